"""Device memory of a program by arithmetic: activations, gradients, gathered weights and caches, in
bytes per device.

No compiler is needed, so the numbers are there at once and for any device. Each term is one kind of
buffer that XLA's memory reports show at the peak. The number of live copies of each buffer was
counted in these reports (benchmarks/results compares them).
"""

from typing import NamedTuple

import jax.numpy as jnp

from pg_ground.config import Model
from pg_ground.parallel.sharding import AnyMesh

KINDS = (
    "parameters", "optimizer", "reference", "rollout weights", "batch", "cache", "activations",
)  # fmt: skip
"""The kinds of memory that a device holds while a program runs.

Gradients and temporaries count as activations.
"""


class Architecture(NamedTuple):
    """The sizes that determine memory."""

    model: Model
    prompt_length: int

    @property
    def image_tokens(self) -> int:
        """Number of image tokens of a prompt."""
        return (self.model.image_size // self.model.vision.patch_size) ** 2

    @property
    def prefix_length(self) -> int:
        """Number of tokens of a prefix."""
        return self.image_tokens + self.prompt_length

    @property
    def activation_bytes(self) -> int:
        """Bytes of one activation."""
        return jnp.dtype(self.model.dtype).itemsize


class DeviceWork(NamedTuple):
    """The work that one device does at a time."""

    prompts: float
    group: int
    tokens: int
    """Number of tokens of a completion."""


def device_work(
    mesh: AnyMesh, questions: int, group: int, tokens: int, parts: int = 1
) -> DeviceWork:
    """Returns a device's share of `questions` that are computed in `parts` parts."""
    return DeviceWork(
        questions / parts / (mesh.shape["replica"] * mesh.shape["data"]), group, tokens
    )


def cache_bytes(architecture: Architecture, mesh: AnyMesh, work: DeviceWork) -> float:
    """Returns the bytes of keys and values: prefixes once per prompt, and completions."""
    text = architecture.model.text
    model_axis = mesh.shape["model"]
    splits = text.num_kv_heads % model_axis == 0
    heads = text.num_kv_heads / model_axis if splits else text.num_kv_heads
    slots = architecture.prefix_length + work.group * work.tokens
    values = text.depth * work.prompts * slots * heads * text.head_dim
    return 2.0 * values * architecture.activation_bytes


def forward_bytes(architecture: Architecture, mesh: AnyMesh, work: DeviceWork) -> float:
    """Returns the bytes of a forward pass without gradients.

    These are the activations of the largest layer, the layer's weights, and logits.
    """
    text, vision = _layer_bytes(architecture, mesh, work, copies=2)
    block = min(work.tokens, architecture.model.logits_block)
    logits = _logits_bytes(architecture, work, block, copies=2)
    return max(text, vision) + _gathered_layer_bytes(architecture, mesh) + logits


def sampling_bytes(
    architecture: Architecture, mesh: AnyMesh, work: DeviceWork, gathered: bool
) -> float:
    """Returns the bytes of sampling without its caches.

    This is the larger of the prefix pass and the logits of one token.
    """
    prefix = max(_layer_bytes(architecture, mesh, work._replace(group=0), copies=2))
    logits = _logits_bytes(architecture, work, 1, copies=4)
    weights = 0.0 if gathered else _gathered_layer_bytes(architecture, mesh)
    return max(prefix, logits) + weights


def learning_bytes(
    architecture: Architecture,
    mesh: AnyMesh,
    work: DeviceWork,
    gradient_bytes: float,
    cast_bytes: float,
) -> float:
    """Returns the bytes of a gradient and its update.

    Args:
      gradient_bytes: a device's share of all gradients that are alive at the same time.
      cast_bytes: a device's share of the parameters whose dtype is not the dtype of activations.
    """
    model = architecture.model
    text, vision = _layer_bytes(architecture, mesh, work, copies=5)
    tokens = architecture.prefix_length + work.group * (work.tokens - 1)
    width = architecture.activation_bytes
    saved_text = model.text.depth * work.prompts * tokens * model.text.width * width
    patches = work.prompts * architecture.image_tokens
    saved_vision = model.vision.depth * patches * model.vision.width * width
    if model.remat == "none":  # all activations of all layers are saved
        saved_text = model.text.depth * text
        saved_vision = model.vision.depth * vision
    cast = cast_bytes * width / jnp.dtype(model.param_dtype).itemsize
    block = min(work.tokens, model.logits_block)
    logits = _logits_bytes(architecture, work, block, copies=3)
    in_decoder = max(text + _gathered_layer_bytes(architecture, mesh), logits)
    in_tower = saved_vision + vision
    return gradient_bytes + cast + max(saved_text + saved_vision + in_decoder, in_tower)


def _layer_bytes(
    architecture: Architecture, mesh: AnyMesh, work: DeviceWork, copies: int
) -> tuple[float, float]:
    """Returns the bytes of one layer's activations in the decoder and in the tower.

    `copies` of the widest activation are alive at the same time.
    """
    model = architecture.model
    model_axis = mesh.shape["model"]
    patches = architecture.image_tokens
    prefix = architecture.prefix_length
    suffix = work.group * max(work.tokens - 1, 1)
    width = architecture.activation_bytes
    mlp_tokens = copies * suffix + max(copies - 2, 2) * prefix
    mlp = mlp_tokens * model.text.mlp_dim * width

    def block_of(queries: int, least: int = 1) -> int:
        block = model.attention_block
        return min(queries, max(block, least) if block else queries)

    pairs = block_of(prefix) * prefix + block_of(suffix, work.group) * (prefix + work.tokens)
    text = work.prompts * (mlp + 1.5 * pairs * model.text.num_heads * 4) / model_axis
    logits = 1.5 * block_of(patches) * patches * model.vision.num_heads * 4
    tower_mlp = copies * patches * model.vision.mlp_dim * width
    return text, work.prompts * (tower_mlp + logits) / model_axis


def _gathered_layer_bytes(architecture: Architecture, mesh: AnyMesh) -> float:
    """Returns the bytes of one layer's gathered matrices, twice.

    One copy is in use. The other copy is in transfer, or it holds gradients.
    """
    text = architecture.model.text
    if mesh.shape["data"] == 1:
        return 0.0
    heads = text.num_heads + text.num_kv_heads
    matrices = text.width * (3 * text.mlp_dim + 2 * heads * text.head_dim)
    return 2.0 * matrices * architecture.activation_bytes / mesh.shape["model"]


def _logits_bytes(architecture: Architecture, work: DeviceWork, tokens: int, copies: int) -> float:
    completions = work.prompts * max(work.group, 1)
    return copies * completions * tokens * architecture.model.text.vocab_size * 4.0

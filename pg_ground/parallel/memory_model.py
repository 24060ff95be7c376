"""What the compiler adds to a program's arguments, by arithmetic: activations, gradients, weights gathered for a layer.

No compiler is asked, so it is known at once and for any device. Each term is one kind of buffer that XLA's reports show at the
peak; how many of each are alive there was counted in these reports (benchmarks/results has the comparison).
"""

from typing import NamedTuple

import jax.numpy as jnp

from pg_ground.config import Config
from pg_ground.parallel.sharding import AnyMesh

KINDS = ("parameters", "optimizer", "reference", "rollout weights", "batch", "cache", "activations")
"""What a device holds while a program runs. Activations are everything the compiler adds, gradients included."""


class Work(NamedTuple):
    """What one device works on at once."""

    prompts: float
    group: int
    tokens: int
    """Of a completion."""


def work(
    config: Config, mesh: AnyMesh, questions: int, group: int, tokens: int, parts: int = 1
) -> Work:
    """Returns a device's share of `questions`, worked through in `parts` parts."""
    return Work(questions / parts / (mesh.shape["replica"] * mesh.shape["data"]), group, tokens)


def image_tokens(config: Config) -> int:
    """Returns the number of image tokens of a prompt."""
    return (config.model.image_size // config.model.vision.patch_size) ** 2


def cache(config: Config, mesh: AnyMesh, w: Work) -> float:
    """Returns the bytes of keys and values of prompts (once each) and completions."""
    text, model = config.model.text, mesh.shape["model"]
    heads = text.num_kv_heads / model if text.num_kv_heads % model == 0 else text.num_kv_heads
    slots = image_tokens(config) + config.data.prompt_length + w.group * w.tokens
    return 2.0 * text.depth * w.prompts * slots * heads * text.head_dim * _width(config)


def forward(config: Config, mesh: AnyMesh, w: Work) -> float:
    """Returns the bytes of one pass without gradients: the largest layer's activations and weights, and logits."""
    text, vision = _layers(config, mesh, w, copies=2)
    return (
        max(text, vision)
        + _weights(config, mesh)
        + _logits(config, w, min(w.tokens, config.model.logits_block), copies=2)
    )


def sampling(config: Config, mesh: AnyMesh, w: Work, gathered: bool) -> float:
    """Returns the bytes of sampling beside its caches: the prefix's pass, then logits of one token and what it is drawn from."""
    prefix = max(_layers(config, mesh, w._replace(group=0), copies=2))
    return max(prefix, _logits(config, w, 1, copies=4)) + (
        0.0 if gathered else _weights(config, mesh)
    )


def learning(
    config: Config, mesh: AnyMesh, w: Work, gradient_bytes: float, cast_bytes: float
) -> float:
    """Returns the bytes of a gradient and its update.

    Args:
      gradient_bytes: of a device's share of the gradients, of all that are alive at once.
      cast_bytes: of those of its parameters whose dtype is not that of activations.
    """
    m = config.model
    text, vision = _layers(config, mesh, w, copies=5)
    prefix = image_tokens(config) + config.data.prompt_length
    kept_text = (
        m.text.depth
        * w.prompts
        * (prefix + w.group * (w.tokens - 1))
        * m.text.width
        * _width(config)
    )
    kept_vision = (
        m.vision.depth * w.prompts * image_tokens(config) * m.vision.width * _width(config)
    )
    if m.remat == "none":  # all of a layer's activations are kept, for all layers
        kept_text, kept_vision = m.text.depth * text, m.vision.depth * vision
    cast = cast_bytes * _width(config) / jnp.dtype(m.param_dtype).itemsize
    vocabulary = _logits(config, w, min(w.tokens, m.logits_block), copies=3)
    at_text = kept_text + kept_vision + max(text + _weights(config, mesh), vocabulary)
    return gradient_bytes + cast + max(at_text, kept_vision + vision)


def _width(config: Config) -> int:
    return jnp.dtype(config.model.dtype).itemsize


def _layers(config: Config, mesh: AnyMesh, w: Work, copies: int) -> tuple[float, float]:
    """Returns the bytes of a layer's activations, of the decoder and of the tower; `copies` of the widest are alive at once."""
    m, model = config.model, mesh.shape["model"]
    patches = image_tokens(config)
    prefix, fed = patches + config.data.prompt_length, w.group * max(w.tokens - 1, 1)
    wide = (copies * fed + max(copies - 2, 2) * prefix) * m.text.mlp_dim * _width(config)

    def at_once(queries: int, least: int = 1) -> int:
        return min(queries, max(m.attention_block, least) if m.attention_block else queries)

    seen = at_once(prefix) * prefix + at_once(fed, w.group) * (prefix + w.tokens)
    text = w.prompts * (wide + 1.5 * seen * m.text.num_heads * 4) / model
    logits = 1.5 * at_once(patches) * patches * m.vision.num_heads * 4
    tower = w.prompts * (copies * patches * m.vision.mlp_dim * _width(config) + logits) / model
    return text, tower


def _weights(config: Config, mesh: AnyMesh) -> float:
    """Returns the bytes of a layer's matrices, gathered: those in use, and those on their way or gradients not yet split."""
    t = config.model.text
    if mesh.shape["data"] == 1:
        return 0.0
    matrices = t.width * (3 * t.mlp_dim + 2 * (t.num_heads + t.num_kv_heads) * t.head_dim)
    return 2.0 * matrices * _width(config) / mesh.shape["model"]


def _logits(config: Config, w: Work, tokens: int, copies: int) -> float:
    return copies * w.prompts * max(w.group, 1) * tokens * config.model.text.vocab_size * 4.0

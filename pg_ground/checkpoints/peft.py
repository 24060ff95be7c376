"""Directories of PEFT adapters: `adapter_config.json` and `adapter_model.safetensors`.

The factors are merged into the matrices of the base model while these are read, as PEFT's
`merge_and_unload` merges them.
"""

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from pg_ground.checkpoints.hugging_face_names import EMBED_TOKENS, HEAD, hub_name
from pg_ground.checkpoints.safetensors_files import HubTensor, Tensor, tensors_of_file
from pg_ground.storage.paths import FilePath, children
from pg_ground.types import JsonDict, UserError, nearest

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"

FACTOR = re.compile(
    r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<part>[AB])(\.(?!bias$)\w+)?$"
)
"""The name of a factor without `.weight`. The name of the adapter can stand at the end."""

WRAPPER = re.compile(r"\.(modules_to_save(\.default)?|base_layer)\.")
"""PEFT's wrapper in the name of a tensor that is trained as a whole."""

UNSUPPORTED = (
    *("use_dora", "fan_in_fan_out", "lora_bias", "layer_replication", "megatron_config"),
    *("alora_invocation_tokens", "trainable_token_indices", "use_qalora", "arrow_config"),
)
"""Settings under which a change of a matrix is not B A, or under which names differ."""

UNCHANGED_BASE = (None, True, False, "gaussian", "eva", "orthogonal")
"""Values of `init_lora_weights` that leave the base as it is. PiSSA, OLoRA and others change it."""

MERGE = "merge it in PEFT (merge_and_unload), then save_pretrained"

logger = logging.getLogger(__name__)


class MergedTensor(NamedTuple):
    """A matrix of the base with a low-rank change: base + scale · B A."""

    base: HubTensor
    down: Tensor
    """A, of shape (rank, inputs); (rank, rows) for an embedding."""
    up: Tensor
    """B, of shape (outputs, rank); (width, rank) for an embedding."""
    scale: float
    is_embedding: bool
    """The change of an embedding is (B A)ᵀ."""

    @property
    def path(self) -> Path:
        return self.base.path

    @property
    def key(self) -> str:
        return self.base.key

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def dtype(self) -> np.dtype:
        """The widest dtype: most changes are smaller than a step of bfloat16."""
        return np.dtype(jnp.result_type(self.base.dtype, self.down.dtype, self.up.dtype))

    def read(self, rows: slice | None = None) -> np.ndarray:
        """Returns all merged values, or some rows. Sums are float32."""
        base = self.base.read(rows).astype(np.float32)
        down, up = (factor.read().astype(np.float32) for factor in (self.down, self.up))
        down, up = down.reshape(len(down), -1), up.reshape(len(up), -1)
        if self.is_embedding:
            down, up = up.T, down.T
        change = (up if rows is None else up[rows]) @ down
        return (base + self.scale * change.reshape(base.shape)).astype(self.dtype)


class Factors(NamedTuple):
    """The two factors of one matrix."""

    down: Tensor
    up: Tensor
    scale: float
    is_embedding: bool


class Adapter(NamedTuple):
    """The tensors of an adapter by the hub's names of the base's tensors."""

    folder: Path
    base: str
    """A path, or a name on the Hub, with `@REVISION` if the adapter states one."""
    factors: Mapping[str, Factors]
    replaced: Mapping[str, Tensor]
    """Tensors that were trained as a whole."""
    is_tied: bool
    """Whether PEFT kept the head tied to an embedding that was trained as a whole."""

    def merge(self, tensors: Mapping[str, HubTensor]) -> dict[str, HubTensor]:
        """Returns the tensors of the base, with the adapter's tensors merged into them.

        Raises:
          UserError: the base lacks a tensor, or it has another shape.
        """
        merged = dict(tensors)
        for name, tensor in self.replaced.items():
            if name not in (EMBED_TOKENS, HEAD):  # a table with other rows is checked later
                self._check_base(name, tensor.key, tensors, tensor.shape)
            merged[name] = tensor
        for name, (down, up, scale, is_embedding) in self.factors.items():
            outputs, inputs = (up.shape[:1], down.shape[1:])
            shape = (*inputs, *outputs) if is_embedding else (*outputs, *inputs)
            self._check_base(name, down.key, merged, shape)
            merged[name] = MergedTensor(merged[name], down, up, scale, is_embedding)
        if EMBED_TOKENS in self.factors:
            logger.warning(
                "%s changes the embedding. The head is tied to it, so it changes too, as in PEFT's "
                "merge_and_unload",
                self.folder,
            )
        elif EMBED_TOKENS in self.replaced and not self.is_tied:
            # PEFT trains a copy of the embedding. The head keeps the values of the base.
            merged.setdefault(HEAD, tensors[EMBED_TOKENS])
        if not self.factors and not self.replaced:
            raise UserError(f"{self.folder} is a PEFT adapter without tensors: nothing to merge")
        ranks = sorted({factors.down.shape[0] for factors in self.factors.values()})
        logger.info(
            "%s: adapter of rank %s merged into %s: %d matrices changed, %d tensors replaced",
            self.folder, "/".join(map(str, ranks)), self.base, len(self.factors),
            len(self.replaced),
        )  # fmt: skip
        return merged

    def _check_base(
        self, name: str, key: str, tensors: Mapping[str, HubTensor], shape: tuple[int, ...]
    ) -> None:
        if name == HEAD:
            raise UserError(
                f"{self.folder}: {key} changes the head, but PaliGemma's head is tied to its "
                "embedding"
            )
        if name not in tensors:
            raise UserError(
                f"{self.folder}: {key} changes {name}, which the base {self.base} lacks; "
                f"{nearest(name, tensors):.200}"
            )
        if tensors[name].shape != shape:
            raise UserError(
                f"{self.folder}: {key} changes a matrix of shape {shape}, but {name} of the base "
                f"{self.base} has {tensors[name].shape}"
            )


def is_adapter(folder: FilePath) -> bool:
    """Returns whether a folder holds an adapter and no model."""
    names = [path.name for path in children(folder)]
    has_model = any(re.fullmatch(r"model.*\.safetensors", name) for name in names)
    return CONFIG_FILE in names and not has_model


def read_config(folder: FilePath) -> JsonDict:
    """Returns the settings of an adapter.

    Raises:
      UserError: the file is no JSON object, or the adapter is not a LoRA of a named base.
    """
    file = folder / CONFIG_FILE
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is not JSON: {error!s:.100}") from None
    kind = settings.get("peft_type") if isinstance(settings, dict) else type(settings).__name__
    if kind != "LORA":
        raise UserError(f"{file}: peft_type is {kind!r:.40}, and only LORA can be read: {MERGE}")
    base = settings.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise UserError(
            f"{file}: base_model_name_or_path is {base!r:.40}, but it must name the base model"
        )
    return settings


def read_adapter(folder: Path) -> Adapter:
    """Returns the adapter of a directory. Values are read later.

    Raises:
      UserError: a file is missing or cannot be read, or the adapter is of a kind that cannot be
        merged.
    """
    settings = read_config(folder)
    _check_kind(folder / CONFIG_FILE, settings)
    file = folder / TENSOR_FILE
    if not file.is_file():
        raise UserError(
            f"{folder} has {CONFIG_FILE} but no {TENSOR_FILE}; only safetensors are read"
        )
    factors: dict[str, dict[str, Tensor]] = {}
    modules: dict[str, str] = {}
    replaced: dict[str, Tensor] = {}
    for tensor in tensors_of_file(file).values():
        key = tensor.key
        match = FACTOR.fullmatch(key.removesuffix(".weight"))
        if match is not None:
            target = hub_name(f"{match['module']}.weight")
            modules[target] = re.sub(r"^base_model\.model\.", "", match["module"])
            part = f"{match['embedding'] or ''}{match['part']}"
            factors.setdefault(target, {})[part] = tensor
        elif "lora_" in key or "trainable_tokens" in key:
            raise UserError(f"{file}: {key} is not a factor A or B of a LoRA: {MERGE}")
        elif ".original_module." not in key:
            replaced[hub_name(WRAPPER.sub(".", key))] = tensor
    pairs = {name: _pair(file, parts, modules[name], settings) for name, parts in factors.items()}
    base = settings["base_model_name_or_path"]
    revision = settings.get("revision")
    if revision:
        base = f"{base}@{revision}"
    is_tied = bool(settings.get("ensure_weight_tying"))
    return Adapter(folder, base, pairs, replaced, is_tied)


def _check_kind(file: Path, settings: JsonDict) -> None:
    """Raises UserError if a setting says that the matrices do not change by scale · B A."""
    for name in UNSUPPORTED:
        if settings.get(name):
            raise UserError(
                f"{file}: {name} is {settings[name]!r:.40}, which cannot be merged here: {MERGE}"
            )
    init = settings.get("init_lora_weights")
    if init not in UNCHANGED_BASE:
        raise UserError(
            f"{file}: init_lora_weights is {init!r:.40}, which changes the base: {MERGE}"
        )


def _pair(file: Path, parts: Mapping[str, Tensor], module: str, settings: JsonDict) -> Factors:
    """Returns the factors of a matrix with their scale."""
    if parts.keys() not in ({"A", "B"}, {"embedding_A", "embedding_B"}):
        names = ", ".join(tensor.key for tensor in parts.values())
        raise UserError(f"{file}: {names} has no partner: a LoRA has A and B for each matrix")
    down, up = (parts[name] for name in sorted(parts))
    rank = down.shape[0]
    expected = _of_module(settings, "rank_pattern", module, settings.get("r", rank))
    if up.shape[1:2] != (rank,) or expected != rank:
        raise UserError(
            f"{file}: {down.key} has the shape {down.shape} and {up.key} {up.shape}, but r of "
            f"{CONFIG_FILE} is {expected!r:.20}"
        )
    alpha = _of_module(settings, "alpha_pattern", module, settings.get("lora_alpha", 8))
    if isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise UserError(f"{file.with_name(CONFIG_FILE)}: lora_alpha is {alpha!r:.40}, no number")
    scale = alpha / rank**0.5 if settings.get("use_rslora") else alpha / rank
    return Factors(down, up, scale, is_embedding="embedding_A" in parts)


def _of_module(settings: JsonDict, name: str, module: str, default: object) -> object:
    """Returns the value of the first pattern that is the end of the name of a module, as in PEFT.

    A pattern is a regular expression. With ^ it is the whole name.
    """
    for pattern, value in (settings.get(name) or {}).items():
        whole = f"{pattern}$" if pattern.startswith("^") else rf"(.*\.)?({pattern})$"
        try:
            if re.match(whole, module):
                return value
        except re.error as error:
            raise UserError(
                f"{CONFIG_FILE}: {name} has the pattern {pattern!r:.60}: {error}"
            ) from None
    return default

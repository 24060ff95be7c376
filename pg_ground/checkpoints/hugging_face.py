"""Reads and writes Hugging Face directories: `config.json` and safetensors, in one file or in
shards.
"""

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from einops import EinopsError, rearrange
from safetensors.numpy import save_file

from pg_ground.checkpoints import vocabulary_rows
from pg_ground.checkpoints.hugging_face_config import (
    FILLER_ROWS,
    HubConfig,
    preprocessor_config,
    read_config,
    to_hub_config,
)
from pg_ground.checkpoints.hugging_face_names import (
    EMBED_TOKENS,
    EMBEDDING,
    HEAD,
    Row,
    table,
)
from pg_ground.checkpoints.peft import TENSOR_FILE, Adapter
from pg_ground.checkpoints.safetensors_files import HubTensor, list_tensors
from pg_ground.checkpoints.tensor_files import (
    BlockIndex,
    StoredTensor,
    block_indices,
    read_whole,
    stack_axes,
)
from pg_ground.config import Model
from pg_ground.types import UserError, first_problems
from pg_ground.vocab import BOS, EOS, PAD

SHARD_BYTES = 5 * 10**9
"""Size of the largest file that is written, as on the hub."""

IGNORED = ("position_ids", "rotary_emb.inv_freq")
"""Ends of the names of buffers that old versions wrote. They are not parameters."""

OF_ADAPTERS = (".base_layer.", "lora_A", "lora_B", "lora_embedding_", "lora_magnitude_vector")
"""Parts of the names of tensors that a PEFT model has before its adapters are merged."""

logger = logging.getLogger(__name__)


def open_directory(
    folder: Path, adapter: Adapter | None = None
) -> tuple[HubConfig, dict[str, StoredTensor]]:
    """Returns the settings and the tensors of a Hugging Face directory, under big_vision's names
    and without filler rows.

    Args:
      adapter: is merged into the tensors while they are read.

    Raises:
      UserError: a file, a layer or a tensor is missing, unknown, cut short, or has another shape
        than in layer 0 (the error lists the first 20), the head is not tied to the embedding, the
        embedding has rows of added tokens, adapters are not merged, or the directory holds both a
        model and an adapter.
    """
    if (folder / TENSOR_FILE).is_file():
        raise UserError(
            f"{folder} holds the weights of a model and of an adapter ({TENSOR_FILE}): move one of "
            "the two to another folder"
        )
    hub = read_config(folder)
    files: dict[str, HubTensor] = {
        name: tensor for name, tensor in list_tensors(folder).items() if not name.endswith(IGNORED)
    }
    _check_merged(folder, files)
    head = _pop_head(folder, files, hub)
    if adapter is not None:
        files = adapter.merge(files)
        head = files.pop(HEAD, head)
    problems: list[str] = []
    tensors: dict[str, StoredTensor] = {}
    used: set[str] = set()
    for row in table(hub.is_gemma2):
        layers = _names_by_layer(row, files)
        names = [name for layer in layers for name in layer]
        used.update(names)
        missing = [name for name in names if name not in files]
        problems += [f"{name}: missing" for name in missing]
        if missing:
            continue
        problems += _other_shapes(names, files)
        try:
            parts = [[files[name] for name in layer] for layer in layers]
            tensors[row.name] = _stored_tensor(row, parts, hub)
        except EinopsError:
            problems.append(_misfit(row, files[names[0]], hub))
    generation = 2 if hub.is_gemma2 else 1
    unknown = sorted(files.keys() - used)
    problems += [f"{name}: not a parameter of a PaliGemma {generation}" for name in unknown]
    if problems:
        raise UserError(
            f"{folder} does not hold a PaliGemma as its config.json describes it: "
            f"{first_problems(problems)}"
        )
    folders = (folder,) if adapter is None else (folder, adapter.folder)
    vocabulary_rows.check_rows(folder, files[EMBED_TOKENS], hub.vocab_size, folders)
    _check_tied(folders[-1], head, files[EMBED_TOKENS])
    return hub, tensors


def _check_merged(folder: Path, tensors: Mapping[str, HubTensor]) -> None:
    """Raises UserError if the tensors belong to a PEFT model whose adapters are not merged."""
    for name, tensor in tensors.items():
        if any(part in name for part in OF_ADAPTERS):
            raise UserError(
                f"{folder} holds a PEFT model whose adapters are not merged ({tensor.key}): "
                "merge_and_unload(), then save_pretrained"
            )


def _pop_head(folder: Path, tensors: dict[str, HubTensor], hub: HubConfig) -> HubTensor | None:
    """Removes the head from `tensors` and returns it.

    If the head is stored and the embedding is not, the head becomes the embedding: safetensors
    stores one of two tensors that share memory.
    """
    head = tensors.pop(HEAD, None)
    if head is None or EMBED_TOKENS in tensors:
        return head
    if not hub.is_tied:
        raise UserError(
            f"{folder} has {head.key} and no embed_tokens.weight, and tie_word_embeddings of its "
            "config.json is false: the embedding is missing"
        )
    logger.info("%s: the embedding is read from %s, its tied copy", folder, head.key)
    tensors[EMBED_TOKENS] = head
    return None


def _names_by_layer(row: Row, tensors: Mapping[str, HubTensor]) -> list[list[str]]:
    """Returns the names of a row's tensors by layer and part.

    The largest layer number of any of them counts, so that a missing tensor of a layer is reported.
    """
    if "{i}" not in row.hub_names[0]:
        return [list(row.hub_names)]
    stem = row.hub_names[0].partition("{i}")[0]
    numbers = (name[len(stem) :].partition(".")[0] for name in tensors if name.startswith(stem))
    # A checkpoint has fewer layers than tensors. This bounds the list if a name has a huge number.
    layers = [
        int(number) for number in numbers if number.isdecimal() and int(number) < len(tensors)
    ]
    count = max(layers, default=0) + 1
    return [[name.format(i=i) for name in row.hub_names] for i in range(count)]


def _other_shapes(names: list[str], tensors: Mapping[str, HubTensor]) -> list[str]:
    """Returns a problem for each tensor of a row that has another shape than in layer 0."""
    expected = tensors[names[0]].shape
    return [
        f"{name}: {tensors[name].shape} in the file, {expected} in layer 0"
        for name in names
        if tensors[name].shape != expected
    ]


def _misfit(row: Row, tensor: HubTensor, hub: HubConfig) -> str:
    """Returns the problem that a row's pattern does not fit the shape of its tensor."""
    heads = "".join(
        f"heads of config.json ({count}) or the " for count in _head_counts(row, hub).values()
    )
    return (
        f"{tensor.key}: {tensor.shape} in the file, "
        f"which the {heads}pattern {row.pattern!r} does not fit"
    )


def _head_counts(row: Row, hub: HubConfig) -> dict[str, int]:
    """Returns the number of heads for a row's pattern, which its shape alone does not tell."""
    if "(n h)" not in row.pattern:
        return {}
    if row.name.startswith("img/"):
        return {"n": hub.vision_heads}
    return {"n": hub.kv_heads if row.name.endswith("kv_einsum/w") else hub.heads}


def _stored_tensor(row: Row, layers: list[list[HubTensor]], hub: HubConfig) -> StoredTensor:
    """Returns the big_vision tensor that one row of the table makes of the tensors of all layers
    and parts.
    """
    first = layers[0][0]
    if row.name == EMBEDDING:
        return _stored_embedding(first, hub)
    sizes = _head_counts(row, hub)
    stacked = stack_axes(row.name)
    placeholder = np.broadcast_to(np.int8(0), first.shape)
    shape = rearrange(placeholder, row.pattern, **sizes).shape

    def blocks() -> Iterator[tuple[BlockIndex, np.ndarray]]:
        for i, parts in enumerate(layers):
            for j, tensor in enumerate(parts):
                yield (i, j)[:stacked], rearrange(tensor.read(), row.pattern, **sizes)

    stack_shape = (len(layers), len(layers[0]))[:stacked]
    dtypes = {tensor.dtype for parts in layers for tensor in parts}
    dtype = first.dtype if len(dtypes) == 1 else np.dtype(np.float32)
    return StoredTensor((*stack_shape, *shape), dtype, blocks)


def _stored_embedding(tensor: HubTensor, hub: HubConfig) -> StoredTensor:
    """Returns the embedding table without its filler rows."""
    rows, width = tensor.shape
    vocab_size = rows - FILLER_ROWS if hub.vocab_size is None else hub.vocab_size
    shape = (min(vocab_size, rows), width)  # a plain Gemma's table has fewer rows

    def blocks() -> Iterator[tuple[BlockIndex, np.ndarray]]:
        for index, _ in block_indices(EMBEDDING, shape, tensor.dtype.itemsize):
            part = index[0]
            assert isinstance(part, slice)
            yield index, tensor.read(part)

    return StoredTensor(shape, tensor.dtype, blocks)


def _check_tied(folder: Path, head: HubTensor | None, embedding: HubTensor) -> None:
    """Raises UserError if there is a head that differs from the embedding."""
    if head is None:
        return
    if head.shape != embedding.shape:
        raise UserError(
            f"{folder}: {head.key} has the shape {head.shape}, and {embedding.key} "
            f"{embedding.shape}: PaliGemma's head is tied to its embedding"
        )
    # NaN equals NaN here: the check of finite values names the array.
    is_tied = all(
        np.array_equal(head.read(part), embedding.read(part), equal_nan=True)
        for (part,), _ in block_indices("", head.shape, head.dtype.itemsize)
        if isinstance(part, slice)
    )
    if not is_tied:
        raise UserError(
            f"{folder}: the head ({head.key} of {head.path.name}) differs from the embedding "
            f"({embedding.key} of {embedding.path.name}): PaliGemma's head is tied to its embedding"
        )


def save_directory(
    folder: Path, model: Model, tensors: Mapping[str, StoredTensor], dtype: str
) -> None:
    """Writes a Hugging Face directory that transformers loads and that computes what `model`
    computes.

    The 64 filler rows of the embedding are the mean of the other rows. Their logits are then never
    the largest, so a greedy `generate` never draws them. At most `SHARD_BYTES` are in memory at a
    time.

    Args:
      dtype: dtype of all tensors; "" keeps their dtypes.
    """
    settings = to_hub_config(model, dtype or _common_dtype(tensors))
    folder.mkdir(parents=True)
    shards, total_bytes = _save_shards(folder, model, tensors, dtype)
    names = ["model.safetensors"]
    if len(shards) > 1:
        count = len(shards)
        names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
        weight_map = {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
        index = {
            "metadata": {"total_size": total_bytes},
            "weight_map": dict(sorted(weight_map.items())),
        }
        _write_json(folder / "model.safetensors.index.json", index)
    for i, name in enumerate(names):
        (folder / f"part-{i}").rename(folder / name)
        (folder / name).chmod(0o644)  # safetensors writes files that only their owner can read
    _write_json(folder / "config.json", settings)
    generation = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
    _write_json(folder / "generation_config.json", generation)
    _write_json(folder / "preprocessor_config.json", preprocessor_config(model))


def _save_shards(
    folder: Path, model: Model, tensors: Mapping[str, StoredTensor], dtype: str
) -> tuple[list[list[str]], int]:
    """Writes `folder/part-0`, `folder/part-1`, …

    Returns the names of the tensors in each file, and the bytes of all tensors.
    """
    shard: dict[str, np.ndarray] = {}
    shards: list[list[str]] = []
    total_bytes = 0

    def flush() -> None:
        if shard:
            save_file(shard, folder / f"part-{len(shards)}", metadata={"format": "pt"})
            shards.append(list(shard))
            shard.clear()

    for name, array in _hub_tensors(model, tensors):
        array = np.ascontiguousarray(array.astype(dtype or array.dtype, copy=False))
        if sum(other.nbytes for other in shard.values()) + array.nbytes > SHARD_BYTES:
            flush()
        shard[name] = array
        total_bytes += array.nbytes
    flush()
    return shards, total_bytes


def _common_dtype(tensors: Mapping[str, StoredTensor]) -> str:
    """Returns the dtype of all tensors, or float32 if their dtypes differ."""
    dtypes = {tensor.dtype.name for tensor in tensors.values()}
    return dtypes.pop() if len(dtypes) == 1 else "float32"


def _hub_tensors(
    model: Model, tensors: Mapping[str, StoredTensor]
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the tensors of a Hugging Face directory by name, one layer (and part) at a time."""
    for row in table(model.text.post_norms):
        tensor = tensors[row.name]
        if row.name == EMBEDDING:
            rows = read_whole(tensor)
            mean = np.mean(rows, axis=0, dtype=np.float32).astype(rows.dtype)
            filler = np.broadcast_to(mean, (FILLER_ROWS, rows.shape[1]))
            yield row.hub_names[0], np.concatenate([rows, filler])
            continue
        hub_axes, _, axes = row.pattern.partition(" -> ")
        is_stack = stack_axes(row.name)
        blocks = tensor.blocks() if is_stack else iter([((0,), read_whole(tensor))])
        for index, block in blocks:
            i, j = (*index, 0)[:2]
            assert isinstance(i, int) and isinstance(j, int)
            yield row.hub_names[j].format(i=i), rearrange(block, f"{axes} -> {hub_axes}")


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")

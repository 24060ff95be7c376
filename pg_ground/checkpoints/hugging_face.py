"""Hugging Face directories (`config.json`, safetensors in one file or in shards) in both directions, by one table of names.

Three spellings of the names are read: the hub's, the one in memory since transformers 5, and the mix that its `save_pretrained`
writes. The hub's is written, which all versions read.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from einops import EinopsError, rearrange
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from pg_ground.checkpoints.tensor_files import Stored, Where, stack_axes, wheres, whole
from pg_ground.config import Model
from pg_ground.types import UserError
from pg_ground.vocab import BOS, EOS, PAD

FILLER_ROWS = 64
"""Rows that Hugging Face's embedding has beyond the vocabulary: `<image>` and padding."""

SHARD_BYTES = 5 * 10**9
"""Largest file written, as on the hub."""


class Row(NamedTuple):
    """One parameter in both worlds."""

    ours: str
    theirs: tuple[str, ...]
    """Names in the hub's spelling; {i} counts layers. Two of them are two parts of one of ours."""
    pattern: str
    """einops: axes of (one layer and part of) theirs -> axes of ours."""


VISION, TEXT = "vision_tower.vision_model.", "language_model.model."


def _norm(ours: str, theirs: str) -> tuple[Row, ...]:
    return (
        Row(f"{ours}/scale", (f"{theirs}.weight",), "d -> d"),
        Row(f"{ours}/bias", (f"{theirs}.bias",), "d -> d"),
    )


def _tower() -> tuple[Row, ...]:
    block, layer = "img/Transformer/encoderblock/", VISION + "encoder.layers.{i}."
    attention = block + "MultiHeadDotProductAttention_0/"
    embedding, position = (
        VISION + "embeddings.patch_embedding",
        VISION + "embeddings.position_embedding",
    )
    projector = "multi_modal_projector.linear"
    rows = [
        Row("img/embedding/kernel", (f"{embedding}.weight",), "d c h w -> h w c d"),
        Row("img/embedding/bias", (f"{embedding}.bias",), "d -> d"),
        Row("img/pos_embedding", (f"{position}.weight",), "p d -> 1 p d"),
        *_norm(block + "LayerNorm_0", layer + "layer_norm1"),
        *_norm(block + "LayerNorm_1", layer + "layer_norm2"),
    ]
    for ours, theirs in (("Dense_0", "fc1"), ("Dense_1", "fc2")):
        rows.append(
            Row(f"{block}MlpBlock_0/{ours}/kernel", (f"{layer}mlp.{theirs}.weight",), "o i -> i o")
        )
        rows.append(Row(f"{block}MlpBlock_0/{ours}/bias", (f"{layer}mlp.{theirs}.bias",), "o -> o"))
    for ours, theirs in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
        rows.append(
            Row(
                f"{attention}{ours}/kernel",
                (f"{layer}self_attn.{theirs}.weight",),
                "(n h) d -> d n h",
            )
        )
        rows.append(
            Row(f"{attention}{ours}/bias", (f"{layer}self_attn.{theirs}.bias",), "(n h) -> n h")
        )
    return (
        *rows,
        Row(f"{attention}out/kernel", (f"{layer}self_attn.out_proj.weight",), "d (n h) -> n h d"),
        Row(f"{attention}out/bias", (f"{layer}self_attn.out_proj.bias",), "d -> d"),
        *_norm("img/Transformer/encoder_norm", VISION + "post_layernorm"),
        Row("img/head/kernel", (f"{projector}.weight",), "o i -> i o"),
        Row("img/head/bias", (f"{projector}.bias",), "o -> o"),
    )


def _decoder(gemma2: bool) -> tuple[Row, ...]:
    """Returns the rows of a decoder; `post_attention_layernorm` is another norm in Gemma 1 than in Gemma 2."""
    block, layer = "llm/layers/", TEXT + "layers.{i}."
    norms = (
        {
            "post_attention_norm": "post_attention_layernorm",
            "pre_ffw_norm": "pre_feedforward_layernorm",
            "post_ffw_norm": "post_feedforward_layernorm",
        }
        if gemma2
        else {"pre_ffw_norm": "post_attention_layernorm"}
    )
    heads = "(n h) d -> n d h"
    return (
        Row("llm/embedder/input_embedding", (f"{TEXT}embed_tokens.weight",), "v d -> v d"),
        Row(f"{block}attn/q_einsum/w", (f"{layer}self_attn.q_proj.weight",), heads),
        Row(
            f"{block}attn/kv_einsum/w",
            tuple(f"{layer}self_attn.{part}_proj.weight" for part in "kv"),
            heads,
        ),
        Row(
            f"{block}attn/attn_vec_einsum/w",
            (f"{layer}self_attn.o_proj.weight",),
            "d (n h) -> n h d",
        ),
        Row(
            f"{block}mlp/gating_einsum",
            tuple(f"{layer}mlp.{part}_proj.weight" for part in ("gate", "up")),
            "o i -> i o",
        ),
        Row(f"{block}mlp/linear", (f"{layer}mlp.down_proj.weight",), "o i -> i o"),
        Row(f"{block}pre_attention_norm/scale", (layer + "input_layernorm.weight",), "d -> d"),
        *(
            Row(f"{block}{ours}/scale", (f"{layer}{theirs}.weight",), "d -> d")
            for ours, theirs in norms.items()
        ),
        Row("llm/final_norm/scale", (f"{TEXT}norm.weight",), "d -> d"),
    )


def table(gemma2: bool) -> tuple[Row, ...]:
    """Returns every parameter of PaliGemma 1 or 2 in both worlds."""
    return (*_tower(), *_decoder(gemma2))


class HubConfig(NamedTuple):
    """What `config.json` says and tensors don't."""

    gemma2: bool
    vision_heads: int
    heads: int
    kv_heads: int
    query_scale: float
    attn_softcap: float
    final_softcap: float
    vocab_size: int | None
    """Without the filler rows; None if it is not said."""


def read_config(folder: Path) -> HubConfig:
    """Returns what a directory's `config.json` says; what it omits has the value that transformers would give it.

    Raises:
      UserError: no such file, not that of a PaliGemma, or of one that is computed in another way than the published ones.
    """
    path = folder / "config.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; a Hugging Face directory has one") from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(found, dict) or found.get("model_type") != "paligemma":
        kind = found.get("model_type") if isinstance(found, dict) else type(found).__name__
        raise UserError(f"{path}: model_type is {kind!r}, but 'paligemma' is wanted")
    # what transformers assumes of a PaliGemma without the section, and of a section without the name, differs
    text = _section(
        path, found, "text_config", {"num_attention_heads": 8, "num_key_value_heads": 1}
    )
    vision = _section(path, found, "vision_config", {"num_attention_heads": 16})
    kind = text.get("model_type", "gemma")
    if kind not in ("gemma", "gemma2"):
        raise UserError(
            f"{path}: text_config.model_type is {kind!r}: a PaliGemma has gemma or gemma2"
        )
    gemma2 = kind == "gemma2"
    rope = text.get("rope_parameters") or text
    fixed = (
        ("rope_theta", rope.get("rope_theta", 1e4), 1e4),
        ("rms_norm_eps", text.get("rms_norm_eps", 1e-6), 1e-6),
    )
    for name, value, right in fixed:
        if value != right:
            raise UserError(
                f"{path}: text_config.{name} is {value!r}, but every PaliGemma has {right:g}"
            )

    def number(name: str, value: Any, kind: type = int) -> Any:
        if isinstance(value, bool) or not isinstance(value, (int, kind)) or value <= 0:
            raise UserError(f"{path}: {name} is {value!r}, but it must be a number above 0")
        return value

    def cap(name: str, default: float) -> float:
        value = text.get(name, default) if gemma2 else None
        return float(number(name, value, float)) if value else 0.0

    head_dim = number("head_dim", text.get("head_dim", 256))
    scalar = (
        number("query_pre_attn_scalar", text.get("query_pre_attn_scalar", 256), float)
        if gemma2
        else head_dim
    )
    vocab_size = found.get("image_token_index", found.get("image_token_id"))
    return HubConfig(
        gemma2=gemma2,
        vision_heads=number("num_attention_heads", vision.get("num_attention_heads", 12)),
        heads=number("num_attention_heads", text.get("num_attention_heads", 8 if gemma2 else 16)),
        kv_heads=number(
            "num_key_value_heads", text.get("num_key_value_heads", 4 if gemma2 else 16)
        ),
        query_scale=scalar**-0.5,
        attn_softcap=cap("attn_logit_softcapping", 50.0),
        final_softcap=cap("final_logit_softcapping", 30.0),
        vocab_size=None if vocab_size is None else number("image_token_index", vocab_size),
    )


def _section(
    path: Path, found: dict[str, Any], name: str, default: dict[str, Any]
) -> dict[str, Any]:
    section = found.get(name, default)
    if not isinstance(section, dict):
        raise UserError(f"{path}: {name} is {section!r:.60}, but it must be an object")
    return section


def hub_name(name: str) -> str:
    """Returns the hub's spelling of a tensor's name in any of the three."""
    name = name.removeprefix("model.")
    if name == "lm_head.weight":
        return "language_model.lm_head.weight"
    for stem, inner in (("vision_tower.", "vision_model."), ("language_model.", "model.")):
        rest = name.removeprefix(stem)
        if rest != name and not rest.startswith((inner, "lm_head.")):
            return stem + inner + rest
    return name


class Tensor(NamedTuple):
    """One tensor of a safetensors file."""

    path: Path
    key: str
    shape: tuple[int, ...]
    dtype: np.dtype

    def read(self, rows: slice | None = None) -> np.ndarray:
        """Returns the tensor, or some of its rows. The file is opened anew, so that what was read before can be forgotten."""
        try:
            with safe_open(self.path, framework="numpy") as file:
                return file.get_tensor(self.key) if rows is None else file.get_slice(self.key)[rows]
        except (SafetensorError, OSError) as error:
            raise UserError(f"{self.path}: {self.key} cannot be read: {error}") from None


DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}


def _tensors(folder: Path) -> dict[str, Tensor]:
    """Returns the tensors of a directory by their names in the hub's spelling."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        try:
            listed: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            files = {
                str(file): [name for name in listed if listed[name] == file]
                for file in sorted(set(listed.values()))
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{index} is no index of safetensors files: {type(error).__name__}: {error}"
            ) from None
    elif single.is_file():
        files = {single.name: []}
    else:
        raise UserError(f"{folder} has neither model.safetensors nor model.safetensors.index.json")
    found: dict[str, Tensor] = {}
    for file, names in files.items():
        path = folder / file
        if not path.is_file():
            raise UserError(
                f"{path} does not exist, but {index.name} says that it holds {names[0]} and {len(names) - 1} more"
            )
        try:
            with safe_open(path, framework="numpy") as opened:
                for key in opened.keys():  # noqa: SIM118 (it is no dict)
                    part = opened.get_slice(key)
                    if part.get_dtype() not in DTYPES:
                        raise UserError(
                            f"{path}: {key} has dtype {part.get_dtype()}, not one of {', '.join(DTYPES)}"
                        )
                    found[hub_name(key)] = Tensor(
                        path, key, tuple(part.get_shape()), np.dtype(DTYPES[part.get_dtype()])
                    )
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} cannot be read as safetensors: {error}") from None
        lost = [name for name in names if hub_name(name) not in found]
        if lost:
            raise UserError(f"{path} lacks {', '.join(lost)}, which {index.name} says it holds")
    return found


IGNORED = ("position_ids", "rotary_emb.inv_freq")
"""Ends of names of buffers that old versions wrote and that are no parameters."""


def open_directory(folder: Path) -> tuple[HubConfig, dict[str, Stored]]:
    """Returns what `config.json` says, and the tensors of a Hugging Face directory under our names, filler rows cut.

    Raises:
      UserError: a file, a layer or a tensor is missing, unknown, cut short or of another shape than its like (all such names
        are listed), or the head is not tied to the embedding.
    """
    c = read_config(folder)
    found = {
        name: tensor for name, tensor in _tensors(folder).items() if not name.endswith(IGNORED)
    }
    head = found.pop("language_model.lm_head.weight", None)
    wrong: list[str] = []
    tensors: dict[str, Stored] = {}
    used: set[str] = set()
    for row in table(c.gemma2):
        names = _layers(row, found)
        used.update(name for layer in names for name in layer)
        lost = [name for layer in names for name in layer if name not in found]
        wrong += [f"{name}: missing" for name in lost]
        if lost:
            continue
        first = found[names[0][0]]
        wrong += [
            f"{name}: {found[name].shape} in the file, {first.shape} in layer 0"
            for layer in names
            for name in layer
            if found[name].shape != first.shape
        ]
        try:
            tensors[row.ours] = _stored(
                row, [[found[name] for name in layer] for layer in names], c
            )
        except EinopsError:
            heads = "".join(
                f"heads of config.json ({count}) or the " for count in _heads(row, c).values()
            )
            wrong.append(
                f"{first.key}: {first.shape} in the file, which the {heads}pattern {row.pattern!r} does not fit"
            )
    wrong += [
        f"{name}: not a parameter of a PaliGemma {2 if c.gemma2 else 1}"
        for name in sorted(found.keys() - used)
    ]
    if wrong:
        raise UserError(
            f"{folder} does not hold a PaliGemma as its config.json describes it: {'; '.join(wrong)}"
        )
    _check_tied(folder, head, found[f"{TEXT}embed_tokens.weight"])
    return c, tensors


def _layers(row: Row, found: Mapping[str, Tensor]) -> list[list[str]]:
    """Returns the names of a row's tensors by layer and part; those of layers that exist in part only are among them."""
    if "{i}" not in row.theirs[0]:
        return [list(row.theirs)]
    stem = row.theirs[0].partition("{i}")[0]
    numbers = (name[len(stem) :].partition(".")[0] for name in found if name.startswith(stem))
    layers = [int(number) for number in numbers if number.isdecimal() and int(number) < len(found)]
    return [[name.format(i=i) for name in row.theirs] for i in range(max(layers, default=0) + 1)]


def _heads(row: Row, c: HubConfig) -> dict[str, int]:
    """Returns the axes of a row's pattern that its shape alone does not tell."""
    if "(n h)" not in row.pattern:
        return {}
    if row.ours.startswith("img/"):
        return {"n": c.vision_heads}
    return {"n": c.kv_heads if row.ours.endswith("kv_einsum/w") else c.heads}


def _stored(row: Row, layers: list[list[Tensor]], c: HubConfig) -> Stored:
    """Returns the tensor of ours that one row of the table makes of theirs."""
    first, sizes, stacked = layers[0][0], _heads(row, c), stack_axes(row.ours)
    shape = rearrange(np.broadcast_to(np.int8(0), first.shape), row.pattern, **sizes).shape
    if row.ours == "llm/embedder/input_embedding":
        kept = min(
            first.shape[0] - FILLER_ROWS if c.vocab_size is None else c.vocab_size, first.shape[0]
        )
        shape = (kept, first.shape[1])

        def rows() -> Iterator[tuple[Where, np.ndarray]]:
            for where, _ in wheres(row.ours, shape, first.dtype.itemsize):
                part = where[0]
                assert isinstance(part, slice)
                yield where, first.read(part)

        return Stored(shape, first.dtype, rows)

    def blocks() -> Iterator[tuple[Where, np.ndarray]]:
        for i, parts in enumerate(layers):
            for j, tensor in enumerate(parts):
                yield (i, j)[:stacked], rearrange(tensor.read(), row.pattern, **sizes)

    lead = (len(layers), len(layers[0]))[:stacked]
    kinds = {tensor.dtype for parts in layers for tensor in parts}
    return Stored((*lead, *shape), first.dtype if len(kinds) == 1 else np.dtype(np.float32), blocks)


def _check_tied(folder: Path, head: Tensor | None, embedding: Tensor) -> None:
    """Raises UserError if there is a head that is not the embedding over again."""
    if head is None:
        return
    tied = head.shape == embedding.shape and all(
        np.array_equal(head.read(part), embedding.read(part))
        for (part,), _ in wheres("", head.shape, head.dtype.itemsize)
        if isinstance(part, slice)
    )
    if not tied:
        raise UserError(
            f"{folder}: {head.key} is not the embedding over again: PaliGemma's head is tied to it"
        )


def save_directory(folder: Path, model: Model, tensors: Mapping[str, Stored], dtype: str) -> None:
    """Writes a Hugging Face directory that transformers loads and that computes what `model` computes.

    The 64 filler rows of the embedding are the mean of the others: their logits then never exceed the largest, so that no
    `generate` draws one greedily. `dtype` "" keeps each tensor's own. One shard of at most `SHARD_BYTES` is held at a time.
    """
    settings = hub_config(model, dtype or _common(tensors))
    folder.mkdir(parents=True)
    shard: dict[str, np.ndarray] = {}
    files: list[list[str]] = []
    total = 0

    def flush() -> None:
        if shard:
            save_file(shard, folder / f"part-{len(files)}", metadata={"format": "pt"})
            files.append(list(shard))
            shard.clear()

    for name, array in _theirs(model, tensors):
        array = np.ascontiguousarray(array.astype(dtype or array.dtype, copy=False))
        if sum(held.nbytes for held in shard.values()) + array.nbytes > SHARD_BYTES:
            flush()
        shard[name] = array
        total += array.nbytes
    flush()
    names = ["model.safetensors"]
    if len(files) > 1:
        names = [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
        weight_map = {name: file for file, held in zip(names, files, strict=True) for name in held}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        _write_json(folder / "model.safetensors.index.json", index)
    for i, name in enumerate(names):
        (folder / f"part-{i}").rename(folder / name)
        (folder / name).chmod(0o644)  # the library writes files that only their owner may read
    _write_json(folder / "config.json", settings)
    _write_json(
        folder / "generation_config.json",
        {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD},
    )
    _write_json(folder / "preprocessor_config.json", preprocessor_config(model))


def _common(tensors: Mapping[str, Stored]) -> str:
    """Returns the dtype of all tensors, float32 if they have several."""
    kinds = {tensor.dtype.name for tensor in tensors.values()}
    return kinds.pop() if len(kinds) == 1 else "float32"


def _theirs(model: Model, tensors: Mapping[str, Stored]) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the tensors of a Hugging Face directory, one layer (and part) at a time."""
    for row in table(model.text.post_norms):
        theirs, _, ours = row.pattern.partition(" -> ")
        tensor = tensors[row.ours]
        if row.ours == "llm/embedder/input_embedding":
            rows = whole(tensor)
            filler = np.mean(rows, axis=0, dtype=np.float32).astype(rows.dtype)
            yield (
                row.theirs[0],
                np.concatenate([rows, np.broadcast_to(filler, (FILLER_ROWS, rows.shape[1]))]),
            )
            continue
        blocks = tensor.blocks() if stack_axes(row.ours) else iter([((0,), whole(tensor))])
        for where, block in blocks:
            i, j = (*where, 0)[:2]
            assert isinstance(i, int) and isinstance(j, int)
            yield row.theirs[j].format(i=i), rearrange(block, f"{ours} -> {theirs}")


def hub_config(model: Model, dtype: str) -> dict[str, Any]:
    """Returns the `config.json` of a model: attention sees everything in every layer, and the final soft-cap is ours.

    Raises:
      UserError: a Gemma 1 whose queries or logits are scaled as only Gemma 2's can be.
    """
    text, vision = model.text, model.vision
    odd = [name for name in ("attn_softcap", "final_softcap") if getattr(text, name)]
    odd += ["query_scale"] if abs(text.attention_scale * text.head_dim**0.5 - 1) > 1e-6 else []
    if odd and not text.post_norms:
        raise UserError(
            f"a Hugging Face Gemma 1 has no {', '.join(odd)} of its own: model.text.{odd[0]} cannot be written"
        )
    decoder: dict[str, Any] = {
        "model_type": "gemma",
        "hidden_size": text.width,
        "intermediate_size": text.mlp_dim,
        "num_hidden_layers": text.depth,
        "num_attention_heads": text.num_heads,
        "num_key_value_heads": text.num_kv_heads,
        "head_dim": text.head_dim,
        "vocab_size": text.vocab_size + FILLER_ROWS,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": 8192,
        "num_image_tokens": (model.image_size // vision.patch_size) ** 2,
        "torch_dtype": dtype,
    }
    if text.post_norms:
        scalar = text.attention_scale**-2
        decoder |= {
            "model_type": "gemma2",
            "query_pre_attn_scalar": round(scalar)
            if abs(scalar - round(scalar)) < 1e-6
            else scalar,
            "attn_logit_softcapping": text.attn_softcap or None,
            "final_logit_softcapping": text.final_softcap or None,
            # all of PaliGemma 2 was trained without Gemma 2's sliding window, which 896 pixels would outgrow
            "layer_types": ["full_attention"] * text.depth,
            "sliding_window": 8192,
        }
    return {
        "architectures": ["PaliGemmaForConditionalGeneration"],
        "model_type": "paligemma",
        "image_token_index": text.vocab_size,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "hidden_size": text.width,
        "projection_dim": text.width,
        "tie_word_embeddings": True,
        "torch_dtype": dtype,
        "vocab_size": text.vocab_size,
        "text_config": decoder,
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": vision.width,
            "intermediate_size": vision.mlp_dim,
            "num_hidden_layers": vision.depth,
            "num_attention_heads": vision.num_heads,
            "image_size": model.image_size,
            "patch_size": vision.patch_size,
            "projection_dim": text.width,
            "hidden_act": "gelu_pytorch_tanh",
            "layer_norm_eps": 1e-6,
            "vision_use_head": False,
            "torch_dtype": dtype,
        },
    }


def preprocessor_config(model: Model) -> dict[str, Any]:
    """Returns the `preprocessor_config.json` of a model: a square image in [-1, 1]."""
    return {
        "image_processor_type": "SiglipImageProcessor",
        "processor_class": "PaliGemmaProcessor",
        "image_seq_length": (model.image_size // model.vision.patch_size) ** 2,
        "size": {"height": model.image_size, "width": model.image_size},
        "do_resize": True,
        "resample": 2,  # bilinear, as this package resizes
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")

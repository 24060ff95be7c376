"""`config.json` and `preprocessor_config.json` of Hugging Face directories, in both directions."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from pg_ground.config import Model, Text, Vision
from pg_ground.storage.paths import FilePath
from pg_ground.types import JsonDict, UserError
from pg_ground.vocab import BOS, EOS, PAD

FILLER_ROWS = 64
"""Rows of Hugging Face's embedding beyond the vocabulary: `<image>` and padding."""


class HubConfig(NamedTuple):
    """The settings of `config.json` that tensors do not tell."""

    is_gemma2: bool
    vision_heads: int
    heads: int
    kv_heads: int
    query_scale: float
    attn_softcap: float
    final_softcap: float
    vocab_size: int | None
    """Without the filler rows; None if `config.json` does not say it."""
    is_tied: bool = True
    """Whether the head shares the memory of the embedding."""


def read_config(folder: Path) -> HubConfig:
    """Returns the settings of a directory's `config.json`.

    Absent settings have the defaults of transformers.

    Raises:
      UserError: the file does not exist, does not belong to a PaliGemma, or has a constant that no
        published PaliGemma has.
    """
    return read_config_file(folder / "config.json")


def read_config_file(path: FilePath) -> HubConfig:
    """Returns the settings of a `config.json` at any path, as `read_config` does."""
    settings = _read_paligemma(path)
    _check_float(path, settings)
    # transformers has other defaults for a missing section than for a missing name in a section
    text_default = {"num_attention_heads": 8, "num_key_value_heads": 1}
    text = _section(path, settings, "text_config", text_default)
    vision = _section(path, settings, "vision_config", {"num_attention_heads": 16})
    decoder = text.get("model_type", "gemma")
    if decoder not in ("gemma", "gemma2"):
        raise UserError(
            f"{path}: text_config.model_type is {decoder!r}: a PaliGemma has gemma or gemma2"
        )
    is_gemma2 = decoder == "gemma2"
    _check_constants(path, text)

    def count(section: JsonDict, name: str, default: int) -> int:
        return _positive(path, name, section.get(name, default), int)

    def softcap(name: str, default: float) -> float:
        value = text.get(name, default) if is_gemma2 else None
        return float(_positive(path, name, value, float)) if value else 0.0

    head_dim = count(text, "head_dim", 256)
    scalar = head_dim
    if is_gemma2:
        name = "query_pre_attn_scalar"
        scalar = _positive(path, name, text.get(name, 256), float)
    vocab_size = settings.get("image_token_index", settings.get("image_token_id"))
    if vocab_size is not None:
        vocab_size = _positive(path, "image_token_index", vocab_size, int)
    return HubConfig(
        is_gemma2=is_gemma2,
        vision_heads=count(vision, "num_attention_heads", 12),
        heads=count(text, "num_attention_heads", 8 if is_gemma2 else 16),
        kv_heads=count(text, "num_key_value_heads", 4 if is_gemma2 else 16),
        query_scale=scalar**-0.5,
        attn_softcap=softcap("attn_logit_softcapping", 50.0),
        final_softcap=softcap("final_logit_softcapping", 30.0),
        vocab_size=vocab_size,
        is_tied=False not in (settings.get("tie_word_embeddings"), text.get("tie_word_embeddings")),
    )


def _check_float(path: FilePath, settings: JsonDict) -> None:
    """Raises UserError if the matrices are quantised."""
    quantization = settings.get("quantization_config")
    if not quantization:
        return
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    raise UserError(
        f"{path.parent} is quantised ({method!s:.40}), and only float tensors are read: load it in "
        "transformers, dequantize(), then save_pretrained; or take the directory it was made from"
    )


def _read_paligemma(path: FilePath) -> JsonDict:
    """Returns the content of a `config.json`. Raises UserError if its model is not a PaliGemma."""
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{path}: {error.strerror}; a Hugging Face directory has this file"
        ) from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    is_object = isinstance(settings, dict)
    model_type = settings.get("model_type") if is_object else type(settings).__name__
    if not is_object or model_type != "paligemma":
        raise UserError(f"{path}: model_type is {model_type!r}, but it must be 'paligemma'")
    return settings


def _section(path: FilePath, settings: JsonDict, name: str, default: JsonDict) -> JsonDict:
    section = settings.get(name, default)
    if not isinstance(section, dict):
        raise UserError(f"{path}: {name} is {section!r:.60}, but it must be an object")
    return section


def _check_constants(path: FilePath, text: JsonDict) -> None:
    """Raises UserError if RoPE or the norms differ from the constants that every PaliGemma has."""
    rope = text.get("rope_parameters") or text
    constants = (
        ("rope_theta", rope.get("rope_theta", 1e4), 1e4),
        ("rms_norm_eps", text.get("rms_norm_eps", 1e-6), 1e-6),
    )
    for name, value, expected in constants:
        if value != expected:
            raise UserError(
                f"{path}: text_config.{name} is {value!r}, but every PaliGemma has {expected:g}"
            )


def _positive(path: FilePath, name: str, value: Any, number: type) -> Any:
    """Returns `value`.

    Raises UserError if it is not a number above 0 (a whole number if `number` is int).
    """
    if isinstance(value, bool) or not isinstance(value, (int, number)) or value <= 0:
        raise UserError(f"{path}: {name} is {value!r}, but it must be a number above 0")
    return value


def to_hub_config(model: Model, dtype: str) -> JsonDict:
    """Returns the `config.json` of a model.

    Every layer has full attention, and the final soft-cap is the model's.

    Raises:
      UserError: the model is a Gemma 1 that scales queries or logits as only Gemma 2 can.
    """
    return {
        "architectures": ["PaliGemmaForConditionalGeneration"],
        "model_type": "paligemma",
        "image_token_index": model.text.vocab_size,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "hidden_size": model.text.width,
        "projection_dim": model.text.width,
        "tie_word_embeddings": True,
        "torch_dtype": dtype,
        "vocab_size": model.text.vocab_size,
        "text_config": _text_config(model, dtype),
        "vision_config": _vision_config(model, dtype),
    }


def _text_config(model: Model, dtype: str) -> JsonDict:
    text = model.text
    decoder: JsonDict = {
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
        "num_image_tokens": (model.image_size // model.vision.patch_size) ** 2,
        "torch_dtype": dtype,
    }
    if not text.post_norms:
        _check_gemma1(text)
        return decoder
    scalar = text.attention_scale**-2
    is_whole = abs(scalar - round(scalar)) < 1e-6
    return decoder | {
        "model_type": "gemma2",
        "query_pre_attn_scalar": round(scalar) if is_whole else scalar,
        "attn_logit_softcapping": text.attn_softcap or None,
        "final_logit_softcapping": text.final_softcap or None,
        # PaliGemma 2 was trained without Gemma 2's sliding window. Prefixes at 896 pixels are
        # longer than the window.
        "layer_types": ["full_attention"] * text.depth,
        "sliding_window": 8192,
    }


def _check_gemma1(text: Text) -> None:
    """Raises UserError if a Gemma 1 has settings that its Hugging Face config cannot say."""
    unsupported = [name for name in ("attn_softcap", "final_softcap") if getattr(text, name)]
    if abs(text.attention_scale * text.head_dim**0.5 - 1) > 1e-6:
        unsupported.append("query_scale")
    if unsupported:
        raise UserError(
            f"a Hugging Face Gemma 1 has no {', '.join(unsupported)}: "
            f"model.text.{unsupported[0]} cannot be written"
        )


def _vision_config(model: Model, dtype: str) -> JsonDict:
    vision: Vision = model.vision
    return {
        "model_type": "siglip_vision_model",
        "hidden_size": vision.width,
        "intermediate_size": vision.mlp_dim,
        "num_hidden_layers": vision.depth,
        "num_attention_heads": vision.num_heads,
        "image_size": model.image_size,
        "patch_size": vision.patch_size,
        "projection_dim": model.text.width,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
        "vision_use_head": False,
        "torch_dtype": dtype,
    }


def preprocessor_config(model: Model) -> JsonDict:
    """Returns the `preprocessor_config.json` of a model: square images with values in [-1, 1]."""
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

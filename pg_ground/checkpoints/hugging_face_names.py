"""One table of parameter names and shapes: big_vision's and Hugging Face's.

Hugging Face checkpoints come with three spellings of the names: the spelling of the hub, the
spelling that transformers 5 has in memory, and the mix that its `save_pretrained` writes. All three
are read. The hub's spelling is written, because all versions read it.
"""

from typing import NamedTuple

VISION = "vision_tower.vision_model."
TEXT = "language_model.model."
HEAD = "language_model.lm_head.weight"

EMBEDDING = "llm/embedder/input_embedding"
EMBED_TOKENS = f"{TEXT}embed_tokens.weight"


class Row(NamedTuple):
    """One parameter in both layouts."""

    name: str
    """big_vision's name."""
    hub_names: tuple[str, ...]
    """Names in the hub's spelling, where {i} is the layer. Two names are two parts of one parameter
    of big_vision.
    """
    pattern: str
    """einops pattern: axes of one layer and part in Hugging Face -> axes in big_vision."""


def table(is_gemma2: bool) -> tuple[Row, ...]:
    """Returns every parameter of PaliGemma 1 or 2."""
    return (*_tower(), *_decoder(is_gemma2))


def _norm(name: str, hub_name: str) -> tuple[Row, ...]:
    return (
        Row(f"{name}/scale", (f"{hub_name}.weight",), "d -> d"),
        Row(f"{name}/bias", (f"{hub_name}.bias",), "d -> d"),
    )


def _tower() -> tuple[Row, ...]:
    """Returns the rows of the SigLIP tower and of the projector."""
    block = "img/Transformer/encoderblock/"
    layer = VISION + "encoder.layers.{i}."
    attention = block + "MultiHeadDotProductAttention_0/"
    patch_embedding = VISION + "embeddings.patch_embedding"
    position_embedding = VISION + "embeddings.position_embedding"
    projector = "multi_modal_projector.linear"
    rows = [
        Row("img/embedding/kernel", (f"{patch_embedding}.weight",), "d c h w -> h w c d"),
        Row("img/embedding/bias", (f"{patch_embedding}.bias",), "d -> d"),
        Row("img/pos_embedding", (f"{position_embedding}.weight",), "p d -> 1 p d"),
        *_norm(block + "LayerNorm_0", layer + "layer_norm1"),
        *_norm(block + "LayerNorm_1", layer + "layer_norm2"),
    ]
    for dense, hub_dense in (("Dense_0", "fc1"), ("Dense_1", "fc2")):
        name = f"{block}MlpBlock_0/{dense}"
        hub_name = f"{layer}mlp.{hub_dense}"
        rows.append(Row(f"{name}/kernel", (f"{hub_name}.weight",), "o i -> i o"))
        rows.append(Row(f"{name}/bias", (f"{hub_name}.bias",), "o -> o"))
    for part in ("query", "key", "value"):
        name = f"{attention}{part}"
        hub_name = f"{layer}self_attn.{part[0]}_proj"
        rows.append(Row(f"{name}/kernel", (f"{hub_name}.weight",), "(n h) d -> d n h"))
        rows.append(Row(f"{name}/bias", (f"{hub_name}.bias",), "(n h) -> n h"))
    return (
        *rows,
        Row(f"{attention}out/kernel", (f"{layer}self_attn.out_proj.weight",), "d (n h) -> n h d"),
        Row(f"{attention}out/bias", (f"{layer}self_attn.out_proj.bias",), "d -> d"),
        *_norm("img/Transformer/encoder_norm", VISION + "post_layernorm"),
        Row("img/head/kernel", (f"{projector}.weight",), "o i -> i o"),
        Row("img/head/bias", (f"{projector}.bias",), "o -> o"),
    )


def _decoder(is_gemma2: bool) -> tuple[Row, ...]:
    """Returns the rows of a decoder.

    `post_attention_layernorm` is the norm before the MLP in Gemma 1, and the norm after attention
    in Gemma 2.
    """
    block = "llm/layers/"
    layer = TEXT + "layers.{i}."
    norms = {"pre_ffw_norm": "post_attention_layernorm"}
    if is_gemma2:
        norms = {
            "post_attention_norm": "post_attention_layernorm",
            "pre_ffw_norm": "pre_feedforward_layernorm",
            "post_ffw_norm": "post_feedforward_layernorm",
        }
    attention = layer + "self_attn."
    key_value = tuple(f"{attention}{part}_proj.weight" for part in "kv")
    gate_up = tuple(f"{layer}mlp.{part}_proj.weight" for part in ("gate", "up"))
    heads = "(n h) d -> n d h"
    return (
        Row(EMBEDDING, (EMBED_TOKENS,), "v d -> v d"),
        Row(f"{block}attn/q_einsum/w", (f"{attention}q_proj.weight",), heads),
        Row(f"{block}attn/kv_einsum/w", key_value, heads),
        Row(f"{block}attn/attn_vec_einsum/w", (f"{attention}o_proj.weight",), "d (n h) -> n h d"),
        Row(f"{block}mlp/gating_einsum", gate_up, "o i -> i o"),
        Row(f"{block}mlp/linear", (f"{layer}mlp.down_proj.weight",), "o i -> i o"),
        Row(f"{block}pre_attention_norm/scale", (f"{layer}input_layernorm.weight",), "d -> d"),
        *(
            Row(f"{block}{name}/scale", (f"{layer}{hub_name}.weight",), "d -> d")
            for name, hub_name in norms.items()
        ),
        Row("llm/final_norm/scale", (f"{TEXT}norm.weight",), "d -> d"),
    )


def hub_name(name: str) -> str:
    """Returns the hub's spelling of a tensor name in any of the three spellings.

    PEFT writes `base_model.model.` before a name.
    """
    name = name.removeprefix("base_model.model.").removeprefix("model.")
    if name == "lm_head.weight":
        return HEAD
    for stem, inner in (("vision_tower.", "vision_model."), ("language_model.", "model.")):
        if name.startswith(stem):
            tail = name.removeprefix(stem)
            return name if tail.startswith((inner, "lm_head.")) else stem + inner + tail
    return name

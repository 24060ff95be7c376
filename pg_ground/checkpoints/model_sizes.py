"""The sizes of a model that the parameters of a checkpoint imply, and errors if they do not fit."""

from collections.abc import Mapping
from dataclasses import replace

from pg_ground.config import DECODERS, Lora, Model, Text, Vision
from pg_ground.models.paligemma import PaliGemma
from pg_ground.storage.paths import FilePath
from pg_ground.types import UserError

TABLE = "llm/embedder/input_embedding"
POSITIONS = "img/pos_embedding"

Shapes = Mapping[str, tuple[int, ...]]
"""Shapes of parameters by name."""

_AXES = {
    "img/embedding/kernel": 4,
    POSITIONS: 3,
    "img/Transformer/encoderblock/MlpBlock_0/Dense_0/kernel": 3,
    "img/Transformer/encoderblock/MultiHeadDotProductAttention_0/query/kernel": 4,
    TABLE: 2,
    "llm/layers/attn/q_einsum/w": 4,
    "llm/layers/attn/kv_einsum/w": 5,
    "llm/layers/mlp/linear": 3,
}
"""The parameters from which sizes are read, and their numbers of axes."""


def parameter_shapes(model: Model) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of a model's parameters by name."""
    return {name: leaf.shape for name, leaf in PaliGemma(model).abstract_params().items()}


def patch_count(model: Model) -> int:
    """Returns the number of image tokens, which is the number of position embeddings."""
    return (model.image_size // model.vision.patch_size) ** 2


def model_from_shapes(shapes: Shapes, path: str) -> Model:
    """Returns the sizes that big_vision's parameter shapes imply.

    Shapes do not tell the scale of queries and the soft-caps. If a published decoder has these
    shapes (with any number of rows in its embedding), its scale and its soft-caps are taken. For
    other decoders, queries are scaled by head_dim**-0.5, and attention is soft-capped at 50 in a
    Gemma 2.

    Raises:
      UserError: a parameter is missing or its shape is impossible.
    """
    _check_plausible(shapes, path)
    kernel, positions, vision_mlp, vision_query, table, query, key_value, mlp = (
        shapes[name] for name in _AXES
    )
    is_gemma2 = "llm/layers/post_attention_norm/scale" in shapes
    vision = Vision(
        width=kernel[3],
        depth=vision_mlp[0],
        mlp_dim=vision_mlp[2],
        num_heads=vision_query[2],
        patch_size=kernel[0],
    )
    text = Text(
        width=table[1],
        depth=query[0],
        mlp_dim=mlp[1],
        num_heads=query[1],
        num_kv_heads=key_value[2],
        head_dim=query[3],
        vocab_size=table[0],
        query_scale=query[3] ** -0.5,
        post_norms=is_gemma2,
        attn_softcap=50.0 if is_gemma2 else 0.0,
    )
    text = _published(text) or text
    side = round(positions[1] ** 0.5)
    return Model(image_size=side * vision.patch_size, vision=vision, text=text)


def is_published(model: Model) -> bool:
    """Returns whether a published decoder has the shapes of the decoder of `model`."""
    return _published(model.text) is not None


def _published(text: Text) -> Text | None:
    """Returns the published decoder with the shapes of `text`, and with its vocabulary."""
    for published in DECODERS.values():
        scales = {"query_scale": published.query_scale, "attn_softcap": published.attn_softcap}
        decoder = replace(published, vocab_size=text.vocab_size)
        if replace(text, **scales) == decoder:
            return decoder
    return None


def _check_plausible(shapes: Shapes, path: str) -> None:
    """Raises UserError if a needed parameter is missing, or if its shape cannot belong to a
    PaliGemma.
    """
    problem = f"{path} is not a PaliGemma checkpoint"
    missing = [name for name in _AXES if name not in shapes]
    if missing:
        raise UserError(f"{problem}: it lacks {', '.join(missing)}")
    wrong = [
        f"{name}: {shapes[name]}, but it must have {axes} axes"
        for name, axes in _AXES.items()
        if len(shapes[name]) != axes
    ]
    if wrong:
        raise UserError(f"{problem}: {'; '.join(wrong)}")
    wrong = [f"{name}: {shapes[name]}, which is empty" for name in _AXES if 0 in shapes[name]]
    positions = shapes[POSITIONS]
    side = round(positions[1] ** 0.5)
    if positions[:2] != (1, side**2):
        wrong.append(f"{POSITIONS}: {positions}, which is not one square of positions")
    key_value = shapes["llm/layers/attn/kv_einsum/w"]
    heads, kv_heads = shapes["llm/layers/attn/q_einsum/w"][1], key_value[2]
    if kv_heads and heads % kv_heads:
        wrong.append(
            f"llm/layers/attn/kv_einsum/w: {key_value}, "
            f"whose {kv_heads} heads do not divide the {heads} query heads"
        )
    if wrong:
        raise UserError(f"{problem}: {'; '.join(wrong)}")


def resolve_model(
    path: FilePath, stored: Model, requested: Model | None, resample: bool, has_scales: bool
) -> Model:
    """Returns the sizes, without adapters, with which a checkpoint is loaded.

    Args:
      stored: sizes of the checkpoint.
      requested: sizes that the caller wants; None means the stored sizes.
      resample: position embeddings of another resolution are resampled.
      has_scales: the checkpoint states its query scale and its soft-cap, so the model must have
        the same.

    Raises:
      UserError: the resolutions differ and `resample` is False, or attention is scaled differently.
    """
    model = replace(stored if requested is None else requested, lora=Lora())
    if has_scales:
        scales = {
            "query_scale": (stored.text.attention_scale, model.text.attention_scale),
            "attn_softcap": (stored.text.attn_softcap, model.text.attn_softcap),
        }
        for name, (in_checkpoint, in_config) in scales.items():
            if abs(in_checkpoint - in_config) > 1e-6 * abs(in_checkpoint):
                raise UserError(
                    f"{path} says {name} {in_checkpoint:g}, but model.text.{name} is {in_config:g}"
                )
    if model.vision.patch_size != stored.vision.patch_size:
        return model  # check_fit reports both shapes
    if model.image_size != stored.image_size and not resample:
        raise UserError(
            f"{path} was trained at {stored.image_size} pixels "
            f"({POSITIONS} has {patch_count(stored)} positions), "
            f"but model.image_size is {model.image_size} ({patch_count(model)}): "
            "take the checkpoint of that resolution, or set resample_positions"
        )
    return model


def check_fit(path: str | FilePath, in_file: Shapes, in_model: Shapes) -> None:
    """Raises UserError if names or shapes differ.

    The error lists every missing name, unknown name and other shape.
    """
    wrong = [
        f"{name}: missing, {in_model[name]} in the model"
        for name in sorted(in_model.keys() - in_file.keys())
    ]
    wrong += [
        f"{name}: not a parameter of this model, {in_file[name]} in the file"
        for name in sorted(in_file.keys() - in_model.keys())
    ]
    wrong += [
        f"{name}: {in_file[name]} in the file, {in_model[name]} in the model"
        for name in sorted(in_model.keys() & in_file.keys())
        if in_file[name] != in_model[name]
    ]
    if wrong:
        raise UserError(f"{path} does not fit the model: {'; '.join(wrong)}")

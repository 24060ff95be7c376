"""The settings of a model that an `.npz` does not state: query scale and soft-caps.

Shapes tell all other sizes. A Hugging Face directory, an orbax directory and a run state them.
"""

import json
import logging
from dataclasses import replace
from typing import NamedTuple

from pg_ground import config
from pg_ground.checkpoints.hugging_face_config import read_config_file, to_hub_config
from pg_ground.checkpoints.model_sizes import check_fit, parameter_shapes
from pg_ground.config import Lora, Model
from pg_ground.storage.paths import FilePath
from pg_ground.types import JsonDict, UserError, first_problems

GEMMA2_SOFTCAP = 50.0
"""The soft-cap of attention of every published Gemma 2."""

logger = logging.getLogger(__name__)


class Scales(NamedTuple):
    """The settings that shapes do not tell. None means that nothing states it."""

    query_scale: float | None = None
    """The factor of queries before the dot product with keys."""
    attn_softcap: float | None = None
    """0 for none."""
    final_softcap: float | None = None
    """0 for none."""


def check_scales(scales: Scales) -> None:
    """Raises UserError if a value is impossible."""
    for name, value in scales._asdict().items():
        if value is not None and (value < 0 or (name == "query_scale" and value == 0)):
            raise UserError(f"--{name}={value:g}: it must be above 0")


def read_scales(path: FilePath, source: FilePath, model: Model) -> Scales:
    """Returns the scales that a configuration states.

    Args:
      path: a `config.json` of a Hugging Face directory or of a run, a `model.json`, or a folder
        with one of them.
      source: the checkpoint, for errors.
      model: the sizes that the shapes of `source` tell.

    Raises:
      UserError: the file cannot be read, or its model has other shapes.
    """
    if path.is_dir():
        names = [name for name in ("config.json", "model.json") if (path / name).is_file()]
        path = path / (names[0] if names else "config.json")
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--sizes={path}: {error.strerror}; expected a config.json") from None
    except ValueError as error:
        raise UserError(f"--sizes={path} is not JSON: {error!s:.100}") from None
    if isinstance(tree, dict) and "model_type" in tree:
        hub = read_config_file(path)
        _check_hub_sizes(path, tree, source, model)
        return Scales(hub.query_scale, hub.attn_softcap, hub.final_softcap)
    is_run = isinstance(tree, dict) and "stages" in tree
    sizes = config.parse(tree).model if is_run else config.parse_model(tree, str(path))
    sizes = replace(sizes, lora=Lora())
    check_fit(source, parameter_shapes(model), parameter_shapes(sizes))
    text = sizes.text
    return Scales(text.attention_scale, text.attn_softcap, text.final_softcap)


def _check_hub_sizes(path: FilePath, tree: JsonDict, source: FilePath, model: Model) -> None:
    """Raises UserError if a size that `config.json` states differs from the shapes."""
    expected = to_hub_config(_as_written(model), "float32")
    wrong = []
    for section in ("text_config", "vision_config"):
        stated = tree.get(section) or {}
        wrong += [
            f"{section}.{name} is {stated[name]!r:.40}, but the shapes say {value!r}"
            for name, value in expected[section].items()
            if name in SIZES and name in stated and stated[name] != value
        ]
    if wrong:
        raise UserError(f"{source} does not fit {path}: {first_problems(wrong, limit=5)}")


SIZES = (
    *("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "image_size"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "patch_size"),
)
"""Settings of `config.json` that shapes tell too."""


def _as_written(model: Model) -> Model:
    """Returns the sizes with scales that every `config.json` can state."""
    text = replace(model.text, query_scale=None, attn_softcap=0.0, final_softcap=0.0)
    return replace(model, text=text)


def with_scales(source: FilePath, model: Model, scales: Scales, is_published: bool) -> Model:
    """Returns the sizes of an `.npz` with stated scales.

    Args:
      model: the sizes that the shapes tell.
      is_published: a published decoder has these shapes, so `model` has its scales.

    Raises:
      UserError: nothing states the query scale of a Gemma 2.
    """
    text = model.text
    is_gemma2 = text.post_norms
    if scales.query_scale is None and is_gemma2 and not is_published:
        raise UserError(
            f"{source}: no published Gemma 2 has these sizes, and an .npz does not state its query "
            f"scale (head_dim**-0.5 would be {text.head_dim**-0.5:.4g}) and its soft-caps: "
            f"--sizes=CONFIG.json, or --query_scale=NUMBER and --attn_softcap={GEMMA2_SOFTCAP:g}"
        )
    if scales.query_scale is None and not is_gemma2 and not is_published:
        logger.info(
            "%s: no published model has these sizes: queries are scaled by %.4g, as in every "
            "Gemma 1",
            source, text.attention_scale,
        )  # fmt: skip
    stated = {name: value for name, value in scales._asdict().items() if value is not None}
    if is_gemma2 and not is_published and scales.attn_softcap is None:
        logger.warning(
            "%s: attention is soft-capped at %g, as in every published Gemma 2", source,
            text.attn_softcap,
        )  # fmt: skip
    return replace(model, text=replace(text, **stated))

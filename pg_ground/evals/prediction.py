"""Answers one prompt about one image: text, boxes and points."""

import logging
from functools import partial
from typing import TypedDict, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image, ImageOps

from pg_ground.checkpoints import weights
from pg_ground.data.images import open_oriented, resize, to_rgb
from pg_ground.data.records import BadRecord
from pg_ground.evals.answers import loc_answers
from pg_ground.models import PaliGemma
from pg_ground.rl.rollout import sample
from pg_ground.storage.downloads import checkpoint_path, tokenizer_file
from pg_ground.storage.paths import FilePath, to_path
from pg_ground.tokenizer import Tokenizer, check_vocab_size
from pg_ground.tokenizer import load as load_tokenizer
from pg_ground.types import Array, Params, Rollout, UserError

ImageLike = str | FilePath | Image.Image | np.ndarray
"""A file name, an image, or pixels: uint8[H, W, 3], uint8[H, W], or floats from 0 to 1."""

logger = logging.getLogger(__name__)


class LabelledBox(TypedDict):
    """A box in pixels of the original image. The label is the text behind its loc tokens."""

    label: str
    xyxy_px: list[float]


class LabelledPoint(TypedDict):
    """A point in pixels of the original image. The label is the text behind its loc tokens."""

    label: str
    xy_px: list[float]


class Prediction(TypedDict):
    """A completion and what it says."""

    text: str
    boxes: list[LabelledBox]
    points: list[LabelledPoint]


def predict(
    model: PaliGemma,
    params: Params,
    image: ImageLike,
    prompt: str,
    tokenizer: Tokenizer | None = None,
    max_new_tokens: int = 64,
) -> Prediction:
    """Returns the greedy answer of a model to a prompt about an image.

    The first call with a prompt of a new length compiles. The next calls reuse the program.

    Args:
      model: `model, params = pg_ground.load(path)`.
      params: the parameters of `model`.
      image: a file name, a PIL image, or pixels uint8[H, W, 3].
      prompt: for example "detect cat", or "detect cat ; dog" for several objects.
      tokenizer: None is the small tokenizer of this package. A published checkpoint needs
        PaliGemma's tokenizer: `pg_ground.tokenizer.load("paligemma_tokenizer.model")`.
      max_new_tokens: largest length of the answer.

    Raises:
      UserError: the image cannot be read, or the tokenizer does not fit the model.
    """
    tokenizer = tokenizer or load_tokenizer()
    check_vocab_size(tokenizer, model.config.text.vocab_size)
    pixels = read_image(image)
    inputs = resize(pixels, model.config.image_size).astype(np.float32) / 127.5 - 1
    prompt_ids = jnp.array([tokenizer.prefix(prompt)], jnp.int32)
    rollout = _answer_greedily(model, params, inputs[None], prompt_ids, max_new_tokens)
    tokens = rollout.tokens[0, 0][np.asarray(rollout.mask[0, 0])].tolist()
    height, width = pixels.shape[:2]
    objects = loc_answers(tokens, tokenizer, (width, height))
    return cast(Prediction, {"text": tokenizer.decode(tokens), **objects})


@partial(jax.jit, static_argnames=("model", "max_new_tokens"))
def _answer_greedily(
    model: PaliGemma,
    params: Params,
    image: Array,
    prompt: Int[Array, "1 L"],
    max_new_tokens: int,
) -> Rollout:
    return sample(
        model,
        params,
        image,
        prompt,
        jnp.ones(prompt.shape, bool),
        jax.random.key(0),
        group_size=1,
        max_new_tokens=max_new_tokens,
        temperature=0.0,
    )


def read_image(image: ImageLike, setting: str = "image") -> UInt8[np.ndarray, "H W 3"]:
    """Returns the pixels of an image: RGB, upright by its EXIF orientation.

    Args:
      setting: the name of the setting or argument in error messages.

    Raises:
      UserError: there is no such file, or it is not an image.
    """
    value, folder, name = image, None, setting
    if isinstance(image, FilePath | str):
        path = to_path(image, setting)
        value, folder, name = path.name, path.parent, f"{setting}={image}"
    try:
        if isinstance(image, Image.Image):
            return np.asarray(to_rgb(ImageOps.exif_transpose(image)))
        opened = open_oriented(value, folder)
    except BadRecord as bad:
        raise UserError(f"{name}: {bad}") from None
    if opened.note:
        logger.warning("%s: %s", name, opened.note)
    return np.asarray(opened.image)


def predict_file(
    params: str | FilePath, image: str | FilePath, prompt: str, tokenizer: str, max_new_tokens: int
) -> tuple[Prediction, UInt8[np.ndarray, "H W 3"]]:
    """Returns the answer of a checkpoint to a prompt about an image file, and the image.

    Args:
      tokenizer: path of a sentencepiece model. "" is the tokenizer of the checkpoint. If the
        checkpoint has none, it is the small tokenizer of this package, with a warning.

    Raises:
      UserError: the checkpoint, the tokenizer or the image cannot be used.
    """
    path = checkpoint_path(params, "--params")
    tokenizer_path = tokenizer or weights.tokenizer_path(path)
    loaded_tokenizer = load_tokenizer(tokenizer_file(tokenizer_path or "", "--tokenizer"))
    pixels = read_image(image, "--image")
    model, loaded_params = weights.load(path)
    if tokenizer_path is None:
        logger.warning(
            "%s has no tokenizer, so the small tokenizer of this package is used: --tokenizer=FILE "
            "names another",
            path,
        )
    answer = predict(model, loaded_params, pixels, prompt, loaded_tokenizer, max_new_tokens)
    return answer, pixels

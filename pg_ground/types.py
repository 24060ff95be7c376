"""The values that flow between rooms, and the legend of their axes.

Axes, in every signature of the package:

    B prompts (one image each)    G completions of one prompt     L prefix text tokens     T completion tokens
    K boxes or points             C names in a question           W tokens of a name       S prefix length (image + text)
    H W pixels                    D width                         N heads                  V vocabulary
    M cells of a mask's side

Frames: `yxyx` and `yx` are fractions of the original image in [0, 1]; anything in pixels says `_px`.
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jaxtyping import Bool, Float, Int, UInt8

Array = jax.Array | np.ndarray
"""An array on a device, or on the host before it is placed or after it is fetched."""

Params = Mapping[str, Any]
"""A tree of parameters: nested dicts by big_vision's names. Leaves are arrays, or `jax.ShapeDtypeStruct` if abstract."""

Metrics = dict[str, Any]
"""Numbers by name: float32 scalars on the device, floats on the host."""

BOXES, POINTS, TEXT = 0, 1, 2
"""What a question asks for: the values of `Gold.target`. TEXT is an answer that no reward on token ids can read."""


FilePath = Path | epath.Path
"""A local path, or a path of etils for a remote file system such as gs://. Both have the same methods."""


def expand_path(path: str) -> str:
    """Returns `path` with a leading `~` or `~user` replaced by the home directory. Other paths stay as they are.

    A shell does not expand `~` inside `--workdir=~/run` or inside a uri, so every opener calls this function.
    """
    return os.path.expanduser(path)


class UserError(Exception):
    """What the user gave cannot be used. Its text is one line: what was found, where, and what would be right."""


class Boxes(NamedTuple):
    """K slots for boxes. An unused slot has `valid` False; a used one may still be degenerate (y2 <= y1)."""

    yxyx: Float[Array, "... K 4"]
    label: Int[Array, "... K"]
    """Index among the names of the question, -1 for a name that is not among them."""
    valid: Bool[Array, "... K"]


class Points(NamedTuple):
    """K slots for points, read like `Boxes`."""

    yx: Float[Array, "... K 2"]
    label: Int[Array, "... K"]
    valid: Bool[Array, "... K"]


class Gold(NamedTuple):
    """What the annotators drew for B questions.

    A question about points may carry boxes too: they are the objects the points lie on, slot by slot.
    """

    boxes: Boxes
    points: Points
    target: Int[Array, " B"]
    """BOXES, POINTS or TEXT: the kind of answer the question asks for."""
    names: Int[Array, "B C W"]
    """Token ids of the names an answer may use, PAD-padded; all PAD for a question whose answers carry no name."""
    masks: Bool[Array, "B K M M"]
    """Cells of the whole image that each object covers, slot by slot; all False for one without, M = 0 where none are carried."""


class Example(NamedTuple):
    """One question on the host: an image of the model's size, its text, and the annotation (numpy, K as it comes)."""

    image: UInt8[np.ndarray, "H W 3"]
    size: tuple[int, int]
    """Width and height in pixels of the original image, after its EXIF orientation is applied."""
    prompt: str
    suffix: str
    boxes: Boxes
    points: Points
    target: int
    names: tuple[str, ...]
    masks: Bool[np.ndarray, "K M M"]
    """Of the objects asked for; empty where the source names none."""
    source: str
    """Name of the config entry it came from."""
    index: int
    """Record number within that source."""


class Batch(NamedTuple):
    """B questions, ready for the device."""

    image: Float[Array, "B H W 3"] | UInt8[Array, "B H W 3"]
    """In [-1, 1]; or as bytes, which the model takes there."""
    prompt: Int[Array, "B L"]
    prompt_mask: Bool[Array, "B L"]
    suffix: Int[Array, "B T"]
    suffix_mask: Bool[Array, "B T"]
    """True up to and including EOS."""
    gold: Gold
    size: Int[Array, "B 2"]
    """Width and height of the original image in pixels."""
    source: Int[Array, " B"]
    """Position of the source among the config's entries."""
    index: Int[Array, " B"]


def same(x: Array) -> Array:
    """Returns `x`: it lies where the compiler puts it."""
    return x


def take(table: Array, tokens: Array) -> Array:
    """Returns the rows of a table."""
    return table[tokens]


class Places(NamedTuple):
    """Where a model's arrays lie: functions that return what they are given, held to a place."""

    rows: Callable[[Array], Array] = same
    """For activations, `[B, …]`: B stays split over devices, and weights come to it."""
    lookup: Callable[[Array, Array], Array] = take
    """(table `[V, D]`, tokens) to rows of it: D stays split as it is in the table, for gradients too, until rows are whole."""
    vocabulary: Callable[[Array], Array] = same
    """For the table that makes logits, `[V, D]`: V is split, so that its rows are not gathered."""


ANYWHERE = Places()
"""Wherever the compiler puts them."""


class PrefixCache(NamedTuple):
    """Keys and values of image and prompt, computed once per prompt and read by all its completions."""

    k: Float[Array, "layers B S K H"]
    v: Float[Array, "layers B S K H"]
    mask: Bool[Array, "B S"]
    """False at padding."""


class SuffixCache(NamedTuple):
    """Keys and values of the completion tokens so far; `length` of the T slots are filled."""

    k: Float[Array, "layers B G T K H"]
    v: Float[Array, "layers B G T K H"]
    length: Int[Array, ""]


class Rollout(NamedTuple):
    """G sampled completions of each prompt."""

    tokens: Int[Array, "B G T"]
    """PAD after EOS."""
    mask: Bool[Array, "B G T"]
    """True up to and including EOS."""
    logps: Float[Array, "B G T"]
    """Natural log-probabilities under the policy that sampled, at the sampling temperature; 0 after EOS."""


class Answer(NamedTuple):
    """What B×G completions say, read from their token ids."""

    boxes: Boxes
    points: Points
    stray: Int[Array, "B G"]
    """Number of loc tokens that belong to no box and no point."""
    finished: Bool[Array, "B G"]
    """The completion ends in EOS."""
    grammatical: Bool[Array, "B G"]
    """The whole completion is an answer of the asked kind: `<loc>x4 name ; …` or `<loc>x2 name ; …`, then EOS."""
    tokens: Int[Array, "B G T"]
    """The completion itself, as in `Rollout`."""
    mask: Bool[Array, "B G T"]


class Rewards(NamedTuple):
    """How good each completion is. NaN marks a completion that a reward cannot judge."""

    total: Float[Array, "B G"]
    parts: dict[str, Float[Array, "B G"]]


class TrainState(NamedTuple):
    """What a step changes. With the data iterator's state and the config's seed it is all that exact resume needs."""

    step: Int[Array, ""]
    """Steps done in this stage."""
    params: Any
    opt: Any
    """State of the optax chain."""
    kl_coef: Float[Array, ""] | np.float32 = np.float32(0)
    """Weight of the KL to the reference policy, where it is steered."""

"""The values that flow between packages, the glossary, and the axes of arrays.

Glossary:

    source          one dataset, as an entry of a config: a uri and the paths of its fields
    record          one entry of a source, as it is stored
    question        a prompt about one image, made from a record. A record can make several.
    prefix          image and prompt. The prefix is computed once per question.
    completion      the tokens that the policy samples after a prefix; also called the suffix
    group           the G completions of one question
    rollout         the groups of a batch with their log-probabilities
    answer          boxes, points and masks that are read from a completion
    gold            the annotation of a question: the right answer
    reward          how good a completion is; NaN if the reward does not apply to it
    advantage       how much better a completion (or a token) is than its baseline
    stage           one phase of a run with its own optimizer state: "sft" or "grpo"
    policy          the model that is trained
    reference       the policy at the start of the stage
    trained         parameters that the optimizer changes
    frozen          parameters that the optimizer does not change

Axes, in every signature of the package:

    B  prompts (one image each)     G  completions of one prompt     L  prompt tokens
    T  completion tokens            K  boxes or points               C  names in a question
    W  tokens of a name             S  prefix length (image + text)  H W  pixels
    D  width                        N  heads                         V  vocabulary
    M  cells along a mask's side

Coordinates: `yxyx` and `yx` are fractions of the original image in [0, 1]. A name that ends in
`_px` is in pixels.
"""

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Int, PyTree, UInt8

Array = jax.Array | np.ndarray
"""An array on a device, or on the host before it is placed or after it is fetched."""

Params = Mapping[str, Any]
"""Parameters: nested dicts by big_vision's names. Leaves are arrays, or `jax.ShapeDtypeStruct` if
abstract.
"""

Metrics = dict[str, Any]
"""Numbers by name: float32 scalars on the device, floats on the host."""

Record = Mapping[str, Any]
"""A record of a source: values by field. A value is JSON, an image, an array or bytes."""

JsonObject = Mapping[str, Any]
"""A JSON object to read."""

JsonDict = dict[str, Any]
"""A JSON object to change."""

BOXES, POINTS, TEXT = 0, 1, 2
"""The values of `Gold.target`: the kind of answer that a question asks for. Rewards on token ids
cannot read a TEXT answer.
"""

POLICY = "policy"
"""The name of the policy's tree among the trainable trees of a `TrainState`."""


class UserError(Exception):
    """An input of the user cannot be used.

    The text is one line: what is wrong, where, and what would be right.
    """


def nearest(name: str, names: Iterable[str]) -> str:
    """Returns the nearest of `names` as a question to the user, or the list of `names` if none
    is near."""
    names = sorted(names)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"did you mean {close[0]}?" if close else f"there are {', '.join(names) or 'none'}"


def first_problems(problems: Sequence[str], separator: str = "; ", limit: int = 20) -> str:
    """Returns the first problems of a list, joined, and the number of the others."""
    more = len(problems) - limit
    texts = [*problems[:limit], f"and {more} more"] if more > 0 else problems
    return separator.join(texts)


class Boxes(NamedTuple):
    """K slots for boxes.

    `valid` is False for an unused slot. A used box can still be degenerate (y2 <= y1).
    """

    yxyx: Float[Array, "... K 4"]
    label: Int[Array, "... K"]
    """Index into the names of the question; -1 for a name that is not among them."""
    valid: Bool[Array, "... K"]


class Points(NamedTuple):
    """K slots for points, with the same fields as `Boxes`."""

    yx: Float[Array, "... K 2"]
    label: Int[Array, "... K"]
    valid: Bool[Array, "... K"]


class Gold(NamedTuple):
    """The annotations of B questions.

    A question about points can have boxes too. Box k is then the object that point k lies on.
    """

    boxes: Boxes
    points: Points
    target: Int[Array, " B"]
    """BOXES, POINTS or TEXT: the kind of answer that the question asks for."""
    names: Int[Array, "B C W"]
    """Token ids of the names that an answer can use, padded with PAD; all PAD if answers have no
    names."""
    masks: Bool[Array, "B K M M"]
    """Cells of the whole image that each object covers.

    All False for an object without a mask; M = 0 without masks.
    """


class Example(NamedTuple):
    """One question on the host, with an image of the model's size. K is not padded."""

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
    """Masks of the objects; empty if the source has no masks."""
    source: str
    """Name of the source in the config."""
    index: int
    """Record number within that source."""
    notes: tuple[str, ...] = ()
    """How the record was read if the record left that open, in words."""
    frames: tuple[tuple[int, int], ...] = ()
    """Width and height of the frame in which the coordinates were read. Then those before EXIF, if
    EXIF exchanges the sides and the coordinates were read after it."""


class Batch(NamedTuple):
    """B questions, ready for the device."""

    image: Float[Array, "B H W 3"] | UInt8[Array, "B H W 3"]
    """Floats in [-1, 1], or bytes that the model scales to [-1, 1]."""
    prompt: Int[Array, "B L"]
    prompt_mask: Bool[Array, "B L"]
    suffix: Int[Array, "B T"]
    suffix_mask: Bool[Array, "B T"]
    """True up to and including EOS."""
    gold: Gold
    size: Int[Array, "B 2"]
    """Width and height of the original image in pixels."""
    source: Int[Array, " B"]
    """Index of the source among the entries of the config."""
    index: Int[Array, " B"]


def unconstrained(x: Array) -> Array:
    """Returns `x`. The compiler chooses its sharding."""
    return x


def take_rows(table: Array, tokens: Array) -> Array:
    """Returns the rows of `table` for `tokens`. The compiler chooses their sharding."""
    return table[tokens]


class ShardingHooks(NamedTuple):
    """Functions through which a model passes its arrays, so that a mesh can constrain shardings."""

    activations: Callable[[Array], Array] = unconstrained
    """For activations `[B, …]`. B stays split over devices, and weights are gathered instead."""
    lookup: Callable[[Array, Array], Array] = take_rows
    """(table `[V, D]`, tokens) → rows `[…, D]`.

    Rows and their gradients keep the table's split of D until they are complete.
    """
    logits_table: Callable[[Array], Array] = unconstrained
    """For the table `[V, D]` that makes logits. V is split, so that its rows are not gathered."""


NO_HOOKS = ShardingHooks()
"""The compiler chooses all shardings."""


class PrefixCache(NamedTuple):
    """Keys and values of image and prompt, computed once per prompt and read by all its
    completions."""

    k: Float[Array, "layers B S K H"]
    v: Float[Array, "layers B S K H"]
    mask: Bool[Array, "B S"]
    """False at padding."""


class SuffixCache(NamedTuple):
    """Keys and values of the completion tokens so far.

    Of the T slots of a row, the first `length` are filled.
    """

    k: Float[Array, "layers B G T K H"]
    v: Float[Array, "layers B G T K H"]
    length: Int[Array, "#B #G"]
    """Filled slots of each row.

    The shape `[1, 1]` means that all rows have the same length, as in the sampler's loop.

    The shape is known when a program is compiled: with `[1, 1]`, `extend` writes one slice for all
    rows instead of scattering.
    """


class Rollout(NamedTuple):
    """G sampled completions of each prompt."""

    tokens: Int[Array, "B G T"]
    """PAD after EOS."""
    mask: Bool[Array, "B G T"]
    """True for real tokens, up to and including EOS. The model attends to them."""
    logps: Float[Array, "B G T"]
    """Log-probabilities (nats) under the policy that sampled, at the sampling temperature; 0
    after EOS."""
    loss_mask: Bool[Array, "B G T"]
    """True for tokens that the policy wrote and is trained on.

    It is part of `mask`: a tool's output is in `mask` alone.
    """


class Answer(NamedTuple):
    """Locations that B×G completions write, read from their token ids."""

    boxes: Boxes
    points: Points
    masks: Bool[Array, "B G K M M"]
    """Cells of the whole image that the mask of each box covers, like `Gold.masks`. All False for a
    box without a mask; M = 0 if masks are not decoded."""
    stray: Int[Array, "B G"]
    """Number of loc tokens that belong to no box and no point."""
    finished: Bool[Array, "B G"]
    """The completion ends in EOS."""
    grammatical: Bool[Array, "B G"]
    """The whole completion is an answer of the asked kind: `<loc>x4 name ; …` or
    `<loc>x2 name ; …`, then EOS."""
    tokens: Int[Array, "B G T"]
    """The completion itself, as in `Rollout`."""
    mask: Bool[Array, "B G T"]
    """Real tokens of the completion, as in `Rollout`."""


class Rewards(NamedTuple):
    """Scores of completions. NaN means that no reward, or not this reward, applies."""

    total: Float[Array, "B G"]
    """Weighted sum of the rewards that apply."""
    parts: dict[str, Float[Array, "B G"]]
    """The rewards by name, without weights."""


class TrainState(NamedTuple):
    """The values that a step changes.

    Exact resume needs this state, the data iterator's state and the config's seed.
    """

    step: Int[Array, ""]
    """Number of finished steps in this stage."""
    params: Mapping[str, Params]
    """The trainable trees by name: `POLICY`, and for example a critic."""
    opt_state: PyTree
    """State of the optax chain over all trainable trees."""
    kl_coef: Float[Array, ""] | np.float32 = np.float32(0)
    """Weight of the KL to the reference policy, if `grpo.kl_target` steers it."""

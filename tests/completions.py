"""Completions as token ids, and questions about boxes and points, for the tests of rewards.

Answers are written as text and tokenized with the package's tokenizer.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from pg_ground import tokenizer
from pg_ground.config import RewardSettings
from pg_ground.rewards.answer_reader import read_answer
from pg_ground.rewards.device_rewards import REWARDS, score
from pg_ground.types import BOXES, POINTS, Answer, Batch, Boxes, Gold, Points, Rollout
from pg_ground.vocab import LOC_MAX, PAD

TOKENS = tokenizer.load()
LENGTH = 32
GROUP = 8
SETTINGS = RewardSettings()

SHAPING = ("length", "repetition", "overlong")
"""Rewards that apply to a completion of any question."""

FOR_BOTH = ("gaussian_point", "label", "format", "count", "count_graded")
FOR_BOXES = ("iou", "iou_squared", "giou", "gaussian_coverage", "detection", *FOR_BOTH)
FOR_POINTS = ("distance_gaussian", "point_in_box", "point_in_mask", *FOR_BOTH)
FOR_MASKS = ("mask_iou",)
"""Rewards that need a decoder of masks: tests/test_answer_reader.py has their laws."""

BOX = (100, 200, 500, 900)
OTHER = (600, 50, 1000, 300)
FAR = (0, 920, 90, 1020)

read_jitted = jax.jit(read_answer, static_argnums=4)


@jax.jit
def all_rewards(rollout: Rollout, batch: Batch) -> dict[str, jax.Array]:
    """Returns every reward, as `score` gives it.

    The rewards are compiled together, for groups of `GROUP`.
    """
    answer = read_answer(
        rollout.tokens, rollout.mask, batch.gold.target, batch.gold.names, TOKENS.vocab
    )
    return dict(score(answer, batch, dict.fromkeys(REWARDS, 1.0), SETTINGS).parts)


def loc(*bins: int) -> str:
    return "".join(f"<loc{b:04d}>" for b in bins)


def make_rollout(*texts: str, unfinished: bool = False, length: int = LENGTH) -> Rollout:
    """Returns one prompt's completions, each ending in EOS unless `unfinished`."""
    tokens = np.full((1, len(texts), length), PAD, np.int32)
    mask = np.zeros((1, len(texts), length), bool)
    for row, text in enumerate(texts):
        ids = TOKENS.text(text) if unfinished else TOKENS.suffix(text)
        tokens[0, row, : len(ids)] = ids
        mask[0, row, : len(ids)] = True
    real = jnp.asarray(mask)
    return Rollout(jnp.asarray(tokens), real, jnp.zeros(tokens.shape), loss_mask=real)


def name_ids(names: Sequence[str]) -> jax.Array:
    """Returns the token ids of up to two names, `[1, 2, 6]`."""
    padded = np.full((1, 2, 6), PAD, np.int32)
    for row, name in enumerate(names):
        ids = TOKENS.text(" " + name)
        padded[0, row, : len(ids)] = ids
    return jnp.asarray(padded)


def read(
    *texts: str,
    target: int = BOXES,
    names: Sequence[str] = ("cat",),
    unfinished: bool = False,
) -> Answer:
    rollout = make_rollout(*texts, unfinished=unfinished)
    ids = name_ids(names)
    return read_jitted(rollout.tokens, rollout.mask, jnp.array([target]), ids, TOKENS.vocab)


def make_batch(
    boxes: Sequence[tuple[tuple[float, ...], int]],
    points: Sequence[tuple[tuple[float, float], int]] = (),
    target: int = BOXES,
    names: Sequence[str] = ("cat",),
) -> Batch:
    """Returns one question with 3 slots for gold boxes and points.

    The masks are the boxes, in 32 × 32 cells.

    Args:
      boxes: (bins, index of the name) of each gold box.
      points: (bins, index of the name) of each gold point.
    """
    box_slots = Boxes(*_slots(boxes, 4))
    middle = (jnp.arange(32) + 0.5) / 32
    y1, x1, y2, x2 = (side[..., None] for side in jnp.moveaxis(box_slots.yxyx, -1, 0))
    rows = ((y1 < middle) & (middle < y2))[..., :, None]
    masks = rows & ((x1 < middle) & (middle < x2))[..., None, :]
    gold = Gold(box_slots, Points(*_slots(points, 2)), jnp.array([target]), name_ids(names), masks)
    text = jnp.zeros((1, 1), jnp.int32)
    zero = jnp.zeros(1, jnp.int32)
    size = jnp.array([[640, 480]])
    image = jnp.zeros((1, 2, 2, 3))
    return Batch(image, text, text > 0, text, text > 0, gold, size, zero, zero)


def _slots(
    entries: Sequence[tuple[tuple[float, ...], int]], width: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    fractions = np.zeros((1, 3, width), np.float32)
    label = np.zeros((1, 3), np.int32)
    valid = np.zeros((1, 3), bool)
    for k, (bins, name) in enumerate(entries):
        fractions[0, k] = np.array(bins) / LOC_MAX
        label[0, k] = name
        valid[0, k] = True
    return jnp.asarray(fractions), jnp.asarray(label), jnp.asarray(valid)


def score_texts(reward: str, batch: Batch, *texts: str, unfinished: bool = False) -> list[float]:
    """Returns the reward of each completion of one question."""
    scores: list[float] = []
    for start in range(0, len(texts), GROUP):
        chunk = texts[start : start + GROUP]
        filler = [""] * (GROUP - len(chunk))
        rollout = make_rollout(*chunk, *filler, unfinished=unfinished)
        scores += all_rewards(rollout, batch)[reward][0, : len(chunk)].tolist()
    return scores


def score_with_settings(reward: str, batch: Batch, *texts: str, **settings) -> list[float]:
    """Returns one reward of each completion under other settings."""
    rollout = make_rollout(*texts)
    answer = read_jitted(
        rollout.tokens, rollout.mask, batch.gold.target, batch.gold.names, TOKENS.vocab
    )
    function = jax.jit(lambda a, b: REWARDS[reward](a, b, RewardSettings(**settings)))
    return function(answer, batch)[0].tolist()


ONE_BOX = make_batch([(BOX, 0)])
ONE_POINT = make_batch([(BOX, 0)], [((300, 550), 0)], POINTS)
"""The point is the box's centre."""

TWO = make_batch([(BOX, 0), (OTHER, 1)], names=("cat", "dog"))
TWO_POINTS = make_batch(
    [(BOX, 0), (OTHER, 1)], [((300, 550), 0), ((800, 175), 1)], POINTS, ("cat", "dog")
)


def right(batch: Batch) -> str:
    return f"{loc(*BOX)} cat" if batch is ONE_BOX else f"{loc(300, 550)} cat"


def wrong(batch: Batch) -> str:
    return f"{loc(*FAR)} cat" if batch is ONE_BOX else f"{loc(1023, 0)} cat"

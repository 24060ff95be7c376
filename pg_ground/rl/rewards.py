"""Completions read from their token ids, and judged, inside `jit`.

A reward is a function `(Answer, Batch, RewardSettings) -> f32[B,G]`, NaN at questions it does not apply to. Sets of answers are
matched one to one for the largest total similarity and score 2·Σ / (n_predicted + n_gold): a missing, a spurious and a
duplicate answer all cost, and an improper box counts as a prediction with similarity 0.
"""

from collections.abc import Callable, Mapping

import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from pg_ground import boxes
from pg_ground.config import RewardSettings, nearest
from pg_ground.rl.advantages import group_std
from pg_ground.types import BOXES, POINTS, TEXT, Answer, Array, Batch, Boxes, Points, Rewards, Rollout, UserError
from pg_ground.vocab import EOS, LOC_TOKENS, PAD, Vocab

Reward = Callable[[Answer, Batch, RewardSettings], Float[Array, "B G"]]


def read_answer(
    tokens: Int[Array, "B G T"],
    mask: Bool[Array, "B G T"],
    asks: Int[Array, " B"],
    names: Int[Array, "B C W"],
    vocab: Vocab,
) -> Answer:
    """Returns the boxes and points that completions write as loc tokens.

    A completion is cut into segments at its separators (";"). A segment with exactly four loc tokens is a box (y1 x1 y2 x2), with
    exactly two a point (y x); the loc tokens of any other segment are stray. What else a segment holds is its name, looked up
    among `names`; where a question has at most one name, every answer bears it.
    """
    length = tokens.shape[-1]
    loc = mask & (tokens >= vocab.loc0) & (tokens < vocab.loc0 + LOC_TOKENS)
    separator = mask & _among(tokens, vocab.separators)
    eos = mask & (tokens == EOS)
    segment = jnp.cumsum(separator, axis=-1)
    within = (segment[..., None] == jnp.arange(length)) & mask[..., None]  # [B, G, T, segment]

    def per_segment(flags: Bool[Array, "B G T"]) -> Int[Array, "B G T"]:
        return jnp.sum(within & flags[..., None], axis=-2)

    def before_in_segment(flags: Bool[Array, "B G T"]) -> Int[Array, "B G T"]:
        totals = per_segment(flags)
        earlier = jnp.take_along_axis(jnp.cumsum(totals, axis=-1) - totals, segment.clip(max=length - 1), axis=-1)
        return jnp.cumsum(flags, axis=-1) - flags - earlier

    locs = per_segment(loc)
    rank = before_in_segment(loc)
    lead = _among(tokens, vocab.spaces) & (rank == 0)  # the lone space that sentencepiece leaves before a later box
    text = mask & ~loc & ~separator & ~eos & ~lead
    words = per_segment(text)

    bins = jnp.where(loc, tokens - vocab.loc0, 0)
    place = within & loc[..., None]
    corners = jnp.stack([jnp.sum(jnp.where(place & (rank == r)[..., None], bins[..., None], 0), -2) for r in range(4)], -1)
    fractions = boxes.decode_loc(corners)  # [B, G, segment, 4]

    word = jnp.clip(before_in_segment(text), 0, names.shape[-1] - 1)
    spelled = jnp.take_along_axis(names[:, None, None], word[:, :, :, None, None], axis=-1)[..., 0]  # [B, G, T, C]
    correct = (spelled == tokens[..., None]).astype(jnp.int32)
    agree = jnp.einsum("BGTs,BGTC->BGsC", (within & text[..., None]).astype(jnp.int32), correct)
    lengths = jnp.sum(names != PAD, axis=-1)
    matches = (agree == words[..., None]) & (words[..., None] == lengths[:, None, None]) & (lengths > 0)[:, None, None]
    label = jnp.where(matches.any(-1), jnp.argmax(matches, axis=-1), -1)
    named = jnp.sum(lengths > 0, axis=-1)[:, None]
    label = jnp.where(named[..., None] <= 1, 0, label)

    is_box, is_point = locs == 4, locs == 2
    wanted = jnp.where(asks == BOXES, 4, 2)[:, None]
    segments = segment[..., -1] + 1
    real = jnp.arange(length) < segments[..., None]
    complete = (locs == wanted[..., None]) & ((words > 0) == (named[..., None] > 0))
    in_order = jnp.all(complete | ~real, axis=-1) & ~jnp.any(loc & (before_in_segment(text) > 0), axis=-1)
    finished = jnp.any(eos, axis=-1)
    return Answer(
        boxes=Boxes(*_first(is_box, (length + 1) // 5, fractions, label)),
        points=Points(*_first(is_point, (length + 1) // 3, fractions[..., :2], label)),
        stray=jnp.sum(jnp.where(is_box | is_point, 0, locs), axis=-1),
        finished=finished,
        grammatical=finished & (in_order | (asks == TEXT)[:, None]),
    )


def _among(tokens: Int[Array, "..."], ids: tuple[int, ...]) -> Bool[Array, "..."]:
    return jnp.isin(tokens, jnp.array(ids, jnp.int32))


def _first(
    used: Bool[Array, "B G s"], slots: int, place: Float[Array, "B G s c"], label: Int[Array, "B G s"]
) -> tuple[Float[Array, "B G K c"], Int[Array, "B G K"], Bool[Array, "B G K"]]:
    """Returns the used entries in order, in at least one and at most `slots` slots."""
    order = jnp.argsort(~used, axis=-1, stable=True)[..., : max(slots, 1)]
    taken = jnp.take_along_axis(used, order, axis=-1)
    place = jnp.take_along_axis(place, order[..., None], axis=-2)
    return jnp.where(taken[..., None], place, 0), jnp.where(taken, jnp.take_along_axis(label, order, axis=-1), 0), taken


def iou(answer: Answer, batch: Batch, _: RewardSettings) -> Float[Array, "B G"]:
    """Returns the matched IoU of predicted and gold boxes, in [0, 1]."""
    return _boxes_alike(answer, batch, boxes.iou)


def giou(answer: Answer, batch: Batch, _: RewardSettings) -> Float[Array, "B G"]:
    """Returns the matched generalised IoU as (1 + GIoU) / 2, in [0, 1]: boxes that miss each other still rank by distance."""
    return _boxes_alike(answer, batch, lambda a, b: (1 + boxes.giou(a, b)) / 2)


def gaussian_coverage(answer: Answer, batch: Batch, settings: RewardSettings) -> Float[Array, "B G"]:
    """Returns the matched overlap of predicted and gold boxes as Gaussians, in [0, 1]."""
    return _boxes_alike(answer, batch, lambda a, b: boxes.gaussian_coverage(a, b, settings.gaussian_alpha))


def gaussian_point(answer: Answer, batch: Batch, settings: RewardSettings) -> Float[Array, "B G"]:
    """Returns how near answers are to the centres of gold boxes, in units of the boxes, in [0, 1].

    For a question about boxes the answers' centres are judged; for one about points the points, against the boxes of the objects
    they should lie on (NaN where the annotation has none).
    """
    gold = batch.gold.boxes

    def alike(yx: Float[Array, "B G P 2"], proper: Bool[Array, "B G P"]) -> Float[Array, "B G P K"]:
        nearness = boxes.gaussian_point(yx[..., None, :], gold.yxyx[:, None, None], settings.gaussian_alpha)
        return jnp.where(proper[..., None], nearness, 0)

    predicted, points = answer.boxes, answer.points
    by_box = _matched(alike(boxes.centre(predicted.yxyx), boxes.is_proper(predicted.yxyx)), predicted, gold)
    by_point = _matched(alike(points.yx, points.valid), points, gold)
    located = gold.valid.sum(axis=-1) == batch.gold.points.valid.sum(axis=-1)
    by_point = jnp.where(located[:, None], by_point, jnp.nan)
    asks = batch.gold.asks[:, None]
    return jnp.where(asks == BOXES, by_box, jnp.where(asks == POINTS, by_point, jnp.nan))


def distance_gaussian(answer: Answer, batch: Batch, settings: RewardSettings) -> Float[Array, "B G"]:
    """Returns the matched nearness of predicted and gold points in pixels of the scaled image, in [0, 1]."""
    predicted, gold = answer.points, batch.gold.points
    similarity = boxes.distance_gaussian(
        predicted.yx[..., None, :],
        gold.yx[:, None, None],
        batch.size[:, None, None, None],
        settings.distance_sigma_px,
        settings.distance_max_size_px,
    )
    return _only(POINTS, batch, _matched(similarity, predicted, gold))


def format(answer: Answer, batch: Batch, _: RewardSettings) -> Float[Array, "B G"]:
    """Returns 1 for a completion that is an answer of the asked kind from its first token to EOS, else 0.

    Where there is nothing to find, the right answer is EOS alone.
    """
    silent = answer.finished & (answer.stray == 0) & (_count(answer, batch) == 0)
    right = jnp.where((_gold_count(batch) == 0)[:, None], silent, answer.grammatical).astype(jnp.float32)
    return jnp.where((batch.gold.asks == TEXT)[:, None], jnp.nan, right)


def count(answer: Answer, batch: Batch, _: RewardSettings) -> Float[Array, "B G"]:
    """Returns 1 for as many answers of the asked kind as there are gold ones, else 0."""
    right = (_count(answer, batch) == _gold_count(batch)[:, None]).astype(jnp.float32)
    return jnp.where((batch.gold.asks == TEXT)[:, None], jnp.nan, right)


REWARDS: dict[str, Reward] = {
    "iou": iou,
    "giou": giou,
    "gaussian_point": gaussian_point,
    "gaussian_coverage": gaussian_coverage,
    "distance_gaussian": distance_gaussian,
    "format": format,
    "count": count,
}


def check_names(weights: Mapping[str, float]) -> None:
    """Raises UserError for a reward that does not exist, or if none has a weight."""
    for name in weights:
        if name not in REWARDS:
            raise UserError(f"config.grpo.rewards.{name} does not exist: {nearest(name, REWARDS)}")
    if not any(weights.values()):
        raise UserError(f"config.grpo.rewards is {dict(weights)}: at least one reward needs a weight other than 0")


def score(answer: Answer, batch: Batch, weights: Mapping[str, float], settings: RewardSettings) -> Rewards:
    """Returns every reward named in `weights`, and their weighted sum over those that apply (NaN where none does).

    Raises:
      KeyError: a name that is not in `REWARDS`.
    """
    parts = {name: REWARDS[name](answer, batch, settings) for name in weights}
    judged = jnp.stack([~jnp.isnan(part) for name, part in parts.items() if weights[name]])
    total = jnp.stack([weights[name] * jnp.nan_to_num(part) for name, part in parts.items()]).sum(axis=0)
    return Rewards(jnp.where(judged.any(axis=0), total, jnp.nan), parts)


def measures(rollout: Rollout, answer: Answer, rewards: Rewards) -> dict[str, Float[Array, ""]]:
    """Returns means over the completions that each reward could judge, and what the completions look like."""
    spread = group_std(rewards.total)
    parts = {f"reward/{name}": jnp.nanmean(part) for name, part in rewards.parts.items()}
    return parts | {
        "reward/total": jnp.nanmean(rewards.total),
        "reward/std": spread.mean(),
        "group/zero_std_fraction": jnp.mean(spread < 1e-6),
        "completion/length": rollout.mask.sum(axis=-1).mean(),
        "completion/unfinished_fraction": jnp.mean(~answer.finished),
        "completion/malformed_fraction": jnp.mean(~answer.grammatical),
    }


def _boxes_alike(answer: Answer, batch: Batch, similarity: Callable[[Array, Array], Array]) -> Float[Array, "B G"]:
    predicted, gold = answer.boxes, batch.gold.boxes
    alike = similarity(predicted.yxyx[..., None, :], gold.yxyx[:, None, None])
    return _only(BOXES, batch, _matched(jnp.where(boxes.is_proper(predicted.yxyx)[..., None], alike, 0), predicted, gold))


def _matched(similarity: Float[Array, "B G P K"], predicted: Boxes | Points, gold: Boxes | Points) -> Float[Array, "B G"]:
    same = predicted.label[..., None] == gold.label[:, None, None]
    return boxes.set_similarity(jnp.where(same, similarity, 0), predicted.valid, gold.valid[:, None])


def _only(kind: int, batch: Batch, reward: Float[Array, "B G"]) -> Float[Array, "B G"]:
    return jnp.where((batch.gold.asks == kind)[:, None], reward, jnp.nan)


def _count(answer: Answer, batch: Batch) -> Int[Array, "B G"]:
    asks_boxes = (batch.gold.asks == BOXES)[:, None]
    return jnp.where(asks_boxes, answer.boxes.valid.sum(axis=-1), answer.points.valid.sum(axis=-1))


def _gold_count(batch: Batch) -> Int[Array, " B"]:
    gold = batch.gold
    return jnp.where(gold.asks == BOXES, gold.boxes.valid.sum(axis=-1), gold.points.valid.sum(axis=-1))

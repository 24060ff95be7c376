"""Completions read from their token ids, and judged, inside `jit`.

A reward is a function `(Answer, Batch, RewardSettings) -> f32[B,G]`, NaN at questions it does not
apply to. Sets of answers are matched one to one, within names, for the largest total similarity and
score 2·Σ / (n_predicted + n_gold): a missing, a spurious and a duplicate answer all cost, an
improper box counts as a prediction with similarity 0, and nothing where nothing is scores 1.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from pg_ground import boxes
from pg_ground.config import RewardSettings, nearest
from pg_ground.rl.advantages import group_std, has_spread
from pg_ground.types import (
    BOXES,
    POINTS,
    TEXT,
    Answer,
    Array,
    Batch,
    Boxes,
    Points,
    Rewards,
    Rollout,
    UserError,
)
from pg_ground.vocab import EOS, LOC_TOKENS, PAD, SEG_TOKENS, Vocab

Reward = Callable[[Answer, Batch, RewardSettings], Float[Array, "B G"]]

DETECTION_THRESHOLDS = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
DUPLICATE_WEIGHT = 0.3
"""Of arXiv 2302.08242, as its released settings."""

RELEASED_SHARES = (0.1, 0, 0.2, 0, 0.2, 0, 0, 0.3, 0, 0.2)
"""Of the thresholds in big_vision's mean: it keeps results under the threshold's first decimal,
where the last writer wins.
"""


def read_answer(
    tokens: Int[Array, "B G T"],
    mask: Bool[Array, "B G T"],
    target: Int[Array, " B"],
    names: Int[Array, "B C W"],
    vocab: Vocab,
) -> Answer:
    """Returns the boxes and points that completions write as loc tokens.

    A completion is cut into segments at its separators (";"). A segment with exactly four loc
    tokens is a box (y1 x1 y2 x2), with exactly two a point (y x); the loc tokens of any other
    segment are stray. What else a segment holds is its name, looked up among `names`; where a
    question has at most one name, every answer bears it.
    """
    length = tokens.shape[-1]
    loc, text, segment, within = cut = _cut(tokens, mask, vocab)
    locs, words, rank = (
        _per_segment(cut, loc),
        _per_segment(cut, text),
        _before_in_segment(cut, loc),
    )

    bins = jnp.where(loc, tokens - vocab.loc0, 0)
    place = within & loc[..., None]
    corners = jnp.stack(
        [
            jnp.sum(jnp.where(place & (rank == r)[..., None], bins[..., None], 0), -2)
            for r in range(4)
        ],
        -1,
    )
    fractions = boxes.decode_loc(corners)  # [B, G, segment, 4]

    word = jnp.clip(_before_in_segment(cut, text), 0, names.shape[-1] - 1)
    spelled = jnp.take_along_axis(names[:, None, None], word[:, :, :, None, None], axis=-1)[
        ..., 0
    ]  # [B, G, T, C]
    correct = (spelled == tokens[..., None]).astype(jnp.int32)
    agree = jnp.einsum("BGTs,BGTC->BGsC", (within & text[..., None]).astype(jnp.int32), correct)
    lengths = jnp.sum(names != PAD, axis=-1)
    matches = (
        (agree == words[..., None])
        & (words[..., None] == lengths[:, None, None])
        & (lengths > 0)[:, None, None]
    )
    label = jnp.where(matches.any(-1), jnp.argmax(matches, axis=-1), -1)
    named = jnp.sum(lengths > 0, axis=-1)[:, None]
    label = jnp.where(named[..., None] <= 1, 0, label)

    is_box, is_point = locs == 4, locs == 2
    wanted = jnp.where(target == BOXES, 4, 2)[:, None]
    segments = segment[..., -1] + 1
    real = jnp.arange(length) < segments[..., None]
    complete = (locs == wanted[..., None]) & ((words > 0) == (named[..., None] > 0))
    in_order = jnp.all(complete | ~real, axis=-1) & ~jnp.any(
        loc & (_before_in_segment(cut, text) > 0), axis=-1
    )
    finished = jnp.any(mask & (tokens == EOS), axis=-1)
    return Answer(
        boxes=Boxes(*_first(is_box, (length + 1) // 5, fractions, label)),
        points=Points(*_first(is_point, (length + 1) // 3, fractions[..., :2], label)),
        stray=jnp.sum(jnp.where(is_box | is_point, 0, locs), axis=-1),
        finished=finished,
        grammatical=finished & (in_order | (target == TEXT)[:, None]),
        tokens=tokens,
        mask=mask,
    )


def confidence(
    tokens: Int[Array, "B G T"],
    mask: Bool[Array, "B G T"],
    logps: Float[Array, "B G T"],
    vocab: Vocab,
) -> Float[Array, "B G K"]:
    """Returns how likely each box's name is behind it, in [0, 1], for the slots of `read_answer`'s
    boxes; 0 for an unused one.

    Detections are ranked by it (pix2seq, arXiv 2109.10852; PaliGemma 2, arXiv 2412.03555, appendix
    C), and not by the likelihood of the box, which is shared out among the bins next to it; that is
    taken for a box without a name. It is the geometric mean over the name's tokens, so that long
    names are not unlikely ones; boxes of one name would rank alike by their product.

    Args:
      logps: as in `Rollout`; those of a greedy rollout are the model's own, at temperature 1.
    """
    cut = _cut(tokens, mask, vocab)
    name = cut.text & ~(
        (tokens >= vocab.seg0) & (tokens < vocab.seg0 + SEG_TOKENS)
    )  # what shape it has is not its name
    named = _per_segment(cut, name) > 0

    def total(of: Array) -> Array:
        by_name, by_place = (
            jnp.sum(jnp.where(cut.within & flags[..., None], of[..., None], 0), -2)
            for flags in (name, cut.loc)
        )
        return jnp.where(named, by_name, by_place)

    likelihood = jnp.exp(total(logps) / jnp.maximum(total(mask), 1))
    is_box = _per_segment(cut, cut.loc) == 4
    return _first(
        is_box,
        (tokens.shape[-1] + 1) // 5,
        likelihood[..., None],
        jnp.zeros(is_box.shape, jnp.int32),
    )[0][..., 0]


class _Cut(NamedTuple):
    """Completions cut into segments at their separators."""

    loc: Bool[Array, "B G T"]
    text: Bool[Array, "B G T"]
    """What else a segment holds."""
    segment: Int[Array, "B G T"]
    """The number of it that each token is in."""
    within: Bool[Array, "B G T s"]


def _cut(tokens: Int[Array, "B G T"], mask: Bool[Array, "B G T"], vocab: Vocab) -> _Cut:
    loc = mask & (tokens >= vocab.loc0) & (tokens < vocab.loc0 + LOC_TOKENS)
    separator = mask & _among(tokens, vocab.separators)
    segment = jnp.cumsum(separator, axis=-1)
    within = (segment[..., None] == jnp.arange(tokens.shape[-1])) & mask[..., None]
    cut = _Cut(loc, mask & ~loc & ~separator & (tokens != EOS), segment, within)
    lead = _among(tokens, vocab.spaces) & (_before_in_segment(cut, loc) == 0)
    return cut._replace(
        text=cut.text & ~lead
    )  # without the lone space that sentencepiece leaves before a later box


def _per_segment(cut: _Cut, flags: Bool[Array, "B G T"]) -> Int[Array, "B G s"]:
    return jnp.sum(cut.within & flags[..., None], axis=-2)


def _before_in_segment(cut: _Cut, flags: Bool[Array, "B G T"]) -> Int[Array, "B G T"]:
    totals = _per_segment(cut, flags)
    earlier = jnp.take_along_axis(
        jnp.cumsum(totals, axis=-1) - totals, cut.segment.clip(max=flags.shape[-1] - 1), axis=-1
    )
    return jnp.cumsum(flags, axis=-1) - flags - earlier


def _among(tokens: Int[Array, "..."], ids: tuple[int, ...]) -> Bool[Array, "..."]:
    return jnp.isin(tokens, jnp.array(ids, jnp.int32))


def _first(
    used: Bool[Array, "B G s"],
    slots: int,
    place: Float[Array, "B G s c"],
    label: Int[Array, "B G s"],
) -> tuple[Float[Array, "B G K c"], Int[Array, "B G K"], Bool[Array, "B G K"]]:
    """Returns the used entries in order, in at least one and at most `slots` slots."""
    order = jnp.argsort(~used, axis=-1, stable=True)[..., : max(slots, 1)]
    taken = jnp.take_along_axis(used, order, axis=-1)
    place = jnp.take_along_axis(place, order[..., None], axis=-2)
    return (
        jnp.where(taken[..., None], place, 0),
        jnp.where(taken, jnp.take_along_axis(label, order, axis=-1), 0),
        taken,
    )


def iou(answer: Answer, batch: Batch, _: RewardSettings) -> Float[Array, "B G"]:
    """Returns the matched IoU of predicted and gold boxes, in [0, 1]."""
    return _boxes_alike(answer, batch, boxes.iou)


def iou_squared(answer: Answer, batch: Batch, _: RewardSettings) -> Float[Array, "B G"]:
    """Returns the matched squared IoU of predicted and gold boxes, in [0, 1]: RLLaVA's grounding
    reward.
    """
    return _boxes_alike(answer, batch, lambda a, b: jnp.square(boxes.iou(a, b)))


def giou(answer: Answer, batch: Batch, _: RewardSettings) -> Float[Array, "B G"]:
    """Returns the matched generalised IoU as (1 + GIoU) / 2, in [0, 1]: boxes that miss each other
    still rank by distance.
    """
    return _boxes_alike(answer, batch, lambda a, b: (1 + boxes.giou(a, b)) / 2)


def gaussian_coverage(
    answer: Answer, batch: Batch, settings: RewardSettings
) -> Float[Array, "B G"]:
    """Returns the matched overlap of predicted and gold boxes as Gaussians, in [0, 1]."""
    return _boxes_alike(
        answer, batch, lambda a, b: boxes.gaussian_coverage(a, b, settings.gaussian_alpha)
    )


def gaussian_point(answer: Answer, batch: Batch, settings: RewardSettings) -> Float[Array, "B G"]:
    """Returns how near answers are to the centres of gold boxes, in units of the boxes, in [0, 1].

    For a question about boxes the answers' centres are judged; for one about points the points,
    against the boxes of the objects they should lie on (NaN where the annotation has none).
    """
    gold = batch.gold.boxes

    def alike(yx: Float[Array, "B G P 2"], proper: Bool[Array, "B G P"]) -> Float[Array, "B G P K"]:
        nearness = boxes.gaussian_point(
            yx[..., None, :], gold.yxyx[:, None, None], settings.gaussian_alpha
        )
        return jnp.where(proper[..., None], nearness, 0)

    predicted, points = answer.boxes, answer.points
    by_box = _matched(
        alike(boxes.centre(predicted.yxyx), boxes.is_proper(predicted.yxyx)), predicted, gold
    )
    by_point = _where_located(batch, _matched(alike(points.yx, points.valid), points, gold))
    return jnp.where((batch.gold.target == BOXES)[:, None], by_box, _only(POINTS, batch, by_point))


def distance_gaussian(
    answer: Answer, batch: Batch, settings: RewardSettings
) -> Float[Array, "B G"]:
    """Returns the matched nearness of predicted and gold points, in [0, 1].

    synthetic-grounding's reward, where sigma is in pixels of the scaled image. A share of the
    image's diagonal is the same for all sizes of images; a share of the gold box's diagonal (NaN
    where the annotation has none) for all sizes of objects.
    """
    predicted, gold, longer_px = answer.points, batch.gold.points, settings.distance_max_size_px
    size = batch.size[:, None, None, None]
    if settings.distance_unit == "px":
        sigma_px = settings.distance_sigma_px
    else:
        by_box = settings.distance_unit == "box"
        sides = (
            jnp.maximum(boxes.sides(batch.gold.boxes.yxyx), boxes.ONE_BIN)
            if by_box
            else jnp.ones((1, 1, 2))
        )
        sigma_px = settings.distance_sigma_share * boxes.distance_px(
            sides[:, None, None], size, longer_px
        )
    similarity = boxes.distance_gaussian(
        predicted.yx[..., None, :], gold.yx[:, None, None], size, sigma_px, longer_px
    )
    reward = _only(POINTS, batch, _matched(similarity, predicted, gold))
    return _where_located(batch, reward) if settings.distance_unit == "box" else reward


def point_in_box(answer: Answer, batch: Batch, _: RewardSettings) -> Float[Array, "B G"]:
    """Returns the matched share of points that lie in the boxes of their objects, edges included,
    in [0, 1].

    NaN where the annotation has no box for each point.
    """
    predicted, gold = answer.points, batch.gold.boxes
    inside = boxes.contains(gold.yxyx[:, None, None], predicted.yx[..., None, :]).astype(
        jnp.float32
    )
    return _only(POINTS, batch, _where_located(batch, _matched(inside, predicted, gold)))


def point_in_mask(answer: Answer, batch: Batch, _: RewardSettings) -> Float[Array, "B G"]:
    """Returns the matched share of points that lie in a set cell of the masks of their objects, in
    [0, 1].

    NaN where a point has no mask, and everywhere if `data.mask_size` is 0.
    """
    predicted, gold = answer.points, batch.gold
    b, g, p = predicted.valid.shape
    if not gold.masks.size:
        return jnp.full((b, g), jnp.nan)
    inside = boxes.covers(gold.masks, predicted.yx.reshape(b, 1, g * p, 2)).astype(jnp.float32)
    similarity = jnp.moveaxis(inside.reshape(b, -1, g, p), 1, -1)
    drawn = jnp.all(gold.masks.any(axis=(-1, -2)) | ~gold.points.valid, axis=-1)
    return _only(
        POINTS,
        batch,
        jnp.where(drawn[:, None], _matched(similarity, predicted, gold.points), jnp.nan),
    )


def detection(answer: Answer, batch: Batch, settings: RewardSettings) -> Float[Array, "B G"]:
    """Returns the boxes found, less 0.3 for each duplicate of one, over the number of boxes; in
    (-0.3, 1].

    Mean over the IoU thresholds 0.5 to 0.95, after "Tuning computer vision models with task
    rewards" (arXiv 2302.08242), with one weight for all names. The paper does not normalise: then
    it is in (-0.3·n_predicted, n_gold], and predictions that match nothing cost nothing. Here the
    number of boxes is the larger of gold and predicted, so that these cost too.
    """
    predicted, gold = answer.boxes, batch.gold.boxes
    may_match = _same_name(predicted, gold) & predicted.valid[..., None] & gold.valid[:, None, None]
    overlap = boxes.iou(predicted.yxyx[..., None, :], gold.yxyx[:, None, None])
    seen = boxes.detect(
        overlap, may_match, jnp.ones(gold.valid.shape)[:, None], DETECTION_THRESHOLDS
    )
    shares = (
        RELEASED_SHARES if settings.detection_as_released else (0.1,) * len(DETECTION_THRESHOLDS)
    )
    total = (seen.weight - DUPLICATE_WEIGHT * seen.duplicate_weight) @ jnp.array(shares)
    most = jnp.maximum(predicted.valid.sum(axis=-1), gold.valid.sum(axis=-1)[:, None])
    worth = total / jnp.maximum(most, 1) if settings.detection_normalise else total
    return _only(BOXES, batch, jnp.where(most == 0, 1.0, worth))


def label(answer: Answer, batch: Batch, _: RewardSettings) -> Float[Array, "B G"]:
    """Returns the set similarity of the names alone, 2·Σ min(n_predicted, n_gold) / (n_predicted +
    n_gold), in [0, 1].

    Σ is over names. Where a question has one name or none, every answer bears it, and this compares
    the numbers of answers.
    """
    names = jnp.arange(batch.gold.names.shape[1])

    def alike(
        predicted: Boxes | Points, proper: Bool[Array, "B G P"], gold: Boxes | Points
    ) -> Float[Array, "B G"]:
        mine = jnp.sum(
            (predicted.label[..., None] == names) & (predicted.valid & proper)[..., None], axis=-2
        )
        theirs = jnp.sum((gold.label[..., None] == names) & gold.valid[..., None], axis=-2)
        total = predicted.valid.sum(axis=-1) + gold.valid.sum(axis=-1)[:, None]
        return jnp.where(
            total == 0,
            1.0,
            2 * jnp.minimum(mine, theirs[:, None]).sum(axis=-1) / jnp.maximum(total, 1),
        )

    by_box = alike(answer.boxes, boxes.is_proper(answer.boxes.yxyx), batch.gold.boxes)
    by_point = alike(answer.points, answer.points.valid, batch.gold.points)
    return jnp.where((batch.gold.target == BOXES)[:, None], by_box, _only(POINTS, batch, by_point))


def format(answer: Answer, batch: Batch, _: RewardSettings) -> Float[Array, "B G"]:
    """Returns 1 for a completion that is an answer of the asked kind from its first token to EOS,
    its boxes proper, else 0.

    Where there is nothing to find, the right answer is EOS alone.
    """
    silent = answer.finished & (answer.stray == 0) & (_count(answer, batch) == 0)
    proper = jnp.all(boxes.is_proper(answer.boxes.yxyx) | ~answer.boxes.valid, axis=-1)
    right = jnp.where(
        (_gold_count(batch) == 0)[:, None], silent, answer.grammatical & proper
    ).astype(jnp.float32)
    return jnp.where((batch.gold.target == TEXT)[:, None], jnp.nan, right)


def count(answer: Answer, batch: Batch, _: RewardSettings) -> Float[Array, "B G"]:
    """Returns 1 for as many answers of the asked kind as there are gold ones, else 0."""
    right = (_count(answer, batch) == _gold_count(batch)[:, None]).astype(jnp.float32)
    return jnp.where((batch.gold.target == TEXT)[:, None], jnp.nan, right)


def count_graded(answer: Answer, batch: Batch, _: RewardSettings) -> Float[Array, "B G"]:
    """Returns 1 / (1 + |n_predicted - n_gold|), in (0, 1], for answers of the asked kind."""
    off = jnp.abs(_count(answer, batch) - _gold_count(batch)[:, None])
    return jnp.where((batch.gold.target == TEXT)[:, None], jnp.nan, 1 / (1 + off))


def length(answer: Answer, _: Batch, __: RewardSettings) -> Float[Array, "B G"]:
    """Returns the share of a completion's room that it leaves, 1 - tokens / T, in [0, 1]. EOS is a
    token.
    """
    return 1 - answer.mask.mean(axis=-1)


def repetition(answer: Answer, _: Batch, settings: RewardSettings) -> Float[Array, "B G"]:
    """Returns minus the share of the completion's n-grams of tokens that occur earlier in it, in
    (-1, 0]; 0 if there are none.
    """
    n, room = settings.repetition_ngram, answer.tokens.shape[-1]
    starts = max(room - n + 1, 0)
    equal = answer.tokens[..., :, None] == answer.tokens[..., None, :]
    alike = jnp.ones((*answer.tokens.shape[:2], starts, starts), bool)
    for k in range(min(n, room)):
        alike &= equal[..., k : k + starts, k : k + starts]
    again = jnp.any(alike & (jnp.arange(starts) < jnp.arange(starts)[:, None]), axis=-1)
    whole = answer.mask[..., n - 1 :]
    return 0 - jnp.sum(again & whole, axis=-1) / jnp.maximum(whole.sum(axis=-1), 1)


def overlong(answer: Answer, _: Batch, settings: RewardSettings) -> Float[Array, "B G"]:
    """Returns DAPO's soft overlong punishment in tokens (arXiv 2503.14476, equation 13), in [-1,
    0].

    It falls from 0 to -1 over the last `overlong_cache_tokens` before the longest length that is
    wanted.
    """
    longest, cache = (
        settings.overlong_max_tokens or answer.tokens.shape[-1],
        settings.overlong_cache_tokens,
    )
    return jnp.clip((longest - cache - answer.mask.sum(axis=-1)) / cache, -1, 0)


REWARDS: dict[str, Reward] = {
    "iou": iou,
    "iou_squared": iou_squared,
    "giou": giou,
    "gaussian_point": gaussian_point,
    "gaussian_coverage": gaussian_coverage,
    "distance_gaussian": distance_gaussian,
    "point_in_box": point_in_box,
    "point_in_mask": point_in_mask,
    "detection": detection,
    "label": label,
    "format": format,
    "count": count,
    "count_graded": count_graded,
    "length": length,
    "repetition": repetition,
    "overlong": overlong,
}


def by_name(name: str) -> Reward:
    """Returns a reward of the package.

    Raises:
      UserError: no such reward.
    """
    if name not in REWARDS:
        raise UserError(f"config.grpo.rewards.{name} does not exist: {nearest(name, REWARDS)}")
    return REWARDS[name]


def score(
    answer: Answer,
    batch: Batch,
    weights: Mapping[str, float | Float[Array, ""]],
    settings: RewardSettings,
    rewards: Mapping[str, Reward] = REWARDS,
    told: Mapping[str, Float[Array, "B G"]] = {},
    counted: frozenset[str] | None = None,
) -> Rewards:
    """Returns every reward named in `weights`, and their weighted sum over those that apply (NaN
    where none does).

    Args:
      rewards: functions by name.
      told: rewards that were computed elsewhere.
      counted: names of those that make a completion judged, and are not only measured; None is
        those with a weight.

    Raises:
      KeyError: a name that is neither in `rewards` nor told.
    """
    parts = {
        name: told[name] if name in told else rewards[name](answer, batch, settings)
        for name in weights
    }
    counted = frozenset(name for name in weights if weights[name]) if counted is None else counted
    judged = jnp.stack([~jnp.isnan(part) for name, part in parts.items() if name in counted])
    total = jnp.stack([weights[name] * jnp.nan_to_num(part) for name, part in parts.items()]).sum(
        axis=0
    )
    return Rewards(jnp.where(judged.any(axis=0), total, jnp.nan), parts)


def measures(
    rollout: Rollout,
    answer: Answer,
    rewards: Rewards,
    weights: Mapping[str, float | Float[Array, ""]],
) -> dict[str, Float[Array, ""]]:
    """Returns means over the completions that each reward could judge, raw and weighted, and what
    the completions look like.
    """
    parts = {name: jnp.nanmean(part) for name, part in rewards.parts.items()}
    return {
        **{f"reward/{name}": mean for name, mean in parts.items()},
        **{f"reward/weighted/{name}": weights[name] * mean for name, mean in parts.items()},
        "reward/total": jnp.nanmean(rewards.total),
        "reward/std": group_std(rewards.total).mean(),
        "group/zero_std_fraction": jnp.mean(~has_spread(rewards.total)),
        "completion/length": rollout.mask.sum(axis=-1).mean(),
        "completion/unfinished_fraction": jnp.mean(~answer.finished),
        "completion/malformed_fraction": jnp.mean(~answer.grammatical),
    }


def _boxes_alike(
    answer: Answer, batch: Batch, similarity: Callable[[Array, Array], Array]
) -> Float[Array, "B G"]:
    predicted, gold = answer.boxes, batch.gold.boxes
    alike = similarity(predicted.yxyx[..., None, :], gold.yxyx[:, None, None])
    return _only(
        BOXES,
        batch,
        _matched(jnp.where(boxes.is_proper(predicted.yxyx)[..., None], alike, 0), predicted, gold),
    )


def _same_name(predicted: Boxes | Points, gold: Boxes | Points) -> Bool[Array, "B G P K"]:
    return predicted.label[..., None] == gold.label[:, None, None]


def _matched(
    similarity: Float[Array, "B G P K"], predicted: Boxes | Points, gold: Boxes | Points
) -> Float[Array, "B G"]:
    within_name = jnp.where(_same_name(predicted, gold), similarity, 0)
    return boxes.set_similarity(within_name, predicted.valid, gold.valid[:, None])


def _where_located(batch: Batch, reward: Float[Array, "B G"]) -> Float[Array, "B G"]:
    """Returns `reward`, NaN where the points have no boxes of the objects they lie on."""
    located = batch.gold.boxes.valid.sum(axis=-1) == batch.gold.points.valid.sum(axis=-1)
    return jnp.where(located[:, None], reward, jnp.nan)


def _only(kind: int, batch: Batch, reward: Float[Array, "B G"]) -> Float[Array, "B G"]:
    return jnp.where((batch.gold.target == kind)[:, None], reward, jnp.nan)


def _count(answer: Answer, batch: Batch) -> Int[Array, "B G"]:
    asks_boxes = (batch.gold.target == BOXES)[:, None]
    return jnp.where(asks_boxes, answer.boxes.valid.sum(axis=-1), answer.points.valid.sum(axis=-1))


def _gold_count(batch: Batch) -> Int[Array, " B"]:
    gold = batch.gold
    return jnp.where(
        gold.target == BOXES, gold.boxes.valid.sum(axis=-1), gold.points.valid.sum(axis=-1)
    )

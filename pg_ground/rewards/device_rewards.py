"""Rewards on token ids, computed inside `jit`.

A reward is a function `(Answer, Batch, RewardSettings) -> f32[B, G]`. It is NaN at a question to
which it does not apply. Sets of locations are matched one to one within names, for the largest
total similarity Σ, and score 2·Σ / (n_predicted + n_gold). So missing, spurious and duplicate
predictions lower the score. An improper box is a prediction with similarity 0. An empty answer
scores 1 if there is nothing to find.

An answer can only name whole loc bins. `score` therefore moves gold boxes and points to the bins
that the gold answer names, so that no answer earns more than the gold answer.
"""

from collections.abc import Callable, Mapping

import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from pg_ground import boxes
from pg_ground.config import RewardSettings
from pg_ground.rl.advantages import group_std, has_spread
from pg_ground.types import (
    BOXES,
    POINTS,
    TEXT,
    Answer,
    Array,
    Batch,
    Boxes,
    Gold,
    Metrics,
    Points,
    Rewards,
    Rollout,
    UserError,
    nearest,
)

Reward = Callable[[Answer, Batch, RewardSettings], Float[Array, "B G"]]

DETECTION_THRESHOLDS = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
"""Thresholds of IoU of `detection`."""

DUPLICATE_WEIGHT = 0.3
"""Cost of a duplicate detection, as in the released settings of arXiv 2302.08242."""

RELEASED_SHARES = (0.1, 0, 0.2, 0, 0.2, 0, 0, 0.3, 0, 0.2)
"""Shares of the thresholds in big_vision's mean.

Its code stores results under the threshold's first decimal. A later threshold with the same decimal
overwrites an earlier one.
"""


def iou(answer: Answer, batch: Batch, _: RewardSettings) -> Float[Array, "B G"]:
    """Returns the matched IoU of predicted and gold boxes, in [0, 1]."""
    return _matched_boxes(answer, batch, boxes.iou)


def iou_squared(answer: Answer, batch: Batch, _: RewardSettings) -> Float[Array, "B G"]:
    """Returns the matched IoU² of predicted and gold boxes, in [0, 1]: RLLaVA's reward."""
    return _matched_boxes(answer, batch, lambda a, b: jnp.square(boxes.iou(a, b)))


def giou(answer: Answer, batch: Batch, _: RewardSettings) -> Float[Array, "B G"]:
    """Returns the matched generalised IoU as (1 + GIoU) / 2, in [0, 1].

    Boxes that do not overlap still rank by their distance.
    """
    return _matched_boxes(answer, batch, lambda a, b: (1 + boxes.giou(a, b)) / 2)


def gaussian_coverage(
    answer: Answer, batch: Batch, settings: RewardSettings
) -> Float[Array, "B G"]:
    """Returns the matched overlap of predicted and gold boxes as Gaussians, in [0, 1]."""
    alpha = settings.gaussian_alpha
    return _matched_boxes(answer, batch, lambda a, b: boxes.gaussian_coverage(a, b, alpha))


def gaussian_point(answer: Answer, batch: Batch, settings: RewardSettings) -> Float[Array, "B G"]:
    """Returns the nearness of answers to the centres of gold boxes, in [0, 1].

    The unit of the distance is the gold box's side. A question about boxes compares the centres of
    the predicted boxes. A question about points compares the points with the boxes of their
    objects; it is NaN if the annotation has none.
    """
    gold = batch.gold.boxes

    def nearness(
        yx: Float[Array, "B G P 2"], valid: Bool[Array, "B G P"]
    ) -> Float[Array, "B G P K"]:
        similarity = boxes.gaussian_point(
            yx[..., None, :], gold.yxyx[:, None, None], settings.gaussian_alpha
        )
        return jnp.where(valid[..., None], similarity, 0)

    predicted, points = answer.boxes, answer.points
    centres = nearness(boxes.centre(predicted.yxyx), boxes.is_proper(predicted.yxyx))
    of_boxes = _set_similarity(centres, predicted, gold)
    of_points = _set_similarity(nearness(points.yx, points.valid), points, gold)
    of_points = _only(POINTS, batch, _if_points_have_boxes(batch, of_points))
    return jnp.where((batch.gold.target == BOXES)[:, None], of_boxes, of_points)


def distance_gaussian(
    answer: Answer, batch: Batch, settings: RewardSettings
) -> Float[Array, "B G"]:
    """Returns the matched nearness of predicted and gold points, in [0, 1].

    This is synthetic-grounding's reward, with sigma in pixels of the scaled image. Other units:
    a share of the image's diagonal, which is the same for all sizes of images, or a share of the
    gold box's diagonal, which is the same for all sizes of objects. The latter is NaN if the
    annotation has no boxes.
    """
    predicted, gold = answer.points, batch.gold.points
    longer_px = settings.distance_max_size_px
    size = batch.size[:, None, None, None]
    similarity = boxes.distance_gaussian(
        predicted.yx[..., None, :],
        gold.yx[:, None, None],
        size,
        _sigma_px(batch, size, settings),
        longer_px,
    )
    reward = _only(POINTS, batch, _set_similarity(similarity, predicted, gold))
    by_box = settings.distance_unit == "box"
    return _if_points_have_boxes(batch, reward) if by_box else reward


def _sigma_px(
    batch: Batch, size: Int[Array, "B 1 1 1 2"], settings: RewardSettings
) -> float | Float[Array, "B 1 1 K"]:
    """Returns sigma of `distance_gaussian`, in pixels of the scaled image."""
    if settings.distance_unit == "px":
        return settings.distance_sigma_px
    sides = jnp.ones((1, 1, 2))
    if settings.distance_unit == "box":
        sides = jnp.maximum(boxes.sides(batch.gold.boxes.yxyx), boxes.ONE_BIN)
    diagonal_px = boxes.distance_px(sides[:, None, None], size, settings.distance_max_size_px)
    return settings.distance_sigma_share * diagonal_px


def point_in_box(answer: Answer, batch: Batch, _: RewardSettings) -> Float[Array, "B G"]:
    """Returns the matched share of points in the boxes of their objects, edges included, in [0, 1].

    The value is NaN if the annotation has no box for each point.
    """
    predicted, gold = answer.points, batch.gold.boxes
    inside = boxes.contains(gold.yxyx[:, None, None], predicted.yx[..., None, :])
    reward = _set_similarity(inside.astype(jnp.float32), predicted, gold)
    return _only(POINTS, batch, _if_points_have_boxes(batch, reward))


def point_in_mask(answer: Answer, batch: Batch, _: RewardSettings) -> Float[Array, "B G"]:
    """Returns the matched share of points in a set cell of the masks of their objects, in [0, 1].

    A point is the square of its loc bin, so that a gold point at the edge of its mask stays in the
    mask. The value is NaN if a gold point has no mask, and everywhere if `data.mask_size` is 0.
    """
    predicted, gold = answer.points, batch.gold
    b, g, p = predicted.valid.shape
    if not gold.masks.size:
        return jnp.full((b, g), jnp.nan)
    corners = jnp.array([(-0.5, -0.5), (-0.5, 0.5), (0.5, -0.5), (0.5, 0.5)]) * boxes.ONE_BIN
    yx = predicted.yx[..., None, :] + corners
    inside = boxes.covers(gold.masks, yx.reshape(b, 1, g * p * 4, 2))
    inside = inside.reshape(b, -1, g, p, 4).any(axis=-1).astype(jnp.float32)
    similarity = jnp.moveaxis(inside, 1, -1)
    reward = _set_similarity(similarity, predicted, gold.points)
    return _only(POINTS, batch, _if_all_have_masks(batch, gold.points.valid, reward))


def mask_iou(answer: Answer, batch: Batch, _: RewardSettings) -> Float[Array, "B G"]:
    """Returns the matched IoU of predicted and gold masks, in [0, 1], in cells of `data.mask_size`.

    A box without a mask is a prediction with similarity 0. The value is NaN if a gold box has no
    mask, and everywhere if `data.mask_size` is 0 or masks are not decoded.
    """
    if not (answer.masks.size and batch.gold.masks.size):
        return jnp.full(answer.finished.shape, jnp.nan)
    similarity = boxes.pairwise_mask_iou(answer.masks, batch.gold.masks[:, None])
    reward = _set_similarity(similarity, answer.boxes, batch.gold.boxes)
    return _only(BOXES, batch, _if_all_have_masks(batch, batch.gold.boxes.valid, reward))


def detection(answer: Answer, batch: Batch, settings: RewardSettings) -> Float[Array, "B G"]:
    """Returns (detected boxes − 0.3 · duplicates) / number of boxes, in (-0.3, 1].

    The value is the mean over the IoU thresholds 0.5 to 0.95, after "Tuning computer vision models
    with task rewards" (arXiv 2302.08242), with the same weight for all names. The number of boxes
    is the larger of gold and predicted, so that predictions that match nothing lower the value.
    The paper does not divide: then the value is in (-0.3·n_predicted, n_gold], and predictions that
    match nothing cost nothing.
    """
    predicted, gold = answer.boxes, batch.gold.boxes
    may_match = _same_name(predicted, gold) & predicted.valid[..., None] & gold.valid[:, None, None]
    overlap = boxes.pairwise_iou(predicted.yxyx, gold.yxyx[:, None])
    weight = jnp.ones(gold.valid.shape)[:, None]
    detections = boxes.detect(overlap, may_match, weight, DETECTION_THRESHOLDS)
    even_shares = (0.1,) * len(DETECTION_THRESHOLDS)
    shares = jnp.array(RELEASED_SHARES if settings.detection_as_released else even_shares)
    total = (detections.weight - DUPLICATE_WEIGHT * detections.duplicate_weight) @ shares
    number = jnp.maximum(predicted.valid.sum(axis=-1), gold.valid.sum(axis=-1)[:, None])
    reward = total / jnp.maximum(number, 1) if settings.detection_normalise else total
    return _only(BOXES, batch, jnp.where(number == 0, 1.0, reward))


def label(answer: Answer, batch: Batch, _: RewardSettings) -> Float[Array, "B G"]:
    """Returns the similarity of the sets of names, in [0, 1].

    It is 2·Σ min(n_predicted, n_gold) / (n_predicted + n_gold), with Σ over names. If a question
    has at most one name, all locations have that name, and the value compares their numbers.
    """
    names = jnp.arange(batch.gold.names.shape[1])

    def similarity(
        predicted: Boxes | Points, proper: Bool[Array, "B G P"], gold: Boxes | Points
    ) -> Float[Array, "B G"]:
        is_named = (predicted.label[..., None] == names) & (predicted.valid & proper)[..., None]
        is_named_gold = (gold.label[..., None] == names) & gold.valid[..., None]
        common = jnp.minimum(is_named.sum(axis=-2), is_named_gold.sum(axis=-2)[:, None])
        sizes = predicted.valid.sum(axis=-1), gold.valid.sum(axis=-1)[:, None]
        return boxes.f_measure(common.sum(axis=-1), *sizes)

    of_boxes = similarity(answer.boxes, boxes.is_proper(answer.boxes.yxyx), batch.gold.boxes)
    of_points = similarity(answer.points, answer.points.valid, batch.gold.points)
    return jnp.where(
        (batch.gold.target == BOXES)[:, None], of_boxes, _only(POINTS, batch, of_points)
    )


def format(answer: Answer, batch: Batch, _: RewardSettings) -> Float[Array, "B G"]:
    """Returns 1 for a completion that follows the grammar and whose boxes are proper, else 0.

    The whole completion must be an answer of the asked kind that ends in EOS. If there is nothing
    to find, EOS alone is the right answer.
    """
    silent = answer.finished & (answer.mask.sum(axis=-1) == 1)
    proper = jnp.all(boxes.is_proper(answer.boxes.yxyx) | ~answer.boxes.valid, axis=-1)
    nothing_to_find = (_gold_count(batch) == 0)[:, None]
    right = jnp.where(nothing_to_find, silent, answer.grammatical & proper)
    return _unless_text(batch, right.astype(jnp.float32))


def count(answer: Answer, batch: Batch, _: RewardSettings) -> Float[Array, "B G"]:
    """Returns 1 if the number of predictions of the asked kind is the gold number, else 0."""
    right = _predicted_count(answer, batch) == _gold_count(batch)[:, None]
    return _unless_text(batch, right.astype(jnp.float32))


def count_graded(answer: Answer, batch: Batch, _: RewardSettings) -> Float[Array, "B G"]:
    """Returns 1 / (1 + |n_predicted - n_gold|), in (0, 1], for predictions of the asked kind."""
    difference = jnp.abs(_predicted_count(answer, batch) - _gold_count(batch)[:, None])
    return _unless_text(batch, 1 / (1 + difference))


def length(answer: Answer, _: Batch, __: RewardSettings) -> Float[Array, "B G"]:
    """Returns the unused share of the longest completion, 1 - tokens / T, in [0, 1].

    EOS is a token.
    """
    return 1 - answer.mask.mean(axis=-1)


def repetition(answer: Answer, _: Batch, settings: RewardSettings) -> Float[Array, "B G"]:
    """Returns minus the share of the completion's n-grams of tokens that occur earlier in it.

    The value is in (-1, 0], and 0 if there are no n-grams.
    """
    n, tokens = settings.repetition_ngram, answer.tokens
    starts = max(tokens.shape[-1] - n + 1, 0)
    same_token = tokens[..., :, None] == tokens[..., None, :]
    same = jnp.ones((*tokens.shape[:2], starts, starts), bool)
    for offset in range(min(n, tokens.shape[-1])):
        same &= same_token[..., offset : offset + starts, offset : offset + starts]
    is_earlier = jnp.arange(starts) < jnp.arange(starts)[:, None]
    repeated = jnp.any(same & is_earlier, axis=-1)
    complete = answer.mask[..., n - 1 :]  # the last token of the n-gram is in the completion
    number = jnp.maximum(complete.sum(axis=-1), 1)
    return 0 - jnp.sum(repeated & complete, axis=-1) / number


def overlong(answer: Answer, _: Batch, settings: RewardSettings) -> Float[Array, "B G"]:
    """Returns DAPO's soft overlong punishment in tokens, in [-1, 0].

    It falls from 0 to -1 over the last `overlong_cache_tokens` tokens before
    `overlong_max_tokens` (arXiv 2503.14476, equation 13).
    """
    longest = settings.overlong_max_tokens or answer.tokens.shape[-1]
    cache = settings.overlong_cache_tokens
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
    "mask_iou": mask_iou,
    "detection": detection,
    "label": label,
    "format": format,
    "count": count,
    "count_graded": count_graded,
    "length": length,
    "repetition": repetition,
    "overlong": overlong,
}


def get_reward(name: str) -> Reward:
    """Returns a reward of `REWARDS`.

    Raises:
      UserError: there is no reward of this name.
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
    precomputed: Mapping[str, Float[Array, "B G"]] = {},
    active: frozenset[str] | None = None,
) -> Rewards:
    """Returns every reward of `weights`, and the weighted sum of those that apply.

    The rewards compare answers with `gold_answer(batch.gold)`. The sum is NaN for a completion to
    which no active reward applies.

    Args:
      rewards: functions by name.
      precomputed: scores by name that were computed elsewhere, such as text rewards.
      active: names of the rewards that training uses; the others are only measured. None means
        the rewards whose weight is not 0.

    Raises:
      KeyError: a name of `weights` is in neither `rewards` nor `precomputed`.
    """
    batch = batch._replace(gold=gold_answer(batch.gold))
    parts = {
        name: precomputed[name] if name in precomputed else rewards[name](answer, batch, settings)
        for name in weights
    }
    if active is None:
        active = frozenset(name for name in weights if weights[name])
    applies = jnp.stack([~jnp.isnan(part) for name, part in parts.items() if name in active])
    weighted = jnp.stack([weights[name] * jnp.nan_to_num(part) for name, part in parts.items()])
    return Rewards(jnp.where(applies.any(axis=0), weighted.sum(axis=0), jnp.nan), parts)


def gold_answer(gold: Gold) -> Gold:
    """Returns `gold` with its boxes and points at the loc bins that the gold answer names.

    The bins are those of `data.examples.loc_text`: a box is at least one bin wide and high.
    """
    yxyx = boxes.decode_loc(boxes.whole_corners(gold.boxes.yxyx))
    yx = boxes.decode_loc(boxes.encode_loc(gold.points.yx))
    return gold._replace(boxes=gold.boxes._replace(yxyx=yxyx), points=gold.points._replace(yx=yx))


def reward_metrics(
    rollout: Rollout,
    answer: Answer,
    rewards: Rewards,
    weights: Mapping[str, float | Float[Array, ""]],
) -> Metrics:
    """Returns the means of rewards, raw and weighted, and statistics of the completions.

    A mean is over the completions to which the reward applies.
    """
    parts = {name: jnp.nanmean(part) for name, part in rewards.parts.items()}
    return {
        **{f"reward/{name}": mean for name, mean in parts.items()},
        **{f"reward/weighted/{name}": weights[name] * mean for name, mean in parts.items()},
        "reward/total": jnp.nanmean(rewards.total),
        "reward/unscored_fraction": jnp.mean(jnp.isnan(rewards.total)),
        "reward/std": group_std(rewards.total).mean(),
        "group/zero_std_fraction": jnp.mean(~has_spread(rewards.total)),
        "completion/length": rollout.mask.sum(axis=-1).mean(),
        "completion/unfinished_fraction": jnp.mean(~answer.finished),
        "completion/malformed_fraction": jnp.mean(~answer.grammatical),
    }


def _matched_boxes(
    answer: Answer, batch: Batch, similarity: Callable[[Array, Array], Array]
) -> Float[Array, "B G"]:
    """Returns the set similarity of predicted and gold boxes, NaN at other questions."""
    predicted, gold = answer.boxes, batch.gold.boxes
    table = similarity(predicted.yxyx[..., None, :], gold.yxyx[:, None, None])
    table = jnp.where(boxes.is_proper(predicted.yxyx)[..., None], table, 0)
    return _only(BOXES, batch, _set_similarity(table, predicted, gold))


def _set_similarity(
    similarity: Float[Array, "B G P K"], predicted: Boxes | Points, gold: Boxes | Points
) -> Float[Array, "B G"]:
    """Returns `boxes.set_similarity` with matches only between equal names."""
    within_name = jnp.where(_same_name(predicted, gold), similarity, 0)
    return boxes.set_similarity(within_name, predicted.valid, gold.valid[:, None])


def _same_name(predicted: Boxes | Points, gold: Boxes | Points) -> Bool[Array, "B G P K"]:
    return predicted.label[..., None] == gold.label[:, None, None]


def _if_points_have_boxes(batch: Batch, reward: Float[Array, "B G"]) -> Float[Array, "B G"]:
    """Returns `reward`, NaN at questions whose gold points do not all have the box of an object."""
    gold = batch.gold
    have_boxes = gold.boxes.valid.sum(axis=-1) == gold.points.valid.sum(axis=-1)
    return jnp.where(have_boxes[:, None], reward, jnp.nan)


def _if_all_have_masks(
    batch: Batch, valid: Bool[Array, "B K"], reward: Float[Array, "B G"]
) -> Float[Array, "B G"]:
    """Returns `reward`, NaN at questions with a valid gold slot that has no mask."""
    have_masks = jnp.all(batch.gold.masks.any(axis=(-1, -2)) | ~valid, axis=-1)
    return jnp.where(have_masks[:, None], reward, jnp.nan)


def _only(target: int, batch: Batch, reward: Float[Array, "B G"]) -> Float[Array, "B G"]:
    """Returns `reward`, NaN at questions that ask for another target."""
    return jnp.where((batch.gold.target == target)[:, None], reward, jnp.nan)


def _unless_text(batch: Batch, reward: Float[Array, "B G"]) -> Float[Array, "B G"]:
    """Returns `reward`, NaN at questions that ask for text."""
    return jnp.where((batch.gold.target == TEXT)[:, None], jnp.nan, reward)


def _predicted_count(answer: Answer, batch: Batch) -> Int[Array, "B G"]:
    asks_boxes = (batch.gold.target == BOXES)[:, None]
    return jnp.where(asks_boxes, answer.boxes.valid.sum(axis=-1), answer.points.valid.sum(axis=-1))


def _gold_count(batch: Batch) -> Int[Array, " B"]:
    gold = batch.gold
    asks_boxes = gold.target == BOXES
    return jnp.where(asks_boxes, gold.boxes.valid.sum(axis=-1), gold.points.valid.sum(axis=-1))

"""Checks of a source before training: the lengths of its texts, and the unit of its coordinates."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pg_ground.config import Data
from pg_ground.data.box_formats import image_extent, split_format
from pg_ground.data.datasets import Examples
from pg_ground.data.examples import format_answer, read_question
from pg_ground.data.records import BadRecord
from pg_ground.tokenizer import Tokenizer
from pg_ground.types import Array, Example, UserError

PROBED_IMAGES = 16
"""Questions of a source whose images are opened."""

CORNER = 0.3
"""The part of each axis, from 0, in which coordinates of a wrong unit lie.

Percent values that are read as pixels lie in it if the sides of the image have at least 334 pixels.
"""

FINER_EXTENT = {"px": 100, "bin": 100, "percent": 1}
"""The extent of an image in the unit that is mistaken for this unit.

Percent is mistaken for pixels and for bins, and fractions for percent. No coordinate of a source in
the mistaken unit is above this number.
"""

LONGEST_SIDE = 9999
"""The image size in pixels that the length of a JSON answer is measured with."""


class Needs(NamedTuple):
    """The lengths that one question needs. The fields have the names of the settings."""

    prompt_length: int
    suffix_length: int
    max_boxes: int


class Budget(NamedTuple):
    """The lengths that the questions of a source need."""

    source: str
    questions: int
    measured: int
    """How many of the questions were measured."""
    prompt_tokens: int
    suffix_tokens: int
    objects: int
    worst: dict[str, int]
    """The question that needs most, by the setting prompt_length, suffix_length or max_boxes."""


def measure_budget(dataset: Examples, tokenizer: Tokenizer, data: Data) -> Budget:
    """Returns the longest prompt and suffix in tokens, and the largest number of objects.

    Measures `data.check_records` questions of the source, and opens the images of `PROBED_IMAGES`
    of these. No other image is opened or fetched.

    Raises:
      UserError: none of the first questions can be used; or no probed image; or all coordinates are
        in one corner, which is the sign of a wrong unit.
    """
    indices = _spread(len(dataset), data.check_records)
    readable: list[int] = []
    needs: list[Needs] = []
    failures: list[str] = []
    for index in indices:
        try:
            needs.append(_measure(dataset, index, tokenizer))
            readable.append(index)
        except BadRecord as bad:
            failures.append(f"question {index}: {bad}")
            if not needs and len(failures) == min(PROBED_IMAGES, len(indices)):
                raise _none_usable(dataset, failures) from None
    check_units(dataset, [readable[i] for i in _spread(len(readable), PROBED_IMAGES)])
    largest = [max(lengths) for lengths in zip(Needs(0, 0, 0), *needs, strict=True)]
    worst = {
        setting: next(
            (i for i, need in zip(readable, needs, strict=True) if need[field] == largest[field]), 0
        )
        for field, setting in enumerate(Needs._fields)
    }
    prompt_tokens, suffix_tokens, objects = largest
    return Budget(
        dataset.name, len(dataset), len(indices), prompt_tokens, suffix_tokens, objects, worst
    )


def _measure(dataset: Examples, index: int, tokenizer: Tokenizer) -> Needs:
    """Returns the lengths of one question. Its image is not opened."""
    record, element = dataset.record(index)
    prompt, annotation = read_question(record, dataset.source, element)
    asks_points = dataset.source.target == "points"
    objects = annotation.points if asks_points else annotation.boxes
    count = min(len(objects), dataset.source.max_objects or len(objects))
    fractions = np.zeros((count, objects.shape[1]), np.float32)
    labels: Sequence[str] = ("",) * count
    if annotation.labels:
        # Chance chooses the objects, so the ones with the longest names are assumed.
        labels = sorted(annotation.labels, key=len)[len(objects) - count :]
    size = (LONGEST_SIDE, LONGEST_SIDE)
    suffix = format_answer(dataset.source, record, element, fractions, labels, size)
    return Needs(
        len(tokenizer.prefix(prompt)),
        len(tokenizer.suffix(suffix)),
        max(len(annotation.boxes[:count]), count),
    )


def _none_usable(dataset: Examples, failures: Sequence[str]) -> UserError:
    return UserError(
        f"source {dataset.name}: none of {len(failures)} questions can be used; {failures[0]}"
    )


def check_units(dataset: Examples, indices: Sequence[int]) -> None:
    """Raises UserError if no image can be used, or if the coordinates are probably in another unit.

    Percent or fractions that are read as pixels lie in one corner, and so do fractions that are
    read as percent. Right coordinates cause this error only if all objects of all these questions
    are within 100 pixels (or 100 bins, or 1 percent) of the corner.
    """
    examples: list[Example] = []
    failures: list[str] = []
    for index in indices:
        try:
            examples.append(dataset[index])
        except BadRecord as bad:
            if bad.kind != "too_many_boxes":  # `check_budgets` names the setting to raise
                failures.append(f"question {index}: {bad}")
    if failures and len(failures) == len(indices):
        raise _none_usable(dataset, failures)
    boxes = [example.boxes.yxyx[:, 2:] for example in examples]
    points = [example.points.yx for example in examples]
    sizes = [example.size for example in examples]
    _check_unit(dataset, "box_format", dataset.source.box_format, boxes, sizes)
    _check_unit(dataset, "point_format", dataset.source.point_format, points, sizes)


def _check_unit(
    dataset: Examples,
    setting: str,
    format_name: str,
    fractions: Sequence[Array],
    sizes: Sequence[tuple[int, int]],
) -> None:
    """Raises UserError if all coordinates are in one corner and fit a finer unit.

    Args:
      dataset: names the source.
      setting: names the format.
      format_name: the value of the setting.
      fractions: for each image, f32[K, 2] with y and x of the farthest corner of each object.
      sizes: width and height of each image in pixels.
    """
    unit = split_format(format_name)[1]
    images = [(yx, size) for yx, size in zip(fractions, sizes, strict=True) if len(yx)]
    objects = sum(len(yx) for yx, _ in images)
    if len(images) < PROBED_IMAGES // 4 or objects < PROBED_IMAGES // 2:
        return  # the objects of a few pictures may really be in one corner
    share = np.median([yx.max() for yx, _ in images])
    largest = max(np.max(yx * np.array(image_extent(unit, size)[::-1])) for yx, size in images)
    if share < CORNER and largest <= 1.01 * FINER_EXTENT.get(unit, 0):
        raise UserError(
            f"source {dataset.name}: most objects are in the first {CORNER:.0%} of both axes and "
            f"no coordinate is above {largest:.3g}, so {setting} = {format_name!r} has probably "
            f"the wrong unit (px, frac, percent and bin exist)"
        )


def _spread(count: int, limit: int) -> list[int]:
    """Returns at most `limit` of `count` indices, evenly spread from the first to the last."""
    return np.unique(np.linspace(0, count - 1, min(count, limit)).astype(np.int64)).tolist()


def check_budgets(budgets: Sequence[Budget], data: Data) -> None:
    """Raises UserError if a question does not fit the lengths in `data`. Names the longest one."""
    for budget in budgets:
        needs = Needs(budget.prompt_tokens, budget.suffix_tokens, budget.objects)
        for setting, need in needs._asdict().items():
            limit = getattr(data, setting)
            if need <= limit:
                continue
            remedy = "raise it"
            if setting != "prompt_length":
                remedy += ", or set max_objects of the source"
            raise UserError(
                f"source {budget.source}: question {budget.worst[setting]} needs "
                f"data.{setting}={need}, but it is {limit}: {remedy}"
            )

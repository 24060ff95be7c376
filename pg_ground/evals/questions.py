"""Turns one question of a batch, its ground truth and a completion into the fields of a row."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from pg_ground.data import run_lengths
from pg_ground.data.datasets import Examples
from pg_ground.data.record_fields import field_at
from pg_ground.data.records import BadRecord
from pg_ground.evals import answers, benchmarks, cv_bench, question_groups
from pg_ground.evals.image_identity import image_identity
from pg_ground.evals.rows import GREEDY
from pg_ground.readers import locations, parsers
from pg_ground.tokenizer import Tokenizer
from pg_ground.types import Array, Batch, Boxes, JsonDict, JsonObject, Points, UserError


class EvalTask(NamedTuple):
    """One held-out source and the benchmark that it is evaluated on."""

    source: str
    """The reported name. It is `NAME@512` if the evaluation asks only 512 of the questions."""
    examples: Examples
    benchmark: str
    is_configured: bool
    """True if `eval.benchmarks` names the benchmark. Otherwise it follows from the source."""
    number: int
    """Position of the source in `eval.sources`, from 0."""
    limit: int
    """Largest number of questions to ask."""

    @property
    def kind(self) -> str:
        """The kind of the benchmark: a key of `benchmarks.KINDS`."""
        return benchmarks.find_benchmark(self.benchmark, "benchmark").kind


def question_row(task: EvalTask, batch: Batch, slot: int, tokenizer: Tokenizer) -> JsonDict:
    """Returns the row of a question without an answer: the prompt, the image and the ground truth.

    Args:
      slot: index of the question in `batch`.

    Raises:
      UserError: the benchmark cannot use the ground truth of this record.
    """
    index = int(batch.index[slot])
    record, element = task.examples.record(index)
    image = field_at(record, task.examples.source.image, element)
    return {
        "source": task.source,
        "benchmark": task.benchmark,
        "id": index,
        "index": index,
        "image": image_identity(image, task.examples.locate(index)[0]),
        "size_px": list(_image_size(batch, slot)),
        "mode": GREEDY,
        "rollout": 0,
        "prompt": tokenizer.decode(batch.prompt[slot][batch.prompt_mask[slot]].tolist()).strip(),
        "text": "",
        "prediction": {},
        "gold": gold_answer(task, batch, slot, record, tokenizer),
    }


def gold_answer(
    task: EvalTask, batch: Batch, slot: int, record: JsonObject, tokenizer: Tokenizer
) -> JsonDict:
    """Returns the ground truth of a question, in the form that its benchmark reads.

    Raises:
      UserError: the benchmark cannot use the ground truth of this record.
    """
    groups = benchmarks.find_benchmark(task.benchmark, "benchmark").groups
    if not groups:
        return _gold_answer(task, batch, slot, record, tokenizer)
    where = f"source {task.examples.name}: record {int(batch.index[slot])}"
    names = question_groups.read_groups(
        groups, lambda name: question_groups.record_field(record, name), where
    )
    gold = _gold_answer(task, batch, slot, record, tokenizer)
    return question_groups.with_groups(groups, gold, names)


def _gold_answer(
    task: EvalTask, batch: Batch, slot: int, record: JsonObject, tokenizer: Tokenizer
) -> JsonDict:
    suffix = tokenizer.decode(np.asarray(batch.suffix[slot]).tolist())
    if task.kind == "mask_points":
        return _question_mask(task, int(batch.index[slot]), record, _image_size(batch, slot))
    if task.kind == "choice":
        return cv_bench.gold(
            record, f"source {task.examples.name}: record {int(batch.index[slot])}"
        )
    if task.kind == "count":
        return {"number": parsers.number(suffix, strict=False)}
    if task.kind == "text":
        return {"text": parsers.words(suffix)}
    names = [tokenizer.decode(np.asarray(name).tolist()).strip() for name in batch.gold.names[slot]]
    size = _image_size(batch, slot)
    boxes, points = (
        _gold_objects(objects, key, names, slot, size)
        for key, objects in (("xyxy_px", batch.gold.boxes), ("xy_px", batch.gold.points))
    )
    return {"boxes": boxes, "points": points} | _gold_masks(task, batch, slot, len(points))


def _gold_objects(
    objects: Boxes | Points, key: str, names: Sequence[str], slot: int, size: tuple[int, int]
) -> list[JsonDict]:
    """Returns the annotated boxes or points of a question, with labels, in pixels of the image."""
    corners = np.asarray(objects[0][slot], np.float64).reshape(len(objects.valid[slot]), -1, 2)
    pixels = corners[..., ::-1] * size  # (y, x) fractions to (x, y) pixels
    return [
        {
            "label": names[int(objects.label[slot][index])],
            key: [round(value, answers.DIGITS) for value in pixels[index].ravel().tolist()],
        }
        for index in np.flatnonzero(objects.valid[slot]).tolist()
    ]


def _gold_masks(task: EvalTask, batch: Batch, slot: int, object_count: int) -> JsonDict:
    """Returns the ground-truth masks of a question as run lengths.

    The result has `mask` if the benchmark compares masks. This mask has the resolution of the
    image. Otherwise the result has `masks`, at `data.mask_size`, if each of the first
    `object_count` objects has a mask. It is empty if neither holds.
    """
    if task.kind == "mask":
        index = int(batch.index[slot])
        try:
            return {"mask": run_lengths.encode(task.examples.mask(index, _image_size(batch, slot)))}
        except BadRecord as bad:
            raise UserError(f"source {task.examples.name}: question {index}: {bad}") from None
    if not batch.gold.masks.shape[-1] or not object_count:
        return {}
    masks = [np.asarray(batch.gold.masks[slot][index]) for index in range(object_count)]
    if not all(mask.any() for mask in masks):
        return {}
    return {"masks": [run_lengths.encode(mask) for mask in masks]}


def _question_mask(
    task: EvalTask, index: int, record: JsonObject, size: tuple[int, int]
) -> JsonDict:
    """Returns the mask of a question at the resolution of the image, and its number of points."""
    try:
        mask = run_lengths.encode(task.examples.mask(index, size))
    except BadRecord as bad:
        raise UserError(f"source {task.examples.name}: question {index}: {bad}") from None
    count = parsers.number(record.get("count"), strict=False)
    return {"masks": [mask]} | ({} if count is None else {"count": count})


def read_prediction(
    task: EvalTask,
    question: JsonObject,
    text: str,
    tokens: Sequence[int],
    tokenizer: Tokenizer,
) -> JsonDict:
    """Returns the prediction that a completion writes, in the form that the benchmark reads.

    Args:
      question: the result of `question_row`.
      text: the decoded completion.
      tokens: the token ids of the completion.
    """
    if task.kind == "choice":
        return {"choice": parsers.option(text, question["gold"]["choices"], strict=False)}
    if task.kind == "count":
        return {"number": parsers.number(text, strict=False)}
    if task.kind == "text":
        return {"text": parsers.words(text)}
    if task.examples.source.suffix == "json":
        return {
            "boxes": _written_objects(text, 4, "xyxy_px"),
            "points": _written_objects(text, 2, "xy_px"),
        }
    width, height = question["size_px"]
    return answers.loc_answers(tokens, tokenizer, (width, height))


def _written_objects(text: str, width: int, key: str) -> list[JsonDict]:
    """Returns the boxes (`width` 4) or points (`width` 2) that a JSON answer writes in pixels."""
    return [
        {"label": location.label, key: location.numbers and list(location.numbers)}
        for location in locations.read_any(text, width)
    ]


def with_scores(prediction: JsonObject, confidence: Float[Array, " K"]) -> JsonDict:
    """Returns a prediction whose boxes have scores.

    Scores are rounded to six digits. Further digits depend on the number of devices.
    """
    boxes = prediction["boxes"]
    scores = [float(f"{value:.6g}") for value in confidence[: len(boxes)]]
    scored = [{**box, "score": score} for box, score in zip(boxes, scores, strict=True)]
    return {**prediction, "boxes": scored}


def _image_size(batch: Batch, slot: int) -> tuple[int, int]:
    """Returns the width and height in pixels of the original image."""
    return int(batch.size[slot][0]), int(batch.size[slot][1])

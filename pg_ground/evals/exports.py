"""Predictions in the formats of other programs, written beside `predictions.jsonl`.

    coco         coco_gold.json and coco_results.json: pycocotools computes the AP from them.
    supervision  supervision.jsonl: each line has the arguments of `supervision.Detections`.
    lmms_eval    lmms_eval.jsonl: samples of its RefCOCO tasks, for questions with one gold box.
    vlmevalkit   vlmevalkit.tsv and vlmevalkit_predictions.tsv: a data set for its RefCOCODataset,
                 and answers that it scores, for questions with one gold box.

Greedy answers and answers of a file are written. Sampled answers are not.
"""

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from pg_ground.boxes import host_boxes, is_proper
from pg_ground.evals.rows import SAMPLED, Row
from pg_ground.storage.files import write_atomically
from pg_ground.storage.paths import FilePath
from pg_ground.types import JsonDict, UserError


def write_exports(out: FilePath, rows: Sequence[Row], formats: Sequence[str]) -> list[FilePath]:
    """Writes predictions in `formats`, keys of `FORMATS`, to the folder `out`.

    Returns:
      the paths of the files.

    Raises:
      UserError: no row has boxes, or no row fits a format.
    """
    if not formats:
        return []
    boxed = [row for row in rows if row["mode"] != SAMPLED and _has_boxes(row)]
    if not boxed:
        raise UserError(f"--{formats[0]} writes boxes, but none of {len(rows)} rows has boxes")
    texts = {name: text for key in formats for name, text in FORMATS[key](boxed).items()}
    for name, text in texts.items():
        write_atomically(out / name, text)
    return [out / name for name in texts]


def _has_boxes(row: Row) -> bool:
    return "boxes" in row["prediction"] and "boxes" in row["gold"]


def _scored_boxes(rows: Sequence[Row]) -> Iterator[tuple[Row, list[tuple[JsonDict, float]]]]:
    """Yields each row, and its predicted boxes with their scores.

    If a box of any row has no score, scores from 1 down say only the order: the first boxes of all
    answers come before the second boxes, as in our AP. No two scores are equal then, because
    programs order equal scores differently.
    """
    boxes = [(rank, i) for i, row in enumerate(rows) for rank, _ in enumerate(_predicted(row))]
    positions = {box: position for position, box in enumerate(sorted(boxes))}
    has_scores = all("score" in box for row in rows for box in _predicted(row))
    for i, row in enumerate(rows):
        ordered = [1 - positions[rank, i] / len(boxes) for rank, _ in enumerate(_predicted(row))]
        values = [float(box["score"]) for box in _predicted(row)] if has_scores else ordered
        yield row, list(zip(_predicted(row), values, strict=True))


def _predicted(row: Row) -> list[JsonDict]:
    return row["prediction"]["boxes"]


def coco_files(rows: Sequence[Row]) -> dict[str, str]:
    """Returns the text of an annotation file and of a results file in COCO's format, by name.

    Rows about one image are one image, unless they share a label: two questions about "cat" are two
    images with one file name. A box that cannot be read has no area, so it matches nothing and
    counts.
    """
    labels = sorted({box["label"] for row in rows for box in _all_boxes(row)})
    categories = {label: number for number, label in enumerate(labels, 1)}
    images: list[JsonDict] = []
    annotations: list[JsonDict] = []
    results: list[JsonDict] = []
    numbers = _image_numbers(rows, images)
    for image, (row, scored) in zip(numbers, _scored_boxes(rows), strict=True):
        for box in row["gold"]["boxes"]:
            annotation = _coco_box(box, image, categories)
            number = len(annotations) + 1
            annotations.append({"id": number, "iscrowd": 0, **annotation})
        for box, score in scored:
            results.append({**_coco_box(box, image, categories), "score": score})
    gold = {
        "info": {"description": "ground truth of predictions.jsonl"},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": number, "name": label} for label, number in categories.items()],
    }
    return {"coco_gold.json": _json(gold), "coco_results.json": _json(results)}


def _all_boxes(row: Row) -> list[JsonDict]:
    return [*row["gold"]["boxes"], *_predicted(row)]


def _image_numbers(rows: Sequence[Row], images: list[JsonDict]) -> list[int]:
    """Returns the id of the image of each row. It adds the images to `images`."""
    numbers = []
    open_images: dict[str, tuple[int, set[str]]] = {}
    for row in rows:
        labels = {box["label"] for box in _all_boxes(row)}
        key = json.dumps([row["source"], row["image"]])
        number, used = open_images.get(key, (0, set()))
        if not number or row["image"] is None or used & labels:
            number, used = len(images) + 1, set()
            width, height = row["size_px"] or (1, 1)
            name = str(row["image"] or row["id"])
            images.append({"id": number, "file_name": name, "width": width, "height": height})
        open_images[key] = (number, used | labels)
        numbers.append(number)
    return numbers


def _coco_box(box: Mapping[str, Any], image: int, categories: Mapping[str, int]) -> JsonDict:
    x1, y1, x2, y2 = box["xyxy_px"] or (0.0, 0.0, 0.0, 0.0)
    width, height = max(x2 - x1, 0.0), max(y2 - y1, 0.0)
    return {
        "image_id": image,
        "category_id": categories[box["label"]],
        "bbox": [x1, y1, width, height],
        "area": width * height,
    }


def supervision_file(rows: Sequence[Row]) -> dict[str, str]:
    """Returns JSON lines with `xyxy` (pixels), `confidence`, `class_id` and `class_name`, by name.

    `class_id` counts the labels of all rows in alphabetical order. Boxes that cannot be read are
    left out.
    """
    labels = sorted({box["label"] for row in rows for box in _all_boxes(row)})
    numbers = {label: number for number, label in enumerate(labels)}
    lines = []
    for row, scored in _scored_boxes(rows):
        pairs = [(box, score) for box, score in scored if box["xyxy_px"] is not None]
        line = {name: row[name] for name in ("source", "id", "image", "size_px", "prompt")}
        line["xyxy"] = [box["xyxy_px"] for box, _ in pairs]
        line["confidence"] = [score for _, score in pairs]
        line["class_id"] = [numbers[box["label"]] for box, _ in pairs]
        line["class_name"] = [box["label"] for box, _ in pairs]
        lines.append(_json(line))
    return {"supervision.jsonl": "".join(lines)}


def lmms_eval_file(rows: Sequence[Row]) -> dict[str, str]:
    """Returns samples as lmms-eval's tasks refcoco_bbox_rec_* write them, by name.

    `doc` has the fields that its `process_results` reads. Boxes are fractions of the image's sides.

    Raises:
      UserError: no question has exactly one gold box.
    """
    lines = []
    for row in rows:
        gold = row["gold"]["boxes"]
        if len(gold) != 1:
            continue
        width, height = row["size_px"] or (1, 1)
        box = _fractions(gold[0]["xyxy_px"], width, height)
        doc = {"question_id": row["id"], "answer": row["prompt"], "bbox": box}
        answers = [box["xyxy_px"] for box in _predicted(row)[:1]]
        response = ""
        if answers and answers[0] is not None:
            numbers = _fractions(answers[0], width, height)
            # lmms-eval reads no exponents
            response = f"[{', '.join(f'{number:.9f}' for number in numbers)}]"
        sample = {
            "doc_id": len(lines),
            "doc": doc | {"image_width": width, "image_height": height},
            "input": row["prompt"],
            "target": str(box),
            "filtered_resps": [response],
        }
        lines.append(_json(sample))
    if not lines:
        raise UserError(f"--lmms_eval needs questions with one gold box: none of {len(rows)} has")
    return {"lmms_eval.jsonl": "".join(lines)}


PIXEL = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNoAAAAggCBd81ytgAAAABJRU5ErkJggg=="
)
"""A PNG of one pixel. VLMEvalKit needs an image of more than 64 characters, and scores without it.
"""


def vlmevalkit_files(rows: Sequence[Row]) -> dict[str, str]:
    """Returns a data set and its predictions as VLMEvalKit's `RefCOCODataset` reads them, by name.

    The index of a question is its position. A split is a benchmark of RefCOCO, or else a source.
    Predicted boxes are fractions of the image's sides, because VLMEvalKit reads pixels up to 1,000
    as thousandths. They are cut at the border of the image, as VLMEvalKit cuts them. A box whose
    corners are in the wrong order has IoU 0, so it is no answer: VLMEvalKit would swap them.

    Raises:
      UserError: no question has exactly one gold box.
    """
    questions: list[JsonDict] = []
    answers: list[JsonDict] = []
    for row in rows:
        gold = row["gold"]["boxes"]
        if len(gold) != 1:
            continue
        first = next(iter(_predicted(row)), {"xyxy_px": None})["xyxy_px"]
        box = first if is_proper(host_boxes([first])[0]) else None
        target = gold[0]["xyxy_px"]
        # Without the image's size, any frame that contains both boxes gives their IoU.
        side = max(*target, *(box or ()), 1.0)
        width, height = row["size_px"] or (side, side)
        question: JsonDict = {"index": len(questions), "question": row["prompt"]}
        corners = zip(("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2"), target, strict=True)
        questions.append({
            **question, "split": _refcoco_split(row), "width": width, "height": height,
            **dict(corners), "file_name": row["image"], "image": PIXEL,
        })  # fmt: skip
        fractions = (
            [min(max(value, 0.0), 1.0) for value in _fractions(box, width, height)] if box else []
        )
        answers.append({**question, "prediction": json.dumps(fractions) if box else ""})
    if not questions:
        raise UserError(f"--vlmevalkit needs questions with one gold box: none of {len(rows)} has")
    return {"vlmevalkit.tsv": _tsv(questions), "vlmevalkit_predictions.tsv": _tsv(answers)}


def _refcoco_split(row: Row) -> str:
    """Returns the split as VLMEvalKit writes it: `refcoco+_testA` is RefCOCO+_testA."""
    benchmark = row["benchmark"]
    return benchmark.replace("refcoco", "RefCOCO") if "refcoco" in benchmark else row["source"]


def _tsv(records: Sequence[JsonDict]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(
        text, list(records[0]), delimiter="\t", quoting=csv.QUOTE_ALL, lineterminator="\n"
    )
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def _fractions(xyxy: Sequence[float], width: float, height: float) -> list[float]:
    return [value / side for value, side in zip(xyxy, (width, height) * 2, strict=True)]


def _json(value: object) -> str:
    return json.dumps(value) + "\n"


FORMATS: dict[str, Callable[[Sequence[Row]], dict[str, str]]] = {
    "coco": coco_files,
    "supervision": supervision_file,
    "lmms_eval": lmms_eval_file,
    "vlmevalkit": vlmevalkit_files,
}
"""A function of rows that returns the texts of files by name, for each flag of `evaluate`."""

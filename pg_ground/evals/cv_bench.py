"""CV-Bench (Cambrian-1, arXiv 2406.16860): its records, its scores and its published formula."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pg_ground.evals.rows import Columns, Row, column
from pg_ground.readers.parsers import option
from pg_ground.types import JsonDict, JsonObject, UserError

TASKS = {"Relation": 650, "Count": 788, "Depth": 600, "Distance": 600}
"""Number of questions of each task in the published test split."""

QUALITATIVE = ("Relation", "Depth", "Distance")
SOURCES = ("ADE20K", "COCO", "Omni3D")


def gold(record: JsonObject, name: str) -> JsonDict:
    """Returns the ground truth of a record of `nyu-visionx/CV-Bench`.

    It has the letter of the right option, the choices, the task and the source.

    Args:
      name: source and number of the record, for the error message.

    Raises:
      UserError: the record is not a record of CV-Bench.
    """
    task = record.get("task")
    choices = list(map(str, record.get("choices", ())))
    letter = option(str(record.get("answer", "")), choices, strict=False)
    if task not in TASKS or letter is None:
        raise UserError(
            f"{name} is not a record of CV-Bench: task {task!r}, "
            f"answer {record.get('answer')!r:.20} of {len(choices)} choices; it must have "
            f"task ({', '.join(TASKS)}), choices and an answer such as (A)"
        )
    return {"choice": letter, "choices": choices, "task": task, "source": record.get("source")}


def check_task_counts(rows: Sequence[Row], tasks: Sequence[str]) -> None:
    """Raises UserError unless `rows` are all published questions of `tasks`, and no others."""
    counts = {task: sum(row["gold"]["task"] == task for row in rows) for task in TASKS}
    published = {task: TASKS[task] if task in tasks else 0 for task in TASKS}
    if counts != published:
        actual = ", ".join(f"{task} {count}" for task, count in counts.items())
        expected = ", ".join(f"{task} {TASKS[task]}" for task in tasks)
        raise UserError(
            f"the numbers of questions are {actual}, but {expected} are published: "
            f"--benchmark=multiple_choice takes any number"
        )


def score(row: Row) -> JsonDict:
    """Returns whether the option that an answer names is the right one."""
    letter = row["prediction"]["choice"]
    return {"correct": int(letter == row["gold"]["choice"]), "valid": int(letter is not None)}


def means(rows: Sequence[Row]) -> Columns:
    """Returns accuracy over all questions, for each task and for each source.

    `invalid_fraction` is the share of answers that name no option. `qualitative` is the accuracy
    over the tasks of QUALITATIVE.
    """
    correct = column(rows, "correct")
    columns = {"accuracy": correct, "invalid_fraction": 1 - column(rows, "valid")}
    tasks = _gold_field(rows, "task")
    sources = _gold_field(rows, "source")
    columns |= {name.lower(): np.where(tasks == name, correct, np.nan) for name in TASKS}
    columns |= {name.lower(): np.where(sources == name, correct, np.nan) for name in SOURCES}
    columns["qualitative"] = np.where(np.isin(tasks, QUALITATIVE), correct, np.nan)
    return columns


def _gold_field(rows: Sequence[Row], name: str) -> np.ndarray:
    return np.array([row["gold"].get(name) or "" for row in rows])


def combined(accuracy: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the published scores, as far as the accuracies of their sources are there.

    2D is (ADE20K + COCO) / 2. 3D is Omni3D. `cv_bench` is the mean of 2D and 3D.

    Args:
      accuracy: accuracies by the name of the source in lower case: numbers, or arrays of one shape.
    """
    scores: dict[str, Any] = {}
    if {"ade20k", "coco"} <= accuracy.keys():
        scores["cv_bench_2d"] = (accuracy["ade20k"] + accuracy["coco"]) / 2
    if "omni3d" in accuracy:
        scores["cv_bench_3d"] = accuracy["omni3d"]
    if len(scores) == 2:
        scores["cv_bench"] = (scores["cv_bench_2d"] + scores["cv_bench_3d"]) / 2
    return scores

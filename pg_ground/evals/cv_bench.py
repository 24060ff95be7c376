"""CV-Bench (Cambrian-1, arXiv 2406.16860): its rows, and the formula of its authors."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pg_ground.evals.rows import Row, column
from pg_ground.rewards.parsers import option
from pg_ground.types import UserError

TASKS = {"Relation": 650, "Count": 788, "Depth": 600, "Distance": 600}
"""Questions of each task in the published test split."""

QUALITATIVE = ("Relation", "Depth", "Distance")
SOURCES = ("ADE20K", "COCO", "Omni3D")


def gold(record: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Returns the right option of a row of CV-Bench (`nyu-visionx/CV-Bench`), with its choices, task and source.

    Raises:
      UserError: it is no such row.
    """
    task, source, choices = (
        record.get("task"),
        record.get("source"),
        list(map(str, record.get("choices", ()))),
    )
    letter = option(str(record.get("answer", "")), choices, strict=False)
    if task not in TASKS or letter is None:
        raise UserError(
            f"{where} is no row of CV-Bench: task {task!r}, answer {record.get('answer')!r:.20} of {len(choices)} choices; "
            f"wanted are task ({', '.join(TASKS)}), choices and an answer such as (A)"
        )
    return {"choice": letter, "choices": choices, "task": task, "source": source}


def check_counts(rows: Sequence[Row], tasks: Sequence[str]) -> None:
    """Raises UserError unless each of `tasks` has as many questions as published, and there are no others."""
    counts = {task: sum(row["gold"]["task"] == task for row in rows) for task in TASKS}
    if counts != {task: TASKS[task] if task in tasks else 0 for task in TASKS}:
        found, wanted = (
            ", ".join(f"{task} {n}" for task, n in of.items())
            for of in (counts, {t: TASKS[t] for t in tasks})
        )
        raise UserError(
            f"there are {found}, where {wanted} are published: --benchmark=multiple_choice takes any number"
        )


def score(row: Row) -> dict[str, Any]:
    """Returns whether the one option that an answer names is the right one."""
    said = row["prediction"]["choice"]
    return {"correct": int(said == row["gold"]["choice"]), "valid": int(said is not None)}


def columns(rows: Sequence[Row]) -> dict[str, np.ndarray]:
    """Returns accuracy overall, of each task and of each source, and the share of answers that name no option."""
    right = column(rows, "correct")
    found = {"accuracy": right, "invalid_fraction": 1 - column(rows, "valid")}
    for field, names in (("task", TASKS), ("source", SOURCES)):
        of = np.array([row["gold"].get(field) or "" for row in rows])
        found |= {name.lower(): np.where(of == name, right, np.nan) for name in names}
    tasks = np.array([row["gold"].get("task") or "" for row in rows])
    return found | {"qualitative": np.where(np.isin(tasks, QUALITATIVE), right, np.nan)}


def others(rows: Sequence[Row]) -> dict[str, float]:
    """Returns the official scores where their sources are there: 2D = (ADE20K + COCO) / 2, 3D = Omni3D, and the mean of both."""
    of = columns(rows)
    known = {
        name: float(np.nanmean(of[name]))
        for name in ("ade20k", "coco", "omni3d")
        if not np.isnan(of[name]).all()
    }
    found: dict[str, float] = {}
    if {"ade20k", "coco"} <= known.keys():
        found["cv_bench_2d"] = (known["ade20k"] + known["coco"]) / 2
    if "omni3d" in known:
        found["cv_bench_3d"] = known["omni3d"]
    return found | (
        {"cv_bench": (found["cv_bench_2d"] + found["cv_bench_3d"]) / 2} if len(found) == 2 else {}
    )

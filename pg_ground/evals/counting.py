"""Numbers and words: how many there are, and what is said."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from pg_ground.evals.rows import Row, column


def score_count(row: Row) -> dict[str, Any]:
    """Returns whether the one number of an answer is the gold one, and by how much it is off."""
    said, gold = row["prediction"]["number"], row["gold"]["number"]
    found: dict[str, Any] = {"correct": int(said == gold), "valid": int(said is not None)}
    return found | ({} if said is None else {"error": abs(said - gold)})


def columns_count(rows: Sequence[Row]) -> dict[str, np.ndarray]:
    """Returns exact accuracy (what cannot be read is wrong), the mean absolute error of what can, and the share that cannot."""
    return {
        "accuracy": column(rows, "correct"),
        "mae": column(rows, "error"),
        "invalid_fraction": 1 - column(rows, "valid"),
    }


def score_text(row: Row) -> dict[str, Any]:
    """Returns whether an answer is the gold text, but for case, blanks and a last full stop."""
    return {"correct": int(row["prediction"]["text"] == row["gold"]["text"])}


def columns_text(rows: Sequence[Row]) -> dict[str, np.ndarray]:
    return {"accuracy": column(rows, "correct")}


def nothing(_: Sequence[Row]) -> dict[str, float]:
    return {}

"""Scores of answers that are one number, and of answers that are text."""

from collections.abc import Sequence

from pg_ground.evals.rows import Columns, Row, column
from pg_ground.readers.parsers import same_choice
from pg_ground.types import JsonDict


def score_count(row: Row) -> JsonDict:
    """Returns whether the number of an answer equals the ground truth, and its absolute error."""
    predicted, gold = row["prediction"]["number"], row["gold"]["number"]
    scores: JsonDict = {
        "correct": int(predicted == gold),
        "valid": int(predicted is not None),
    }
    if predicted is not None:
        scores["error"] = abs(predicted - gold)
    return scores


def means_count(rows: Sequence[Row]) -> Columns:
    """Returns exact accuracy, mean absolute error, and the share of answers that cannot be read.

    An answer that cannot be read is wrong. It has no absolute error.
    """
    return {
        "accuracy": column(rows, "correct"),
        "mae": column(rows, "error"),
        "invalid_fraction": 1 - column(rows, "valid"),
    }


def score_text(row: Row) -> JsonDict:
    """Returns whether an answer equals the ground-truth text.

    `parsers.words` has removed differences of case, blanks and a final full stop. If the ground
    truth is a spatial relation, an option, yes or no, the answer must name the same.
    """
    text, gold = row["prediction"]["text"], row["gold"]["text"]
    return {"correct": int(text == gold or same_choice(text, gold))}


def means_text(rows: Sequence[Row]) -> Columns:
    """Returns accuracy."""
    return {"accuracy": column(rows, "correct")}

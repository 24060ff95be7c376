"""Tables, for the terminal and for the report page."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class Table(NamedTuple):
    """A table of results."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    """Each cell is a text, a whole number, a fraction, or None, which is shown as –."""
    note: str = ""


SHOWN_METRICS = (
    "ap",
    "ap50",
    "miou",
    "acc50",
    "acc75",
    "acc95",
    "mean_iou",
    "point_in_box",
    "precision",
    "n_acc",
    "t_acc",
    "f1",
    "f1_mean",
    "f1_50",
    "f1_95",
    "accuracy",
    "macro_accuracy",
    "rejection_accuracy",
    "mae",
    "cv_bench",
    "mean_reward",
    "pass@1",
    "completion_length",
    "malformed_fraction",
    "unfinished_fraction",
    "suffix_perplexity",
)
"""Names of the metrics that a results table shows. `eval.json` holds all metrics."""


def is_shown(name: str) -> bool:
    """Returns whether a results table shows the metric `eval/<source>/<metric>`.

    It shows `SHOWN_METRICS`, and the mean of each reward of an environment: `reward_<name>`.
    """
    metric = name.rpartition("/")[2].removeprefix("sampled_")
    return metric in SHOWN_METRICS or metric.startswith("reward_")


def results_table(title: str, columns: Mapping[str, Mapping[str, float]], note: str = "") -> Table:
    """Returns a table with one row for each shown metric.

    Args:
      columns: the metrics of each column, by the column's header: a step of a run, or a run.
    """
    names = sorted({name for metrics in columns.values() for name in metrics if is_shown(name)})
    rows = []
    for name in names:
        cells = [f"{metrics[name]:.3f}" if name in metrics else "" for metrics in columns.values()]
        rows.append([name.removeprefix("eval/"), *cells])
    return Table(title, ["metric", *columns], rows, note)


def ascii_table(table: Table) -> str:
    """Returns the lines of a table for a terminal: title, columns, rule, rows, note.

    Columns of numbers are aligned to the right.
    """
    cells = [[cell_text(value) for value in row] for row in table.rows]
    widths = [max(map(len, column)) for column in zip(table.columns, *cells, strict=True)]
    is_number = [is_number_column(table, i) for i in range(len(table.columns))]

    def line(row: Sequence[str]) -> str:
        padded = [
            text.rjust(width) if right else text.ljust(width)
            for text, width, right in zip(row, widths, is_number, strict=True)
        ]
        return "  ".join(padded).rstrip()

    rule = "  ".join("-" * width for width in widths)
    lines = [table.title, line(table.columns), rule, *map(line, cells), table.note]
    return "\n".join(text for text in lines if text)


def cell_text(value: object) -> str:
    """Returns the text of a cell: four decimals for a fraction, – for None."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.4f}" if 1e-3 <= abs(value) < 1e4 or value == 0 else f"{value:.4g}"
    return str(value)


def is_number_column(table: Table, column: int) -> bool:
    """Returns whether a column holds only numbers, as values or as text, and empty cells."""
    texts = [cell_text(row[column]) for row in table.rows if row[column] not in (None, "")]
    return bool(texts) and all(
        re.fullmatch(r"[-+−]?[\d.,]+(e[-+]?\d+)?[%×]?|nan|inf", text) for text in texts
    )

"""Tables of evaluation metrics, for the terminal and for the report page."""

from collections.abc import Mapping

from pg_ground.reporting.html_page import Table

SHOWN_METRICS = (
    "ap",
    "ap50",
    "miou",
    "acc50",
    "acc75",
    "acc95",
    "mean_iou",
    "point_in_box",
    "f1",
    "accuracy",
    "mae",
    "cv_bench",
    "mean_reward",
    "malformed_fraction",
    "unfinished_fraction",
    "suffix_perplexity",
)
"""Names of the metrics that a results table shows. `eval.json` holds all metrics."""


def is_shown(name: str) -> bool:
    """Returns whether a results table shows the metric `eval/<source>/<metric>`."""
    return name.rpartition("/")[2].removeprefix("sampled_") in SHOWN_METRICS


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

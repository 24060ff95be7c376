"""The charts of a report: which metrics share a chart, and the points of each curve."""

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pg_ground.reporting.run_files import Run
from pg_ground.reporting.tables import is_shown
from pg_ground.types import JsonDict, JsonObject

MAX_POINTS = 400
"""A longer curve is reduced to about this many points. Its extremes stay."""

SMOOTHED_FROM = 60
"""A curve with more points than this is drawn faint, with its running mean on top."""

NOT_SMOOTHED = r"eval/|data/|optim/lr$"
"""Metrics without noise, which need no running mean."""

CHARTS: tuple[tuple[str, str], ...] = (
    ("Reward", r"reward/(?!std$|weighted/|errors/)"),
    ("Reward parts times their weights", r"reward/weighted/"),
    ("Reward: standard deviation in a group", r"reward/std$"),
    ("Text rewards: errors", r"reward/errors/"),
    ("SFT loss", r"sft/"),
    ("Policy loss", r"(grpo|policy)/loss$"),
    ("KL(policy ‖ reference)", r"policy/kl$"),
    ("Entropy (nats)", r"policy/entropy$"),
    ("Completion length (tokens)", r"completion/length"),
    (
        "Malformed, unfinished, groups without spread (fraction)",
        r"completion/.*_fraction$|group/.*_fraction$",
    ),
    ("Clipped tokens (fraction)", r"policy/clip_fraction$"),
    ("Sampler against trainer: largest Δ logp", r"policy/logp_diff_max$"),
    ("Gradient norm", r"optim/grad_norm$"),
    ("Learning rate", r"optim/lr$"),
    ("Throughput (a second)", r"perf/(images|completions)_per_s$"),
    ("Throughput (tokens a second)", r"perf/tokens_per_s$"),
    ("Time of a step by phase (s)", r"time/"),
)
"""Title of a chart, and a pattern of the metrics that it shows.

Each benchmark has a chart for greedy answers and one for sampled answers. A metric that matches no
pattern has a chart for itself.
"""

SEPARATE_METRICS = ("mae", "suffix_perplexity", "completion_length")
"""Held-out metrics that are not fractions of 1. Each has a chart for itself."""


class Curve(NamedTuple):
    """A metric over the steps."""

    name: str
    steps: list[int]
    values: list[float]
    """NaN is a gap."""


def charts(runs: Sequence[Run]) -> list[JsonDict]:
    """Returns the charts of a page as JSON.

    The charts of one run show groups of metrics. The charts of several runs show one metric each,
    with one curve for each run.
    """
    curves = [curves_of(run.metrics) for run in runs]
    names = list(dict.fromkeys(curve.name for run_curves in curves for curve in run_curves))
    groups = metric_groups(names)
    if len(runs) > 1:
        groups = [
            (title if len(group) == 1 else f"{title}: {_label(name)}", [name])
            for title, group in groups
            for name in group
        ]
    return [{"title": title, "lines": _chart_lines(runs, curves, group)} for title, group in groups]


def _chart_lines(
    runs: Sequence[Run], curves: Sequence[Sequence[Curve]], group: Sequence[str]
) -> list[JsonDict]:
    """Returns the curves of one chart."""
    lines = []
    for index, (run, run_curves) in enumerate(zip(runs, curves, strict=True)):
        starts = stage_starts(run.metrics)
        for curve in run_curves:
            if curve.name in group:
                label = run.name if len(runs) > 1 else _label(curve.name)
                lines.append({"run": index, "label": label, **_points(curve, starts)})
    return lines


def metric_groups(names: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Returns the title and the metrics of each chart, in the order of the page.

    The order is: reward, evaluations, the other entries of `CHARTS`, all other metrics. Only
    held-out metrics of the results table have a chart.
    """
    evaluations: dict[str, list[str]] = {}
    for name in names:
        if name.startswith("eval/") and is_shown(name):
            evaluations.setdefault(_evaluation_title(name), []).append(name)
    matches = [
        (title, [name for name in names if re.match(pattern, name)]) for title, pattern in CHARTS
    ]
    assigned = {name for _, group in matches for name in group}
    others = [
        (name, [name]) for name in names if name not in assigned and not name.startswith("eval/")
    ]
    groups = [*matches[:1], *evaluations.items(), *matches[1:], *others]
    return [(title, group) for title, group in groups if group]


def _evaluation_title(name: str) -> str:
    """Returns the title for `eval/<benchmark>/<metric>` or `eval/<benchmark>/sampled_<metric>`."""
    benchmark, _, metric = name.removeprefix("eval/").rpartition("/")
    mode = "sampled" if metric.startswith("sampled_") else "greedy"
    metric = metric.removeprefix("sampled_")
    suffix = f", {metric}" if metric in SEPARATE_METRICS else ""
    return f"Evaluation: {benchmark}{suffix}, {mode} answers"


def _label(name: str) -> str:
    """Returns the short name of a metric in the legend of a chart."""
    label = name.rpartition("/")[2].removeprefix("sampled_")
    return label.removesuffix("_fraction").removesuffix("_s").removesuffix("_per")


def curves_of(metrics: Sequence[JsonObject]) -> list[Curve]:
    """Returns one curve for each metric, in order of first appearance. A null is NaN, a gap."""
    curves: dict[str, Curve] = {}
    for row in metrics:
        for name, value in row.items():
            if name in ("step", "stage"):
                continue
            curve = curves.setdefault(name, Curve(name, [], []))
            curve.steps.append(row["step"])
            curve.values.append(math.nan if value is None else float(value))
    return list(curves.values())


def stage_starts(metrics: Sequence[JsonObject]) -> list[tuple[str, int]]:
    """Returns the name of each stage and the step that it starts after.

    That step is the last step of the stage before.
    """
    starts: list[tuple[str, int]] = []
    last_step = 0
    for row in metrics:
        if not starts or starts[-1][0] != row["stage"]:
            starts.append((str(row["stage"]), last_step))
        last_step = row["step"]
    return starts


def _points(curve: Curve, starts: Sequence[tuple[str, int]]) -> JsonDict:
    """Returns the points of a curve, and of its running mean within each stage if it is noisy."""
    values = np.array(curve.values)
    indices = thinned(values)
    points: JsonDict = {
        "steps": [curve.steps[i] for i in indices],
        "values": _numbers(values[indices]),
    }
    if len(values) > SMOOTHED_FROM and not re.match(NOT_SMOOTHED, curve.name):
        cuts = np.searchsorted(curve.steps, [start for _, start in starts[1:]], side="right")
        half = max(1, len(values) // 40)
        stages = [stage for stage in np.split(values, cuts) if len(stage)]
        means = np.concatenate([running_mean(stage, half) for stage in stages])
        points["means"] = _numbers(means[indices])
    return points


def thinned(values: np.ndarray) -> list[int]:
    """Returns the indices of about `MAX_POINTS` values.

    They are the two ends, and the smallest and the largest value of each interval between.
    """
    if len(values) <= MAX_POINTS:
        return list(range(len(values)))
    indices = {0, len(values) - 1}
    for interval in np.array_split(np.arange(len(values)), MAX_POINTS // 2):
        finite = interval[~np.isnan(values[interval])]
        if len(finite):
            indices |= {int(finite[values[finite].argmin()]), int(finite[values[finite].argmax()])}
        else:
            indices.add(int(interval[0]))
    return sorted(indices)


def running_mean(values: np.ndarray, half: int) -> np.ndarray:
    """Returns the mean of each value and of its `half` neighbours on either side, without NaN."""
    finite = ~np.isnan(values)
    window = np.ones(2 * half + 1)
    centre = slice(half, half + len(values))
    total = np.convolve(np.where(finite, values, 0.0), window)[centre]
    count = np.convolve(finite, window)[centre]
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _numbers(values: np.ndarray) -> list[float | None]:
    return [float(f"{value:.5g}") if math.isfinite(value) else None for value in values.tolist()]

"""The benchmarks, each with its protocol and its size, and the metrics of rows (`eval.json`)."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from pg_ground.evals import (
    counting,
    cv_bench,
    detection_f1,
    environment,
    grec,
    grounding,
    mask_points,
    pointing,
    question_groups,
    rejection,
    segmentation,
)
from pg_ground.evals.intervals import intervals
from pg_ground.evals.rows import SAMPLED, Columns, Row, cluster, column, without_scores
from pg_ground.types import JsonDict, JsonObject, UserError, nearest


class Kind(NamedTuple):
    """The functions that compute the metrics of a benchmark from its rows."""

    score: Callable[[Row], JsonDict]
    """Returns the scores of one row."""
    means: Callable[[Sequence[Row]], Columns]
    """Returns a number of each scored row, for the metrics that are means over rows."""
    aggregates: Callable[[Sequence[Row]], dict[str, float]]
    """Returns the metrics of scored rows that are not means over rows."""
    not_shares: frozenset[str] = frozenset()
    """Metrics that are no fractions of 1. All others are shown in percent."""
    combined: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda _: {}
    """Returns the metrics that are computed from the means, for numbers or arrays."""
    ranges: Callable[[Sequence[Row]], dict[str, list[float]]] = lambda _: {}
    """Returns the 95 % intervals of aggregates of scored rows, as far as they have one."""


def _no_aggregates(_: Sequence[Row]) -> dict[str, float]:
    return {}


_BOXES = frozenset({"duplicates_per_image", "box_size_ratio"})
_POINTS = frozenset({"distance", "distance_px", "median_distance_px"})
_COUNT = frozenset({"mae"})
_REWARD = frozenset(
    {"mean_reward", "std_reward", "group_std_reward", "completion_length", "rollouts"}
)
_ANY_KIND = frozenset({"invalid", "suffix_nll", "suffix_perplexity", "questions"})

KINDS: dict[str, Kind] = {
    "box": Kind(grounding.score_one, grounding.means_one, grounding.aggregates, _BOXES),
    "boxes": Kind(grounding.score_set, grounding.means_set, grounding.aggregates, _BOXES),
    "detection": Kind(
        grounding.score_set, grounding.means_set, grounding.detection_aggregates, _BOXES
    ),
    "f1": Kind(
        detection_f1.score,
        detection_f1.means,
        detection_f1.aggregates,
        frozenset({"duplicates_per_image"}),
        ranges=detection_f1.ranges,
    ),
    "grec": Kind(grec.score, grec.means, _no_aggregates),
    "rejection": Kind(rejection.score, rejection.means, _no_aggregates),
    "mask": Kind(segmentation.score, segmentation.means, _no_aggregates),
    "points": Kind(pointing.score_set, pointing.means_set, pointing.aggregates, _POINTS),
    "click": Kind(pointing.score_click, pointing.means_click, pointing.aggregates, _POINTS),
    "mask_points": Kind(mask_points.score, mask_points.means, _no_aggregates),
    "count": Kind(counting.score_count, counting.means_count, _no_aggregates, _COUNT),
    "choice": Kind(cv_bench.score, cv_bench.means, _no_aggregates, combined=cv_bench.combined),
    "text": Kind(counting.score_text, counting.means_text, _no_aggregates),
    "reward": Kind(environment.score, environment.means, environment.aggregates, _REWARD),
}


class Benchmark(NamedTuple):
    """A protocol and, for a published benchmark, its number of questions."""

    kind: str
    """A key of KINDS."""
    protocol: str
    """The protocol in words, for `eval.json` and the terminal."""
    question_count: int | None = None
    """None means that the benchmark takes any number of questions."""
    tasks: tuple[str, ...] = ()
    """The tasks of CV-Bench in this benchmark. Each task has a published number of questions."""
    groups: str = ""
    """A key of `question_groups.GROUPINGS`, or "" for a benchmark without groups."""


REC = (
    "first box of the answer against the one ground-truth box, plain IoU (no pixel added), "
    "correct if IoU >= 0.5, an unreadable box has IoU 0"
)
UNC = f"{REC}; one question for each sentence of the UNC split"
UMD = f"{REC}; one question for each sentence of the UMD split"
LISA = f"{REC}; VLM-R1's LISA-Grounding test file, whose authors publish no size"
OBJECTS = (
    "all boxes against all ground-truth boxes, matched one to one within labels for the largest "
    "total IoU; accP is 2 hits / (predicted + ground truth) with a hit at IoU >= P, mean_iou is "
    "2 sum / (predicted + ground truth), no box for no ground-truth box is 1"
)
GREC = (
    "all boxes against all targets, matched one to one, largest IoU first (arXiv 2308.16182): "
    "precision is the share of questions with F1 = 1, with a hit at IoU >= 0.5; precision_giou "
    "compares generalized IoU, as the published evaluation code does; n_acc is the share of "
    "questions without a target whose answer has no box, t_acc the share of questions with targets "
    "whose answer has a box"
)
REJECTION = (
    "first box of the answer against the target, plain IoU; a question without a target is right "
    "if the answer has no box; accuracy over all questions, accP over the questions with a target, "
    "rejection_accuracy over the others"
)
GROUNDINGME = f"{REJECTION}; GroundingME (arXiv 2512.17495), also by dimension and subtask"
REF_ADV_S = (
    f"{REJECTION}; the public part of Ref-Adv (arXiv 2602.23898), in which every question has a "
    "target, also by number of distractors"
)
DETECTION = (
    "COCO's average precision (pycocotools; ap over IoU .5 to .95, ap50, ap75, ar100), each answer "
    "is an image; ranked by score if all boxes have one, otherwise in the order written"
)
DETECTION_F1 = (
    "precision, recall and F1 over labels at IoU .5, .95 and of the mean over .5 to .95 (arXiv "
    "2510.12798, 2605.27365), boxes matched within labels as in COCO; precision and recall are "
    "means over the labels whose value is above 0, as in the published script, macro_f1 over all "
    "labels with ground-truth boxes"
)
MASK = (
    "mIoU of masks at full resolution over all answers, 0 for an answer without a mask, as in "
    "big_vision's evaluator; boxaccP is the share of boxes with IoU >= P"
)
POINTING = (
    "points and ground-truth objects matched one to one for most hits (arXiv 2409.17146); a hit "
    "lies in the object's mask, or without masks in its box, or without boxes within 5 % of the "
    "diagonal of its point; precision, recall and F1 of each answer, averaged"
)
SCREENSPOT = (
    "first point in the ground-truth box, edges included (arXiv 2401.10935); a box counts by its "
    "centre, if it is written as four numbers or in the tags of a box"
)
SCREENSPOT_V2 = (
    f"{SCREENSPOT}; ScreenSpot-v2 (arXiv 2410.23218), also by platform and type of element; "
    "macro_accuracy is the mean of the six, the average of ScreenSpot's first paper"
)
SCREENSPOT_PRO = (
    f"{SCREENSPOT}; ScreenSpot-Pro (arXiv 2504.07981), also by group of applications and type of "
    "element"
)
MASK_POINTS = (
    "the first point in the mask of the question; if the question asks for a number of points, all "
    "points in the mask, and as many as asked (arXiv 2505.09990); point_share is the mean share of "
    "an answer's points in the mask"
)
POINT_BENCH = (
    f"{MASK_POINTS}; Point-Bench, also by category, macro_accuracy is the mean of the five"
)
COUNTING = "the one number of the answer, exact; mae over the answers that can be read"
CV = (
    "one option letter (or the words or the relation of the option), in the answer that a sentence "
    "states; none or several is wrong"
)
CV_BENCH = f"{CV}; the mean of 2D (mean of ADE20K and COCO) and 3D (Omni3D)"
CV_QUALITATIVE = f"{CV}; Relation, Depth and Distance only, over all their questions"
TEXT = (
    "the answer, which a sentence may state, equals the ground-truth text, except for case, blanks "
    "and a final full stop; a relation, an option, yes or no may have other words"
)
ENVIRONMENT = "mean reward; a rollout passes from reward 0.5; pass@k unbiased (arXiv 2107.03374)"

# Sizes of RefCOCO and RefCOCO+: Yu et al. 2016 (arXiv 1608.00272), sentences of the UNC splits.
# Sizes of RefCOCOg: Nagaraja et al. 2016 (arXiv 1608.00525), sentences of the UMD splits.
BENCHMARKS: dict[str, Benchmark] = {
    "rec": Benchmark("box", REC),
    "refcoco_val": Benchmark("box", UNC, 10834),
    "refcoco_testA": Benchmark("box", UNC, 5657),
    "refcoco_testB": Benchmark("box", UNC, 5095),
    "refcoco+_val": Benchmark("box", UNC, 10758),
    "refcoco+_testA": Benchmark("box", UNC, 5726),
    "refcoco+_testB": Benchmark("box", UNC, 4889),
    "refcocog_val": Benchmark("box", UMD, 4896),
    "refcocog_test": Benchmark("box", UMD, 9602),
    "lisa_grounding": Benchmark("box", LISA),
    "objects": Benchmark("boxes", OBJECTS),
    "grec": Benchmark("grec", GREC),
    "rejection": Benchmark("rejection", REJECTION),
    "groundingme": Benchmark("rejection", GROUNDINGME, 1005, groups="groundingme"),
    "ref_adv_s": Benchmark("rejection", REF_ADV_S, 1142, groups="ref_adv_s"),
    "detection": Benchmark("detection", DETECTION),
    "detection_f1": Benchmark("f1", DETECTION_F1),
    "segmentation": Benchmark("mask", MASK),
    "refcoco_val_seg": Benchmark("mask", MASK, 10834),
    "refcoco_testA_seg": Benchmark("mask", MASK, 5657),
    "refcoco_testB_seg": Benchmark("mask", MASK, 5095),
    "refcoco+_val_seg": Benchmark("mask", MASK, 10758),
    "refcoco+_testA_seg": Benchmark("mask", MASK, 5726),
    "refcoco+_testB_seg": Benchmark("mask", MASK, 4889),
    "refcocog_val_seg": Benchmark("mask", MASK, 4896),
    "refcocog_test_seg": Benchmark("mask", MASK, 9602),
    "pointing": Benchmark("points", POINTING),
    "screenspot": Benchmark("click", SCREENSPOT),
    "screenspot_v2": Benchmark("click", SCREENSPOT_V2, 1272, groups="screenspot_v2"),
    "screenspot_pro": Benchmark("click", SCREENSPOT_PRO, 1581, groups="screenspot_pro"),
    "points_in_mask": Benchmark("mask_points", MASK_POINTS),
    "point_bench": Benchmark("mask_points", POINT_BENCH, 982, groups="point_bench"),
    "counting": Benchmark("count", COUNTING),
    "cv_bench": Benchmark("choice", CV_BENCH, 2638, tuple(cv_bench.TASKS)),
    "cv_bench_qualitative": Benchmark("choice", CV_QUALITATIVE, 1850, cv_bench.QUALITATIVE),
    "multiple_choice": Benchmark("choice", CV),
    "text": Benchmark("text", TEXT),
    "environment": Benchmark("reward", ENVIRONMENT),
}
"""Every benchmark. Metrics carry the name of a benchmark of fixed size only if all its questions
were answered."""


def find_benchmark(name: str, setting: str) -> Benchmark:
    """Returns a benchmark by its name. `refcoco_val@512` names a part of `refcoco_val`.

    Args:
      setting: where the name comes from, for the error message.

    Raises:
      UserError: there is no such benchmark.
    """
    base = name.partition("@")[0]
    if base not in BENCHMARKS:
        raise UserError(f"{setting} {name!r} does not exist: {nearest(base, BENCHMARKS)}")
    return BENCHMARKS[base]


def check_question_count(rows: Sequence[Row], name: str) -> None:
    """Raises UserError unless rows of one mode are all the questions of the benchmark `name`."""
    benchmark = find_benchmark(name, "benchmark")
    fault = count_fault(name, len({str(row["id"]) for row in rows}))
    is_part = "@" in name
    if is_part and fault:
        raise UserError(fault)
    if is_part or benchmark.question_count is None:
        return
    alternative = without_size(name)
    if fault:
        raise UserError(
            f"{fault}: --benchmark={alternative} takes any number and reports under its own name"
        )
    if benchmark.tasks:
        cv_bench.check_task_counts(rows, benchmark.tasks)
    if benchmark.groups:
        question_groups.check_group_counts(benchmark.groups, rows, alternative)


def count_fault(name: str, count: int) -> str:
    """Returns in words how `count` differs from the number of questions of a benchmark, or of its
    part; "" if it does not differ."""
    part = name.partition("@")[2]
    expected = part or find_benchmark(name, "benchmark").question_count
    if expected is None or str(expected) == str(count):
        return ""
    return f"{name} has {expected} questions, but there are {count}"


def without_size(name: str) -> str:
    """Returns the benchmark of the same kind as `name` that takes any number of questions."""
    kind = find_benchmark(name, "benchmark").kind
    return next(
        other_name
        for other_name, other in BENCHMARKS.items()
        if other.kind == kind and other.question_count is None
    )


def source_count_faults(counts: Mapping[str, int], configured: Mapping[str, str]) -> str:
    """Returns in one line which sources have another number of questions than their benchmarks,
    and what helps; "" if none differs.

    Args:
      counts: the number of questions of each held-out source.
      configured: `eval.benchmarks`.
    """
    faults = {
        name: count_fault(configured[name], count)
        for name, count in counts.items()
        if configured.get(name)
    }
    faults = {name: fault for name, fault in faults.items() if fault}
    if not faults:
        return ""
    first = next(iter(faults))
    # A later source with the name of its benchmark is named by its benchmark, for a shorter line.
    texts = [
        fault
        if name != first and configured[name] == name
        else f"config.eval.sources.{name}: {fault}"
        for name, fault in faults.items()
    ]
    return (
        f"{'; '.join(texts)}: files are missing; if these are all questions that you have, give "
        f"each of these sources --config.eval.benchmarks.{first}={without_size(configured[first])}"
    )


def score_rows(rows: Sequence[Row]) -> list[JsonDict]:
    """Returns rows with the scores of their benchmarks. Earlier scores are dropped."""
    return [without_scores(row) | _kind(row).score(row) for row in rows]


def _kind(row: Row) -> Kind:
    return KINDS[find_benchmark(row["benchmark"], "benchmark").kind]


def _combined(row: Row) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """Returns the function that computes metrics of the benchmark of a row from means."""
    benchmark = find_benchmark(row["benchmark"], "benchmark")
    combine = KINDS[benchmark.kind].combined
    if not benchmark.groups:
        return combine
    return lambda means: combine(means) | question_groups.combined(benchmark.groups, means)


class MetricValues(NamedTuple):
    """The metrics of the rows of one source and mode."""

    values: dict[str, float]
    columns: Columns
    """The number of each row, for the metrics that are means."""


def compute_metrics(rows: Sequence[Row]) -> MetricValues:
    """Returns the metrics of scored rows of one source and mode.

    A metric is left out if no row has a number for it.
    """
    kind = _kind(rows[0])
    columns = kind.means(rows)
    groups = find_benchmark(rows[0]["benchmark"], "benchmark").groups
    if groups:
        columns |= question_groups.columns(groups, rows, columns)
    for name in ("malformed", "unfinished"):
        if name in rows[0]:
            columns[f"{name}_fraction"] = column(rows, name)
    columns = {name: numbers for name, numbers in columns.items() if not np.isnan(numbers).all()}
    values = {name: float(np.nanmean(numbers)) for name, numbers in columns.items()}
    values |= _combined(rows[0])(values) | kind.aggregates(rows)
    if "invalid_fraction" in columns:
        values["invalid"] = float(columns["invalid_fraction"].sum())
    if "suffix_nll" in rows[0]:
        token_count = column(rows, "suffix_tokens").sum()
        nll_per_token = float(column(rows, "suffix_nll").sum() / token_count)
        values |= {"suffix_nll": nll_per_token, "suffix_perplexity": math.exp(nll_per_token)}
    return MetricValues(values, columns)


def group_by_source(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    """Returns rows by (source, mode), in their order."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["source"], row["mode"]), []).append(row)
    return groups


def named_metrics(rows: Sequence[Row]) -> dict[str, float]:
    """Returns the metrics of scored rows as `eval/<source>/<metric>`, and the number of questions.

    Metrics of sampled answers have the prefix `sampled_`: `eval/<source>/sampled_<metric>`.
    """
    metrics: dict[str, float] = {}
    for (source, mode), group in group_by_source(rows).items():
        prefix = f"eval/{source}/{_mode_prefix(mode)}"
        values = compute_metrics(group).values
        metrics |= {prefix + name: value for name, value in values.items()}
        metrics[f"eval/{source}/questions"] = float(_question_count(group))
    return metrics


def _mode_prefix(mode: str) -> str:
    return "sampled_" if mode == SAMPLED else ""


def _question_count(rows: Sequence[Row]) -> int:
    return len({str(row["id"]) for row in rows})


def make_report(rows: Sequence[Row]) -> JsonDict:
    """Returns the content of `eval.json` for scored rows.

    It has all `named_metrics` and, for each source, the benchmark, the protocol, counts and
    intervals. If there is one source, its metrics also stand at the top under their short names. A
    file of another program has only these, because its source has no name.
    """
    sources: dict[str, JsonDict] = {}
    short_metrics: dict[str, float] = {}
    for (source, mode), group in group_by_source(rows).items():
        values, columns = compute_metrics(group)
        prefix = _mode_prefix(mode)
        summary = sources.setdefault(source, _source_summary(group))
        ranges = intervals(columns, list(map(cluster, group)), _combined(group[0]))
        ranges |= _kind(group[0]).ranges(group)
        summary["intervals"] |= {prefix + name: ends for name, ends in ranges.items()}
        short_metrics |= {prefix + name: value for name, value in values.items()}
    named = {} if "" in sources else {**named_metrics(rows), "sources": sources}
    if len(sources) != 1:
        return named
    summary = dict(next(iter(sources.values())))
    ranges = summary.pop("intervals")
    return summary | short_metrics | {"intervals": ranges} | named


def _source_summary(rows: Sequence[Row]) -> JsonDict:
    """Returns the benchmark, protocol and counts of the rows of one source, without intervals."""
    benchmark = rows[0]["benchmark"]
    clusters = set(map(cluster, rows))
    return {
        "benchmark": benchmark,
        "protocol": find_benchmark(benchmark, "benchmark").protocol,
        "n": _question_count(rows),
        "images": sum(kind == "image" for kind, _ in clusters),
        "resampled": " and ".join(sorted({f"{kind}s" for kind, _ in clusters})),
        "intervals": {},
    }


def table_rows(report: JsonObject) -> list[list[str]]:
    """Returns the metrics of a report as table rows: name, value and 95 % interval.

    Shares are shown in percent.
    """
    ranges = report["intervals"]
    kind = KINDS[find_benchmark(report["benchmark"], "benchmark").kind]
    rows = []
    for name, value in report.items():
        if not isinstance(value, float):
            continue
        scale, form, unit = (100, ".2f", " %") if _is_share(name, kind) else (1, ".4g", "")
        interval = ""
        if name in ranges:
            low, high = ranges[name]
            interval = f"{low * scale:{form}} to {high * scale:{form}}"
        rows.append([name, f"{value * scale:{form}}{unit}", interval])
    return rows


def _is_share(name: str, kind: Kind) -> bool:
    """Returns whether a metric is a fraction of 1. `name` may have the prefixes of its source."""
    metric = name.rpartition("/")[2].removeprefix(_mode_prefix(SAMPLED))
    return metric not in kind.not_shares | _ANY_KIND and not metric.startswith("reward_")

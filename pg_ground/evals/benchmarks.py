"""What answers are measured as: every benchmark by its name, with its protocol and its size; and rows → `eval.json`."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from pg_ground.config import nearest
from pg_ground.evals import counting, cv_bench, environment, grounding, pointing, segmentation
from pg_ground.evals.intervals import intervals
from pg_ground.evals.rows import SAMPLED, Row, bare, column
from pg_ground.types import UserError


class Kind(NamedTuple):
    """A way to measure: pure functions of rows."""

    score: Callable[[Row], dict[str, Any]]
    """What is found of one row."""
    columns: Callable[[Sequence[Row]], dict[str, Float[np.ndarray, " N"]]]
    """Measures that are means over rows: a number of each, NaN where it does not count."""
    others: Callable[[Sequence[Row]], dict[str, float]]
    """Measures that are not."""


KINDS: dict[str, Kind] = {
    "box": Kind(grounding.score_one, grounding.columns_one, grounding.others),
    "boxes": Kind(grounding.score_set, grounding.columns_set, grounding.others),
    "detection": Kind(grounding.score_set, grounding.columns_set, grounding.detected),
    "mask": Kind(segmentation.score, segmentation.columns, counting.nothing),
    "points": Kind(pointing.score_set, pointing.columns_set, pointing.others),
    "click": Kind(pointing.score_click, pointing.columns_click, pointing.others),
    "count": Kind(counting.score_count, counting.columns_count, counting.nothing),
    "choice": Kind(cv_bench.score, cv_bench.columns, cv_bench.others),
    "text": Kind(counting.score_text, counting.columns_text, counting.nothing),
    "reward": Kind(environment.score, environment.columns, environment.others),
}


class Benchmark(NamedTuple):
    """A kind of measuring, on questions that are the same for everybody."""

    kind: str
    protocol: str
    count: int | None = None
    """Questions that it has; None takes any number."""
    tasks: tuple[str, ...] = ()
    """Of CV-Bench, each with its published number of questions."""


REC = "first box of the answer against the one gold box, plain IoU (no +1 pixel), correct where IoU >= 0.5, unreadable is IoU 0"
UNC = f"{REC}; one question a sentence of the UNC split"
UMD = f"{REC}; one question a sentence of the UMD split"
MASK = (
    "mIoU of masks at full resolution over all answers, 0 for one without a mask, as big_vision's evaluator has it; boxaccP is "
    "the share of boxes with IoU >= P"
)
CV = "one option letter (or the option's own words); none or several is wrong"

BENCHMARKS: dict[str, Benchmark] = {
    # sentences of each split: Yu et al. 2016 (arXiv 1608.00272), and for RefCOCOg Nagaraja et al. 2016 (arXiv 1608.00525)
    "rec": Benchmark("box", REC),
    "refcoco_val": Benchmark("box", UNC, 10834),
    "refcoco_testA": Benchmark("box", UNC, 5657),
    "refcoco_testB": Benchmark("box", UNC, 5095),
    "refcoco+_val": Benchmark("box", UNC, 10758),
    "refcoco+_testA": Benchmark("box", UNC, 5726),
    "refcoco+_testB": Benchmark("box", UNC, 4889),
    "refcocog_val": Benchmark("box", UMD, 4896),
    "refcocog_test": Benchmark("box", UMD, 9602),
    "lisa_grounding": Benchmark(
        "box", f"{REC}; VLM-R1's LISA-Grounding test file, whose authors name no size"
    ),
    "objects": Benchmark(
        "boxes",
        "all boxes against all gold boxes, matched one to one within names for the largest total IoU; accP is 2 "
        "hits / (predicted + gold) with a hit at IoU >= P, mean_iou 2 sum / (predicted + gold), nothing answered to nothing is 1",
    ),
    "detection": Benchmark(
        "detection",
        "COCO's average precision (pycocotools; ap over IoU .5 to .95, ap50, ap75, ar100), each answer an image; ranked by score "
        "where all boxes have one, else in the order written",
    ),
    "segmentation": Benchmark("mask", MASK),
    "refcoco_val_seg": Benchmark("mask", MASK, 10834),
    "refcoco_testA_seg": Benchmark("mask", MASK, 5657),
    "refcoco_testB_seg": Benchmark("mask", MASK, 5095),
    "refcoco+_val_seg": Benchmark("mask", MASK, 10758),
    "refcoco+_testA_seg": Benchmark("mask", MASK, 5726),
    "refcoco+_testB_seg": Benchmark("mask", MASK, 4889),
    "refcocog_val_seg": Benchmark("mask", MASK, 4896),
    "refcocog_test_seg": Benchmark("mask", MASK, 9602),
    "pointing": Benchmark(
        "points",
        "points and gold objects matched one to one for most hits (arXiv 2409.17146); a hit lies in the object's mask, else in "
        "its box, else within 5 % of the diagonal of its point; precision, recall and F1 of each answer, averaged",
    ),
    "screenspot": Benchmark(
        "click",
        "first point (or centre of the first box) in the gold box, edges included (arXiv 2401.10935)",
    ),
    "counting": Benchmark(
        "count", "the one number of the answer, exact; mae over answers that can be read"
    ),
    "cv_bench": Benchmark(
        "choice",
        f"{CV}; the mean of 2D (mean of ADE20K and COCO) and 3D (Omni3D)",
        2638,
        tuple(cv_bench.TASKS),
    ),
    "cv_bench_qualitative": Benchmark(
        "choice",
        f"{CV}; Relation, Depth and Distance alone, over all their questions",
        1850,
        cv_bench.QUALITATIVE,
    ),
    "multiple_choice": Benchmark("choice", CV),
    "text": Benchmark(
        "text", "the answer is the gold text, but for case, blanks and a last full stop"
    ),
    "environment": Benchmark(
        "reward",
        "mean reward; a rollout passes from reward 0.5; pass@k unbiased (arXiv 2107.03374)",
    ),
}
"""Every benchmark. Where it has a size, nothing else is reported under its name."""

OF_QUESTIONS = {"boxes": "rec", "points": "pointing", "text": "text"}
"""What a source is measured as where `eval.benchmarks` does not say: by what it asks for. Several gold boxes are `objects`."""


def benchmark_of(name: str, where: str) -> Benchmark:
    """Returns a benchmark by its name, or by that of a part of it (`refcoco_val@512`).

    Raises:
      UserError: there is none; `where` says who asked.
    """
    whole = name.partition("@")[0]
    if whole not in BENCHMARKS:
        raise UserError(f"{where} {name!r} does not exist: {nearest(whole, BENCHMARKS)}")
    return BENCHMARKS[whole]


def check_count(rows: Sequence[Row], name: str) -> None:
    """Raises UserError unless rows (of one mode) are all questions of the benchmark of that name."""
    benchmark = benchmark_of(name, "benchmark")
    number = len({str(row["id"]) for row in rows})
    part = name.partition("@")[2]
    if part and part != str(number):
        raise UserError(f"{name} has {part} questions, but there are {number}")
    if part or benchmark.count is None:
        return
    if number != benchmark.count:
        free = next(
            free
            for free, other in BENCHMARKS.items()
            if other.kind == benchmark.kind and other.count is None
        )
        raise UserError(
            f"{name} has {benchmark.count} questions, but there are {number}: --benchmark={free} takes any number, under its "
            f"own name"
        )
    if benchmark.tasks:
        cv_bench.check_counts(rows, benchmark.tasks)


def scored(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Returns rows with what their benchmarks find of each, and nothing that was found before."""
    return [
        bare(row) | KINDS[benchmark_of(row["benchmark"], "benchmark").kind].score(row)
        for row in rows
    ]


class Measured(NamedTuple):
    """Measures of rows of one source and mode."""

    values: dict[str, float]
    columns: dict[str, Float[np.ndarray, " N"]]
    """Those that are means, row by row."""


def measure(rows: Sequence[Row]) -> Measured:
    """Returns the measures of scored rows of one source and mode; those that no row has a number for are left out."""
    kind = KINDS[benchmark_of(rows[0]["benchmark"], "benchmark").kind]
    columns = kind.columns(rows)
    columns |= {
        f"{name}_fraction": column(rows, name)
        for name in ("malformed", "unfinished")
        if name in rows[0]
    }
    columns = {name: values for name, values in columns.items() if not np.isnan(values).all()}
    values = {name: float(np.nanmean(of)) for name, of in columns.items()} | kind.others(rows)
    if "invalid_fraction" in columns:
        values["invalid"] = float(columns["invalid_fraction"].sum())
    if "suffix_nll" in rows[0]:
        nll = float(column(rows, "suffix_nll").sum() / column(rows, "suffix_tokens").sum())
        values |= {"suffix_nll": nll, "suffix_perplexity": math.exp(nll)}
    return Measured(values, columns)


def grouped(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    """Returns rows by source and mode, in the order they come in."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row["source"], row["mode"]), []).append(row)
    return found


def metrics(rows: Sequence[Row]) -> dict[str, float]:
    """Returns `eval/<source>/<measure>` of scored rows, `sampled_` before those at temperature, and the number of questions."""
    found: dict[str, float] = {}
    for (source, mode), some in grouped(rows).items():
        prefix = f"eval/{source}/" + ("sampled_" if mode == SAMPLED else "")
        found |= {prefix + name: value for name, value in measure(some).values.items()}
        found[f"eval/{source}/questions"] = float(len({str(row["id"]) for row in some}))
    return found


def report(rows: Sequence[Row]) -> dict[str, Any]:
    """Returns what `eval.json` says of scored rows: all `metrics`; for each source its benchmark, protocol, counts and intervals.

    Where there is one source, its measures stand at the top by their bare names; those of somebody's file do so alone.
    """
    sources: dict[str, dict[str, Any]] = {}
    flat: dict[str, Any] = {}
    for (source, mode), some in grouped(rows).items():
        found, prefix = measure(some), "sampled_" if mode == SAMPLED else ""
        about = sources.setdefault(
            source,
            {
                "benchmark": some[0]["benchmark"],
                "protocol": benchmark_of(some[0]["benchmark"], "benchmark").protocol,
                "n": len({str(row["id"]) for row in some}),
                "images": len({str(row["image"]) for row in some if row["image"] is not None}),
                "intervals": {},
            },
        )
        ends = intervals(found.columns, [row["image"] for row in some])
        about["intervals"] |= {prefix + name: value for name, value in ends.items()}
        flat |= {prefix + name: value for name, value in found.values.items()}
    of_runs = {} if "" in sources else {**metrics(rows), "sources": sources}
    if len(sources) != 1:
        return of_runs
    about = next(iter(sources.values()))
    bounds = about.pop("intervals") if not of_runs else about["intervals"]
    head = {name: value for name, value in about.items() if name != "intervals"}
    return head | flat | {"intervals": bounds} | of_runs


def shown(of: Mapping[str, Any]) -> list[list[str]]:
    """Returns measures as rows of a table: shares in percent, with their 95 % intervals."""
    found = []
    for name, value in of.items():
        if isinstance(value, float):
            low_high = of["intervals"].get(name)
            share = (
                name in of["intervals"]
                and "distance" not in name
                and name not in ("mae", "mean_reward")
            )
            scale, form = (100, ".2f") if share else (1, ".4g")
            between = (
                f"{low_high[0] * scale:{form}} to {low_high[1] * scale:{form}}" if low_high else ""
            )
            found.append([name, f"{value * scale:{form}}{' %' if share else ''}", between])
    return found

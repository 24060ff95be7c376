"""A run as one page that needs nothing else: results, curves, a gallery of rollouts, settings, hardware, times.

python -m pg_ground.report --workdir=D [--workdir=E …] [--out=O.html]

The page is a function of the files of a run (`config.json`, `metrics.jsonl`, `hardware.json`, `samples/`), and is written anew as
often as the run is measured or draws its rollouts. Of several runs it is a comparison: curves over one another, results side by
side, the settings that differ, a gallery of each.
"""

import dataclasses
import html
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pg_ground import config
from pg_ground.parallel.multiprocess import flatten_settings
from pg_ground.reporting import drawing, html_page, provenance
from pg_ground.reporting.files import write_atomically
from pg_ground.reporting.metric_writers import read_metrics
from pg_ground.reporting.tables import Table, is_shown, results_table
from pg_ground.types import UserError

FILE = "report.html"

SAMPLES_BYTES = 3 * 2**20
"""What the gallery of a page may take: as many steps are in it as fit, evenly chosen, the first and the last always."""

POINTS = 400
"""A curve of more points is thinned out to about so many, extremes kept."""

MOVING = 60
"""Curves with more points than this are drawn faintly, with their running mean on top …"""

EXACT = r"eval/|data/|optim/lr$"
"""… but for these, which carry no noise that a mean could take away."""

CURVES: tuple[tuple[str, str], ...] = (
    ("Reward", r"reward/(?!std$|weighted/|errors/)"),
    ("Reward parts times their weights", r"reward/weighted/"),
    ("Reward: standard deviation in a group", r"reward/std$"),
    ("Rewards of text: errors", r"reward/errors/"),
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
"""A chart's title and the metrics it shows; what matches none gets a chart of its own, evaluations one a benchmark."""


HEADLINES = (
    r"eval/(.+/(?:acc50|point_in_box|accuracy))|(reward)/total|completion/(malformed)_fraction"
)
"""Metrics that stand at the top of the page, and by which part of their names."""


NOTE = "sampled_: at temperature; the rest: greedy."

OWN_SCALE = ("mae", "suffix_perplexity")
"""Held-out measures that are no fractions of 1: each has a chart of its own."""


class Run(NamedTuple):
    """What the files of a run say."""

    name: str
    config: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]]
    """The lines of `metrics.jsonl`."""
    samples: Sequence[Mapping[str, Any]]
    """The steps that the gallery shows: what `samples/*.json` hold."""
    left_out: int
    """Steps with pictures that it has no room for."""
    machines: Sequence[Mapping[str, Any]]
    """What `hardware.json` holds."""


class Curve(NamedTuple):
    """A metric over the steps."""

    name: str
    steps: list[int]
    values: list[float]
    """NaN is a gap."""


def write_report(workdir: Path) -> Path:
    """Writes `report.html` of a run, and returns its path. Equal files of a run give equal bytes."""
    return write_page([workdir], workdir / FILE)


def write_page(workdirs: Sequence[Path], path: Path) -> Path:
    """Writes the page of one run, or the comparison of several runs, and returns its path.

    Raises:
      UserError: a directory holds no run, or a file of a run is broken.
    """
    samples_bytes = SAMPLES_BYTES // len(workdirs)
    names = distinct_names(workdirs)
    runs = [read_run(*run, samples_bytes) for run in zip(workdirs, names, strict=True)]
    write_atomically(path, report_html(runs))
    return path


def read_run(workdir: Path, name: str = "", samples_bytes: int = SAMPLES_BYTES) -> Run:
    """Returns what the page says of a run, under its directory's name if no other is given.

    Raises:
      UserError: there is no run in that directory, or a file of it is broken.
    """
    if not (workdir / "config.json").is_file():
        raise UserError(f"{workdir} holds no run: there is no config.json in it")
    files = sorted(
        (workdir / "samples").glob("*.json"), key=lambda path: path.stem.rpartition("_")[2]
    )
    chosen = evenly(files, [path.stat().st_size for path in files], samples_bytes)
    return Run(
        name or workdir.resolve().name,
        _json(workdir / "config.json"),
        read_metrics(workdir),
        [_json(path) for path in chosen],
        len(files) - len(chosen),
        _json(workdir / provenance.FILE) if (workdir / provenance.FILE).is_file() else [],
    )


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None


def evenly(items: Sequence[Any], sizes: Sequence[int], budget: int) -> list[Any]:
    """Returns as many of the items as fit, evenly spaced, the first and the last among them whatever their size."""
    for count in range(len(items), 2, -1):
        places = sorted({round(i * (len(items) - 1) / (count - 1)) for i in range(count)})
        if sum(sizes[i] for i in places) <= budget:
            return [items[i] for i in places]
    return list(items) if len(items) < 3 else [items[0], items[-1]]


def samples_name(stage: str, step: int) -> str:
    """Returns where the rollouts of a step lie in the working directory, without what says picture (.png) or numbers (.json)."""
    return f"samples/{stage}_{step:08d}"


def forget_samples(workdir: Path, step: int | None) -> None:
    """Deletes the rollouts that were written later than `step`, or all of them: the run will write them again."""
    for path in (workdir / "samples").glob("*_*.*"):
        number = path.stem.rpartition("_")[2]
        if number.isdigit() and (step is None or int(number) > step):
            path.unlink()


def distinct_names(workdirs: Sequence[Path]) -> list[str]:
    """Returns a name for each directory: the shortest ends of their paths that tell them apart."""
    parts = [path.resolve().parts for path in workdirs]
    for depth in range(1, max(map(len, parts))):
        names = ["/".join(one[-depth:]) for one in parts]
        if len(set(names)) == len(names):
            return names
    raise UserError(f"--workdir names {workdirs[0]} twice")


def report_html(runs: Sequence[Run]) -> str:
    """Returns the page of a run, or of several that are compared."""
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs compared"
    return html_page.page(
        f"{title} · pg_ground", "\n".join(_body(title, runs)), _data(runs), "report.js"
    )


def _body(title: str, runs: Sequence[Run]) -> Iterator[str]:
    sections = {name: content for name, content in _sections(runs).items() if content}
    links = " ".join(f'<a href="#{name.lower()}">{name}</a>' for name in sections)
    notes = "".join(
        f'<p class="note">{html.escape(_summary(run, alone=len(runs) == 1))}</p>' for run in runs
    )
    tiles = _tiles(runs[0]) if len(runs) == 1 else ""
    yield f'<header><h1>{html.escape(title)}</h1>{notes}<nav aria-label="sections">{links}</nav>{tiles}</header>'
    for name, content in sections.items():
        yield f'<section id="{name.lower()}"><h2>{name}</h2>{content}</section>'
    yield "<noscript><p>Curves and gallery are drawn by a script of this page, which is not allowed to run.</p></noscript>"


def _sections(runs: Sequence[Run]) -> dict[str, str]:
    """Returns the page's parts by title, "" where there is nothing to say."""

    def drawn(note: str, place: str) -> str:
        return f'<p class="note">{html.escape(note)}</p><div id="{place}"></div>'

    table = results(runs[0]) if len(runs) == 1 else comparison(runs)
    times = [
        html_page.table_html(times_table(run, run.name if len(runs) > 1 else ""))
        for run in runs
        if _phases(run)
    ]
    return {
        "Results": html_page.table_html(table) if table.rows else "",
        "Curves": drawn(_curves_note(runs), "charts") if any(run.metrics for run in runs) else "",
        "Rollouts": drawn(_rollouts_note(runs), "gallery")
        if any(run.samples for run in runs)
        else "",
        "Settings": "\n".join(_settings(runs)),
        "Hardware": html_page.table_html(machines_table(runs))
        if any(run.machines for run in runs)
        else "",
        "Time": "\n".join(times),
    }


def _summary(run: Run, alone: bool) -> str:
    """Returns in words which stages a run has, how far it is, and how good it was last."""
    done, total = (
        (run.metrics[-1]["step"] if run.metrics else 0),
        sum(length for _, length in _stages(run)),
    )
    words = [f"{' → '.join(f'{name} {length:,}' for name, length in _stages(run))} steps"]
    words.append("finished" if done >= total else f"at step {done:,} of {total:,}")
    return " · ".join([*([] if alone else [run.name]), *words])


def _tiles(run: Run) -> str:
    """Returns the headline numbers of a run, each with what it was at first."""
    found = []
    for curve in curves_of(run.metrics):
        known = [value for value in curve.values if not math.isnan(value)]
        named = re.fullmatch(HEADLINES, curve.name)
        if named and known:
            name = next(filter(None, named.groups())).replace("/", ": ").replace("_", " ")
            before = f"<small>from {known[0]:.3f}</small>" if len(known) > 1 else ""
            found.append(
                f'<div class="tile"><dt>{html.escape(name)}</dt><dd>{known[-1]:.3f}{before}</dd></div>'
            )
    return f'<dl class="tiles">{"".join(found)}</dl>' if found else ""


def _stages(run: Run) -> list[tuple[str, int]]:
    """Returns each stage of a run with its number of steps."""
    return [(stage, run.config[stage]["steps"]) for stage in run.config["stages"]]


def _curves_note(runs: Sequence[Run]) -> str:
    marks = stage_starts(runs[0].metrics)
    text = "Steps count over all stages"
    if len(runs) == 1 and len(marks) > 1:
        text += f" ({', '.join(f'{name} from step {start}' for name, start in marks)}); a dotted line marks where a stage starts"
    text += ". Point at a chart, or use the arrow keys on it, for its values"
    return (
        text
        + "; a name in its legend hides the curve. A bold curve over a faint one is its running mean."
    )


def _rollouts_note(runs: Sequence[Run]) -> str:
    text = "What the policy answered to the first prompts of a step, each answer in the colour of its reward, gold dashed in white. "
    text += "Point at an answer, or tap it, to see it alone."
    left_out = sum(run.left_out for run in runs)
    return text + (f" {left_out} more steps are in samples/." if left_out else "")


def results(run: Run) -> Table:
    """Returns the held-out measures, a row each: at the start, at the end of each stage, and the last ones so far."""
    return results_table("Held-out measures", measured(run), NOTE)


def comparison(runs: Sequence[Run]) -> Table:
    """Returns the last held-out measures of each run side by side."""
    last = {}
    for run in runs:
        moments = measured(run)
        if moments:
            moment = list(moments)[-1]
            last[f"{run.name}, {moment}"] = moments[moment]
    return results_table("Held-out measures, the last of each run", last, NOTE)


def measured(run: Run) -> dict[str, dict[str, float]]:
    """Returns the held-out measures at the start, at the end of each stage, and, if that is later, when they were last taken."""
    ends, end = {0: "start"}, 0
    for stage, length in _stages(run):
        end += length
        ends[end] = f"after {stage}"
    found: dict[int, dict[str, float]] = {}
    for line in run.metrics:
        values = {
            name: value
            for name, value in line.items()
            if name.startswith("eval/") and value is not None
        }
        if values:
            found[line["step"]] = values
    return {
        ends.get(step, f"step {step}"): values
        for step, values in found.items()
        if step in ends or step == max(found)
    }


def _settings(runs: Sequence[Run]) -> Iterator[str]:
    flat = [flatten_settings(run.config) for run in runs]
    if len(runs) > 1:
        names = sorted(set().union(*flat))
        rows = [
            [name, *(_spelled(one.get(name)) for one in flat)]
            for name in names
            if len({_spelled(o.get(name)) for o in flat}) > 1
        ]
        yield html_page.table_html(
            Table(
                "What differs",
                ["setting", *(run.name for run in runs)],
                rows,
                "" if rows else "Nothing.",
            )
        )
    for run, one in zip(runs, flat, strict=True):
        own = f"{run.name}: " if len(runs) > 1 else ""
        chosen = [[name, _spelled(value)] for name, value in one.items() if _is_chosen(name, value)]
        table = html_page.table_html(Table("", ["config.", "value"], chosen))
        yield _details(f"{own}{len(chosen)} settings that are not the default", table)
        text = json.dumps(run.config, indent=2, ensure_ascii=False)
        yield _details(f"{own}every setting", f"<pre>{html.escape(text)}</pre>")


def _details(summary: str, content: str) -> str:
    return f"<details><summary>{html.escape(summary)}</summary>{content}</details>"


DEFAULTS: Mapping[str, Any] = flatten_settings(dataclasses.asdict(config.Config()))
SOURCE_DEFAULTS: Mapping[str, Any] = dataclasses.asdict(config.Source())


def _is_chosen(name: str, value: Any) -> bool:
    """Returns whether a setting has another value than it would have unsaid."""
    source = re.fullmatch(r"\w+\.sources\..+\.(\w+)", name)
    default = SOURCE_DEFAULTS.get(source[1]) if source else DEFAULTS.get(name)
    return _spelled(value) != _spelled(default)


def _spelled(value: Any) -> str:
    return (
        ""
        if value is None
        else value
        if isinstance(value, str) and value
        else json.dumps(value, ensure_ascii=False)
    )


def machines_table(runs: Sequence[Run]) -> Table:
    """Returns a column for each machine of each run."""
    columns = [(run, one) for run in runs for one in run.machines]
    heads = [
        (f"{run.name}, " if len(runs) > 1 else "")
        + (f"from step {one['from_step']}" if one["from_step"] else "from the start")
        for run, one in columns
    ]
    names = list(dict.fromkeys(name for _, one in columns for name in one if name != "from_step"))
    return Table(
        "",
        ["", *heads],
        [[name, *(_spelled(one.get(name)) for _, one in columns)] for name in names],
    )


def times_table(run: Run, title: str) -> Table:
    """Returns the mean seconds and the share of each phase of a step, by stage."""
    found = _phases(run)
    rows = []
    for stage, phases in found.items():
        whole = phases.get("time/step_s", math.nan)
        for name, seconds in phases.items():
            share = "" if name == "time/step_s" else f"{100 * seconds / whole:.1f}%"
            rows.append(
                [stage, name.removeprefix("time/").removesuffix("_s"), f"{seconds:.4f}", share]
            )
    note = (
        "Without the first line of each stage and of each machine, in which programs are compiled."
    )
    return Table(title, ["stage", "phase", "mean s", "share of a step"], rows, note)


def _phases(run: Run) -> dict[str, dict[str, float]]:
    """Returns the mean seconds of each phase by stage; a line of metrics is the mean of its steps already."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for line in run.metrics:
        if "time/step_s" in line:
            found.setdefault(line["stage"], []).append(line)
    means = {}
    for stage, lines in found.items():
        after = [
            next((line["step"] for line in lines if line["step"] > one["from_step"]), None)
            for one in run.machines
        ]
        starts = {lines[0]["step"], *after}
        kept = [line for line in lines if line["step"] not in starts] or lines
        names = [name for name in kept[-1] if name.startswith("time/")]
        values = {
            name: [line[name] for line in kept if line.get(name) is not None] for name in names
        }
        means[stage] = {name: float(np.mean(own)) for name, own in values.items() if own}
    return means


def _data(runs: Sequence[Run]) -> dict[str, Any]:
    """Returns what the script draws."""
    return {
        "viridis": drawing.VIRIDIS,
        "unjudged": drawing.UNJUDGED,
        "runs": [
            {"name": run.name, "marks": stage_starts(run.metrics), "samples": run.samples}
            for run in runs
        ],
        "charts": charts(runs),
    }


def charts(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Returns the charts: of one run with its metrics in groups, of several with one metric each, a curve a run."""
    curves = [curves_of(run.metrics) for run in runs]
    names = list(dict.fromkeys(curve.name for own in curves for curve in own))
    grouped = groups(names)
    if len(runs) > 1:
        grouped = [
            (title if len(group) == 1 else f"{title}: {_label(name)}", [name])
            for title, group in grouped
            for name in group
        ]
    found = []
    for title, group in grouped:
        lines = []
        for index, own in enumerate(curves):
            marks = stage_starts(runs[index].metrics)
            for curve in own:
                if curve.name in group:
                    lines.append(
                        {
                            "run": index,
                            "label": runs[index].name if len(runs) > 1 else _label(curve.name),
                        }
                        | _drawn(curve, marks)
                    )
        found.append({"title": title, "lines": lines})
    return found


def groups(names: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Returns the charts of metrics in the order of the page: reward, evaluations, then the rest of CURVES and what is left.

    Of held-out measures those of the table of results have one.
    """
    evaluations: dict[str, list[str]] = {}
    for name in names:
        if name.startswith("eval/") and is_shown(name):
            evaluations.setdefault(_evaluation_title(name), []).append(name)
    named = [
        (title, [name for name in names if re.match(pattern, name)]) for title, pattern in CURVES
    ]
    taken = {name for _, group in named for name in group} | {
        name for name in names if name.startswith("eval/")
    }
    left = [(name, [name]) for name in names if name not in taken]
    return [
        (title, group)
        for title, group in [*named[:1], *evaluations.items(), *named[1:], *left]
        if group
    ]


def _evaluation_title(metric: str) -> str:
    """Returns the chart of `eval/<benchmark>/<measure>` or `eval/<benchmark>/sampled_<measure>`."""
    benchmark, _, measure = metric.removeprefix("eval/").rpartition("/")
    mode = "sampled" if measure.startswith("sampled_") else "greedy"
    own = f", {_measure(metric)}" if _measure(metric) in OWN_SCALE else ""
    return f"Evaluation: {benchmark}{own}, {mode} answers"


def _measure(metric: str) -> str:
    return metric.rpartition("/")[2].removeprefix("sampled_")


def _label(metric: str) -> str:
    return (
        metric.rpartition("/")[2]
        .removeprefix("sampled_")
        .removesuffix("_fraction")
        .removesuffix("_s")
        .removesuffix("_per")
    )


def curves_of(metrics: Sequence[Mapping[str, Any]]) -> list[Curve]:
    """Returns one curve a metric, in order of first appearance; null is NaN, a gap."""
    found: dict[str, Curve] = {}
    for row in metrics:
        for name, value in row.items():
            if name in ("step", "stage"):
                continue
            curve = found.setdefault(name, Curve(name, [], []))
            curve.steps.append(row["step"])
            curve.values.append(math.nan if value is None else float(value))
    return list(found.values())


def stage_starts(metrics: Sequence[Mapping[str, Any]]) -> list[tuple[str, int]]:
    """Returns each stage's name and the step it starts after: the last step of the stage before."""
    starts: list[tuple[str, int]] = []
    last = 0
    for row in metrics:
        if not starts or starts[-1][0] != row["stage"]:
            starts.append((str(row["stage"]), last))
        last = row["step"]
    return starts


def _drawn(curve: Curve, marks: Sequence[tuple[str, int]]) -> dict[str, Any]:
    """Returns a curve as it is drawn: thinned out, and with its running mean, within each stage, where it is noisy."""
    values = np.array(curve.values)
    kept = thinned(values)
    line: dict[str, Any] = {
        "steps": [curve.steps[i] for i in kept],
        "values": _numbers(values[kept]),
    }
    if len(values) > MOVING and not re.match(EXACT, curve.name):
        cuts = np.searchsorted(curve.steps, [start for _, start in marks[1:]], side="right")
        half = max(1, len(values) // 40)
        means = np.concatenate(
            [running_mean(part, half) for part in np.split(values, cuts) if len(part)]
        )
        line["means"] = _numbers(means[kept])
    return line


def thinned(values: np.ndarray) -> list[int]:
    """Returns the places of at most about `POINTS` values: the ends, and the least and the largest of each stretch between."""
    if len(values) <= POINTS:
        return list(range(len(values)))
    kept = {0, len(values) - 1}
    for part in np.array_split(np.arange(len(values)), POINTS // 2):
        known = part[~np.isnan(values[part])]
        kept |= (
            {int(known[values[known].argmin()]), int(known[values[known].argmax()])}
            if len(known)
            else {int(part[0])}
        )
    return sorted(kept)


def running_mean(values: np.ndarray, half: int) -> np.ndarray:
    """Returns the mean of each value and its `half` neighbours on either side; NaN counts for nothing."""
    known, window = ~np.isnan(values), np.ones(2 * half + 1)
    here = slice(half, half + len(values))
    total = np.convolve(np.where(known, values, 0.0), window)[here]
    count = np.convolve(known, window)[here]
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _numbers(values: np.ndarray) -> list[float | None]:
    return [float(f"{value:.5g}") if math.isfinite(value) else None for value in values.tolist()]

"""The HTML page of a run: results, curves, rollouts, settings, hardware, goodput and times.

The page depends only on the files of the run (`config.json`, `metrics.jsonl`, `hardware.json`,
`timeline.jsonl`, `samples/`). A run writes it again after each evaluation, picture and checkpoint.
The page of several runs is a comparison: their curves share a chart, their results share a table,
and a table lists the settings that differ.
"""

import dataclasses
import html
import json
import math
import re
from collections.abc import Iterator, Sequence

import numpy as np

from pg_ground import config
from pg_ground.parallel.multiprocess import flatten_settings
from pg_ground.reporting import goodput, html_page
from pg_ground.reporting.curves import charts, curves_of, stage_starts
from pg_ground.reporting.rollout_pictures import UNSCORED, VIRIDIS
from pg_ground.reporting.run_files import SAMPLES_BYTES, Run, distinct_names, read_run
from pg_ground.reporting.tables import Table, results_table
from pg_ground.storage.files import write_atomically
from pg_ground.storage.paths import FilePath
from pg_ground.types import JsonDict, JsonObject

FILE = "report.html"

HEADLINES = (
    r"eval/(.+/(?:acc50|point_in_box|accuracy))|(reward)/total|completion/(malformed)_fraction"
)
"""Metrics at the top of the page. A group of the pattern holds the name that the page shows."""

RESULTS_NOTE = "sampled_: answers at temperature; all other metrics: greedy answers."


def write_report(workdir: FilePath) -> FilePath:
    """Writes `report.html` of a run, and returns its path.

    Equal files of a run give equal bytes.
    """
    return write_page([workdir], workdir / FILE)


def write_page(
    workdirs: Sequence[FilePath], path: FilePath, price: float | None = None
) -> FilePath:
    """Writes the page of one run, or the comparison of several runs, and returns its path.

    Args:
      price: the price of a chip for an hour; None for a page without money.

    Raises:
      UserError: a directory holds no run, or a file of a run is broken.
    """
    samples_bytes = SAMPLES_BYTES // len(workdirs)
    names = distinct_names(workdirs)
    runs = [
        read_run(workdir, name, samples_bytes)
        for workdir, name in zip(workdirs, names, strict=True)
    ]
    write_atomically(path, report_html(runs, price))
    return path


def report_html(runs: Sequence[Run], price: float | None = None) -> str:
    """Returns the page of one run, or the comparison of several runs.

    Args:
      price: the price of a chip for an hour; None for a page without money.
    """
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs compared"
    body = "\n".join(_body(title, runs, price))
    return html_page.page(f"{title} · pg_ground", body, _script_data(runs), "report.js")


def _script_data(runs: Sequence[Run]) -> JsonDict:
    """Returns the curves and the rollouts, which the script of the page draws."""
    return {
        "viridis": VIRIDIS,
        "unscored": UNSCORED,
        "runs": [
            {"name": run.name, "marks": stage_starts(run.metrics), "samples": run.samples}
            for run in runs
        ],
        "charts": charts(runs),
    }


def _body(title: str, runs: Sequence[Run], price: float | None) -> Iterator[str]:
    sections = {name: content for name, content in _sections(runs, price).items() if content}
    links = " ".join(f'<a href="#{name.lower()}">{name}</a>' for name in sections)
    notes = "".join(_note(_summary(run, with_name=len(runs) > 1)) for run in runs)
    tiles = _tiles(runs[0]) if len(runs) == 1 else ""
    yield (
        f"<header><h1>{html.escape(title)}</h1>{notes}"
        f'<nav aria-label="sections">{links}</nav>{tiles}</header>'
    )
    for name, content in sections.items():
        yield f'<section id="{name.lower()}"><h2>{name}</h2>{content}</section>'
    yield (
        "<noscript><p>A script of this page draws the curves and the rollouts. "
        "The browser does not run it.</p></noscript>"
    )


def _sections(runs: Sequence[Run], price: float | None) -> dict[str, str]:
    """Returns the HTML of each section by title, "" for a section without content."""
    table = results(runs[0]) if len(runs) == 1 else comparison(runs)
    times = [
        html_page.table_html(table)
        for run in runs
        for table in _time_tables(run, run.name if len(runs) > 1 else "", price)
    ]
    sections = {
        "Results": html_page.table_html(table) if table.rows else "",
        "Curves": "",
        "Rollouts": "",
        "Settings": "\n".join(_settings(runs)),
        "Hardware": "",
        "Time": "\n".join(times),
    }
    if any(run.metrics for run in runs):
        sections["Curves"] = f'{_note(_curves_note(runs))}<div id="charts"></div>'
    if any(run.samples for run in runs):
        sections["Rollouts"] = f'{_note(_rollouts_note(runs))}<div id="gallery"></div>'
    if any(run.machines for run in runs):
        sections["Hardware"] = html_page.table_html(machines_table(runs))
    return sections


def _note(text: str) -> str:
    return f'<p class="note">{html.escape(text)}</p>'


def _summary(run: Run, with_name: bool) -> str:
    """Returns the stages of a run and its progress in words."""
    done = run.metrics[-1]["step"] if run.metrics else 0
    total = sum(steps for _, steps in run.stages)
    words = [run.name] if with_name else []
    words.append(f"{' → '.join(f'{name} {steps:,}' for name, steps in run.stages)} steps")
    words.append("finished" if done >= total else f"at step {done:,} of {total:,}")
    return " · ".join(words)


def _tiles(run: Run) -> str:
    """Returns the headline metrics of a run, each with its newest and its first value."""
    tiles = []
    for curve in curves_of(run.metrics):
        finite = [value for value in curve.values if not math.isnan(value)]
        match = re.fullmatch(HEADLINES, curve.name)
        if match and finite:
            name = next(filter(None, match.groups())).replace("/", ": ").replace("_", " ")
            first = f"<small>from {finite[0]:.3f}</small>" if len(finite) > 1 else ""
            value = f"<dd>{finite[-1]:.3f}{first}</dd>"
            tiles.append(f'<div class="tile"><dt>{html.escape(name)}</dt>{value}</div>')
    return f'<dl class="tiles">{"".join(tiles)}</dl>' if tiles else ""


def _curves_note(runs: Sequence[Run]) -> str:
    starts = stage_starts(runs[0].metrics)
    text = "Steps count over all stages"
    if len(runs) == 1 and len(starts) > 1:
        names = ", ".join(f"{name} from step {step}" for name, step in starts)
        text += f" ({names}). A dotted line marks the start of a stage"
    return (
        f"{text}. Point at a chart, or use the arrow keys on it, to see its values. Click a name "
        "in its legend to hide a curve. A bold curve over a faint curve is its running mean."
    )


def _rollouts_note(runs: Sequence[Run]) -> str:
    text = (
        "The answers of the policy to the first prompts of a step. Each answer has the colour of "
        "its reward; the ground truth is dashed in white. Point at an answer, or tap it, to see it "
        "alone."
    )
    omitted = sum(run.omitted_samples for run in runs)
    return f"{text} {omitted} more steps are in samples/." if omitted else text


# results


def results(run: Run) -> Table:
    """Returns the held-out metrics at the start, at the end of each stage, and at the newest
    step."""
    return results_table("Held-out metrics", evaluations(run), RESULTS_NOTE)


def comparison(runs: Sequence[Run]) -> Table:
    """Returns the newest held-out metrics of each run."""
    columns = {}
    for run in runs:
        by_moment = evaluations(run)
        if by_moment:
            moment = list(by_moment)[-1]
            columns[f"{run.name}, {moment}"] = by_moment[moment]
    return results_table("Held-out metrics, the newest of each run", columns, RESULTS_NOTE)


def evaluations(run: Run) -> dict[str, dict[str, float]]:
    """Returns the held-out metrics by moment: "start", "after sft", …, "step 60" at the end."""
    moments = {0: "start"}
    last_step = 0
    for stage, steps in run.stages:
        last_step += steps
        moments[last_step] = f"after {stage}"
    by_step = evaluations_by_step(run)
    return {
        moments.get(step, f"step {step}"): values
        for step, values in by_step.items()
        if step in moments or step == max(by_step)
    }


def evaluations_by_step(run: Run) -> dict[int, dict[str, float]]:
    """Returns the held-out metrics of each step at which the run was evaluated."""
    by_step: dict[int, dict[str, float]] = {}
    for line in run.metrics:
        values = {
            name: value
            for name, value in line.items()
            if name.startswith("eval/") and value is not None
        }
        if values:
            by_step[line["step"]] = values
    return by_step


# settings

DEFAULTS: JsonObject = flatten_settings(dataclasses.asdict(config.Config()))
SOURCE_DEFAULTS: JsonObject = dataclasses.asdict(config.Source())


def _settings(runs: Sequence[Run]) -> Iterator[str]:
    settings = [flatten_settings(run.config) for run in runs]
    if len(runs) > 1:
        yield html_page.table_html(_differences([run.name for run in runs], settings))
    for run, values in zip(runs, settings, strict=True):
        prefix = f"{run.name}: " if len(runs) > 1 else ""
        changed = [
            [name, _value_text(value)] for name, value in values.items() if _is_changed(name, value)
        ]
        table = html_page.table_html(Table("", ["config.", "value"], changed))
        yield _details(f"{prefix}{len(changed)} settings that are not the default", table)
        text = json.dumps(run.config, indent=2, ensure_ascii=False)
        yield _details(f"{prefix}every setting", f"<pre>{html.escape(text)}</pre>")


def _differences(names: Sequence[str], settings: Sequence[JsonObject]) -> Table:
    """Returns the settings that are not the same in all runs."""
    rows = []
    for name in sorted(set().union(*settings)):
        texts = [_value_text(values.get(name)) for values in settings]
        if len(set(texts)) > 1:
            rows.append([name, *texts])
    return Table("What differs", ["setting", *names], rows, "" if rows else "Nothing.")


def _details(summary: str, content: str) -> str:
    return f"<details><summary>{html.escape(summary)}</summary>{content}</details>"


def _is_changed(name: str, value: object) -> bool:
    """Returns whether a setting has another value than its default."""
    source_field = re.fullmatch(r"\w+\.sources\..+\.(\w+)", name)
    default = SOURCE_DEFAULTS.get(source_field[1]) if source_field else DEFAULTS.get(name)
    return _value_text(value) != _value_text(default)


def _value_text(value: object) -> str:
    """Returns a setting as text: "" for None, a text as it is, JSON for all else."""
    if value is None:
        return ""
    if isinstance(value, str) and value:
        return value
    return json.dumps(value, ensure_ascii=False)


# hardware and time


def machines_table(runs: Sequence[Run]) -> Table:
    """Returns a table with one column for each machine of each run."""
    heads, machines = [], []
    for run in runs:
        for machine in run.machines:
            step = machine["from_step"]
            prefix = f"{run.name}, " if len(runs) > 1 else ""
            heads.append(prefix + (f"from step {step}" if step else "from the start"))
            machines.append(machine)
    names = list(dict.fromkeys(name for machine in machines for name in machine))
    rows = [
        [name, *(_value_text(machine.get(name)) for machine in machines)]
        for name in names
        if name != "from_step"
    ]
    return Table("", ["", *heads], rows)


def _time_tables(run: Run, title: str, price: float | None) -> Iterator[Table]:
    """Yields the goodput and the times of a run, as far as its files have them."""
    if run.sessions:
        measured = goodput.measure(run.sessions)
        cost = goodput.cost_words(measured, run, price)
        yield goodput.goodput_table(measured, title, cost)
    if _phase_seconds(run):
        yield times_table(run, title)


def times_table(run: Run, title: str) -> Table:
    """Returns the mean seconds of each phase and its share of a step, by stage."""
    rows = []
    for stage, phases in _phase_seconds(run).items():
        step_seconds = phases.get("time/step_s", math.nan)
        for name, seconds in phases.items():
            share = "" if name == "time/step_s" else f"{100 * seconds / step_seconds:.1f}%"
            phase = name.removeprefix("time/").removesuffix("_s")
            rows.append([stage, phase, f"{seconds:.4f}", share])
    note = (
        "Without the first line of each stage and of each machine, because programs are compiled "
        "in those steps."
    )
    return Table(title, ["stage", "phase", "mean s", "share of a step"], rows, note)


def _phase_seconds(run: Run) -> dict[str, dict[str, float]]:
    """Returns the mean seconds of each phase by stage.

    A line of `metrics.jsonl` holds the mean of its steps.
    """
    by_stage: dict[str, list[JsonObject]] = {}
    for line in run.metrics:
        if "time/step_s" in line:
            by_stage.setdefault(line["stage"], []).append(line)
    means = {}
    for stage, lines in by_stage.items():
        first_steps = {lines[0]["step"]} | {
            next((line["step"] for line in lines if line["step"] > machine["from_step"]), None)
            for machine in run.machines
        }
        timed = [line for line in lines if line["step"] not in first_steps] or lines
        means[stage] = {}
        for name in timed[-1]:
            seconds = [line[name] for line in timed if line.get(name) is not None]
            if name.startswith("time/") and seconds:
                means[stage][name] = float(np.mean(seconds))
    return means

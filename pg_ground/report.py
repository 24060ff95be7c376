"""A run as one page that needs nothing else: tables, curves, pictures and its config; and tables for the terminal."""

import base64
import html
import io
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

FILE = "report.html"

SERIES = ("#3d86d1", "#d9792b", "#2f9e77", "#c9558a", "#8a74d1", "#a3912a", "#5aa6b8", "#b0605a")
"""Line colours of middling lightness: they can be told apart on white and on black."""

INK = "#010203"
"""Stands for the page's text colour while matplotlib draws; CSS decides on it in the reader's browser."""

MOVING = 60
"""Curves with more points than this are drawn faintly, with their running mean on top …"""

EXACT = r"eval/|data/|optim/lr$"
"""… but for these, which carry no noise that a mean could take away."""

CURVES: tuple[tuple[str, str], ...] = (
    ("Reward", r"reward/(?!std$)"),
    ("Reward, standard deviation", r"reward/std$"),
    ("SFT loss", r"sft/"),
    ("Policy loss", r"(grpo|policy)/loss$"),
    ("KL(policy ‖ reference)", r"policy/kl$"),
    ("Entropy (nats)", r"policy/entropy$"),
    ("Completion length (tokens)", r"completion/length"),
    ("Malformed, unfinished, groups without spread (fraction)", r"completion/.*_fraction$|group/.*_fraction$"),
    ("Clipped tokens (fraction)", r"policy/clip_fraction$"),
    ("Sampler against trainer: largest |Δ logp|", r"policy/logp_diff_max$"),
    ("Gradient norm", r"optim/grad_norm$"),
    ("Learning rate", r"optim/lr$"),
    ("Time of a step by phase (s)", r"time/"),
)
"""A chart's title and the metrics it shows; what matches none gets a chart of its own, evaluations one a benchmark."""

STYLE = """
:root { color-scheme: light dark; --paper: #fdfdfb; --ink: #1d1d1f; --soft: #6a6a70; --line: #dededa; --card: #f4f4f1;
  --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --paper: #161618; --ink: #e8e8e6; --soft: #9a9aa0; --line: #38383c;
  --card: #202023; --bad: #ff8a80; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.2rem; max-width: 76rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: .4rem 0 1.2rem; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; padding-top: .6rem; border-top: 1px solid var(--line); }
h3 { font-size: .95rem; margin: 0 0 .4rem; font-weight: 600; }
.note { color: var(--soft); font-size: .9rem; margin: .3rem 0 1rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; margin: .3rem 0; }
th, td { padding: .3rem .8rem; text-align: left; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--soft); font-weight: 600; }
th.number, td.number { text-align: right; }
.grid { display: grid; gap: 1rem; align-items: start;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)); }
.card { background: var(--card); border-radius: .5rem; padding: .8rem; min-width: 0; }
.card svg { width: 100%; height: auto; display: block; color: var(--ink); }
.card svg text { font-family: system-ui, -apple-system, "Segoe UI", sans-serif !important; }
figure { margin: 0 0 1.4rem; }
figcaption { color: var(--soft); font-size: .9rem; margin-top: .3rem; overflow-wrap: anywhere; }
img { max-width: 100%; height: auto; border-radius: .3rem; display: block; }
.card img { margin: 0 auto .5rem; max-height: 26rem; width: auto; }
pre { background: var(--card); padding: .8rem; border-radius: .5rem; overflow-x: auto; font-size: .8rem;
  line-height: 1.4; }
summary { cursor: pointer; color: var(--soft); }
p.text { margin: .15rem 0; overflow-wrap: anywhere; }
.soft { color: var(--soft); font-size: .85rem; }
.bad { color: var(--bad); overflow-wrap: anywhere; margin: .2rem 0; }
"""


class Table(NamedTuple):
    """A table of results."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    """Text, whole numbers, fractions and None (shown as –)."""
    note: str = ""


def write_report(
    workdir: Path,
    *,
    title: str,
    config_json: Mapping[str, Any],
    metrics: Sequence[Mapping[str, Any]],
    tables: Sequence[Table],
    pictures: Sequence[tuple[str, Path | Image.Image]],
) -> Path:
    """Returns the path of `report.html`, written whole; equal arguments give equal bytes."""
    path = workdir / FILE
    write_whole(path, report_html(title, config_json, metrics, tables, pictures))
    return path


def report_html(
    title: str,
    config_json: Mapping[str, Any],
    metrics: Sequence[Mapping[str, Any]],
    tables: Sequence[Table],
    pictures: Sequence[tuple[str, Path | Image.Image]],
) -> str:
    """Returns the page of a run; `metrics` are the lines of its `metrics.jsonl`."""
    body = [f"<h1>{html.escape(title)}</h1>"]
    if tables:
        body += ["<h2>Results</h2>", *map(_table_html, tables)]
    charts = _charts(metrics)
    if charts:
        marks = _stage_starts(metrics)
        body += ["<h2>Curves</h2>", _legend_note(marks), '<div class="grid">']
        body += [_card(name, _svg(name, curves, marks)) for name, curves in charts]
        body += ["</div>"]
    if pictures:
        body += ["<h2>Rollouts</h2>", *(_figure(caption, picture) for caption, picture in pictures)]
    config = html.escape(json.dumps(config_json, indent=2, ensure_ascii=False))
    body += ["<h2>Config</h2>", f"<details><summary>every setting of the run</summary><pre>{config}</pre></details>"]
    return page(title, "\n".join(body))


def page(title: str, body: str) -> str:
    """Returns a whole HTML page that asks nothing of the network; `body` is HTML already, `title` is text."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def write_whole(path: Path, content: str | bytes) -> None:
    """Puts `content` at `path` at once: a reader sees the old file or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    os.replace(temporary, path)


def ascii_table(table: Table) -> str:
    """Returns the table as lines for a terminal: title, columns, a rule, rows, note; numbers stand right."""
    cells = [[_cell(value) for value in row] for row in table.rows]
    widths = [max(map(len, column)) for column in zip(table.columns, *cells, strict=True)]
    right = [_is_number_column(table, i) for i in range(len(table.columns))]

    def line(row: Sequence[str]) -> str:
        padded = [text.rjust(w) if r else text.ljust(w) for text, w, r in zip(row, widths, right, strict=True)]
        return "  ".join(padded).rstrip()

    rule = "  ".join("-" * w for w in widths)
    lines = [table.title, line(table.columns), rule, *map(line, cells), table.note]
    return "\n".join(text for text in lines if text)


def _table_html(table: Table) -> str:
    kind = ['class="number"' if _is_number_column(table, i) else "" for i in range(len(table.columns))]
    head = "".join(f"<th {k}>{html.escape(name)}</th>" for k, name in zip(kind, table.columns, strict=True))
    rows = "\n".join(
        "<tr>" + "".join(f"<td {k}>{html.escape(_cell(v))}</td>" for k, v in zip(kind, row, strict=True)) + "</tr>"
        for row in table.rows
    )
    note = f'<p class="note">{html.escape(table.note)}</p>' if table.note else ""
    body = f"<table><thead><tr>{head}</tr></thead><tbody>\n{rows}\n</tbody></table>"
    return f'<h3>{html.escape(table.title)}</h3><div class="scroll">{body}</div>{note}'


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.4f}" if 1e-3 <= abs(value) < 1e4 or value == 0 else f"{value:.4g}"
    return str(value)


def _is_number_column(table: Table, column: int) -> bool:
    """Returns whether the column holds only numbers, as values or as text, and gaps."""
    texts = [_cell(row[column]) for row in table.rows if row[column] not in (None, "")]
    return bool(texts) and all(re.fullmatch(r"[-+−]?[\d.,]+(e[-+]?\d+)?[%×]?|nan|inf", text) for text in texts)


def _figure(caption: str, picture: Path | Image.Image) -> str:
    """Returns the picture, which a narrow screen shows at a legible size and scrolls sideways."""
    text, (uri, width) = html.escape(caption), _data_uri_and_width(picture)
    image = f'<img src="{uri}" alt="{text}" style="min-width: min({width}px, 60rem)">'
    return f'<figure><div class="scroll">{image}</div><figcaption>{text}</figcaption></figure>'


def _data_uri_and_width(picture: Path | Image.Image) -> tuple[str, int]:
    if isinstance(picture, Path):
        data = picture.read_bytes()
    else:
        out = io.BytesIO()
        picture.save(out, format="PNG", optimize=True)
        data = out.getvalue()
    with Image.open(io.BytesIO(data)) as opened:
        kind, width = Image.MIME[opened.format or "PNG"], opened.width
    return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}", width


class _Curve(NamedTuple):
    name: str
    steps: list[int]
    values: list[float]


def _charts(metrics: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[_Curve]]]:
    """Returns the charts in the order of the page: reward, evaluations, then the rest of CURVES and what is left."""
    curves = _curves(metrics)
    evaluations: dict[str, list[_Curve]] = {}
    for curve in curves:
        if curve.name.startswith("eval/") and not curve.name.endswith("/questions"):
            evaluations.setdefault(_evaluation_title(curve.name), []).append(curve)
    named = [(title, [c for c in curves if re.match(pattern, c.name)]) for title, pattern in CURVES]
    taken = {c.name for _, group in named for c in group} | {c.name for c in curves if c.name.startswith("eval/")}
    left = [(c.name, [c]) for c in curves if c.name not in taken]
    return [(title, group) for title, group in [*named[:1], *evaluations.items(), *named[1:], *left] if group]


def _evaluation_title(metric: str) -> str:
    """Returns the chart of `eval/<benchmark>/<measure>` or `eval/<benchmark>/sampled_<measure>`."""
    benchmark, _, measure = metric.removeprefix("eval/").rpartition("/")
    return f"Evaluation: {benchmark}, {'sampled' if measure.startswith('sampled_') else 'greedy'} answers"


def _curves(metrics: Sequence[Mapping[str, Any]]) -> list[_Curve]:
    """Returns one curve a metric, in order of first appearance; null is NaN, a gap."""
    found: dict[str, _Curve] = {}
    for row in metrics:
        for name, value in row.items():
            if name in ("step", "stage"):
                continue
            curve = found.setdefault(name, _Curve(name, [], []))
            curve.steps.append(row["step"])
            curve.values.append(math.nan if value is None else float(value))
    return list(found.values())


def _stage_starts(metrics: Sequence[Mapping[str, Any]]) -> list[tuple[str, int]]:
    """Returns each stage's name and the step it starts after: the last step of the stage before."""
    starts: list[tuple[str, int]] = []
    last = 0
    for row in metrics:
        if not starts or starts[-1][0] != row["stage"]:
            starts.append((str(row["stage"]), last))
        last = row["step"]
    return starts


def _legend_note(marks: Sequence[tuple[str, int]]) -> str:
    stages = ", ".join(f"{name} from step {start}" for name, start in marks)
    text = f"Steps count over all stages ({stages}); a dotted line marks where a stage starts. "
    text += "Where a curve is drawn twice, the bold one is its running mean."
    return f'<p class="note">{html.escape(text)}</p>'


def _card(name: str, svg: str) -> str:
    return f'<div class="card"><h3>{html.escape(name)}</h3>{svg}</div>'


def _svg(name: str, curves: Sequence[_Curve], marks: Sequence[tuple[str, int]]) -> str:
    """Returns a chart as inline SVG, whose text and axes take the page's text colour."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    settings: dict[Any, Any] = {
        "svg.fonttype": "none", "svg.hashsalt": name, "font.size": 9, "path.simplify_threshold": 0.5,
        "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK,
        "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.6,
    }  # fmt: skip
    with rc_context(settings):
        figure = Figure(figsize=(4.4, 2.7), layout="constrained")
        axes = figure.subplots()
        for i, curve in enumerate(curves):
            _plot(axes, curve, SERIES[i % len(SERIES)], ("-", "--", ":")[i // len(SERIES) % 3], marks)
        for _, start in marks[1:]:
            axes.axvline(start, color=INK, alpha=0.5, linewidth=0.8, linestyle=":")
        axes.grid(axis="y", color=INK, alpha=0.12, linewidth=0.6)
        axes.set_xlabel("step")
        top = _top([v for curve in curves for v in curve.values if not math.isnan(v)])
        if top is not None:
            axes.set_ylim(-0.02 * top, top)
        if len(curves) > 1:
            figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False, handlelength=1.4)
        out = io.StringIO()
        metadata = {"Date": None, "Creator": None, "Format": None, "Type": None}
        figure.savefig(out, format="svg", transparent=True, metadata=metadata)
    return _inlined(out.getvalue())


def _top(values: Sequence[float]) -> float | None:
    """Returns the upper end of an axis that starts at 0: where the curves come near 0 or stand still, else None."""
    low, high = min(values, default=0.0), max(values, default=0.0)
    if low < 0 or high / 2 < low < high:
        return None
    return 1.08 * high or 1.0


def _plot(axes: Any, curve: _Curve, color: str, style: str, marks: Sequence[tuple[str, int]]) -> None:
    many = len(curve.steps) > MOVING and not re.match(EXACT, curve.name)
    marker = "o" if len(curve.steps) < 12 else ""
    label = curve.name.rpartition("/")[2].removeprefix("sampled_")
    first = {"alpha": 0.3, "linewidth": 0.8} if many else {"linewidth": 1.6, "label": label, "marker": marker}
    axes.plot(curve.steps, curve.values, color=color, linestyle=style, markersize=3, **first)
    if not many:
        return
    cuts = np.searchsorted(curve.steps, [start for _, start in marks[1:]], side="right")
    parts = zip(np.split(np.array(curve.steps), cuts), np.split(np.array(curve.values), cuts), strict=True)
    half = max(1, len(curve.steps) // 40)
    for steps, values in parts:
        if len(steps):
            axes.plot(steps, _running_mean(values, half), color=color, linestyle=style, linewidth=1.8, label=label)
            label = None


def _running_mean(values: np.ndarray, half: int) -> np.ndarray:
    """Returns the mean of each value and its `half` neighbours on either side; NaN counts for nothing."""
    known, window = ~np.isnan(values), np.ones(2 * half + 1)
    here = slice(half, half + len(values))
    total = np.convolve(np.where(known, values, 0.0), window)[here]
    count = np.convolve(known, window)[here]
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _inlined(svg: str) -> str:
    """Returns matplotlib's file as an element of a page: no prologue, no namespaces, no size or ids of its own."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)
    return svg.replace(INK, "currentColor").strip()

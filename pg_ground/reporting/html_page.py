"""Pages that need nothing else and ask nothing of the network, tables for pages and for the terminal, files written whole."""

import html
import json
import os
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
"""What a browser may load for a page: what stands in it (Content Security Policy, W3C)."""


class Table(NamedTuple):
    """A table of results."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    """Text, whole numbers, fractions and None (shown as –)."""
    note: str = ""


def page(title: str, body: str, data: Any = None, script: str = "") -> str:
    """Returns a whole HTML page that asks nothing of the network.

    Args:
      title: text.
      body: HTML.
      data: JSON that the page carries for its script, in the element `data`.
      script: name of a file in `assets`.
    """
    parts = [
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">',
        f"<title>{html.escape(title)}</title>\n<style>\n{asset('page.css')}</style></head>\n<body>\n{body}",
    ]
    if script:
        # `<` could end the element: as an escape it is the same JSON
        text = json.dumps(data, separators=(",", ":"), ensure_ascii=False, allow_nan=False).replace(
            "<", "\\u003c"
        )
        parts += [
            f'<script type="application/json" id="data">{text}</script>',
            f"<script>\n{asset(script)}</script>",
        ]
    return "\n".join([*parts, "</body></html>\n"])


def asset(name: str) -> str:
    """Returns the text of a file in `assets`."""
    return (resources.files("pg_ground.assets") / name).read_text(encoding="utf-8")


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
        padded = [
            text.rjust(w) if r else text.ljust(w)
            for text, w, r in zip(row, widths, right, strict=True)
        ]
        return "  ".join(padded).rstrip()

    rule = "  ".join("-" * w for w in widths)
    lines = [table.title, line(table.columns), rule, *map(line, cells), table.note]
    return "\n".join(text for text in lines if text)


def table_html(table: Table) -> str:
    """Returns the table as HTML, which a narrow screen scrolls sideways."""
    kind = [
        'class="number"' if _is_number_column(table, i) else "" for i in range(len(table.columns))
    ]
    head = "".join(
        f"<th {k}>{html.escape(name)}</th>" for k, name in zip(kind, table.columns, strict=True)
    )
    rows = "\n".join(
        "<tr>"
        + "".join(f"<td {k}>{html.escape(_cell(v))}</td>" for k, v in zip(kind, row, strict=True))
        + "</tr>"
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
    return bool(texts) and all(
        re.fullmatch(r"[-+−]?[\d.,]+(e[-+]?\d+)?[%×]?|nan|inf", text) for text in texts
    )

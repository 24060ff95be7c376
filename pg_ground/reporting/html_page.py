"""HTML pages that need no other file and make no request over the network."""

import html
import json
from importlib import resources
from typing import Any

from pg_ground.reporting.tables import Table, cell_text, is_number_column

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
"""What a browser may load for a page: what stands in it (Content Security Policy, W3C)."""


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


def table_html(table: Table) -> str:
    """Returns the table as HTML, which a narrow screen scrolls sideways."""
    kind = [
        'class="number"' if is_number_column(table, i) else "" for i in range(len(table.columns))
    ]
    head = "".join(
        f"<th {k}>{html.escape(name)}</th>" for k, name in zip(kind, table.columns, strict=True)
    )
    rows = "\n".join(
        "<tr>"
        + "".join(
            f"<td {k}>{html.escape(cell_text(v))}</td>" for k, v in zip(kind, row, strict=True)
        )
        + "</tr>"
        for row in table.rows
    )
    note = f'<p class="note">{html.escape(table.note)}</p>' if table.note else ""
    body = f"<table><thead><tr>{head}</tr></thead><tbody>\n{rows}\n</tbody></table>"
    return f'<h3>{html.escape(table.title)}</h3><div class="scroll">{body}</div>{note}'

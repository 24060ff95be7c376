"""HTML pages that need no other file and make no request over the network."""

import html
import json
from importlib import resources

from pg_ground.reporting.tables import Table, cell_text, is_number_column

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
"""Content Security Policy (W3C): a browser loads nothing but the content of the page itself."""


def page(title: str, body: str, data: object = None, script: str = "") -> str:
    """Returns a whole HTML page.

    Args:
      title: text.
      body: HTML.
      data: a JSON value for the script, in the element `data`.
      script: the name of a file in `assets`, "" for a page without a script.
    """
    parts = [
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="data:,">',
        f"<title>{html.escape(title)}</title>\n<style>\n{asset('page.css')}</style></head>\n"
        f"<body>\n{body}",
    ]
    if script:
        text = json.dumps(data, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        text = text.replace("<", "\\u003c")  # `</script>` in a text would end the element
        parts += [
            f'<script type="application/json" id="data">{text}</script>',
            f"<script>\n{asset(script)}</script>",
        ]
    return "\n".join([*parts, "</body></html>\n"])


def asset(name: str) -> str:
    """Returns the text of a file in `assets`."""
    return (resources.files("pg_ground.assets") / name).read_text(encoding="utf-8")


def table_html(table: Table) -> str:
    """Returns a table as HTML. A narrow screen scrolls it sideways."""
    attributes = [
        'class="number"' if is_number_column(table, i) else "" for i in range(len(table.columns))
    ]

    def cells(tag: str, texts: list[str]) -> str:
        return "".join(
            f"<{tag} {attribute}>{html.escape(text)}</{tag}>"
            for attribute, text in zip(attributes, texts, strict=True)
        )

    head = cells("th", list(table.columns))
    rows = "\n".join(
        f"<tr>{cells('td', [cell_text(value) for value in row])}</tr>" for row in table.rows
    )
    note = f'<p class="note">{html.escape(table.note)}</p>' if table.note else ""
    body = f"<table><thead><tr>{head}</tr></thead><tbody>\n{rows}\n</tbody></table>"
    return f'<h3>{html.escape(table.title)}</h3><div class="scroll">{body}</div>{note}'

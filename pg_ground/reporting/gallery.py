"""The first examples of every source of a config, gold boxes and points drawn: one self-contained page.

Run `python -m pg_ground.look --config=configs/quickstart.py --n=16 --out=look.html`.
"""

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from PIL import Image

from pg_ground.config import Config, Source
from pg_ground.data.datasets import open_examples
from pg_ground.data.records import BadRecord
from pg_ground.reporting import drawing, html_page
from pg_ground.reporting.files import write_atomically
from pg_ground.tokenizer import Tokenizer
from pg_ground.tokenizer import load as load_tokenizer
from pg_ground.types import POINTS, Boxes, Example, Points


@runtime_checkable
class Examples(Protocol):
    """Questions by index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Example: ...


class Look(NamedTuple):
    """A source of the config, opened."""

    name: str
    sections: tuple[str, ...]
    """Where the config names it: sft, grpo, eval."""
    source: Source
    examples: Examples
    """Indexing raises BadRecord at a record that cannot be used."""


def look(config: Config, *, n: int, out: Path) -> Path:
    """Returns `out`, the page with the first `n` examples of every source, written whole."""
    write_atomically(out, look_page(open_sources(config), n, load_tokenizer(config.data.tokenizer)))
    return out


def open_sources(config: Config) -> list[Look]:
    """Returns every source once, in the order of the config, however many sections name the same entry."""
    found: list[tuple[str, Source, list[str]]] = []
    for section, sources in (
        ("sft", config.sft.sources),
        ("grpo", config.grpo.sources),
        ("eval", config.eval.sources),
    ):
        for name, source in sources.items():
            same = [sections for n, s, sections in found if (n, s) == (name, source)]
            if same:
                same[0].append(section)
            else:
                found.append((name, source, [section]))
    side = config.model.image_size
    return [
        Look(
            name,
            tuple(sections),
            source,
            open_examples(f"{sections[0]}/{name}", source, config.data, side),
        )
        for name, source, sections in found
    ]


def look_page(looks: Sequence[Look], n: int, tokenizer: Tokenizer) -> str:
    """Returns the page with the first `n` examples of each source, and how many tokens their texts are."""
    body = ["<h1>What the sources hold</h1>"]
    for one in looks:
        count = min(n, len(one.examples))
        where = f"{', '.join(one.sections)} · {one.source.uri} · {count} of {len(one.examples)} questions"
        body += [
            f"<h2>{html.escape(one.name)}</h2>",
            f'<p class="note">{html.escape(where)}</p>',
            '<div class="grid">',
        ]
        body += [_card(one, i, tokenizer) for i in range(count)]
        body += ["</div>"]
    return html_page.page("What the sources hold", "\n".join(body))


def _card(one: Look, index: int, tokenizer: Tokenizer) -> str:
    try:
        example = one.examples[index]
    except BadRecord as bad:
        text = html.escape(f"{one.name} {index}: {bad.kind}: {bad}")
        return f'<div class="card"><p class="bad">{text}</p></div>'
    width, height = example.size
    about = f"{example.source} {example.index} · {width}×{height} px · {_count(example)}"
    lines = [
        ("prompt", len(tokenizer.prefix(example.prompt)), example.prompt),
        ("suffix", len(tokenizer.suffix(example.suffix)), example.suffix),
    ]
    texts = "".join(
        f'<p class="text"><span class="soft">{name}, {tokens} tokens:</span> {html.escape(text)}</p>'
        for name, tokens, text in lines
    )
    alt = html.escape(example.prompt)
    return (
        f'<div class="card"><img src="{drawing.data_uri(example_picture(example))}" alt="{alt}">'
        f'{texts}<p class="text soft">{html.escape(about)}</p></div>'
    )


def example_picture(example: Example) -> Image.Image:
    """Returns the example's image in the aspect of its original, gold in the colours of its names."""
    boxes = _shapes(example.boxes.yxyx, example.boxes, example.names)
    points = _shapes(example.points.yx, example.points, example.names)
    if example.target == POINTS:
        boxes = [box._replace(label="", color=drawing.GOLD) for box in boxes]
    return drawing.panel(example.image, boxes=boxes, points=points, size=example.size)


def _shapes(at: Any, slots: Boxes | Points, names: tuple[str, ...]) -> list[drawing.Shape]:
    """Returns the used slots of `at`; one whose label is no index of `names` carries no text."""
    labels, used = np.asarray(slots.label).tolist(), np.asarray(slots.valid).tolist()
    return [
        drawing.Shape(
            np.asarray(at[k]).tolist(),
            drawing.LABEL_COLORS[label % len(drawing.LABEL_COLORS)],
            names[label] if 0 <= label < len(names) else "",
        )
        for k, label in enumerate(labels)
        if used[k]
    ]


def _count(example: Example) -> str:
    boxes, points = int(np.sum(example.boxes.valid)), int(np.sum(example.points.valid))
    return f"{boxes} box{'es' * (boxes != 1)}, {points} point{'s' * (points != 1)}"

"""A page with the first examples of every source, with ground-truth boxes and points drawn on
them."""

import html
import logging
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from PIL import Image

from pg_ground.config import Data, Source
from pg_ground.data import datasets
from pg_ground.data.bad_records import BadRecords, in_words
from pg_ground.data.datasets import open_examples
from pg_ground.data.records import BadRecord
from pg_ground.data.text_budgets import measure_budget
from pg_ground.reporting import drawing, html_page
from pg_ground.storage.downloads import tokenizer_file
from pg_ground.storage.files import write_atomically
from pg_ground.storage.paths import FilePath
from pg_ground.tokenizer import Tokenizer
from pg_ground.tokenizer import load as load_tokenizer
from pg_ground.types import POINTS, Boxes, Example, Points, UserError

logger = logging.getLogger(__name__)

TITLE = "Examples of the sources"


@runtime_checkable
class Examples(Protocol):
    """Examples by index. Indexing raises BadRecord if the record cannot be used."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Example: ...


class OpenSource(NamedTuple):
    """A source of the config and its examples."""

    name: str
    sections: tuple[str, ...]
    """The sections of the config that use the source: sft, grpo, eval."""
    source: Source
    examples: Examples

    @property
    def setting(self) -> str:
        """Section and name of the source in the config."""
        return f"{self.sections[0]}/{self.name}"


def write_gallery(
    out: FilePath,
    sources: Mapping[str, Mapping[str, Source]],
    data: Data,
    image_size: int,
    examples: int,
) -> FilePath:
    """Writes the page with the first examples of every source, and returns its path.

    Warnings say how many of these examples cannot be used, how records were read if they left that
    open, and what training would doubt or refuse.

    Args:
      sources: the sources of each section of the config, by the name of the section.
      image_size: pixels of a side of the model's image.
      examples: the number of examples of each source.

    Raises:
      UserError: no example of a source can be used. The page is written all the same.
    """
    opened = open_sources(sources, data, image_size)
    tokenizer = load_tokenizer(tokenizer_file(data.tokenizer))
    bad_records = BadRecords()
    write_atomically(out, gallery_html(opened, examples, tokenizer, bad_records))
    unusable = []
    for source in opened:
        _say_what_is_shown(source, examples)
        entries = [entry for entry in bad_records.entries() if entry["source"] == source.setting]
        if entries:
            logger.warning("%s", in_words(entries))
        if entries and len(entries) == min(examples, len(source.examples)):
            unusable.append(source.setting)
        else:
            _warn_of_readings(source, tokenizer, data)
    if unusable:
        raise UserError(f"no example of {', '.join(unusable)} can be used; see {out}")
    return out


def _say_what_is_shown(source: OpenSource, examples: int) -> None:
    """Logs how many questions of a source the page leaves out: they can have any fault."""
    total = len(source.examples)
    if examples < total:
        text = "source %s: the page shows the first %d of %d questions; look --check reads all"
        logger.info(text, source.setting, examples, total)


def _warn_of_readings(source: OpenSource, tokenizer: Tokenizer, data: Data) -> None:
    """Logs how the records of a source are read, and what training would say about the source."""
    if not isinstance(source.examples, datasets.Examples):
        return
    try:
        budget = measure_budget(source.examples, tokenizer, data)
    except UserError as error:
        logger.warning("training would stop: %s", error)
        return
    for note, records in budget.notes.items():
        logger.info("source %s: %s records: %s", source.setting, records, note)
    for doubt in budget.doubts:
        logger.warning("source %s: %s", source.setting, doubt)


def open_sources(
    sources: Mapping[str, Mapping[str, Source]], data: Data, image_size: int
) -> list[OpenSource]:
    """Returns every source once, in order, even if several sections use it."""
    by_source: dict[tuple[str, Source], list[str]] = {}
    for section, entries in sources.items():
        for name, source in entries.items():
            by_source.setdefault((name, source), []).append(section)
    return [
        OpenSource(
            name,
            tuple(sections),
            source,
            open_examples(f"{sections[0]}/{name}", source, data, image_size),
        )
        for (name, source), sections in by_source.items()
    ]


def gallery_html(
    sources: Sequence[OpenSource], examples: int, tokenizer: Tokenizer, bad_records: BadRecords
) -> str:
    """Returns the page with the first examples of each source and the token counts of their texts.

    Examples that cannot be used are added to `bad_records`.
    """
    body = [f"<h1>{TITLE}</h1>"]
    for source in sources:
        total = len(source.examples)
        count = min(examples, total)
        sections = ", ".join(source.sections)
        first = "the first " if count < total else ""
        note = f"{sections} · {source.source.uri} · {first}{count} of {total} questions"
        body += [
            f"<h2>{html.escape(source.name)}</h2>",
            f'<p class="note">{html.escape(note)}</p>',
            '<div class="grid">',
        ]
        body += [_card(source, index, tokenizer, bad_records) for index in range(count)]
        body += ["</div>"]
    return html_page.page(TITLE, "\n".join(body))


def _card(source: OpenSource, index: int, tokenizer: Tokenizer, bad_records: BadRecords) -> str:
    """Returns the HTML of one example, or of the reason why its record cannot be used."""
    try:
        example = source.examples[index]
    except BadRecord as error:
        bad_records.add(source.setting, index, error.kind, str(error))
        text = html.escape(f"{source.name} {index}: {error.kind}: {error}")
        return f'<div class="card"><p class="bad">{text}</p></div>'
    width, height = example.size
    boxes = _count(int(np.sum(example.boxes.valid)), "box", "boxes")
    points = _count(int(np.sum(example.points.valid)), "point", "points")
    about = f"{example.source} {example.index} · {width}×{height} px · {boxes}, {points}"
    texts = [
        ("prompt", len(tokenizer.prefix(example.prompt)), example.prompt),
        ("suffix", len(tokenizer.suffix(example.suffix)), example.suffix),
    ]
    paragraphs = "".join(
        f'<p class="text"><span class="soft">{name}, {tokens} tokens:</span> '
        f"{html.escape(text)}</p>"
        for name, tokens, text in texts
    )
    picture = drawing.data_uri(draw_example(example))
    return (
        f'<div class="card"><img src="{picture}" alt="{html.escape(example.prompt)}">'
        f'{paragraphs}<p class="text soft">{html.escape(about)}</p></div>'
    )


def _count(number: int, singular: str, plural: str) -> str:
    return f"{number} {singular if number == 1 else plural}"


def draw_example(example: Example) -> Image.Image:
    """Returns the image of an example in its original aspect, with the ground truth on it.

    Each name has a colour. Boxes of a question about points are white and have no label.
    """
    boxes = _shapes(example.boxes.yxyx, example.boxes, example.names)
    points = _shapes(example.points.yx, example.points, example.names)
    if example.target == POINTS:
        boxes = [box._replace(label="", color=drawing.GOLD) for box in boxes]
    return drawing.panel(example.image, boxes=boxes, points=points, size=example.size)


def _shapes(coordinates: Any, slots: Boxes | Points, names: tuple[str, ...]) -> list[drawing.Shape]:
    """Returns the used slots. A slot whose label is not an index of `names` has no text."""
    labels = np.asarray(slots.label).tolist()
    used = np.asarray(slots.valid).tolist()
    colors = drawing.LABEL_COLORS
    return [
        drawing.Shape(
            np.asarray(coordinates[k]).tolist(),
            colors[label % len(colors)],
            names[label] if 0 <= label < len(names) else "",
        )
        for k, label in enumerate(labels)
        if used[k]
    ]

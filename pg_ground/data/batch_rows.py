"""`Example` → one row of a `Batch`: token ids and annotation slots of fixed lengths."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Int

from pg_ground.config import Data
from pg_ground.data.records import BadRecord, short
from pg_ground.readers.locations import loc_segments
from pg_ground.tokenizer import Tokenizer
from pg_ground.types import POINTS, TEXT, Batch, Boxes, Example, Gold, Points
from pg_ground.vocab import EOS, PAD, SEG_TOKENS, Vocab


def to_batch_row(
    example: Example,
    tokenizer: Tokenizer,
    data: Data,
    source_position: int,
    cut_answers: bool = False,
) -> Batch:
    """Returns one row of a `Batch` without the B axis, padded to the lengths in `data`.

    Args:
      cut_answers: whether a longer answer in loc tokens is cut at `data.suffix_length`. The row
        still has all of its objects.

    Raises:
      BadRecord: too_long or too_many_boxes, with the setting to raise; bad_text, if the answer in
        loc tokens is not read back as it was written.
    """
    check_box_count(example, data)
    prompt, prompt_mask = _pad(
        tokenizer.prefix(example.prompt), data.prompt_length, "prompt_length", example.prompt
    )
    names = [tokenizer.text(" " + name) for name in example.names]  # as they follow a loc token
    ids = tokenizer.suffix(example.suffix)
    is_long = len(ids) > data.suffix_length
    cuts = is_long and cut_answers and _can_cut(example, names, data)
    written = ids[: data.suffix_length] if cuts else ids
    suffix, suffix_mask = _pad(written, data.suffix_length, "suffix_length", example.suffix)
    if example.target != TEXT:
        _check_read_back(ids, names, example, tokenizer.vocab)
    gold = Gold(
        boxes=Boxes(*(_pad_slots(leaf, data.max_boxes) for leaf in example.boxes)),
        points=Points(*(_pad_slots(leaf, data.max_boxes) for leaf in example.points)),
        target=np.asarray(example.target, np.int32),
        names=_name_rows(names, data),
        masks=_pad_slots(example.masks, data.max_boxes),
    )
    return Batch(
        image=example.image,
        prompt=prompt,
        prompt_mask=prompt_mask,
        suffix=suffix,
        suffix_mask=suffix_mask,
        gold=gold,
        size=np.array(example.size, np.int32),
        source=np.asarray(source_position, np.int32),
        index=np.asarray(example.index, np.int32),
    )


def _can_cut(example: Example, names: Sequence[Sequence[int]], data: Data) -> bool:
    """Returns whether the objects of an answer say all of it, and the tokens of each name fit."""
    return example.target != TEXT and max(map(len, names), default=0) <= data.suffix_length


def _check_read_back(
    ids: Sequence[int], names: Sequence[Sequence[int]], example: Example, vocab: Vocab
) -> None:
    """Raises BadRecord (bad_text) if the reader of answers does not read the gold answer as it is.

    `ids` are the tokens of the answer, and `names` the tokens of each name.

    Device rewards read token ids (`rewards.answer_reader`). A ";" that is one piece with a letter
    of a name is no separator, and a name that the tokenizer does not know is the same as another.
    Text rewards and evals read the text.
    """
    slots = example.points if example.target == POINTS else example.boxes
    labels = slots.label[slots.valid].tolist()
    segments = _segments(ids, vocab) if labels else []
    if len(segments) != len(labels):
        raise BadRecord(
            "bad_text",
            f"the answer {short(example.suffix)} is read back as {len(segments)} objects, "
            f"not {len(labels)}",
        )
    for i, name in enumerate(names):
        if name in names[:i]:
            first = example.names[names.index(name)]
            raise BadRecord(
                "bad_text",
                f"the names {short(first)} and {short(example.names[i])} are the same tokens",
            )
    expected = [names[label] if names else [] for label in labels]
    # The text of other names is read back as it is.
    is_safe = not any(";" in name or "<" in name for name in example.names)
    texts = [] if is_safe or not labels else loc_segments(example.suffix)
    text_labels = [example.names[label] for label in labels] if texts else []
    if segments[: len(labels)] != expected or [text.label for text in texts] != text_labels:
        raise BadRecord(
            "bad_text", f"a name of the answer {short(example.suffix)} is read back differently"
        )


def _segments(ids: Sequence[int], vocab: Vocab) -> list[list[int]]:
    """Returns the tokens of the name in each part between two separators."""
    first_special, after_special = vocab.loc0, vocab.seg0 + SEG_TOKENS
    segments: list[list[int]] = [[]]
    has_loc = False
    for token in ids:
        if token in vocab.separators:
            segments.append([])
            has_loc = False
        elif first_special <= token < after_special:
            has_loc = True
        elif token != EOS and (has_loc or token not in vocab.spaces):
            segments[-1].append(token)
    return segments


def check_box_count(example: Example, data: Data) -> None:
    """Raises BadRecord (too_many_boxes) if an example needs more than `data.max_boxes` slots."""
    for kind, count in (("boxes", len(example.boxes.yxyx)), ("points", len(example.points.yx))):
        if count > data.max_boxes:
            raise BadRecord(
                "too_many_boxes", f"{count} {kind}, but data.max_boxes is {data.max_boxes}"
            )


def stack_rows(rows: Sequence[Batch]) -> Batch:
    """Returns rows as one batch, with B as the first axis."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *rows)


def _pad(
    ids: list[int], length: int, setting: str, text: str
) -> tuple[Int[np.ndarray, " length"], Bool[np.ndarray, " length"]]:
    """Returns token ids with PAD behind them, and a mask of the ids."""
    if len(ids) > length:
        raise BadRecord(
            "too_long", f"{len(ids)} tokens, but data.{setting} is {length}: {short(text)}"
        )
    row = np.full(length, PAD, np.int32)
    row[: len(ids)] = ids
    mask = np.zeros(length, bool)
    mask[: len(ids)] = True
    return row, mask


def _pad_slots(values: Any, count: int) -> np.ndarray:
    """Returns `values` with zeros behind them, `count` rows in all."""
    slots = np.zeros((count, *values.shape[1:]), values.dtype)
    slots[: len(values)] = values
    return slots


def _name_rows(names: Sequence[Sequence[int]], data: Data) -> Int[np.ndarray, "C W"]:
    """Returns the token ids of each name, with PAD behind them."""
    rows = np.full((data.max_boxes, data.suffix_length), PAD, np.int32)
    for row, ids in zip(rows, names, strict=False):
        row[: len(ids)] = ids
    return rows

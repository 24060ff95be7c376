"""Checks of a source before training: the lengths of its texts, and the unit of its coordinates."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from pg_ground.config import Data, Source
from pg_ground.data.bad_records import exceeds_share, numbered
from pg_ground.data.chat_turns import turn_notes
from pg_ground.data.datasets import Examples
from pg_ground.data.examples import (
    Annotation,
    format_answer,
    image_address,
    is_count,
    nothing_there,
    read_question,
)
from pg_ground.data.fetch import cache_fault
from pg_ground.data.frames import check_frames, recorded_size
from pg_ground.data.names import INVISIBLE, SPECIAL_TOKENS, code_point
from pg_ground.data.pixel_depth import DARK
from pg_ground.data.record_fields import (
    field_or_none,
    placeholders,
    unfilled_fields,
    with_setting,
)
from pg_ground.data.records import BadRecord, short
from pg_ground.data.units import Coordinates, check_units
from pg_ground.tokenizer import Tokenizer
from pg_ground.types import Example, Record, UserError, first_problems

PROBED_IMAGES = 16
"""Questions of a source whose images are opened."""

LONGEST_SIDE = 9999
"""The image size in pixels that the length of a JSON answer is measured with."""


FOREIGN_TOKENS = re.compile(
    rf"{SPECIAL_TOKENS}|<(?:image|video|audio|img|mask|unused\d+|image_soft_token)>"
    r"|<(?:start|end)_of_(?:turn|image)>|<\|[^|<>]{1,40}\|>|\[/?INST\]"
)
"""Special tokens and tokens of other models' chats. PaliGemma learned none of them as text."""


MISSING = frozenset({"nan", "none", "null", "nil", "n/a", "<na>", "nat", "undefined"})
"""Texts that tables and programs write for a value that is missing, in lower case."""

ANSWERS = frozenset({"none", "n/a"})
"""Texts of these that can be the right answer to a question."""

SHOWN = 3
"""Texts that a doubt quotes."""

WHOLE_SOURCE = "all"
"""The number of records of a note that the reader of a source made when it was opened."""


class Needs(NamedTuple):
    """The lengths that one question needs. The fields have the names of the settings."""

    prompt_length: int
    suffix_length: int
    max_boxes: int


class Question(NamedTuple):
    """A question whose image was not opened."""

    needs: Needs
    prompt: str
    annotation: Annotation
    size: tuple[int, int] | None
    """The image size that the record states."""
    address: str
    """The http(s) address of the image; "" if the image is no address."""
    notes: tuple[str, ...]
    """Which elements of lists are read, if others are not."""
    missing: dict[str, str]
    """The fields of the templates whose text says that there is no value, and these texts."""


class Budget(NamedTuple):
    """The lengths that the questions of a source need."""

    source: str
    questions: int
    measured: int
    """How many of the questions were measured."""
    prompt_tokens: int
    suffix_tokens: int
    objects: int
    worst: dict[str, int]
    """The question that needs most, by the setting prompt_length, suffix_length or max_boxes."""
    notes: dict[str, str]
    """How records were read if they left that open → "12 of 16" records."""
    doubts: list[str]
    """What is probably not meant, in words."""
    cut_answers: bool = False
    """Whether answers may be longer than `data.suffix_length`: an evaluation cuts them."""


def measure_budget(dataset: Examples, tokenizer: Tokenizer, data: Data) -> Budget:
    """Returns the longest prompt and suffix in tokens, and the largest number of objects.

    Measures `data.check_records` questions of the source, and opens the images of `PROBED_IMAGES`
    of these. No other image is opened or fetched.

    Raises:
      UserError: none of the first questions can be used; or no probed image; or no record has the
        field of the boxes; or the coordinates are in another unit (`units.check_units`); or too
        many images are at addresses and `data.fetch` names no folder for them.
    """
    indices = spread(len(dataset), data.check_records)
    questions: dict[int, Question] = {}
    failures: list[str] = []
    empty = blocking = 0
    for index in indices:
        try:
            questions[index] = _measure(dataset, index, tokenizer)
        except BadRecord as bad:
            failures.append(numbered(index, str(bad), "question"))
            # Many records may say that nothing is there. A field that is absent may be a typo.
            says_nothing = bad.kind == "empty" and str(bad) == nothing_there(dataset.source)
            empty += bad.kind == "empty"
            blocking += not says_nothing
            if not questions and blocking == min(PROBED_IMAGES, len(indices)):
                raise _none_usable(dataset, failures) from None
    if not questions:
        raise _none_usable(dataset, failures)
    _check_any_object(dataset, questions)
    address_doubts = _address_doubts(dataset, questions, data)
    _unit_doubts(dataset, questions, {})  # before the images: its error says more than theirs
    readable = list(questions)
    probed = _probe(dataset, [readable[i] for i in spread(len(readable), PROBED_IMAGES)])
    largest = [
        max((question.needs[field] for question in questions.values()), default=0)
        for field in range(len(Needs._fields))
    ]
    worst = {
        setting: next((i for i in readable if questions[i].needs[field] == largest[field]), 0)
        for field, setting in enumerate(Needs._fields)
    }
    return Budget(
        dataset.name,
        len(dataset),
        len(indices),
        largest[0],
        largest[1],
        largest[2],
        worst,
        _notes(dataset, questions, probed, empty),
        [
            *_unit_doubts(dataset, questions, probed),
            *address_doubts,
            *check_frames(dataset.name, Counter(note for e in probed.values() for note in e.notes)),
            *_dark_doubts(probed),
            *_missing_doubts(questions),
            *_template_doubts(dataset, readable[0]),
            *foreign_tokens([question.prompt for question in questions.values()]),
            *invisible_characters([question.prompt for question in questions.values()]),
        ],
        dataset.cut_answers and dataset.source.suffix == "loc" and dataset.source.target != "text",
    )


def _measure(dataset: Examples, index: int, tokenizer: Tokenizer) -> Question:
    """Returns one question with the lengths that it needs. Its image is not opened."""
    try:
        return _measured(dataset, index, tokenizer)
    except BadRecord as bad:
        raise with_setting(bad, dataset.source) from None


def _measured(dataset: Examples, index: int, tokenizer: Tokenizer) -> Question:
    record, element = dataset.record(index)
    source = dataset.source
    prompt, annotation = read_question(record, source, element)
    asks_points = source.target == "points"
    rows = (annotation.points if asks_points else annotation.boxes).numbers
    count = min(len(rows), source.max_objects or len(rows))
    fractions = np.zeros((count, rows.shape[1]), np.float32)
    labels: Sequence[str] = ("",) * count
    if annotation.labels:
        # Chance chooses the objects, so the ones with the longest names are assumed.
        labels = sorted(annotation.labels, key=len)[len(rows) - count :]
    codes = annotation.codes[:count]
    size = (LONGEST_SIDE, LONGEST_SIDE)
    suffix = format_answer(
        source, record, element, fractions, labels, codes, size, annotation.count
    )
    slots = 0 if is_count(source, suffix) else max(len(annotation.boxes.numbers[:count]), count)
    needs = Needs(len(tokenizer.prefix(prompt)), len(tokenizer.suffix(suffix)), slots)
    return Question(
        needs,
        prompt,
        annotation,
        recorded_size(record, source, element),
        image_address(record, source, element),
        turn_notes(record, source, element),
        _missing_values(record, source, element),
    )


def _missing_values(record: Record, source: Source, element: int) -> dict[str, str]:
    """Returns the fields of the templates whose text stands for a missing value, such as nan."""
    values = {}
    texts = {source.prompt: MISSING, source.name: MISSING, source.suffix: MISSING - ANSWERS}
    for template, missing in texts.items():
        for name in placeholders(template):
            path = source.phrase if name == "phrase" else name
            text = field_or_none(record, path, element)
            if isinstance(text, str) and text.strip().casefold() in missing:
                values[path] = text.strip()
    return values


def _missing_doubts(questions: Mapping[int, Question]) -> list[str]:
    """Returns in words how many texts of each field say that there is no value."""
    texts: dict[str, Counter[str]] = {}
    for question in questions.values():
        for path, text in question.missing.items():
            texts.setdefault(path, Counter())[text] += 1
    doubts = []
    for path, found in texts.items():
        shown = first_problems(sorted(map(repr, found)), ", ", SHOWN)
        counts = f"{found.total()} of {len(questions)} questions have {shown} in {path}"
        mend = "" if "[]" in path else f'; where = "{path} not in {sorted(found)}" leaves them out'
        doubts.append(f"{counts}, as a missing value is written{mend:.150}")
    return doubts


def _template_doubts(dataset: Examples, index: int) -> list[str]:
    """Returns in words which fields of the templates stay as they are written.

    Args:
      index: a question whose record can be read.
    """
    source = dataset.source
    fields = {"phrase", *dataset.record(index)[0]}
    return [
        f"{setting} has {text} as text, the same for all questions: {text.replace(' ', '')} is the "
        "field"
        for setting in ("prompt", "suffix", "name")
        for text in unfilled_fields(getattr(source, setting), fields)
    ]


def _address_doubts(dataset: Examples, questions: Mapping[int, Question], data: Data) -> list[str]:
    """Returns in words how many images are at addresses that cannot be fetched.

    Raises:
      UserError: so many that the run would stop for its bad records.
    """
    fault = cache_fault(data.fetch)
    addresses = {i: question.address for i, question in questions.items() if question.address}
    if not fault or not addresses:
        return []
    index, address = next(iter(addresses.items()))
    text = (
        f"{len(addresses)} of {len(questions)} images are at addresses, such as {short(address)} "
        f"of question {index}, but {fault}"
    )
    if exceeds_share(len(addresses), len(questions), len(dataset), data.bad_record_share):
        raise UserError(f"source {dataset.name}: {text}")
    return [f"{text}; the records are bad (not_fetched)"]


def _none_usable(dataset: Examples, failures: Sequence[str]) -> UserError:
    return UserError(
        f"source {dataset.name}: none of {len(failures)} questions can be used; {failures[0]}"
    )


def _probe(dataset: Examples, indices: Sequence[int]) -> dict[int, Example]:
    """Returns the examples of questions whose images are opened.

    Raises:
      UserError: no image can be used.
    """
    examples: dict[int, Example] = {}
    failures: list[str] = []
    for index in indices:
        try:
            examples[index] = dataset[index]
        except BadRecord as bad:
            if bad.kind != "too_many_boxes":  # `check_budgets` names the setting to raise
                failures.append(numbered(index, str(bad), "question"))
    if failures and len(failures) == len(indices):
        raise _none_usable(dataset, failures)
    return examples


def _unit_doubts(
    dataset: Examples, questions: Mapping[int, Question], probed: Mapping[int, Example]
) -> list[str]:
    """Returns doubts about the units of boxes and points. Raises UserError if one is wrong."""
    sizes = {index: (*e.frames, e.size)[0] for index, e in probed.items()} | {
        index: question.size for index, question in questions.items() if question.size
    }
    rows = {
        "box_format": {index: q.annotation.boxes for index, q in questions.items()},
        "point_format": {index: q.annotation.points for index, q in questions.items()},
    }
    doubts = [
        check_units(
            dataset.name,
            setting,
            [
                Coordinates(
                    row.numbers,
                    row.format,
                    sizes.get(i),
                    next(iter(probed[i].frames[1:]), None) if i in probed else None,
                )
                for i, row in by_index.items()
            ],
        )
        for setting, by_index in rows.items()
    ]
    return [doubt for doubt in doubts if doubt]


def _dark_doubts(probed: Mapping[int, Example]) -> list[str]:
    """Returns in words how many images of 16 bits, 32 bits or floats become dark, if many do."""
    notes = [note for example in probed.values() for note in example.notes if "pixels" in note]
    dark = [note for note in notes if DARK in note]
    if not dark or 2 * len(dark) < len(notes):
        return []
    largest = Counter(note[note.index(DARK) + len(DARK) :] for note in dark).most_common(1)[0][0]
    remedy = "data.deep_images = 'percentile' stretches the values of each image"
    if all("upper bytes" in note for note in dark):
        remedy = "write them with 8 bits in each channel"
    counts = f"{len(dark)} of {len(probed)} images look dark"
    return [f"{counts}: they have no value above{largest}; {remedy}"]


def _notes(
    dataset: Examples,
    questions: Mapping[int, Question],
    probed: Mapping[int, Example],
    dropped: int,
) -> dict[str, str]:
    """Returns how the records were read → "12 of 16", the number of records."""
    target = dataset.source.target
    empty_answers = sum(not question.annotation.count for question in questions.values())
    measured = len(questions) + dropped
    notes = dict.fromkeys(dataset.notes, WHOLE_SOURCE)
    if dropped:
        notes[f"no {target}: the record is left out (empty)"] = f"{dropped} of {measured}"
    if empty_answers and target != "text":
        notes[f"no {target}: the answer is empty"] = f"{empty_answers} of {measured}"
    counts = Counter(note for example in probed.values() for note in example.notes)
    notes |= {note: f"{count} of {len(probed)}" for note, count in sorted(counts.items())}
    of_all = Counter(note for question in questions.values() for note in question.notes)
    return notes | {note: f"{count:,} of {len(questions):,}" for note, count in of_all.items()}


def _check_any_object(dataset: Examples, questions: Mapping[int, Question]) -> None:
    """Raises UserError if the field of the boxes or points is absent in all records.

    `empty="keep"` would make every answer empty. Records that state [] or null are questions about
    nothing, and a source can hold only these.
    """
    annotations = [question.annotation for question in questions.values()]
    if dataset.source.target == "text" or not annotations:
        return
    if all(not annotation.count and annotation.absence for annotation in annotations):
        reason = nothing_there(dataset.source) + annotations[0].absence
        raise _none_usable(dataset, [reason] * len(annotations))


def foreign_tokens(prompts: Sequence[str]) -> list[str]:
    """Returns in words which tokens of other models the prompts of a source have."""
    tokens = Counter(
        token for prompt in prompts for token in sorted(set(FOREIGN_TOKENS.findall(prompt)))
    )
    return [
        f"{count} of {len(prompts)} prompts have {token}, which is no text that PaliGemma knows: "
        f"remove = {re.escape(token)!r} leaves it out"
        for token, count in tokens.most_common(3)
    ]


def invisible_characters(prompts: Sequence[str]) -> list[str]:
    """Returns in words how many prompts of a source have characters that nobody sees."""
    characters = [sorted(set("".join(INVISIBLE.findall(prompt)))) for prompt in prompts]
    count = sum(map(bool, characters))
    if not count:
        return []
    numbers = Counter(sign for signs in characters for sign in signs)
    signs = [sign for sign, _ in numbers.most_common(5)]
    return [
        f"{count} of {len(prompts)} prompts have invisible characters, such as "
        f"{', '.join(map(code_point, signs))}: unsafe_names = 'replace' leaves them out"
    ]


def spread(count: int, limit: int) -> list[int]:
    """Returns at most `limit` of `count` indices, evenly spread from the first to the last."""
    return np.unique(np.linspace(0, count - 1, min(count, limit)).astype(np.int64)).tolist()


def check_budgets(budgets: Sequence[Budget], data: Data) -> None:
    """Raises UserError if a question does not fit the lengths in `data`. Names the longest one."""
    for budget in budgets:
        needs = Needs(budget.prompt_tokens, budget.suffix_tokens, budget.objects)
        for setting, need in needs._asdict().items():
            limit = getattr(data, setting)
            if need <= limit or (setting == "suffix_length" and budget.cut_answers):
                continue
            remedy = f"set --config.data.{setting}={need}"
            if setting != "prompt_length":
                remedy += ", or max_objects of the source"
            raise UserError(
                f"source {budget.source}: question {budget.worst[setting]} needs "
                f"data.{setting}={need}, but it is {limit}: {remedy}"
            )

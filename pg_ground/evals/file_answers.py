"""Reads the answers and the ground truth of a file that another program wrote."""

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from pg_ground.boxes import host_boxes, is_proper
from pg_ground.data.box_formats import (
    BOX_ORDERS,
    POINT_ORDERS,
    UNITS,
    check_format,
    format_names,
    split_format,
    to_pixels,
)
from pg_ground.evals.box_format_check import check_box_format
from pg_ground.evals.rejection import written_boxes
from pg_ground.readers import answer_formats, parsers
from pg_ground.readers.answer_formats import AUTO, FORMATS, PLAIN, AnswerFormat
from pg_ground.readers.locations import Location, load_value
from pg_ground.storage.paths import FilePath
from pg_ground.types import JsonDict, JsonObject, UserError

LOCATION_KINDS = ("box", "boxes", "detection", "f1", "grec", "rejection", "points", "click")
"""Kinds of benchmarks whose answers are boxes or points."""

MAX_OUTSIDE = 0.05
"""Largest share of answers with coordinates outside the image, in the unit of a detected format."""


class Formats(NamedTuple):
    """Formats of the answers and of the coordinates in a file.

    "" means that a format is not stated. Then the format of the answers states the unit; without a
    sign of a format, coordinates are pixels. Tokens such as `<loc0512>` always have their own unit.
    """

    boxes: str = "xyxy_px"
    points: str = "xy_px"
    gold: str = ""
    """Format of the ground truth. "" is the stated format of the predictions."""
    answers: str = AUTO
    """A name in `answer_formats.FORMATS`. "auto" detects the format of each answer."""


def check_formats(formats: Formats) -> None:
    """Raises UserError if a format does not exist."""
    answer_formats.find_format(formats.answers, "--answer-format")
    for value, setting, orders in (
        (formats.boxes, "--box-format", BOX_ORDERS),
        (formats.points, "--point-format", POINT_ORDERS),
        (formats.gold, "--gold-format", (*BOX_ORDERS, *POINT_ORDERS)),
    ):
        if value:
            check_format(value, setting, format_names(orders))


class FileAnswers(NamedTuple):
    """The answers of a file, in the form that a benchmark reads."""

    predictions: list[JsonDict]
    gold: list[JsonDict]
    summary: JsonDict
    """`formats` (the number of answers by the name of their format), `read`, `of` and `units`.
    Empty if no format was detected or stated."""
    notes: list[str]
    """Sentences for the terminal."""


def read_answers(
    kind: str,
    formats: Formats,
    path: FilePath,
    fields: Mapping[str, str],
    columns: Mapping[str, Sequence[Any]],
    sizes: Sequence[list[float] | None],
) -> FileAnswers:
    """Returns the answers and the ground truth of a file.

    Args:
      kind: the kind of the benchmark, a key of `benchmarks.KINDS`.
      formats: the stated formats.
      fields: the stated paths, for error messages.
      columns: the values of all records, by name.
      sizes: width and height in pixels of each image, or None.

    Raises:
      UserError: the ground truth of a row cannot be read, no prediction can be read, or the boxes
        are in another format than the ground truth.
    """
    reader = _AnswerReader(kind, formats, path, dict(fields), columns, sizes)
    values, echoes = reader.clean_answers()
    if kind in LOCATION_KINDS:
        return reader.read_locations(values, echoes)
    gold = reader.checked_gold(list(map(reader.gold_value, range(len(sizes)))))
    predictions = [reader.prediction_value(value, index) for index, value in enumerate(values)]
    if kind in ("count", "choice"):
        readable = [any(value is not None for value in answer.values()) for answer in predictions]
        reader.check_readable(values, readable, [])
    return FileAnswers(predictions, gold, {}, echoes)


class _Read(NamedTuple):
    """The locations of one answer."""

    form: AnswerFormat
    width: int
    """4 for boxes, 2 for points."""
    locations: list[Location]

    @property
    def is_readable(self) -> bool:
        return any(location.numbers is not None for location in self.locations)

    @property
    def in_pixels(self) -> bool:
        return any(location.written.endswith("_px") for location in self.locations)


class _AnswerReader(NamedTuple):
    """The columns of a file, and the formats of its answers."""

    kind: str
    formats: Formats
    path: FilePath
    fields: Mapping[str, str]
    columns: Mapping[str, Sequence[Any]]
    sizes: Sequence[list[float] | None]

    # Answers

    def clean_answers(self) -> tuple[list[Any], list[str]]:
        """Returns the predictions without special tokens and without the prompt, and notes."""
        prompts = self.columns.get("prompt", [""] * len(self.sizes))
        values, repeated = [], 0
        for value, prompt in zip(self.columns["pred"], prompts, strict=True):
            if isinstance(value, str) and self.kind != "reward":
                text = answer_formats.without_special_tokens(value)
                if self.kind not in LOCATION_KINDS:
                    text = re.sub(r"<\|(?:begin|end)_of_box\|>", "", text)
                value = answer_formats.without_echo(
                    text, answer_formats.without_special_tokens(str(prompt or ""))
                )
                repeated += value != text
            values.append(value)
        is_one = repeated == 1
        note = f"{repeated} answer{' repeats' if is_one else 's repeat'} the prompt: it is left out"
        return values, [note] if repeated else []

    def check_readable(
        self, values: Sequence[Any], readable: Sequence[bool], tried: Sequence[str]
    ) -> None:
        """Raises UserError if no answer can be read, or if all answers are empty.

        Args:
          tried: names of the formats that were tried.
        """
        if any(readable):
            return
        start = f"--predictions={self.path}: "
        filled = [index for index, value in enumerate(values) if not _is_empty(value)]
        field = self.fields.get("pred", "pred")
        if all(value is None or value == "" for value in self.columns["pred"]):
            raise UserError(f"{start}the field {field} is empty in all {len(values)} rows")
        if filled:
            examples = ", ".join(f"row {i}: {_short(self.columns['pred'][i])}" for i in filled[:3])
            formats = f"; tried {', '.join(tried)}" if tried else ""
            names = {"choice": "options", "count": "numbers", "points": "points", "click": "points"}
            raise UserError(
                f"{start}none of {len(values)} answers can be read as "
                f"{names.get(self.kind, 'boxes')}{formats}; for example {examples}; "
                f"--fields=pred=PATH names the answers (now {field})"
            )

    # Boxes and points

    def read_locations(self, values: Sequence[Any], echoes: list[str]) -> FileAnswers:
        """Returns the answers and the ground truth of a benchmark of boxes or points."""
        forced = answer_formats.find_format(self.formats.answers, "--answer-format")
        detected = self._detect("pred", values)
        gold_reads = self._read_gold({forced} if forced else set(detected))
        reads = [
            self._read(self._without_semicolons(value, gold), forced or form)
            for value, form, gold in zip(values, detected, gold_reads, strict=True)
        ]
        reads = [self._with_semicolons(read) for read in reads]
        readable = [read.is_readable for read in reads]
        if any(read.is_readable for read in gold_reads):
            names = [forced.name] if forced else list(FORMATS)
            self.check_readable(values, readable, names)
        self._check_units(reads, "pred", "--box-format or --point-format")
        if not self.formats.gold:
            self._check_units(gold_reads, "gold", "--gold-format")
        pixels = [any(read.in_pixels for read in group) for group in (gold_reads, reads)]
        gold = self.checked_gold(
            [self._gold(read, index, pixels[1]) for index, read in enumerate(gold_reads)]
        )
        predictions = [self._prediction(read, index, pixels[0]) for index, read in enumerate(reads)]
        if self.kind != "points":
            self._check_box_format(reads, gold)
        summary, notes = self._summary(reads, bool(forced))
        notes = [*notes, *self._gold_note(gold_reads), *echoes, *self._names(reads, gold)]
        return FileAnswers(predictions, gold, summary, notes)

    def _detect(self, column: str, values: Sequence[object]) -> list[AnswerFormat]:
        """Returns the format of each value of a column.

        A field that is called `box_2d` holds Gemini's numbers, as objects with this key do.
        """
        name = self.fields.get(column, "").rpartition(".")[2]
        plain = FORMATS["gemini"] if name == "box_2d" else PLAIN
        return [plain if form is PLAIN else form for form in answer_formats.detect_all(values)]

    def _read_gold(self, predicted_forms: Collection[AnswerFormat]) -> list[_Read]:
        """Returns the locations of the ground truth of each row.

        Without --gold-format, the stated format of the predictions is the format of the ground
        truth too, unless the ground truth is in a format with a unit that no prediction is in.
        """
        gold_format = self.formats.gold or (
            self.formats.points if self.kind == "points" else self.formats.boxes
        )
        width = 4
        if self.kind == "points":
            order = gold_format.partition("_")[0]
            width = 2 if not order or order in POINT_ORDERS else 4
        values = self.columns["gold"]
        return [
            self._located(
                value,
                width,
                form,
                gold_format if form is PLAIN or form in predicted_forms else self.formats.gold,
            )
            for value, form in zip(values, self._detect("gold", values), strict=True)
        ]

    def _gold_note(self, reads: Sequence[_Read]) -> list[str]:
        """Returns a note about the ground truth in a format that states its unit."""
        counts = Counter(
            (read.form.name, location.written)
            for read in reads
            if read.form is not PLAIN and not self.formats.gold
            for location in read.locations[:1]
        )
        parts = [f"{count} as {name} ({unit})" for (name, unit), count in counts.most_common()]
        return [f"ground truth: {', '.join(parts)}"] if parts else []

    def _read(self, value: object, form: AnswerFormat) -> _Read:
        """Returns the locations of a prediction: of a click, points or boxes."""
        width = 2 if self.kind == "points" else 4
        if self.kind == "click":
            width = answer_formats.first_width(value, form) or 2
        stated = self.formats.boxes if width == 4 else self.formats.points
        return self._located(value, width, form, stated)

    def _located(self, value: object, width: int, form: AnswerFormat, stated: str) -> _Read:
        default = stated or form.stated_format(width) or ("xyxy_px" if width == 4 else "xy_px")
        return _Read(form, width, answer_formats.read(value, width, form, default))

    def _without_semicolons(self, value: object, gold: _Read) -> object:
        """Returns an answer in which a `;` of a gold name no longer ends a segment."""
        if isinstance(value, str) and "<loc" in value:
            for name in {location.label for location in gold.locations if ";" in location.label}:
                parts = [re.escape(part.strip()) for part in name.split(";")]
                pattern = re.compile(r"\s*;\s*".join(parts))
                value = pattern.sub(lambda _, name=name: name.replace(";", _SEMICOLON), value)
        return value

    def _with_semicolons(self, read: _Read) -> _Read:
        located = [
            location._replace(label=location.label.replace(_SEMICOLON, ";"))
            for location in read.locations
        ]
        return read._replace(locations=located)

    def _gold(self, read: _Read, index: int, compared_with_pixels: bool) -> JsonDict | None:
        """Returns the ground truth of a row, or None if it cannot be read."""
        objects = self._objects(read, index, compared_with_pixels)
        if read.width == 2:
            if any(point["xy_px"] is None for point in objects):
                return None
            masks = {"masks": self.columns["masks"][index]} if "masks" in self.columns else {}
            return {"points": objects, **masks}
        if self.kind == "rejection":
            objects = written_boxes(objects)
        proper = is_proper(host_boxes(box["xyxy_px"] for box in objects))
        if not proper.all() or (self.kind in ("box", "click") and len(objects) != 1):
            return None
        if self.kind == "rejection" and len(objects) > 1:
            return None
        return {"boxes": objects}

    def _prediction(self, read: _Read, index: int, compared_with_pixels: bool) -> JsonDict:
        """Returns the prediction of a row. An unreadable object stays, without coordinates."""
        objects = self._objects(read, index, compared_with_pixels)
        if self.kind == "click" and read.width == 4:
            return {"points": [], "boxes": [box for box in objects if box["xyxy_px"] is not None]}
        if read.width == 2:
            return {"points": objects, "boxes": []}
        return {"boxes": objects}

    def _objects(self, read: _Read, index: int, compared_with_pixels: bool) -> list[JsonDict]:
        """Returns the boxes or points of an answer, in pixels.

        Args:
          compared_with_pixels: the answers on the other side are in pixels.
        """
        key = "xyxy_px" if read.width == 4 else "xy_px"
        objects = []
        for location in read.locations:
            coordinates = None
            if location.numbers is not None:
                size = self._size(index, location.written, read.form, compared_with_pixels)
                coordinates = to_pixels(location.numbers, location.written, size)
            score = {} if location.score is None else {"score": location.score}
            objects.append({"label": location.label, key: coordinates, **score})
        return objects

    def _size(
        self, index: int, format_name: str, form: AnswerFormat, compared_with_pixels: bool
    ) -> list[float]:
        """Returns the size of the image of a row.

        Without a known size it is 1 x 1: pixels stay pixels, and fractions stay fractions.

        Raises:
          UserError: the size is not known, but fractions are compared with pixels.
        """
        size = self.sizes[index]
        if size is None and compared_with_pixels and not format_name.endswith("_px"):
            detected = "" if form is PLAIN else f" (the answers are {form.name})"
            raise UserError(
                f"--predictions={self.path}: {format_name}{detected} is compared with pixels, but "
                f"the size of row {index}'s image is not known: --fields=…,width=W,height=H "
                f"(or size=…)"
            )
        return size or [1.0, 1.0]

    def _check_units(self, reads: Sequence[_Read], column: str, flags: str) -> None:
        """Raises UserError if detected formats have coordinates outside the image.

        A unit that the user states is not checked here, and tokens cannot have other units.
        """
        stated = {4: self.formats.boxes, 2: self.formats.points}
        outside: Counter[AnswerFormat] = Counter()
        total = Counter(read.form for read in reads)
        first: dict[AnswerFormat, int] = {}
        for index, read in enumerate(reads):
            convention = read.form.stated_format(read.width)
            unit = convention.rpartition("_")[2]
            is_detected = stated[read.width] != convention and any(
                location.written.rpartition("_")[2] == unit for location in read.locations
            )
            if is_detected and not read.form.is_fixed and any(map(_is_outside, read.locations)):
                outside[read.form] += 1
                first.setdefault(read.form, index)
        for form, count in outside.items():
            unit = form.stated_format(reads[first[form]].width)
            if count > MAX_OUTSIDE * total[form]:
                raise UserError(
                    f"--predictions={self.path}: {count} of {total[form]} values of {column} that "
                    f"look like {form.name} have coordinates outside the image, if they are "
                    f"{unit}, first row {first[form]}: "
                    f"{_short(self.columns[column][first[form]])}; {flags} states the unit"
                )

    def _check_box_format(self, reads: Sequence[_Read], gold: Sequence[JsonObject]) -> None:
        """Raises UserError if the predicted boxes are in another format than the ground truth.

        Boxes are paired in the order in which they are written. Tokens have one format only, so
        they are left out.
        """
        pairs: dict[str, list[tuple[Any, Any, Any]]] = {}
        for index, read in enumerate(reads):
            if read.form.is_fixed or read.width == 2:
                continue
            for location, gold_box in zip(read.locations, gold[index]["boxes"], strict=False):
                if location.numbers is not None and any(location.numbers):
                    pairs.setdefault(location.written, []).append(
                        (location.numbers, gold_box["xyxy_px"], self.sizes[index])
                    )
        gold_format = self.formats.gold or self.formats.boxes or "xyxy_px"
        for written, triples in pairs.items():
            predicted, gold_boxes, sizes = zip(*triples, strict=True)
            check_box_format(predicted, gold_boxes, sizes, written, gold_format)

    def _summary(self, reads: Sequence[_Read], is_forced: bool) -> tuple[JsonDict, list[str]]:
        """Returns what is reported about the formats of the answers, and the note about them."""
        counts = Counter(read.form.name for read in reads if read.is_readable)
        if not is_forced and not counts.keys() - {PLAIN.name}:
            return {}, []
        units: dict[str, str] = {}
        for read in reads:
            for location in read.locations:
                if location.numbers is not None:
                    units.setdefault(read.form.name, location.written)
        parts = [f"{count} as {name} ({units[name]})" for name, count in counts.most_common()]
        read_count = sum(counts.values())
        summary = {
            "formats": dict(counts.most_common()),
            "read": read_count,
            "of": len(reads),
            "units": units,
        }
        return summary, [f"answers: {read_count} of {len(reads)} read: {', '.join(parts)}"]

    def _names(self, reads: Sequence[_Read], gold: Sequence[JsonObject]) -> list[str]:
        """Returns a note if most predicted names are no gold names."""
        if self.kind not in ("boxes", "detection", "f1"):
            return []
        gold_names = {box["label"] for answer in gold for box in answer["boxes"]} - {""}
        names = [r.label for read in reads for r in read.locations if r.label]
        if gold_names and not names and any(read.locations for read in reads):
            return [
                f"no answer has a name, but the gold has names such as {min(gold_names)!r:.60}: "
                "boxes are matched by name"
            ]
        unknown = [name for name in names if name not in gold_names]
        if not gold_names or len(unknown) <= len(names) / 2:
            return []
        nearest = sorted(gold_names, key=lambda name: (name.lower() != unknown[0].lower(), name))
        return [
            f"{len(unknown)} of {len(names)} names are no gold name, for example "
            f"{unknown[0]!r:.60} (a gold name is {nearest[0]!r:.60}): names must be equal"
        ]

    # Ground truth, and answers that are no locations

    def checked_gold(self, gold: Sequence[JsonDict | None]) -> list[JsonDict]:
        """Returns the ground truth of each row.

        Raises:
          UserError: the ground truth of a row cannot be read. A prediction that cannot be read is
            only a wrong answer.
        """
        wrong = [index for index, answer in enumerate(gold) if answer is None]
        if wrong:
            expected = {"box": "one box", "click": "one box", "rejection": "one box or none"}.get(
                self.kind, "an answer that can be read"
            )
            value = self.columns["gold"][wrong[0]]
            raise UserError(
                f"--predictions={self.path}: the gold of {len(wrong)} of {len(gold)} rows is not "
                f"{expected}, first row {wrong[0]}: {value!r:.80}"
            )
        return [answer for answer in gold if answer is not None]

    def gold_value(self, index: int) -> JsonDict | None:
        """Returns the ground truth of a row that is no location, or None if it cannot be read."""
        if self.kind == "reward":
            return {}
        value = self.columns["gold"][index]
        if self.kind == "count":
            number = parsers.number(value, strict=False)
            return None if number is None else {"number": number}
        if self.kind == "text":
            return None if value is None else {"text": parsers.words(value)}
        choices = self._choices(index)
        letter = parsers.option(value, choices, strict=False)
        if letter is None:
            return None
        names = [name for name in ("task", "source") if name in self.columns]
        labels = {name: self.columns[name][index] for name in names}
        return {"choice": letter, "choices": choices, **labels}

    def prediction_value(self, value: object, index: int) -> JsonDict:
        """Returns the prediction of a row that is no location."""
        if self.kind == "reward":
            return {}
        if self.kind == "count":
            return {"number": parsers.number(value, strict=False)}
        if self.kind == "text":
            return {"text": "" if value is None else parsers.words(value)}
        return {"choice": parsers.option(value, self._choices(index), strict=False)}

    def _choices(self, index: int) -> list[str]:
        choices = self.columns["choices"][index] if "choices" in self.columns else None
        if isinstance(choices, str):
            choices = load_value(choices)
        return list(map(str, choices)) if isinstance(choices, list) else []


_SEMICOLON = "\ue000"
"""Stands for a `;` inside a name while an answer is cut at its `;`."""


def _is_empty(value: object) -> bool:
    """Returns whether an answer says nothing, or that there is nothing: `{"bbox_2d": null}`."""
    if isinstance(value, str):
        text = value.strip()
        value = load_value(text) if text.startswith("{") else text
    if isinstance(value, Mapping):
        return all(part in (None, "", []) for part in value.values())
    return value in (None, [], *_NOTHING)


_NOTHING = ("", "[]", "{}", "null", "None")


def _short(value: object) -> str:
    """Returns a value in at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _is_outside(location: Location) -> bool:
    """Returns whether a location has a coordinate outside the image, in a unit other than pixels.

    Models write a little beside the edge, so 2 % are allowed.
    """
    extent = UNITS.get(split_format(location.written)[1])
    if extent is None or location.numbers is None:
        return False
    return any(not -0.02 * extent <= number <= 1.02 * extent for number in location.numbers)

"""COCO's instances as records: one for each image, or one for each image and category."""

import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from pg_ground.data.annotations import read_rows
from pg_ground.data.class_names import shared_names
from pg_ground.data.record_fields import plain_text
from pg_ground.data.records import BadRecord, Records, clip_text, short
from pg_ground.data.tables import BadEntry, RecordList, describe, load_json, split_options
from pg_ground.storage.json_values import Repeated, fields_of
from pg_ground.storage.paths import to_path
from pg_ground.types import JsonDict, UserError

COCO_RECORDS = ("image", "category", "list")
"""The values of the option `ask` of `coco:`."""

SINGULAR = {"images": "image", "annotations": "annotation", "categories": "category"}
"""The lists of COCO's instances, with the name of one entry of each."""

FLAGS = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False, "": False}
"""Flags as text, in lower case."""

MAX_DIGITS = 18
"""A text with more digits is an id that is a text."""

LARGEST = sys.float_info.max
"""A coordinate is smaller."""

Key = int | str
"""An id in the form in which ids are compared."""


class Category(NamedTuple):
    """The name of a category, or the reason why it has none."""

    name: str | None
    fault: str = ""


@dataclass(slots=True)
class ImageObjects:
    """One image and its objects."""

    fields: JsonDict
    """`image` (the file name), and `width` and `height` if the file has them."""
    categories: list[Category] = field(default_factory=list)
    boxes: list[Any] = field(default_factory=list)
    iscrowd: list[int] = field(default_factory=list)
    crowds: tuple[str | None, ...] = ()
    """The names of the crowds that are left out."""
    lost: tuple[str | None, ...] = ()
    """The names of the annotations that cannot be used. None is a name that is unknown."""

    def count_fault(self, names: Collection[str] | None) -> str:
        """Returns why objects with these names cannot be counted, in words; "" if they can be.

        Args:
          names: None stands for all names.
        """
        kept = zip(self.categories, self.iscrowd, strict=True)
        crowds = (*self.crowds, *(category.name for category, crowd in kept if crowd))
        for some, what in ((self.lost, "annotations that cannot be used"), (crowds, "crowds")):
            count = sum(names is None or name is None or name in names for name in some)
            if count:
                image = short(self.fields["image"])
                return f"the count is unknown: {image} has {what} ({count}) beside the objects"
        return ""


def open_coco(
    location: str, keep_empty: bool = False, flat_is_bad: bool = True, counts: bool = False
) -> Records:
    """Returns the objects of COCO's instances as records.

    With `ask=image` there is one record for each image: `image` (its file name), `width`, `height`,
    and for each object an entry of `categories`, `boxes` (x, y, w, h in pixels) and `iscrowd`.
    With `ask=category` an image has one record for each category of its objects, with `category`
    instead of `categories`. With `ask=list`, a record of `ask=image` also has `classes`:
    the different categories in their order, "cat ; dog". An image without objects stays. Regions
    that stand for a crowd of objects are left out, unless `crowd=1`.

    Ids are compared by value: 3, 3.0 and "3" are the same id. An entry that cannot be used is one
    bad record behind the others, and the other objects of its image stay.

    Args:
      location: `FILE?ask=image&images=DIR&crowd=0`. `images` is the folder of the images, by
        default the folder of FILE.
      keep_empty: whether an image without any annotation is a question too. With `ask=category`
        and `ask=list`, such images ask for one category each, in turn.
      flat_is_bad: whether a box without width or height is a bad entry.
      counts: whether the questions ask for the number of objects. If an image shows a crowd of what
        is counted, or has an annotation of it that cannot be used, the question is a bad record.

    Raises:
      UserError: the file or an option does not exist, the file is no JSON or has not COCO's form,
        two entries of one list have the same id, or no record can be used.
    """
    uri = f"coco:{location}"
    name, options = split_options("coco", location, ("ask", "images", "crowd"))
    path = to_path(name, f"source {uri}")
    ask = options.get("ask", "image")
    crowd = options.get("crowd", "0")
    if ask not in COCO_RECORDS or crowd not in ("0", "1"):
        raise UserError(
            f"source {uri}: ask must be one of {', '.join(COCO_RECORDS)}, and crowd 0 or 1"
        )
    lists = _lists(load_json(path, uri), ask != "image", uri)
    categories, bad = _categories(lists["categories"], path.name, uri)
    images, by_id = _images(lists["images"], path.name, uri)
    # With ask=image, a missing name shows in the records that need the name.
    bad = [] if ask == "image" else bad
    rules = _Rules(crowd == "1", ask != "image", flat_is_bad)
    bad += _add_annotations(lists["annotations"], by_id, categories, rules, path.name, uri)
    names = dict.fromkeys(category.name for category in categories.values() if category.name)
    entries, count = _to_records(images, ask, list(names) if keep_empty else [], counts)
    entries += bad
    _check_usable(entries, ask, uri)
    text = "background image asks" if count == 1 else "background images ask"
    notes = (f"{count} {text} for one class each, in turn",) if count else ()
    named = [(str(key), item.name) for key, item in categories.items() if item.name]
    notes += tuple(shared_names(named))
    orphans = sum(entry.kind == "missing_image" for entry in bad)
    has_background = any(isinstance(i, ImageObjects) and not (i.boxes or i.lost) for i in images)
    doubt = "counts" if counts else "empty answers" if keep_empty and has_background else ""
    if orphans and doubt:
        text = "annotation names" if orphans == 1 else "annotations name"
        notes += (f"{orphans} {text} no image of the file: some {doubt} may be wrong",)
    partial = sum(isinstance(i, ImageObjects) and bool(i.boxes and i.lost) for i in images)
    if partial and not counts:
        text = f"{partial} {'image has' if partial == 1 else 'images have'}"
        notes += (f"{text} annotations that cannot be used: their objects are in no answer",)
    root = to_path(options["images"], f"source {uri}") if "images" in options else path.parent
    return RecordList(entries, path.name, root, notes)


def _check_usable(entries: Sequence[JsonDict | BadEntry], ask: str, uri: str) -> None:
    """Raises UserError if there are no records, or only bad ones."""
    bad = [entry for entry in entries if isinstance(entry, BadEntry)]
    if len(bad) < len(entries):
        return
    faults = [entry.message for entry in bad if entry.kind != "empty"]
    kind = "objects" if ask == "category" else "images"
    reason = f"no entry can be used: {faults[0]}" if faults else f"there are no {kind} in it"
    raise UserError(f"source {uri}: {reason}")


def id_key(value: object) -> Key | None:
    """Returns an id in the form in which ids are compared; None if the value is no id.

    3, 3.0 and "3" are the same id. "003" is another id.
    """
    if type(value) is int:
        return value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if not isinstance(value, str):
        return None
    digits = value.removeprefix("-")
    is_number = digits.isascii() and digits.isdecimal() and len(digits) <= MAX_DIGITS
    return int(value) if is_number and str(int(value)) == value else value


def positions_by_id(entries: Sequence[Any], list_name: str, source: str) -> dict[Key, int]:
    """Returns the position of each id in a list of COCO's form. Entries without an id are left out.

    Raises:
      UserError: two entries have the same id. The text begins with `source`.
    """
    positions: dict[Key, int] = {}
    for position, entry in enumerate(entries):
        value = fields_of(entry).get("id")
        key = id_key(value)
        if key is None:
            continue
        first = positions.setdefault(key, position)
        if first != position:
            both = f"{_entry_label(entries, first)} and {_entry_label(entries, position)}"
            raise UserError(
                f"{source}: entries {both} of {list_name} have the same id {short(value)}"
            )
    return positions


def read_flag(value: object) -> bool | None:
    """Returns a flag that is a bool, 0, 1, None (False) or a text of `FLAGS`; otherwise None."""
    if value is None:
        return False
    if isinstance(value, str):
        return FLAGS.get(value.strip().lower())
    return bool(value) if isinstance(value, int | float) and value in (0, 1) else None


def name_text(value: object) -> str | None:
    """Returns a name that is a text or a whole number as text; None for every other value."""
    is_fraction = isinstance(value, float) and not value.is_integer()
    text = None if is_fraction else plain_text(value)
    return text if text and text.strip() else None


def _lists(value: object, needs_names: bool, uri: str) -> dict[str, list[Any]]:
    """Returns COCO's lists. An absent list is empty, if the questions do not need it."""
    needed = ("images", "categories") if needs_names else ("images",)
    lists = {}
    for name in SINGULAR:
        entries = value.get(name) if isinstance(value, dict) else None
        if not isinstance(entries, list) and (entries is not None or name in needed):
            described = describe(value) if entries is None else f"{name} is {describe(entries)}"
            raise UserError(
                f"source {uri}: this is {described}, "
                f"but COCO's instances have the lists images, annotations, categories"
            )
        lists[name] = entries or []
    return lists


def _categories(
    entries: Sequence[Any], file_name: str, uri: str
) -> tuple[dict[Key, Category], list[BadEntry]]:
    """Returns the categories by id, and the entries that are no categories."""
    positions = positions_by_id(entries, "categories", f"source {uri}")
    categories = {}
    for key, position in positions.items():
        entry = entries[position]
        value = fields_of(entry).get("name")
        where = where_text(entries, position, "categories", file_name)
        fault = f"{where} has the name {short(value)}, which is no text"
        name = name_text(value)
        if isinstance(entry, Repeated):
            name, fault = None, f"{where}: {entry.fault}"
        # Prompts and answers have single spaces, so names that differ in blanks are one class.
        categories[key] = Category(" ".join(name.split()) if name else None, "" if name else fault)
    with_id = set(positions.values())
    bad = [
        entry_without(entries, position, "categories", "id", file_name)
        for position in range(len(entries))
        if position not in with_id
    ]
    return categories, bad


def _images(
    entries: Sequence[Any], file_name: str, uri: str
) -> tuple[list[ImageObjects | BadEntry], dict[Key, ImageObjects | BadEntry]]:
    """Returns the images in the order of the file, and the same images by id."""
    keys = {at: key for key, at in positions_by_id(entries, "images", f"source {uri}").items()}
    images: list[ImageObjects | BadEntry] = []
    by_id: dict[Key, ImageObjects | BadEntry] = {}
    for position, entry in enumerate(entries):
        missing = "file_name" if position in keys else "id"
        name = _image_name(entry) if position in keys and isinstance(entry, dict) else None
        if name is None:
            image = entry_without(entries, position, "images", missing, file_name)
        elif not isinstance(name, str) or not name.strip():
            where = where_text(entries, position, "images", file_name)
            reason = f"file_name is {short(name)}, which names no file"
            image = BadEntry("missing_image", f"{where}: {reason}")
        else:
            sizes = {side: entry[side] for side in ("width", "height") if entry.get(side)}
            image = ImageObjects({"image": name, **sizes})
        images.append(image)
        if position in keys:
            by_id[keys[position]] = image
    return images, by_id


def _image_name(entry: JsonDict) -> object:
    """Returns the `file_name` of an image; in LVIS, which has none, FOLDER/FILE of its `coco_url`.

    LVIS's val images are in COCO's folders val2017 and train2017.
    """
    address = entry.get("coco_url")
    if entry.get("file_name") is None and isinstance(address, str):
        return "/".join(address.split("/")[-2:]) or None
    return entry.get("file_name")


class _Rules(NamedTuple):
    """Which annotations are used."""

    with_crowd: bool
    needs_name: bool
    flat_is_bad: bool


def _add_annotations(
    entries: Sequence[Any],
    images: Mapping[Any, ImageObjects | BadEntry],
    categories: Mapping[Any, Category],
    rules: _Rules,
    file_name: str,
    uri: str,
) -> list[BadEntry]:
    """Adds each annotation to its image. Returns the annotations that cannot be used."""
    positions_by_id(entries, "annotations", f"source {uri}")
    bad = []
    for position, entry in enumerate(entries):
        image = images.get(_key_of(entry, "image_id"))
        if isinstance(image, BadEntry):
            continue  # the image is the bad record
        try:
            _add_annotation(entry, image, images, categories, rules)
        except BadRecord as fault:
            where = where_text(entries, position, "annotations", file_name)
            bad.append(BadEntry(fault.kind, f"{where}: {fault}"))
            if image:
                category = categories.get(_key_of(entry, "category_id"))
                image.lost += (category.name if category else None,)
    return bad


def _add_annotation(
    entry: Any,
    image: ImageObjects | None,
    images: Iterable[Key],
    categories: Mapping[Any, Category],
    rules: _Rules,
) -> None:
    """Adds an annotation to its image. Raises BadRecord without the place of the entry."""
    if isinstance(entry, Repeated):
        raise BadRecord("bad_json", entry.fault)
    if not isinstance(entry, dict):
        raise BadRecord("bad_entry", f"it is {short(entry)}, not an object")
    crowd = read_flag(entry.get("iscrowd"))  # some files of this form do not have it
    if crowd is None:
        raise BadRecord("bad_entry", f"iscrowd is {short(entry['iscrowd'])}, which is no flag")
    category = categories.get(_key_of(entry, "category_id"))
    if crowd and not rules.with_crowd:
        if image:
            image.crowds += (category.name if category else None,)
        return
    if image is None:
        raise BadRecord("missing_image", _no_such(entry, "image_id", images))
    if category is None and rules.needs_name:
        raise BadRecord("missing_category", _no_such(entry, "category_id", categories))
    box = read_bbox(entry)
    if rules.flat_is_bad and isinstance(box, list) and min(box[2:]) <= 0:
        raise BadRecord("bad_box", f"bbox {short(box)} has no width or no height")
    image.categories.append(category or Category(None))
    image.boxes.append(box)
    image.iscrowd.append(int(crowd))


def _key_of(entry: Any, name: str) -> Key | None:
    return id_key(fields_of(entry).get(name))


def _no_such(entry: JsonDict, name: str, keys: Iterable[Key]) -> str:
    """Returns the reason why the entry's id names nothing."""
    kind = name.removesuffix("_id")
    if entry.get(name) is None:
        return f"there is no {name}"
    text = f"there is no {kind} with the id {short(entry[name])}"
    key = id_key(entry[name])
    other = next((other for other in keys if type(other) is not type(key)), None)
    return text if other is None else f"{text}; there are ids such as {short(other)}"


def read_bbox(annotation: JsonDict) -> Any:
    """Returns the `bbox` of an annotation, which is one box in any form that `read_rows` knows.

    Raises:
      BadRecord: bad_box.
    """
    if "bbox" not in annotation:
        raise BadRecord("bad_box", "there is no bbox")
    value = annotation["bbox"]
    if isinstance(value, list) and len(value) == 4 and all(map(_is_finite, value)):
        return value
    if isinstance(value, list) and any(isinstance(item, bool) for item in value):
        raise BadRecord("bad_box", f"bbox is {short(value)}, not 4 numbers")
    try:
        rows = read_rows(value, "xyxy_px", 4)
    except BadRecord as bad:
        raise BadRecord("bad_box", f"bbox: {bad}") from None
    if len(rows.numbers) != 1:
        raise BadRecord("bad_box", f"bbox is {short(value)}, not 4 numbers")
    return rows.numbers[0].tolist() if rows.reading == "lists" else value


def _is_finite(value: object) -> bool:
    # A comparison, because a whole number can be too large for a float.
    return type(value) in (int, float) and -LARGEST < value < LARGEST  # type: ignore[operator]


def _to_records(
    images: Sequence[ImageObjects | BadEntry], ask: str, names: Sequence[str], counts: bool
) -> tuple[list[JsonDict | BadEntry], int]:
    """Returns the records of all images, and how many images without objects ask for a class.

    Args:
      images: in the order of the file.
      ask: a value of `COCO_RECORDS`.
      names: the classes that images without annotations ask for, in turn; empty if these images
        ask for nothing.
      counts: whether the questions ask for the number of objects.
    """
    records: list[JsonDict | BadEntry] = []
    background: list[JsonDict | BadEntry] = []
    count = 0
    for image in images:
        if isinstance(image, BadEntry):
            records.append(image)
        elif image.lost and not image.boxes:
            # Whether the image shows an object is unknown, so an empty answer may be wrong.
            text = f"no annotation of {short(image.fields['image'])} can be used"
            records += [BadEntry("empty", text)] if ask != "category" else []
        elif ask == "image" or image.boxes or not names:
            parts = _questions(image, ask)
            records += [_countable(part, image, ask) for part in parts] if counts else parts
        else:
            question = _question_of_nothing(image, names, count, ask)
            count += isinstance(question, dict)
            if ask == "list":
                records.append(question)
            elif isinstance(question, dict):
                background.append(question)
    return records + background, count


def _questions(image: ImageObjects, ask: str) -> list[JsonDict | BadEntry]:
    """Returns the records of an image."""
    if ask == "category":
        return _split_by_category(image)
    return [_image_record(image) if ask == "image" else _list_record(image)]


def _countable(record: JsonDict | BadEntry, image: ImageObjects, ask: str) -> JsonDict | BadEntry:
    """Returns a record of an image, or why the objects that it asks for cannot be counted."""
    if isinstance(record, BadEntry):
        return record
    names = None
    if ask == "category":
        names = (record["category"],)
    elif ask == "list":
        names = record["categories"]
    fault = image.count_fault(names)
    return BadEntry("bad_count", fault) if fault else record


def _question_of_nothing(
    image: ImageObjects, names: Sequence[str], rank: int, ask: str
) -> JsonDict | BadEntry:
    """Returns the question of an image without objects: class number `rank`, in turn.

    If the image shows a crowd of a class, it does not ask for this class.
    """
    turned = [names[(rank + i) % len(names)] for i in range(len(names))]
    absent = [] if None in image.crowds else [name for name in turned if name not in image.crowds]
    if not absent:
        return BadEntry("empty", f"{short(image.fields['image'])} shows crowds of all classes")
    if ask == "list":
        return _image_record(image) | {"classes": absent[0]}
    return image.fields | {"category": absent[0], "boxes": [], "iscrowd": []}


def _image_record(image: ImageObjects) -> JsonDict:
    return image.fields | {
        "categories": [category.name for category in image.categories],
        "boxes": image.boxes,
        "iscrowd": image.iscrowd,
    }


def _list_record(image: ImageObjects) -> JsonDict | BadEntry:
    """Returns a record with `classes`. It is bad if a category has no name."""
    for category in image.categories:
        if category.name is None:
            return BadEntry("bad_text", category.fault)
    record = _image_record(image)
    return record | {"classes": " ; ".join(dict.fromkeys(record["categories"]))}


def _split_by_category(image: ImageObjects) -> list[JsonDict | BadEntry]:
    """Returns an image's record in parts, one for each name of its categories."""
    parts: dict[Any, JsonDict | BadEntry] = {}
    by_name: dict[str, JsonDict] = {}
    for category, box, crowd in zip(image.categories, image.boxes, image.iscrowd, strict=True):
        name = category.name
        if name is None:
            parts[category] = BadEntry("bad_text", category.fault)
            continue
        if name not in by_name:
            by_name[name] = image.fields | {"category": name, "boxes": [], "iscrowd": []}
            parts[name] = by_name[name]
        by_name[name]["boxes"].append(box)
        by_name[name]["iscrowd"].append(crowd)
    return list(parts.values())


def entry_without(
    entries: Sequence[Any], position: int, list_name: str, name: str, file_name: str
) -> BadEntry:
    """Returns the bad entry at a position that is no object, or has no field `name`."""
    where = where_text(entries, position, list_name, file_name)
    entry = entries[position]
    if isinstance(entry, Repeated):
        return BadEntry("bad_json", f"{where}: {entry.fault}")
    if not isinstance(entry, dict):
        return BadEntry("bad_entry", f"{where}: it is {short(entry)}, not an object")
    if entry.get(name) is None:
        return BadEntry("missing_field", f"{where}: there is no {name}")
    return BadEntry("bad_entry", f"{where}: {name} is {short(entry[name])}, which is no id")


def where_text(entries: Sequence[Any], position: int, list_name: str, file_name: str) -> str:
    """Returns, for example, `annotation 20 (id 999) of train.json`."""
    value = fields_of(entries[position]).get("id")
    number = f"{position} (id {short(value)})" if value is not None else str(position)
    return f"{SINGULAR[list_name]} {number} of {file_name}"


def _entry_label(entries: Sequence[Any], position: int) -> str:
    """Returns the position of an entry, with its file name or its name if it has one."""
    fields = fields_of(entries[position])
    label = fields.get("file_name", fields.get("name"))
    return f"{position}" if label is None else f"{position} ({clip_text(str(label), 40)})"

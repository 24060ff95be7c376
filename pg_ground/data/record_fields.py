"""Fields of a record: dotted paths, and templates that are filled with fields."""

import decimal
import functools
import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jinja2
import jinja2.sandbox
import numpy as np

from pg_ground.config import Source
from pg_ground.data.records import BadRecord, list_names, nearest_name, short
from pg_ground.storage.paths import to_path
from pg_ground.types import JsonDict, Record, UserError

_INDEX = re.compile(r"-?\d+")
_BRACKETS = re.compile(r"\[(-?\d+)\]")

_BRACES = re.compile(r"\{\{|\}\}|\{([^{}]*)\}")
_FIELD_PATH = re.compile(r"[^\s{}\"':,][^{}\"':,\n]*")
"""The path between braces. Other text between braces is text: `\\boxed{}`, `{"bbox_2d": [x1]}`."""

_BRACED_NAME = re.compile(r"\{\s*([^\s{}]+)\s*\}")
"""A name between braces in a filled template."""


class MissingField(BadRecord):
    """A path of a source that leads to no value. The kind is missing_field."""

    def __init__(self, path: str, reason: str, setting: str = ""):
        where = f" ({setting} of the source)" if setting else ""
        super().__init__("missing_field", f"there is no {path}{where}: {reason}")
        self.path = path
        self.reason = reason

    @property
    def is_absent(self) -> bool:
        """Whether a field outside of lists is absent or null."""
        return isinstance(self, _Absent)


class _Absent(MissingField):
    """A path that leads to no value, because a field outside of lists is absent or null."""


def with_setting(bad: BadRecord, source: Source) -> BadRecord:
    """Returns an error about a missing field with the setting that names the field."""
    if not isinstance(bad, MissingField):
        return bad
    settings = [name for name, paths in _setting_paths(source).items() if bad.path in paths]
    reason = bad.reason
    if settings == ["suffix"] and bad.path == "count":
        reason += "; suffix = 'count' writes the number of objects"
    return MissingField(bad.path, reason, " and ".join(settings))


@functools.lru_cache(maxsize=64)
def _setting_paths(source: Source) -> dict[str, list[str]]:
    """Returns the paths that each setting of a source names."""
    single = ("image", "image_sha256", "phrase", "mask", "label")
    several = ("boxes", "points", "size")
    templates = ("prompt", "name", "suffix")
    return {
        **{name: [getattr(source, name)] for name in single},
        **{name: paths_of(getattr(source, name)) for name in several},
        **{
            name: [path for path in placeholders(getattr(source, name)) if path != "phrase"]
            for name in templates
        },
    }


def field_at(record: Record, path: str, element: int = 0) -> Any:
    """Returns the value at a dotted path. Through a list of objects, returns the list of values.

    - `objects.bbox` reads {"objects": {"bbox": [..]}} and {"objects": [{"bbox": ..}, ..]}.
    - `objects[].bbox` reads the bbox of one object, number `element`.
    - `messages.1.content` and `messages[1].content` read one element; -1 is the last one.
    - `image.path` reads the field "image.path" if the record has a field with this name.

    Raises:
      BadRecord: missing_field, with the names of the fields that exist.
    """
    steps = steps_of(path)
    if len(steps) == 1 and isinstance(record, dict) and path in record and path[-1:] != "]":
        return record[path]
    return _descend(record, steps, path, element)


@functools.lru_cache(maxsize=1024)
def steps_of(path: str) -> tuple[str, ...]:
    """Returns the names and numbers of a path one by one: a[1].b and a.1.b are a, 1, b."""
    return tuple(_BRACKETS.sub(r".\1", path).split("."))


def field_or_none(record: Record, path: str, element: int = 0) -> Any:
    """Returns the value at a path, or None if a field on the way is absent or null.

    Raises:
      BadRecord: missing_field, if an element of a list lacks the field.
    """
    try:
        return field_at(record, path, element)
    except _Absent:
        return None


def with_field(record: Record, path: str, value: object) -> JsonDict:
    """Returns a copy of `record` with another value at a path that `field_at` reads.

    Nothing inside `record` changes.

    Raises:
      BadRecord: missing_field, as `field_at`.
      UserError: the path goes through several elements of a list.
    """
    return _with_field(record, steps_of(path), path, value)


def _with_field(inner: Any, names: Sequence[str], path: str, value: object) -> Any:
    if not names:
        return value
    if isinstance(inner, list | tuple):
        is_index = _is_index(inner, names[0])
        if not is_index and len(inner) != 1:
            raise UserError(f"the path {path} goes through a list of {len(inner)} elements")
        position = int(names[0]) if is_index else 0
        _element_at(inner, str(position), path)
        items = list(inner)
        names = names[1:] if is_index else names
        items[position] = _with_field(items[position], names, path, value)
        return items
    if not isinstance(inner, Mapping):
        raise _Absent(path, f"{short(inner)} has no {names[0]}")
    keys = _keys_of(inner, names, path)
    for key, count in keys:
        if names[count - 1].endswith("[]"):
            raise UserError(f"the path {path} goes through a list with []")
        try:
            return {**inner, key: _with_field(inner[key], names[count:], path, value)}
        except _Absent:
            if (key, count) == keys[-1]:
                raise
    raise AssertionError("there is at least one key")


def paths_of(text: str) -> list[str]:
    """Returns the paths of a setting that can name several fields, such as `x1,y1,x2,y2`."""
    return [path.strip() for path in text.split(",")] if text else []


def coordinates_at(record: Record, text: str, element: int = 0) -> Any:
    """Returns the value at the path `text`, or the values at several paths as one row.

    `x1,y1,x2,y2` reads four fields as one box. If the fields are lists, it reads one box for each
    of their elements. Returns None if a path leads to no value.

    Raises:
      BadRecord: missing_field, if a path leads to no value and another path does; or the lists have
        different lengths.
    """
    paths = paths_of(text)
    if len(paths) <= 1 or text in record:
        return field_or_none(record, text, element)
    values = [field_or_none(record, path, element) for path in paths]
    absent = [path for path, value in zip(paths, values, strict=True) if value is None]
    if len(absent) == len(paths):
        return None
    if absent:
        field_at(record, absent[0], element)  # raises if the field is absent, not if it is null
        raise BadRecord("missing_field", f"{absent[0]} is null, but {text} needs a number")
    lists = [value for value in values if isinstance(value, list | tuple | np.ndarray)]
    if not lists:
        return values
    lengths = [len(value) for value in lists]
    if len(lists) < len(values) or len(set(lengths)) > 1:
        raise BadRecord("missing_field", f"the lists {text} have {lengths} elements")
    return [list(row) for row in zip(*values, strict=True)]


def _descend(value: object, names: Sequence[str], path: str, element: int) -> Any:
    if not names:
        return value
    if isinstance(value, list | tuple):
        if _is_index(value, names[0]):
            return _descend(_element_at(value, names[0], path), names[1:], path, element)
        return [_descend_inside(item, names, path, element) for item in value]
    if not isinstance(value, Mapping):
        kind = _Absent if value is None else MissingField
        raise kind(path, f"{short(value)} has no field {names[0]}")
    keys = _keys_of(value, names, path)
    for key, count in keys[:-1]:
        try:
            return _descend_field(value[key], count, names, path, element)
        except _Absent:
            pass
    key, count = keys[-1]
    return _descend_field(value[key], count, names, path, element)


def _descend_field(inner: Any, count: int, names: Sequence[str], path: str, element: int) -> Any:
    """Returns the value behind a field whose name is `count` names of the path."""
    name = names[count - 1]
    if name.endswith("[]"):
        if inner is None:
            raise _Absent(path, f"{name[:-2]} is null")
        if not isinstance(inner, list | tuple) or element >= len(inner):
            reason = f"{name[:-2]} is {short(inner)}, which has no element {element}"
            raise MissingField(path, reason)
        inner = inner[element]
    return _descend(inner, names[count:], path, element)


def _descend_inside(item: object, names: Sequence[str], path: str, element: int) -> Any:
    """Returns `_descend` of an element of a list. A field that it lacks is a fault."""
    try:
        return _descend(item, names, path, element)
    except _Absent as absent:
        raise MissingField(absent.path, absent.reason) from None


def _is_index(value: Sequence[object], name: str) -> bool:
    """Returns whether `name` counts the elements of a list.

    It does not if every element is an object that has a field of this name.
    """
    if not _INDEX.fullmatch(name):
        return False
    return not value or not all(isinstance(item, Mapping) and name in item for item in value)


def _element_at(value: Sequence[object], name: str, path: str) -> object:
    index = int(name)
    if not -len(value) <= index < len(value):
        parent = path.partition(f".{name}")[0].partition(f"[{name}]")[0]
        elements = "1 element" if len(value) == 1 else f"{len(value)} elements"
        raise _Absent(path, f"{parent} has {elements}")
    return value[index]


def _keys_of(value: Record, names: Sequence[str], path: str) -> list[tuple[Any, int]]:
    """Returns the keys that the next names can mean, each with the number of these names.

    A key with dots in it is several names. It is the last to try.

    Raises:
      _Absent: there is none.
    """
    keys: list[tuple[Any, int]] = []
    for count in (1, *range(len(names), 1, -1)):
        text = ".".join(names[:count])
        keys += [(key, count) for key in dict.fromkeys((text, text.removesuffix("[]")))]
    # The keys of a table can be numbers.
    name = names[0].removesuffix("[]")
    if _INDEX.fullmatch(name):
        keys.append((int(name), 1))
    present = [(key, count) for key, count in keys if key in value]
    if not present:
        reason = f"the fields are {list_names(value)}{nearest_name(names[0], value)}"
        raise _Absent(path, reason)
    return present


def list_path(source: Source) -> str:
    """Returns the path of the list that the source's paths go through with `[]`, or "".

    Raises:
      UserError: the paths go through several lists.
    """
    paths = [
        source.image,
        source.image_sha256,
        source.phrase,
        *paths_of(source.boxes),
        *paths_of(source.points),
        source.mask,
        source.label,
    ]
    for template in (source.prompt, source.name, source.suffix):
        paths += placeholders(template)
    lists = sorted({path.partition("[]")[0] for path in paths if "[]" in path})
    if len(lists) > 1 or any(path.count("[]") > 1 for path in paths):
        raise UserError(
            f"the paths of a source can go through one list with [], but these go through "
            f"{', '.join(lists)}, or through one list inside another"
        )
    return lists[0] if lists else ""


def count_elements(record: Record, path: str) -> int:
    """Returns the number of elements of the list at `path`.

    Raises:
      BadRecord: missing_field, also if the value is not a list.
    """
    value = field_at(record, path)
    if not isinstance(value, list):
        raise BadRecord("missing_field", f"{path} is {short(value)}, but {path}[] needs a list")
    return len(value)


def placeholders(template: str) -> list[str]:
    """Returns the paths of the fields that a template names between braces."""
    paths = [match[1] for match in _BRACES.finditer(template)]
    return [path for path in paths if path is not None and _FIELD_PATH.fullmatch(path)]


def unfilled_fields(template: str, fields: Collection[str]) -> list[str]:
    """Returns the texts such as "{ phrase }" that name a field, but stay text in a template.

    `{{ phrase }}` is a field in Jinja, and here it writes "{ phrase }".

    Args:
      fields: names of fields.
    """
    if template.endswith(".jinja"):
        return []
    parts = _template_parts(template)
    text = "".join(text if path is None else f"{text}\0" for text, path in parts)
    return [match[0] for match in _BRACED_NAME.finditer(text) if match[1] in fields]


def fill_template(template: str, record: Record, phrase: str, element: int = 0) -> str:
    """Returns `template` with every `{field}` replaced, and with single spaces.

    `{{` and `}}` write one brace. Braces that cannot hold a path stay: `\\boxed{}`. A template that
    is the name of a Jinja file (NAME.jinja) is rendered in a sandbox, with the record's fields and
    `phrase`.

    Args:
      template: text with `{dotted.path}` in it, or a file name.
      record: the record whose fields are filled in.
      phrase: the dotted path that `{phrase}` stands for.
      element: the element that `[]` in a path stands for.

    Raises:
      BadRecord: missing_field, or bad_text if a field is neither a text nor a finite number.
      UserError: the Jinja file is missing or does not parse.
    """

    if template.endswith(".jinja"):
        fields = dict(record)
        value = field_or_none(record, phrase, element)
        if value is not None:
            fields["phrase"] = value
        return " ".join(_render(template, fields).split())
    texts = []
    for text, field in _template_parts(template):
        texts.append(text)
        if field is not None:
            path = phrase if field == "phrase" else field
            texts.append(_field_text(template, record, path, element))
    return " ".join("".join(texts).split())


@functools.lru_cache(maxsize=256)
def _template_parts(template: str) -> tuple[tuple[str, str | None], ...]:
    """Returns the parts of a template: a text, and the path of the field after it or None."""
    parts: list[tuple[str, str | None]] = []
    end = 0
    for match in _BRACES.finditer(template):
        text = template[end : match.start()]
        end = match.end()
        if match[1] is None:
            parts.append((text + match[0][0], None))
        elif _FIELD_PATH.fullmatch(match[1]):
            parts.append((text, match[1]))
        else:
            parts.append((text + match[0], None))
    return (*parts, (template[end:], None))


def _field_text(template: str, record: Record, path: str, element: int) -> str:
    """Returns the field at `path` as text. Raises BadRecord as `fill_template` does."""
    value = _template_field(record, path, element)
    text = plain_text(value)
    if text is None or not text.strip():
        raise BadRecord(
            "bad_text", f"{path} is {short(value)}, which makes no text for {short(template)}"
        )
    return text


def _template_field(record: Record, path: str, element: int) -> Any:
    try:
        return field_at(record, path, element)
    except MissingField as missing:
        if path.strip().isdigit() or "\\" in path:
            reason = f"{missing.reason} (write {{{{{path}}}}} for braces)"
            raise MissingField(path, reason) from None
        raise


def plain_text(value: object) -> str | None:
    """Returns a text or a number as text, or None for every other value.

    A float that is a whole number has no decimal point: tables with a missing value store counts as
    floats, so 3 becomes 3.0. NaN and infinity are no text.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, float | decimal.Decimal) and math.isfinite(value):
        is_whole = value == int(value) and abs(value) < 1e15
        return str(int(value)) if is_whole else str(value)
    return None


def _jinja_text(value: object) -> object:
    """Returns what Jinja writes for a value. Numbers are written as in the other templates."""
    if value is None or isinstance(value, float | decimal.Decimal | np.generic):
        text = plain_text(value)
        if text is None:
            raise BadRecord("bad_text", f"{value} makes no text")
        return text
    return value


@functools.cache
def _jinja_template(path: str) -> jinja2.Template:
    """Returns the template in a file. Its filters and attributes are those of Jinja's sandbox."""
    environment = jinja2.sandbox.SandboxedEnvironment(
        undefined=jinja2.StrictUndefined, autoescape=False, finalize=_jinja_text
    )
    try:
        text = to_path(path, "prompt").read_text(encoding="utf-8")
        return environment.from_string(text)
    except OSError as error:
        raise UserError(f"prompt template {path}: {error.strerror or error}") from None
    except (jinja2.TemplateSyntaxError, UnicodeDecodeError) as error:
        raise UserError(f"prompt template {path} is not valid Jinja: {error}") from None


def _render(path: str, fields: Record) -> str:
    template = _jinja_template(path)
    try:
        return template.render(fields)
    except BadRecord as bad:
        raise BadRecord(bad.kind, f"{path}: {bad}") from None
    except jinja2.UndefinedError as error:
        reason = f"{error}; the fields are {list_names(fields)}"
        raise BadRecord("missing_field", f"{path}: {reason}") from None
    except Exception as error:
        # A template is a user's program. Any exception of it concerns this record.
        reason = f"{type(error).__name__}: {error}"
        raise BadRecord("bad_text", f"{path} does not render: {short(reason, 200)}") from None

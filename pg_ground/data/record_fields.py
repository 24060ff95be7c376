"""Fields of a record: dotted paths, and templates that are filled with fields."""

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.sandbox

from pg_ground.config import Source
from pg_ground.data.records import BadRecord
from pg_ground.storage.paths import to_path
from pg_ground.types import Record, UserError

_PLACEHOLDER = re.compile(r"\{([^{}]*)\}")


def field_at(record: Record, path: str, element: int = 0) -> Any:
    """Returns the value at a dotted path. Through a list of objects, returns the list of values.

    `objects.bbox` reads {"objects": {"bbox": [..]}} and {"objects": [{"bbox": ..}, {"bbox": ..}]}.
    `objects[].bbox` reads the bbox of one object, number `element`.

    Raises:
      BadRecord: missing_field, with the names of the fields that exist.
    """
    return _descend(record, path.split("."), path, element)


def _descend(value: object, names: Sequence[str], path: str, element: int) -> Any:
    if not names:
        return value
    if isinstance(value, list):
        return [_descend(item, names, path, element) for item in value]
    if not isinstance(value, Mapping):
        reason = f"{value!r:.60} has no field {names[0]}"
        raise BadRecord("missing_field", f"there is no {path}: {reason}")
    name = names[0].removesuffix("[]")
    if name not in value:
        fields = ", ".join(map(str, value)) or "none"
        raise BadRecord("missing_field", f"there is no {path}: the fields are {fields}")
    inner = value[name]
    if names[0].endswith("[]"):
        if not isinstance(inner, list) or element >= len(inner):
            reason = f"{name} is {inner!r:.60}, which has no element {element}"
            raise BadRecord("missing_field", f"there is no {path}: {reason}")
        inner = inner[element]
    return _descend(inner, names[1:], path, element)


def list_path(source: Source) -> str:
    """Returns the path of the list that the source's paths go through with `[]`, or "".

    Raises:
      UserError: the paths go through several lists.
    """
    paths = [
        source.image,
        source.image_sha256,
        source.phrase,
        source.boxes,
        source.points,
        source.mask,
        source.label,
    ]
    for template in (source.prompt, source.name, source.suffix):
        paths += _PLACEHOLDER.findall(template)
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
        raise BadRecord("missing_field", f"{path} is {value!r:.60}, but {path}[] needs a list")
    return len(value)


def fill_template(template: str, record: Record, phrase: str, element: int = 0) -> str:
    """Returns `template` with every `{field}` replaced, and with single spaces.

    A template that is the name of a Jinja file (NAME.jinja) is rendered in a sandbox, with the
    record's fields and `phrase`.

    Args:
      template: text with `{dotted.path}` in it, or a file name.
      record: the record whose fields are filled in.
      phrase: the dotted path that `{phrase}` stands for.
      element: the element that `[]` in a path stands for.

    Raises:
      BadRecord: missing_field, or bad_text if a field is neither a text nor a number.
      UserError: the Jinja file is missing or does not parse.
    """

    def field_text(match: re.Match[str]) -> str:
        path = phrase if match[1] == "phrase" else match[1]
        value = field_at(record, path, element)
        is_plain = isinstance(value, str | int | float) and not isinstance(value, bool)
        if not is_plain or not str(value).strip():
            raise BadRecord(
                "bad_text", f"{path} is {value!r:.60}, which makes no text for {template!r}"
            )
        return str(value)

    if template.endswith(".jinja"):
        fields = dict(record)
        if _has_field(record, phrase, element):
            fields["phrase"] = field_at(record, phrase, element)
        return " ".join(_render(template, fields).split())
    return " ".join(_PLACEHOLDER.sub(field_text, template).split())


def _has_field(record: Record, path: str, element: int) -> bool:
    try:
        field_at(record, path, element)
    except BadRecord:
        return False
    return True


@functools.cache
def _jinja_template(path: str) -> jinja2.Template:
    """Returns the template in a file. Its filters and attributes are those of Jinja's sandbox."""
    environment = jinja2.sandbox.SandboxedEnvironment(
        undefined=jinja2.StrictUndefined, autoescape=False
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
    except jinja2.UndefinedError as error:
        names = ", ".join(map(str, fields)) or "none"
        raise BadRecord("missing_field", f"{path}: {error}; the fields are {names}") from None
    except Exception as error:
        # A template is a user's program. Any exception of it concerns this record.
        reason = f"{type(error).__name__}: {error}"
        raise BadRecord("bad_text", f"{path} does not render: {reason}") from None

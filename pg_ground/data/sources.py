"""Records by uri: `open_records("jsonl:PATH")`, `open_records("synthetic:SPLIT?side=48")`.

A record is a dict of whatever its dataset has; `examples.py` knows what a config entry calls its fields.
"""

from pathlib import Path
from urllib.parse import parse_qsl

from pg_ground.config import nearest
from pg_ground.data import synthetic
from pg_ground.data.records import Records
from pg_ground.data.tables import JsonLines
from pg_ground.types import UserError


def open_records(uri: str) -> Records:
    """Returns the records that `uri` names.

    Raises:
      UserError: the scheme is unknown, the file is missing or holds no records.
    """
    scheme, separator, rest = uri.partition(":")
    if not separator or scheme not in SCHEMES:
        raise UserError(f"source uri {uri!r}: no scheme {scheme!r}; {nearest(scheme, SCHEMES)} (as in jsonl:PATH)")
    return SCHEMES[scheme](rest)


def _open_json_lines(rest: str) -> Records:
    return JsonLines(Path(rest))


def _open_synthetic(rest: str) -> Records:
    split, _, options = rest.partition("?")
    return synthetic.open_scenes(split, dict(parse_qsl(options, keep_blank_values=True)))


SCHEMES = {"jsonl": _open_json_lines, "synthetic": _open_synthetic}

"""Records by uri: `open_records("jsonl:PATH")`, `open_records("synthetic:SPLIT?side=48")`, and so on through `SCHEMES`.

A record is a dict of whatever its dataset has; `examples.py` knows what a config entry calls its fields.
"""

from collections.abc import Callable
from urllib.parse import parse_qsl

from pg_ground.config import nearest
from pg_ground.data import synthetic
from pg_ground.data.arrayrecord import open_array_record
from pg_ground.data.hub import open_hub
from pg_ground.data.records import Records
from pg_ground.data.refer import open_refer
from pg_ground.data.relations import open_relations
from pg_ground.data.tables import open_coco, open_json, open_json_lines, open_parquet, open_yaml
from pg_ground.data.tfds import open_tfds
from pg_ground.types import UserError


def open_records(uri: str, entry: str = "") -> Records:
    """Returns the records that `uri` names.

    Args:
      entry: where the config has it, as `grpo/photos`, or the name alone: errors say which setting it is.

    Raises:
      UserError: the scheme is unknown, the file is missing or holds no records.
    """
    scheme, separator, rest = uri.partition(":")
    try:
        if not separator or scheme not in SCHEMES:
            raise UserError(
                f"source {uri}: no scheme {scheme!r}; {nearest(scheme, SCHEMES)} (as in jsonl:PATH)"
            )
        return SCHEMES[scheme](rest)
    except UserError as e:
        if not entry:
            raise
        section, slash, name = entry.rpartition("/")
        setting = f"config.{section}.sources.{name}.uri" if slash else f"sources.{name}.uri"
        raise UserError(f"{setting} ({uri}): {str(e).removeprefix(f'source {uri}: ')}") from e


def _open_synthetic(rest: str) -> Records:
    split, _, options = rest.partition("?")
    return synthetic.open_scenes(split, dict(parse_qsl(options, keep_blank_values=True)))


def _open_relations(rest: str) -> Records:
    return open_relations(rest, open_records)


SCHEMES: dict[str, Callable[[str], Records]] = {
    "arrayrecord": open_array_record,
    "coco": open_coco,
    "hf": open_hub,
    "json": open_json,
    "jsonl": open_json_lines,
    "parquet": open_parquet,
    "refer": open_refer,
    "relations": _open_relations,
    "synthetic": _open_synthetic,
    "tfds": open_tfds,
    "yaml": open_yaml,
}

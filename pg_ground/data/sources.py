"""Opens the records of a source by uri, such as `jsonl:PATH` or `synthetic:SPLIT?side=48`.

The part before the colon is a scheme of `SCHEMES`. A record is a dict with the fields of its
dataset. A config entry says what the fields mean, and `examples.py` reads them.
"""

from collections.abc import Callable
from dataclasses import replace
from urllib.parse import parse_qsl

import numpy as np

from pg_ground.config import Source
from pg_ground.data import synthetic
from pg_ground.data.arrayrecord import open_array_record
from pg_ground.data.arrow_files import open_arrow, open_csv
from pg_ground.data.coco import open_coco
from pg_ground.data.hub import open_hub
from pg_ground.data.pointarena import open_pointarena
from pg_ground.data.records import Records
from pg_ground.data.refer import open_refer
from pg_ground.data.relations import open_relations
from pg_ground.data.row_filters import Kept, RowFilter
from pg_ground.data.tables import open_json, open_json_lines, open_parquet, open_yaml
from pg_ground.data.tfds import open_tfds
from pg_ground.types import UserError, nearest

MAX_DRAWN = 2**17
"""The largest number of drawn scenes that a filter draws, which takes about a minute."""


def with_dir(source: Source, folder: str) -> Source:
    """Returns `source` with `folder` in the place of "{dir}" in its uri."""
    return replace(source, uri=source.uri.replace("{dir}", folder.rstrip("/")))


def open_records(
    uri: str,
    entry: str = "",
    keep_empty: bool = False,
    flat_is_bad: bool = True,
    counts: bool = False,
) -> Records:
    """Returns the records of `uri`.

    Args:
      uri: SCHEME:LOCATION.
      entry: the config entry, as `grpo/photos` or `photos`. An error names its setting.
      keep_empty: whether images without objects are questions. Only `coco:` makes questions of
        images; the records of the other schemes are the same.
      flat_is_bad: whether a box without width or height is a bad entry of `coco:`.
      counts: whether the questions ask for the number of objects. The objects of an image of
        `coco:` cannot be counted if there are crowds, or annotations that cannot be used.

    Raises:
      UserError: the scheme does not exist, or the file is missing or has no records.
    """
    scheme, separator, location = uri.partition(":")
    try:
        if not separator or scheme not in SCHEMES:
            raise UserError(
                f"source {uri}: no scheme {scheme!r}; {nearest(scheme, SCHEMES)} (as in jsonl:PATH)"
            )
        if scheme == "coco":
            return open_coco(location, keep_empty, flat_is_bad, counts)
        return SCHEMES[scheme](location)
    except UserError as error:
        if not entry:
            raise
        reason = str(error).removeprefix(f"source {uri}: ")
        raise UserError(f"{setting_name(entry, 'uri')} ({uri}): {reason}") from error


def setting_name(entry: str, field: str) -> str:
    """Returns the name of a setting of a source, as an error has it.

    Args:
      entry: the config entry, as `grpo/photos` or `photos`.
      field: of the source.
    """
    section, slash, name = entry.rpartition("/")
    return f"config.{section}.sources.{name}.{field}" if slash else f"sources.{name}.{field}"


def filter_records(records: Records, source: Source, entry: str) -> Kept:
    """Returns the records that `source.where` keeps, all if it is empty.

    Args:
      entry: the config entry, as `grpo/photos` or `photos`.

    Raises:
      UserError: see `RowFilter`; or the records are scenes that are drawn, and there are too many.
    """
    if not source.where:
        return Kept(np.arange(len(records)), "")
    setting = setting_name(entry, "where")
    if source.uri.startswith("synthetic:") and len(records) > MAX_DRAWN:
        raise UserError(
            f"{setting} draws all of {len(records)} scenes: add scenes=N to the uri "
            f"(at most {MAX_DRAWN})"
        )
    return RowFilter(source.where, setting).choose(records)


def _open_synthetic(location: str) -> Records:
    split, _, options = location.partition("?")
    return synthetic.open_scenes(split, dict(parse_qsl(options, keep_blank_values=True)))


def _open_relations(location: str) -> Records:
    return open_relations(location, open_records)


SCHEMES: dict[str, Callable[[str], Records]] = {
    "arrayrecord": open_array_record,
    "arrow": open_arrow,
    "coco": open_coco,
    "csv": open_csv,
    "hf": open_hub,
    "json": open_json,
    "jsonl": open_json_lines,
    "parquet": open_parquet,
    "pointarena": open_pointarena,
    "refer": open_refer,
    "relations": _open_relations,
    "synthetic": _open_synthetic,
    "tfds": open_tfds,
    "yaml": open_yaml,
}

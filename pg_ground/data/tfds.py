"""Datasets that TensorFlow Datasets has prepared, read without TensorFlow.

`tfds:NAME/CONFIG:VERSION?split=SPLIT&data_dir=DIR`. The dataset must be prepared in the
array_record format (`tfds build --file_format=array_record`). The package `tensorflow_datasets`
finds the shards of a split and describes their features.
"""

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from etils import epy
from google.protobuf.json_format import ParseError
from google.protobuf.message import DecodeError

from pg_ground.data.arrayrecord import ArrayRecords, count_records, text_or_bytes
from pg_ground.data.class_names import class_name
from pg_ground.data.records import BadRecord, Records, list_names
from pg_ground.data.tables import split_options
from pg_ground.storage.paths import expand_path, to_path
from pg_ground.types import JsonDict, UserError, nearest

with epy.lazy_imports():  # an optional dependency, which takes 0.3 s to import
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import example_parser, read_only_builder, registered

CANNOT_PARSE = (DecodeError, LookupError, ValueError, AttributeError, TypeError, RuntimeError)
"""`tensorflow_datasets` raises these if a record is no Example or has other features."""

FILE_FORMAT = "array_record"


def open_tfds(location: str) -> Records:
    """Returns the records of a split as plain Python values.

    A sequence of features is a list of dicts, text is str, and images stay encoded. A class is its
    name if the dataset has class names, and None if its number is -1.

    Args:
      location: `NAME/CONFIG:VERSION?split=SPLIT&data_dir=DIR`. SPLIT may be a slice or a sum, as in
        tfds (`train[:10%]+validation`). Without DIR, tfds looks in its own folders.

    Raises:
      UserError: the package, the dataset or the split is missing, or the dataset has no
        array_record files.
    """
    name, options = split_options("tfds", location, ("split", "data_dir"))
    source = f"source tfds:{location}"
    data_dir = expand_path(options["data_dir"]) if "data_dir" in options else None
    builder = _find_builder(name, data_dir, source)
    splits = builder.info.splits
    if "split" not in options:
        raise UserError(f"{source}: no split; ?split=SPLIT names one of {_split_sizes(splits)}")
    try:
        spans = splits[options["split"]].file_instructions
    except (KeyError, ValueError) as error:
        raise UserError(
            f"{source}: no split {options['split']!r}; "
            f"there are {_split_sizes(splits)}, slices and sums"
        ) from error
    if not spans:
        raise UserError(
            f"{source}: split {options['split']} is empty; there are {_split_sizes(splits)}"
        )
    count_records([span.filename for span in spans], source)
    features = builder.info.features
    parser = example_parser.ExampleParserNp(features.get_serialized_info())
    decode = functools.partial(_decode, features, parser)
    return ArrayRecords(ArrayRecordDataSource(spans), decode, None)


def _find_builder(name: str, data_dir: str | None, source: str) -> Any:
    """Returns tfds' builder of a prepared dataset, set to read its array_record files."""
    try:
        builder = read_only_builder.builder_from_files(name, data_dir=data_dir)
        formats = [kind.value for kind in builder.info.available_file_formats()]
        if FILE_FORMAT not in formats:
            raise UserError(_wrong_format_text(builder.data_dir, formats, source))
        # The dataset may have other formats too.
        builder.info.set_file_format(FILE_FORMAT, override=True, override_if_initialized=True)
        return builder
    # First, because the next clause's exception is imported lazily itself.
    except ImportError as error:
        raise UserError(
            f"{source}: {error}; install the package tensorflow-datasets (TensorFlow is not "
            f"needed), and gcsfs for gs://"
        ) from error
    except registered.DatasetNotFoundError as error:
        raise UserError(
            f"{source}: not prepared in {data_dir or 'the folders of tfds'}; "
            f"{_prepared_names(name, data_dir)}"
        ) from error
    except (ValueError, OSError, ParseError) as error:  # the name, or the dataset's own files
        line = str(error).partition("\n")[0]
        raise UserError(
            f"{source}: {line} (a dataset's name looks like ref_coco/refcoco_unc:1.1.0)"
        ) from error


def _wrong_format_text(folder: object, formats: list[str], source: str) -> str:
    command = f"tfds convert_format --dataset_version_dir={folder} --out_file_format={FILE_FORMAT}"
    return (
        f"{source}: {folder} holds {', '.join(formats)}, which only TensorFlow reads; prepare the "
        f"dataset with file_format={FILE_FORMAT}, or add that format on a machine with "
        f"TensorFlow: {command}"
    )


def _prepared_names(name: str, data_dir: str | None) -> str:
    """Returns the prepared dataset in `data_dir` that is nearest to `name`, or all, as a text."""
    if data_dir is None:
        return "data_dir=DIR names another folder"
    root = to_path(data_dir, f"source tfds:{name}")
    folders = [
        path.parent
        for pattern in ("*/*", "*/*/*")
        for path in root.glob(f"{pattern}/features.json")
    ]
    names = [":".join(str(path.relative_to(root)).rsplit("/", 1)) for path in folders]
    return nearest(name, names)


def _split_sizes(splits: Any) -> str:
    return list_names([f"{name} ({split.num_examples})" for name, split in splits.items()])


def _decode(features: Any, parser: Any, data: bytes) -> JsonDict:
    try:
        return _to_plain(features, parser.parse_example(data))
    except CANNOT_PARSE as error:
        raise BadRecord("bad_record", f"not an example of the dataset: {error!r:.200}") from error


def _to_plain(feature: Any, value: Any) -> Any:
    """Returns a serialised value as plain Python. Images stay encoded."""
    match feature:
        case tfds.features.FeaturesDict():
            return {name: _to_plain(inner, value[name]) for name, inner in sorted(feature.items())}
        case tfds.features.Sequence():
            return [_to_plain(feature.feature, item) for item in _sequence_items(value)]
        case tfds.features.Image():
            return value
        case tfds.features.ClassLabel():
            return class_name(feature.names, int(value), "a class label")
    value = feature.decode_example_np(value)
    if isinstance(value, bytes):
        return text_or_bytes(value)
    if isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.ndim > 1:
        return value
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


def _sequence_items(columns: Any) -> Iterator[Any]:
    """Yields the items of a sequence. tfds stores a sequence of dicts as a dict of sequences."""
    if not isinstance(columns, dict):
        yield from columns
        return
    for values in zip(*(_sequence_items(column) for column in columns.values()), strict=True):
        yield dict(zip(columns, values, strict=True))

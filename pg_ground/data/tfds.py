"""Datasets that TensorFlow Datasets has prepared, read without TensorFlow: `tfds:NAME/CONFIG:VERSION?split=SPLIT&data_dir=DIR`.

They must be there in the array_record format (`tfds build --file_format=array_record`). The package `tensorflow_datasets` says
where the shards of a split are and what their features mean.
"""

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from etils import epy
from google.protobuf.json_format import ParseError
from google.protobuf.message import DecodeError

from pg_ground.config import nearest
from pg_ground.data.arrayrecord import ArrayRecords, count_records, text_or_bytes
from pg_ground.data.records import BadRecord, Records, to_path
from pg_ground.data.tables import listed, with_options
from pg_ground.types import UserError, expand_path

with epy.lazy_imports():  # an extra of the package, and 0.3 s
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import example_parser, read_only_builder, registered

CANNOT_PARSE = (DecodeError, KeyError, ValueError, AttributeError, TypeError)
"""What `tensorflow_datasets` raises on a record that is no Example or has other features than the dataset."""


def open_tfds(rest: str) -> Records:
    """Returns the records of a split as plain Python: a sequence of features is a list of dicts, text is str, images are encoded.

    SPLIT may be a slice or a sum, as tfds has them (`train[:10%]+validation`). Without DIR, tfds looks where it keeps datasets.
    A class is its name where the dataset has names, and None where it is -1.

    Raises:
      UserError: the package, the dataset or the split is not there, or the dataset is only there as tfrecord.
    """
    name, options = with_options("tfds", rest, ("split", "data_dir"))
    source = f"source tfds:{rest}"
    data_dir = expand_path(options["data_dir"]) if "data_dir" in options else None
    builder = _find(name, data_dir, source)
    splits = builder.info.splits
    if "split" not in options:
        raise UserError(f"{source}: no split; ?split=SPLIT names one of {_sizes(splits)}")
    try:
        spans = splits[options["split"]].file_instructions
    except (KeyError, ValueError) as e:
        raise UserError(
            f"{source}: no split {options['split']!r}; there are {_sizes(splits)}, slices and sums"
        ) from e
    if not spans:
        raise UserError(f"{source}: split {options['split']} is empty; there are {_sizes(splits)}")
    count_records([span.filename for span in spans], source)
    features = builder.info.features
    decode = functools.partial(
        _decode, features, example_parser.ExampleParserNp(features.get_serialized_info())
    )
    return ArrayRecords(ArrayRecordDataSource(spans), decode, None)


def _find(name: str, data_dir: str | None, source: str) -> Any:
    """Returns tfds' builder of a prepared dataset, its files in the array_record format."""
    wanted = "array_record"
    try:
        builder = read_only_builder.builder_from_files(name, data_dir=data_dir)
        formats = [kind.value for kind in builder.info.available_file_formats()]
        if wanted not in formats:
            convert = f"tfds convert_format --dataset_version_dir={builder.data_dir} --out_file_format={wanted}"
            raise UserError(
                f"{source}: {builder.data_dir} holds {', '.join(formats)}, which takes TensorFlow to read; prepare the dataset "
                f"with file_format={wanted}, or add that format where TensorFlow is installed: {convert}"
            )
        builder.info.set_file_format(
            wanted, override=True, override_if_initialized=True
        )  # it may be there in others too
        return builder
    except ImportError as e:  # ahead of the other, whose name is imported too
        raise UserError(
            f"{source}: {e}; it takes the package tensorflow-datasets (no TensorFlow), and gcsfs for gs://"
        ) from e
    except registered.DatasetNotFoundError as e:
        raise UserError(
            f"{source}: not prepared in {data_dir or 'the places of tfds'}; {_prepared(name, data_dir)}"
        ) from e
    except (ValueError, OSError, ParseError) as e:  # the name, or the dataset's own files
        line = str(e).partition("\n")[0]
        raise UserError(
            f"{source}: {line} (a dataset's name is like ref_coco/refcoco_unc:1.1.0)"
        ) from e


def _prepared(name: str, data_dir: str | None) -> str:
    """Returns the nearest to `name` of the datasets in `data_dir`, or all of them, as a text."""
    if data_dir is None:
        return "data_dir=DIR names another"
    root = to_path(data_dir)
    found = [
        path.parent
        for pattern in ("*/*", "*/*/*")
        for path in root.glob(f"{pattern}/features.json")
    ]
    return nearest(name, [":".join(str(path.relative_to(root)).rsplit("/", 1)) for path in found])


def _sizes(splits: Any) -> str:
    return listed([f"{name} ({split.num_examples})" for name, split in splits.items()])


def _decode(features: Any, parser: Any, data: bytes) -> dict[str, Any]:
    try:
        return _plain(features, parser.parse_example(data))
    except CANNOT_PARSE as e:
        raise BadRecord("bad_record", f"not an example of the dataset: {e!r:.200}") from e


def _plain(feature: Any, value: Any) -> Any:
    """Returns a serialised value as plain Python, decoded, but for images."""
    match feature:
        case tfds.features.FeaturesDict():
            return {name: _plain(inner, value[name]) for name, inner in sorted(feature.items())}
        case tfds.features.Sequence():
            return [_plain(feature.feature, item) for item in _items(value)]
        case tfds.features.Image():
            return value
        case tfds.features.ClassLabel():
            return _class(feature.names, int(value))
    value = feature.decode_example_np(value)
    if isinstance(value, bytes):
        return text_or_bytes(value)
    if isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.ndim > 1:
        return value
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


def _items(columns: Any) -> Iterator[Any]:
    """Yields the items of a sequence. tfds keeps a sequence of dicts as a dict of sequences."""
    if not isinstance(columns, dict):
        yield from columns
        return
    for values in zip(*(_items(column) for column in columns.values()), strict=True):
        yield dict(zip(columns, values, strict=True))


def _class(names: list[str], index: int) -> str | int | None:
    if index < 0:
        return None
    return index if names[index] == str(index) else names[index]

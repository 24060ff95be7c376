"""Writes the records of sources into array_record files that hold the images too.

The files have the records in their order. A record that cannot be used keeps its place: reading it
gives a bad record of the same kind. So a packed source gives the same batches as before.
"""

import io
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from pg_ground.config import Fetch, Source
from pg_ground.data.arrayrecord import NUMERIC_KINDS, write_array_record
from pg_ground.data.examples import image_value, with_address
from pg_ground.data.image_files import find_spelling
from pg_ground.data.image_values import image_name, plain_image
from pg_ground.data.images import load_image, load_nonzero
from pg_ground.data.record_fields import field_at, plain_text, with_field
from pg_ground.data.records import BadRecord, Records, image_folder, unusable_fields
from pg_ground.data.sources import filter_records, open_records
from pg_ground.storage.paths import FilePath, join
from pg_ground.types import JsonDict, UserError


def pack(
    sections: Sequence[Mapping[str, Source]], fetch: Fetch, folder: FilePath, num_shards: int
) -> dict[str, JsonDict]:
    """Writes each source into `num_shards` files in `folder`.

    Args:
      sections: sources by name; several sections may name the same source.
      fetch: settings for images at http(s) urls.
      folder: is made if it does not exist.
      num_shards: number of files of each source.

    Returns:
      By the source's name: the uri of the files, the number of usable records, and the number of
      the other records by the kind of fault. Sources that read the same records share the files.

    Raises:
      UserError: a source cannot be opened, two different sources have one name, or a file exists.
    """
    packed: dict[str, JsonDict] = {}
    written: dict[tuple[Any, ...], JsonDict] = {}
    folder.mkdir(parents=True, exist_ok=True)
    for name, source in _unique_sources(sections).items():
        contents = _contents(source)
        if contents not in written:
            existing = next(iter(folder.glob(f"{name}-*-of-*.array_record")), None)
            if existing is not None:
                raise UserError(f"{existing} exists already: remove it, or choose another --out")
            counts = _pack_source(name, source, fetch, folder, num_shards)
            uri = f"arrayrecord:{folder / name}@{num_shards}.array_record"
            written[contents] = {"uri": uri, **counts}
        packed[name] = written[contents]
    return packed


def _contents(source: Source) -> tuple[Any, ...]:
    """Returns the settings that decide the contents of a source's files."""
    return (
        source.uri,
        source.where,
        source.image,
        source.image_sha256,
        source.image_root,
        source.empty == "keep",
        source.flat_boxes == "bad",
    )


def _unique_sources(sections: Sequence[Mapping[str, Source]]) -> dict[str, Source]:
    """Returns the sources by name. Raises UserError if one name has two uris or two filters."""
    sources: dict[str, Source] = {}
    for section in sections:
        for name, source in section.items():
            first = sources.setdefault(name, source)
            if first.uri != source.uri:
                raise UserError(
                    f"two sources are called {name}: {first.uri} and {source.uri}; "
                    f"give them different names"
                )
            if first.where != source.where:
                raise UserError(
                    f"two sources called {name} have different filters ({first.where!r} and "
                    f"{source.where!r} in where): give them different names"
                )
    return sources


def _pack_source(
    name: str, source: Source, fetch: Fetch, folder: FilePath, num_shards: int
) -> Counter[str]:
    """Writes the files of one source and returns the counts of its records."""
    records = open_records(
        source.uri,
        keep_empty=source.empty == "keep",
        flat_is_bad=source.flat_boxes == "bad",
        counts=source.suffix == "count",
    )
    counts: Counter[str] = Counter()
    kept = filter_records(records, source, name).indices
    with tqdm(total=len(kept), desc=name, file=sys.stderr) as bar:
        for shard in range(num_shards):
            path = folder / f"{name}-{shard:05d}-of-{num_shards:05d}.array_record"
            # Whole stretches, because a reader goes through the files one after the other.
            start, stop = (len(kept) * number // num_shards for number in (shard, shard + 1))
            indices = kept[start:stop].tolist()
            write_array_record(path, _packed_records(records, source, fetch, indices, counts, bar))
    return counts


def _packed_records(
    records: Records,
    source: Source,
    fetch: Fetch,
    indices: Sequence[int],
    counts: Counter[str],
    bar: Any,
) -> Iterator[JsonDict]:
    """Yields records with their images in them. Counts them as "records", or by kind of fault."""
    folder = image_folder(records, source)
    for index in indices:
        bar.update()
        try:
            record = records[index]
        except BadRecord as fault:
            counts[fault.kind] += 1
            yield unusable_fields(fault)
            continue
        try:
            record, bad = _with_image(record, source, fetch, folder)
        except UserError as error:
            reason = "a source with one image per element cannot be packed"
            raise UserError(f"source {source.uri}: {error}: {reason}") from None
        counts[bad.kind if bad else "records"] += 1
        yield _to_plain(record)


def _with_image(
    record: JsonDict, source: Source, fetch: Fetch, folder: FilePath | None
) -> tuple[JsonDict, BadRecord | None]:
    """Returns a record with its image, or with the fault of its image, and the fault.

    Raises:
      UserError: the path of the image goes through several elements of a list.
    """
    try:
        image = image_value(record, source, 0, fetch)
        content = encoded_image(image, folder)
        name = image_name(field_at(record, source.image))
        # The name says which questions are about the same image.
        packed = {"bytes": content, "path": name} if name else content
        return with_field(record, source.image, packed), None
    except BadRecord as bad:
        fault = with_address(bad, record, source, 0)
    try:
        return with_field(record, source.image, unusable_fields(fault)), fault
    except BadRecord:  # without the field, reading the record gives the same fault again
        return record, fault


def encoded_image(image: object, root: FilePath | None) -> bytes:
    """Returns the bytes of an image file unchanged, or pixels as a PNG or a TIFF.

    Raises:
      BadRecord: missing_image or corrupt_image.
    """
    load_nonzero(image, root)  # any range of values will do: a setting of the reader scales them
    content = plain_image(image)
    if isinstance(content, bytes):
        return content
    if isinstance(content, str):
        folder = root or Path()
        path = join(folder, content)
        spelling = None if path.is_file() else find_spelling(folder, content)
        return (spelling.path if spelling else path).read_bytes()
    return _encode_pixels(content)


def _encode_pixels(pixels: np.ndarray) -> bytes:
    """Returns an image file of pixels, with the depth of grey pixels if Pillow can write it."""
    grey = pixels[..., 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels
    type_name = "float32" if grey.dtype.kind == "f" else grey.dtype.name
    is_deep = grey.ndim == 2 and type_name in ("uint16", "int32", "float32")
    image = Image.fromarray(grey.astype(type_name) if is_deep else load_image(pixels, None))
    file = io.BytesIO()
    image.save(file, "TIFF" if is_deep else "PNG")
    return file.getvalue()


def _to_plain(value: object) -> Any:
    """Returns a value with numpy scalars and tuples as Python's numbers and lists.

    Dates and other values that array_record files cannot hold become text.
    """
    if isinstance(value, dict):
        return {str(name): _to_plain(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_to_plain(inner) for inner in value]
    if isinstance(value, np.generic):
        return _to_plain(value.item())
    if isinstance(value, np.ndarray):
        return value if value.dtype.kind in NUMERIC_KINDS else _to_plain(value.tolist())
    if value is None or isinstance(value, (bool, int, float, str, bytes)):
        return value
    return plain_text(value) or str(value)

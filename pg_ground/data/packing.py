"""The records of every source of a config in array_record files, images within: what a pod streams fast.

python -m pg_ground.pack --config=F --out=DIR [--num_shards=16]

Writes DIR/NAME-00000-of-00016.array_record and so on for each source, with its records as they are, but for the image, whose
encoded bytes take the place of a file name or an address. In the config the source is then
uri="arrayrecord:DIR/NAME@16.array_record", with the same paths. Prints one JSON object: the new uri and the number of records of
each source. A record without a usable image is left out and counted.
"""

import io
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath
from PIL import Image
from tqdm import tqdm

from pg_ground.config import Config, Fetch, Source
from pg_ground.data.arrayrecord import write_array_record
from pg_ground.data.examples import image_at
from pg_ground.data.records import BadRecord, Records, image_folder, load_image
from pg_ground.data.sources import open_records
from pg_ground.types import FilePath, UserError


def pack(config: Config, folder: FilePath, shards: int) -> dict[str, dict[str, Any]]:
    """Returns uri and counts of what was written for each source of a config, under its name.

    Raises:
      UserError: a source cannot be opened, two different ones have one name, or a file exists already.
    """
    sources: dict[str, Source] = {}
    for section in (config.sft.sources, config.grpo.sources, config.eval.sources):
        for name, source in section.items():
            if sources.setdefault(name, source).uri != source.uri:
                raise UserError(
                    f"two sources are called {name}: {sources[name].uri} and {source.uri}; give them different names"
                )
    done = {}
    folder.mkdir(parents=True, exist_ok=True)
    for name, source in sources.items():
        there = next(iter(folder.glob(f"{name}-*-of-*.array_record")), None)
        if there is not None:
            raise UserError(f"{there} exists already: remove it, or choose another --out")
        records = open_records(source.uri)
        counts: Counter[str] = Counter()
        with tqdm(total=len(records), desc=name, file=sys.stderr) as bar:
            for shard in range(shards):
                path = folder / f"{name}-{shard:05d}-of-{shards:05d}.array_record"
                write_array_record(
                    path,
                    _packed(
                        records,
                        source,
                        config.data.fetch,
                        range(shard, len(records), shards),
                        counts,
                        bar,
                    ),
                )
        done[name] = {"uri": f"arrayrecord:{folder / name}@{shards}.array_record", **counts}
    return done


def _packed(
    records: Records,
    source: Source,
    fetch: Fetch,
    indices: Sequence[int],
    counts: Counter[str],
    bar: Any,
) -> Iterator[dict[str, Any]]:
    """Yields records with their images in them, counting them as records or by what is wrong with them."""
    for index in indices:
        bar.update()
        try:
            record = dict(records[index])
            folder = image_folder(records, source)
            _put(record, source.image, encoded(image_at(record, source, 0, fetch), folder))
        except BadRecord as bad:
            counts[bad.kind] += 1
            continue
        counts["records"] += 1
        yield _plain(record)


def encoded(image: Any, root: FilePath | None) -> bytes:
    """Returns the bytes of an image file: those there are, or a PNG of pixels.

    Raises:
      BadRecord: missing_image or corrupt_image.
    """
    pixels = load_image(image, root)
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path")
    if isinstance(image, bytes):
        return image
    if isinstance(image, str):
        return ((root or epath.Path()) / image).read_bytes()
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def _put(record: dict[str, Any], path: str, value: Any) -> None:
    """Sets what lies at a dotted path, in copies of the dicts on the way."""
    *parents, last = path.split(".")
    for name in parents:
        if not isinstance(record[name], dict):
            raise UserError(
                f"the image path {path} goes through the list {name}: such a source cannot be packed"
            )
        record[name] = dict(record[name])
        record = record[name]
    record[last] = value


def _plain(value: Any) -> Any:
    """Returns a value with numpy's scalars and tuples as Python's numbers and lists."""
    if isinstance(value, dict):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return value.item() if isinstance(value, np.generic) else value

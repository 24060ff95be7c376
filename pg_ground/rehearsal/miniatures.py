"""Datasets in miniature, in the layout of the real ones, for a rehearsal without the data.

The scenes are drawn (`data.synthetic`). A source with `{dir}` in its uri gets the files that its
scheme reads: the folders of the refer toolkit, a file of COCO annotations, or a file of rows with
the fields that the source names.
"""

import hashlib
import io
import json
import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qsl

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pg_ground.config import Config, Source
from pg_ground.data.refer import COMBINED, DATASETS
from pg_ground.data.sources import open_records
from pg_ground.types import JsonDict, UserError

IMAGES = 6
"""Images of each split."""

SIDE = 160
"""Pixels. The images are wider than high, as most photographs are."""

HEIGHT = 120

SPLITS = {
    "unc": ("train", "val", "testA", "testB"),
    "umd": ("train", "val", "test"),
    "google": ("train", "val", "test"),
}
"""The splits of the refer toolkit, by their makers."""


class Scene(NamedTuple):
    """A drawn image and the objects on it."""

    image: Image.Image
    objects: Sequence[JsonDict]
    """`name` and `box`: x1, y1, x2, y2 in pixels of the image."""


def scenes(split: str, count: int) -> list[Scene]:
    """Returns drawn scenes of `SIDE` x `HEIGHT` pixels. Another split has other scenes."""
    seed = sum(split.encode()) % 1000
    drawn = open_records(f"synthetic:train?side={SIDE}&shapes=3&seed={seed}&scenes={count}")
    return [_scene(drawn[index]) for index in range(count)]


def _scene(record: JsonDict) -> Scene:
    shrunk = HEIGHT / SIDE
    image = Image.fromarray(np.asarray(record["image"], np.uint8)).resize((SIDE, HEIGHT))
    objects = []
    for entry in record["objects"]:
        x1, y1, x2, y2 = entry["box"]
        objects.append({"name": entry["name"], "box": [x1, y1 * shrunk, x2, y2 * shrunk]})
    return Scene(image, objects)


def write_miniatures(config: Config, folder: Path, address: str = "") -> None:
    """Writes the files of every source of a run below `folder`, which takes the place of `{dir}`.

    Args:
      address: the address at which a web server shows `folder`, for sources whose images are on
        the web.

    Raises:
      UserError: the scheme of a source has no miniature.
    """
    for section, sources in config.sources_by_section.items():
        if section not in (*config.stages, "eval"):
            continue
        for name, source in sources.items():
            if "{dir}" in source.uri:
                setting = f"config.{section}.sources.{name}"
                _write_source(source, folder, setting, address)


def has_addresses(config: Config) -> bool:
    """Returns whether a source of the run has images on the web."""
    sources = [source for table in config.sources_by_section.values() for source in table.values()]
    return any(source.image_sha256 for source in sources)


def _write_source(source: Source, folder: Path, setting: str, address: str) -> None:
    if source.where:
        raise UserError(f"{setting}.where ({source.where:.80}) has no data in miniature")
    scheme, _, location = source.uri.partition(":")
    path, _, query = location.partition("?")
    options = dict(parse_qsl(query, keep_blank_values=True, encoding="utf-8"))
    # "+" is a blank in a query, but a letter in the name of RefCOCO+.
    options = {key: value.replace(" ", "+") for key, value in options.items()}
    where = Path(path.replace("{dir}", str(folder)))
    images = Path(options.get("images", path).replace("{dir}", str(folder)))
    if scheme == "refer":
        _write_refer(where, images, options)
    elif scheme == "coco":
        _write_coco(where, images)
    elif scheme in ("parquet", "json", "jsonl"):
        file = where.with_name(where.name.replace("*", "00000-of-00001"))
        _write_rows(file, scheme, source, setting, folder, address)
    else:
        raise UserError(f"{setting}.uri ({source.uri}): {scheme}: has no data in miniature")


def _write_rows(
    file: Path, scheme: str, source: Source, setting: str, folder: Path, address: str
) -> None:
    """Writes a file of rows, one for each scene, with the fields that `source` names."""
    if file.exists():
        return
    rows = [
        _row(source, setting, scene, index, file, folder, address)
        for index, scene in enumerate(scenes(f"{file.parent.parent.name} {file.name}", IMAGES))
    ]
    file.parent.mkdir(parents=True, exist_ok=True)
    if scheme == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
    elif scheme == "json":
        file.write_text(json.dumps(rows))
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _row(
    source: Source,
    setting: str,
    scene: Scene,
    index: int,
    file: Path,
    folder: Path,
    address: str,
) -> JsonDict:
    """Returns the row of a scene. The question is about its first object."""
    thing = scene.objects[0]
    row: JsonDict = {}

    def put(path: str, value: object) -> None:
        if not re.fullmatch(r"\w+", path):
            raise UserError(f"{setting}: the path {path} has no data in miniature")
        row[path] = value

    name = f"{file.parent.parent.name}-{file.stem}-{index}.png"
    content = io.BytesIO()
    scene.image.save(content, "PNG")
    if source.image_sha256:
        (folder / "web").mkdir(parents=True, exist_ok=True)
        (folder / "web" / name).write_bytes(content.getvalue())
        put(source.image, f"{address}/web/{name}")
        put(source.image_sha256, hashlib.sha256(content.getvalue()).hexdigest())
    elif file.suffix == ".parquet":
        put(source.image, {"bytes": content.getvalue(), "path": name})
    else:
        (file.parent / source.image_root).mkdir(parents=True, exist_ok=True)
        (file.parent / source.image_root / name).write_bytes(content.getvalue())
        put(source.image, name)
    put(source.phrase, thing["name"])
    x1, y1, x2, y2 = thing["box"]
    if source.boxes:
        numbers = {"xyxy": [x1, y1, x2, y2], "xywh": [x1, y1, x2 - x1, y2 - y1]}
        order, _, unit = source.box_format.partition("_")
        if order not in numbers or unit != "px":
            raise UserError(f"{setting}.box_format ({source.box_format}) has no data in miniature")
        put(source.boxes, numbers[order])
    if source.points:
        scale = {"xy_px": (1.0, 1.0), "xy_percent": (100 / SIDE, 100 / HEIGHT)}
        if source.point_format not in scale:
            raise UserError(
                f"{setting}.point_format ({source.point_format}) has no data in miniature"
            )
        x_scale, y_scale = scale[source.point_format]
        centre = {"x": (x1 + x2) / 2 * x_scale, "y": (y1 + y2) / 2 * y_scale}
        # The last row asks for something that is not there, if the source has such questions.
        nothing = source.empty == "keep" and index == IMAGES - 1
        put(source.points, [] if nothing else [centre])
    if source.suffix == "{count}":
        put("count", 1)
    for field, values in GROUPS.items():
        put(field, values[index % len(values)])
    return row


GROUPS = {
    "data_type": ("text", "icon"),
    "data_source": ("ios", "android", "windows", "macos", "shop", "tool"),
}
"""Fields of benchmarks of interfaces, with values of their groups. Other readers ignore them."""


def _write_refer(folder: Path, images: Path, options: Mapping[str, str]) -> None:
    """Writes `instances.json` and `refs(SPLIT_BY).p` of one dataset, or of the combined set."""
    name = options.get("dataset", "refcoco")
    parts = COMBINED if name == "combined" else [(name, options.get("split_by", "unc"))]
    for dataset, split_by in parts:
        if dataset not in DATASETS:
            raise UserError(f"refer: dataset {dataset} has no miniature")
        if not (folder / dataset / f"refs({split_by}).p").exists():
            _write_refer_dataset(folder / dataset, images, dataset, split_by)


def _write_refer_dataset(folder: Path, images: Path, dataset: str, split_by: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    entries: dict[str, list[Any]] = {"images": [], "annotations": [], "categories": []}
    names: dict[str, int] = {}
    refs = []
    first = 100_000 * (1 + DATASETS.index(dataset))  # images of two datasets have other ids
    for split in SPLITS[split_by]:
        for scene in scenes(f"{dataset} {split}", IMAGES):
            image_id = first + len(entries["images"])
            file_name = f"COCO_train2014_{image_id:012d}.jpg"
            _save(scene.image, images / file_name)
            entries["images"].append(_image_entry(image_id, file_name))
            for thing in scene.objects[:2]:
                number = first + len(entries["annotations"])
                category = names.setdefault(thing["name"], len(names) + 1)
                entries["annotations"].append(_annotation(number, image_id, category, thing["box"]))
                refs.append(_ref(number, image_id, category, split, thing["name"], file_name))
    entries["categories"] = [{"id": number, "name": name} for name, number in names.items()]
    (folder / "instances.json").write_text(json.dumps(entries))
    (folder / f"refs({split_by}).p").write_bytes(pickle.dumps(refs, protocol=2))


def _ref(
    number: int, image_id: int, category: int, split: str, name: str, file_name: str
) -> JsonDict:
    texts = (name, f"the {name}")
    sentences = [
        {"tokens": text.split(), "raw": text, "sent_id": 2 * number + i, "sent": text}
        for i, text in enumerate(texts)
    ]
    return {
        "ref_id": number,
        "ann_id": number,
        "image_id": image_id,
        "category_id": category,
        "split": split,
        "file_name": file_name,
        "sent_ids": [sentence["sent_id"] for sentence in sentences],
        "sentences": sentences,
    }


def _write_coco(file: Path, images: Path) -> None:
    """Writes a file of COCO annotations and its images."""
    if file.exists():
        return
    entries: dict[str, list[Any]] = {"images": [], "annotations": [], "categories": []}
    names: dict[str, int] = {}
    for image_id, scene in enumerate(scenes(file.stem, IMAGES), start=1):
        file_name = f"{image_id:012d}.jpg"
        _save(scene.image, images / file_name)
        entries["images"].append(_image_entry(image_id, file_name))
        for thing in scene.objects:
            category = names.setdefault(thing["name"], len(names) + 1)
            number = len(entries["annotations"]) + 1
            entries["annotations"].append(_annotation(number, image_id, category, thing["box"]))
    entries["categories"] = [{"id": number, "name": name} for name, number in names.items()]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(entries))


def _image_entry(image_id: int, file_name: str) -> JsonDict:
    return {"id": image_id, "file_name": file_name, "width": SIDE, "height": HEIGHT}


def _annotation(number: int, image_id: int, category: int, box: Sequence[float]) -> JsonDict:
    x1, y1, x2, y2 = box
    return {
        "id": number,
        "image_id": image_id,
        "category_id": category,
        "bbox": [x1, y1, x2 - x1, y2 - y1],
        "area": (x2 - x1) * (y2 - y1),
        "iscrowd": 0,
        "segmentation": [[x1, y1, x2, y1, x2, y2, x1, y2]],
    }


def _save(image: Image.Image, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    image.save(file, quality=90)

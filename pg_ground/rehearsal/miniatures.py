"""Datasets in miniature, in the layout of the real ones, for a rehearsal without the data.

The scenes are drawn (`data.synthetic`). A source whose uri begins in `{dir}` gets the files that
its scheme reads: the folders of the refer toolkit, a file of COCO annotations, rows of parquet or
JSON lines.
"""

import json
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qsl

import numpy as np
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


def write_miniatures(config: Config, folder: Path) -> dict[str, str]:
    """Writes the files of every source of a run below `folder`, which takes the place of `{dir}`.

    Returns a note on each source that was written, by its name.

    Raises:
      UserError: the scheme of a source has no miniature.
    """
    notes = {}
    for section, sources in config.sources_by_section.items():
        if section not in (*config.stages, "eval"):
            continue
        for name, source in sources.items():
            if "{dir}" in source.uri:
                notes[name] = _write_source(source, folder, f"config.{section}.sources.{name}")
    return notes


def _write_source(source: Source, folder: Path, setting: str) -> str:
    scheme, _, location = source.uri.partition(":")
    path, _, query = location.partition("?")
    options = dict(parse_qsl(query, keep_blank_values=True, encoding="utf-8"))
    # "+" is a blank in a query, but a letter in the name of RefCOCO+.
    options = {key: value.replace(" ", "+") for key, value in options.items()}
    where = Path(path.replace("{dir}", str(folder)))
    images = Path(options.get("images", path).replace("{dir}", str(folder)))
    writers = {"refer": _write_refer, "coco": _write_coco}
    if scheme not in writers:
        raise UserError(f"{setting}.uri ({source.uri}): {scheme}: has no data in miniature")
    return writers[scheme](where, images, options)


def _write_refer(folder: Path, images: Path, options: Mapping[str, str]) -> str:
    """Writes `instances.json` and `refs(SPLIT_BY).p` of one dataset, or of the combined set."""
    name = options.get("dataset", "refcoco")
    parts = COMBINED if name == "combined" else [(name, options.get("split_by", "unc"))]
    for dataset, split_by in parts:
        if dataset not in DATASETS:
            raise UserError(f"refer: dataset {dataset} has no miniature")
        if not (folder / dataset / f"refs({split_by}).p").exists():
            _write_refer_dataset(folder / dataset, images, dataset, split_by)
    return f"refer files of {name}, {IMAGES} images in each split"


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


def _write_coco(file: Path, images: Path, options: Mapping[str, str]) -> str:
    """Writes a file of COCO annotations and its images."""
    if file.exists():
        return f"COCO annotations, {IMAGES} images"
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
    return f"COCO annotations, {IMAGES} images"


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

"""Referring expressions in the files of the UNC refer toolkit: RefCOCO, RefCOCO+ and RefCOCOg.

The toolkit is github.com/lichengunc/refer. The uri is `refer:DIR?dataset=…&split=…` (see
`open_refer`). `refs(SPLIT_BY).p` and `instances.json` are in DIR/DATASET or in DIR itself.
"""

import json
import pickle
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from pg_ground.data.records import BadRecord, Records
from pg_ground.data.tables import split_options
from pg_ground.storage.paths import FilePath, to_path
from pg_ground.types import JsonDict, UserError, nearest

DATASETS = ("refcoco", "refcoco+", "refcocog", "combined")

COMBINED = (("refcocog", "umd"), ("refcoco", "unc"), ("refcoco+", "unc"))
"""The parts of big_vision's refcocox_combined, in its order (datasets/refcoco/refcoco.py)."""

CANNOT_UNPICKLE = (
    pickle.UnpicklingError,
    EOFError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    OverflowError,
    MemoryError,
)
"""Reading a file that is no pickle, or not all of one, raises one of these."""


class Ref(NamedTuple):
    """One entry of a refs file."""

    dataset: str
    split: str
    """The split that the entry belongs to. In `combined` it may differ from the entry's split."""
    entry: JsonDict


class Coco(NamedTuple):
    """COCO annotations by their ids."""

    images: dict[int, JsonDict]
    annotations: dict[int, JsonDict]
    categories: dict[int, JsonDict]


class Refs:
    """The refs of one split.

    A ref is an object, its box in pixels as COCO writes it (x, y, w, h), and sentences about it.
    """

    def __init__(self, refs: Sequence[Ref], coco: dict[str, Coco], root: FilePath):
        self._refs = refs
        self._coco = coco
        self._root = root

    @property
    def root(self) -> FilePath:
        return self._root

    def __len__(self) -> int:
        return len(self._refs)

    def __getitem__(self, index: int) -> JsonDict:
        dataset, _, ref = self._refs[index]
        coco = self._coco[dataset]
        annotation = _look_up(coco.annotations, "annotation", ref, "ann_id")
        image = _look_up(coco.images, "image", annotation, "image_id")
        category = _look_up(coco.categories, "category", annotation, "category_id")
        try:
            return {
                "image": image["file_name"],
                "image_id": ref["image_id"],
                "ref_id": ref["ref_id"],
                "ann_id": ref["ann_id"],
                "category": category["name"],
                "width": image["width"],
                "height": image["height"],
                "bbox": annotation["bbox"],
                "segmentation": annotation["segmentation"],
                "sentences": ref["sentences"],
                "split": ref["split"],
                "dataset": dataset,
            }
        except KeyError as error:
            raise BadRecord(
                "missing_field",
                f"there is no {error} in the ref, its annotation, image or category",
            ) from error


def open_refer(location: str) -> Records:
    """Returns the refs of one split, with their boxes.

    `dataset=combined` is big_vision's refcocox_combined. Its train split leaves out every image
    that another split of the three datasets shows. Its test split is test, testA and testB of them.

    Args:
      location: `DIR?dataset=D&split_by=S&split=SPLIT&images=DIR&coco=FILE`. D is refcoco,
        refcoco+, refcocog or combined; S is unc, google or umd (none for combined). `validation`
        is another name of the split val. `images` is the folder of the image files, by default
        DIR. `coco` is a file of COCO annotations, such as instances_train2017.json, that replaces
        instances.json.

    Raises:
      UserError: an option, a file or the split does not exist, or a file has another form.
    """
    source = f"source refer:{location}"
    name, options = split_options(
        "refer", location, ("dataset", "split_by", "split", "images", "coco")
    )
    folder = to_path(name, source)
    dataset, split_by, split = (options.get(name, "") for name in ("dataset", "split_by", "split"))
    if dataset not in DATASETS:
        raise UserError(f"{source}: no dataset {dataset!r}; {nearest(dataset, DATASETS)}")
    if (dataset == "combined") == bool(split_by):
        raise UserError(
            f"{source}: split_by={split_by} with dataset={dataset}; "
            f"combined takes no split_by, and the others need one"
        )
    _check_folder(folder, source)
    parts = COMBINED if dataset == "combined" else ((dataset, split_by),)
    refs = [ref for part in parts for ref in _read_refs(folder, *part, source)]
    refs = list(_combined_splits(refs)) if dataset == "combined" else refs
    chosen = [ref for ref in refs if ref.split == _canonical_split(split)]
    if not chosen:
        sizes = ", ".join(f"{name} ({n})" for name, n in Counter(ref.split for ref in refs).items())
        raise UserError(f"{source}: {dataset} has no split {split!r}; there are {sizes or 'none'}")
    coco = _read_all_coco(folder, options.get("coco"), chosen, source)
    return Refs(chosen, coco, to_path(options["images"], source) if "images" in options else folder)


def _check_folder(folder: FilePath, source: str) -> None:
    try:
        exists = folder.is_dir()
    except ImportError as error:  # the client of the remote file system is not installed
        raise UserError(f"{source}: {error}") from error
    if not exists:
        raise UserError(
            f"{source}: there is no folder {folder}; "
            f"it must hold files such as refcoco/refs(unc).p and refcoco/instances.json"
        )


def _canonical_split(split: str) -> str:
    return "val" if split == "validation" else split


def _combined_splits(refs: Sequence[Ref]) -> Iterable[Ref]:
    """Yields refs with the splits of refcocox_combined.

    Leaves out the train refs whose image is in another split too.
    """
    held_out = {ref.entry["image_id"] for ref in refs if ref.split != "train"}
    for ref in refs:
        if ref.split == "train" and ref.entry["image_id"] in held_out:
            continue
        yield ref._replace(split="test") if ref.split in ("testA", "testB") else ref


def _folder_with(folder: FilePath, dataset: str, name: str) -> FilePath:
    """Returns the folder that holds the file `name`: DIR/DATASET, or DIR if only that has it."""
    inner = folder / dataset
    return folder if (folder / name).exists() and not (inner / name).exists() else inner


def _read_refs(folder: FilePath, dataset: str, split_by: str, source: str) -> list[Ref]:
    name = f"refs({split_by}).p"
    path = _folder_with(folder, dataset, name) / name
    try:
        with path.open("rb") as file:
            # The published files were written by Python 2.
            entries = PlainUnpickler(file, encoding="latin1").load()
    except OSError as error:
        raise UserError(
            f"{source}: {path}: {error.strerror or error}; "
            f"the refs files in the folder: {_refs_files(path.parent)}"
        ) from error
    except CANNOT_UNPICKLE as error:
        raise UserError(
            f"{source}: {path} is no pickle of refs, or not all of one: "
            f"{str(error) or type(error).__name__}"
        ) from error
    if not isinstance(entries, list) or not all(map(_is_ref, entries)):
        raise UserError(
            f"{source}: {path} holds {entries!r:.60}, "
            f"not a list of refs with split, image_id and ann_id"
        )
    return [Ref(dataset, _canonical_split(entry["split"]), entry) for entry in entries]


def _is_ref(entry: object) -> bool:
    if not isinstance(entry, dict):
        return False
    types = {"split": str, "image_id": int, "ann_id": int}
    return all(isinstance(entry.get(name), kind) for name, kind in types.items())


class PlainUnpickler(pickle.Unpickler):
    """Loads dicts, lists, tuples, numbers and texts, and refuses everything else.

    A pickle that names a class or a function would run it.
    """

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        raise pickle.UnpicklingError(
            f"it asks for {module_name}.{global_name}, but it may hold plain values only"
        )


def _refs_files(folder: FilePath) -> str:
    """Returns the names of the refs files in a folder, as a text."""
    names = sorted(path.name for path in folder.glob("refs(*).p")) if folder.is_dir() else []
    return ", ".join(names) or "none"


def _read_all_coco(
    folder: FilePath, coco: str | None, refs: Sequence[Ref], source: str
) -> dict[str, Coco]:
    """Returns the annotations of the refs by dataset. Other annotations are dropped: COCO has many.

    Args:
      folder: DIR of the uri.
      coco: a file that replaces instances.json for all datasets.
      refs: the refs whose annotations are read.
      source: the beginning of an error's text.
    """
    ids: dict[str, set[int]] = {}
    for ref in refs:
        ids.setdefault(ref.dataset, set()).add(ref.entry["ann_id"])
    if coco:
        annotations = _read_coco(to_path(coco, source), set().union(*ids.values()), source)
        return dict.fromkeys(ids, annotations)
    name = "instances.json"
    return {
        dataset: _read_coco(_folder_with(folder, dataset, name) / name, dataset_ids, source)
        for dataset, dataset_ids in ids.items()
    }


def _read_coco(path: FilePath, ids: set[int], source: str) -> Coco:
    """Returns the annotations with these ids, and their images and categories."""
    try:
        content = json.loads(path.read_bytes())
        tables = (content["images"], content["annotations"], content["categories"])
        images, annotations, categories = ({row["id"]: row for row in table} for table in tables)
        annotations = {i: row for i, row in annotations.items() if i in ids}
        image_ids = {row["image_id"] for row in annotations.values()}
    except (OSError, ImportError) as error:
        raise UserError(f"{source}: {error}; coco=FILE names COCO annotations elsewhere") from error
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(
            f"{source}: {path} does not hold COCO's images, annotations and categories: {error!r}"
        ) from error
    return Coco({i: row for i, row in images.items() if i in image_ids}, annotations, categories)


def _look_up(table: dict[int, JsonDict], kind: str, row: JsonDict, name: str) -> JsonDict:
    """Returns the row of `table` with the id `row[name]`. Raises BadRecord (missing_`kind`)."""
    try:
        return table[row[name]]
    except (KeyError, TypeError) as error:
        raise BadRecord(
            f"missing_{kind}", f"there is no {kind} with the {name} {row.get(name)}"
        ) from error

"""Referring expressions in the files of the UNC refer toolkit (github.com/lichengunc/refer): RefCOCO, RefCOCO+, RefCOCOg.

`refer:DIR?dataset=refcoco|refcoco+|refcocog&split_by=unc|google|umd&split=SPLIT&images=DIR&coco=FILE`, with `refs(SPLIT_BY).p`
and `instances.json` in DIR/DATASET or in DIR itself. `dataset=combined`, without split_by, is big_vision's refcocox_combined.
"""

import json
import pickle
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from pg_ground.config import nearest
from pg_ground.data.records import BadRecord, Records, to_path
from pg_ground.data.tables import with_options
from pg_ground.types import FilePath, UserError

DATASETS = ("refcoco", "refcoco+", "refcocog", "combined")

COMBINED = (("refcocog", "umd"), ("refcoco", "unc"), ("refcoco+", "unc"))
"""What big_vision's refcocox_combined is made of, in its order (datasets/refcoco/refcoco.py)."""

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
"""What a file that is no pickle, or not all of one, ends in."""


class Ref(NamedTuple):
    """One entry of a refs file."""

    dataset: str
    split: str
    """The split it counts to, which in `combined` may be another than its own."""
    entry: dict[str, Any]


class Coco(NamedTuple):
    """COCO annotations by their ids."""

    images: dict[int, dict[str, Any]]
    annotations: dict[int, dict[str, Any]]
    categories: dict[int, dict[str, Any]]


class Refs:
    """The refs of one split: an object, its box in pixels as COCO has it (x, y, w, h), and the sentences that refer to it."""

    def __init__(self, refs: Sequence[Ref], coco: dict[str, Coco], root: FilePath):
        self._refs = refs
        self._coco = coco
        self._root = root

    @property
    def root(self) -> FilePath:
        return self._root

    def __len__(self) -> int:
        return len(self._refs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        dataset, _, ref = self._refs[index]
        coco = self._coco[dataset]
        annotation = _of(coco.annotations, "annotation", ref, "ann_id")
        image = _of(coco.images, "image", annotation, "image_id")
        category = _of(coco.categories, "category", annotation, "category_id")
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
        except KeyError as e:
            raise BadRecord(
                "missing_field", f"there is no {e} in the ref, its annotation, image or category"
            ) from e


def open_refer(rest: str) -> Records:
    """Returns the refs of one split, with their boxes. `validation` is another name of `val`.

    The train split of `combined` leaves out every image that occurs in another split of its three datasets; its test split is
    their test, testA and testB. File names of images are those of the COCO annotations, relative to `images` (by default DIR).
    `coco` names a file of COCO annotations to be read instead of instances.json, such as instances_train2017.json.

    Raises:
      UserError: an option, a file or the split does not exist, or a file does not hold what its name says.
    """
    name, options = with_options("refer", rest, ("dataset", "split_by", "split", "images", "coco"))
    source, folder = f"source refer:{rest}", to_path(name)
    dataset, split_by, split = (options.get(name, "") for name in ("dataset", "split_by", "split"))
    if dataset not in DATASETS:
        raise UserError(f"{source}: no dataset {dataset!r}; {nearest(dataset, DATASETS)}")
    if (dataset == "combined") == bool(split_by):
        raise UserError(
            f"{source}: split_by={split_by} with dataset={dataset}; combined takes none, the others need one"
        )
    _check_folder(folder, source)
    parts = COMBINED if dataset == "combined" else ((dataset, split_by),)
    refs = [ref for part in parts for ref in _read_refs(folder, *part, source)]
    refs = list(_combined(refs)) if dataset == "combined" else refs
    chosen = [ref for ref in refs if ref.split == _one_name(split)]
    if not chosen:
        found = ", ".join(f"{name} ({n})" for name, n in Counter(ref.split for ref in refs).items())
        raise UserError(f"{source}: {dataset} has no split {split!r}; there are {found or 'none'}")
    coco = _read_all_coco(folder, options.get("coco"), chosen, source)
    return Refs(chosen, coco, to_path(options["images"]) if "images" in options else folder)


def _check_folder(folder: FilePath, source: str) -> None:
    try:
        found = folder.is_dir()
    except ImportError as e:  # what reads a bucket is not installed
        raise UserError(f"{source}: {e}") from e
    if not found:
        raise UserError(
            f"{source}: there is no folder {folder}; it is the one with refcoco/refs(unc).p and its like"
        )


def _one_name(split: str) -> str:
    return "val" if split == "validation" else split


def _combined(refs: Sequence[Ref]) -> Iterable[Ref]:
    """Yields refs with the splits of refcocox_combined, but for those of train whose image is in another split."""
    held_out = {ref.entry["image_id"] for ref in refs if ref.split != "train"}
    for ref in refs:
        if ref.split != "train" or ref.entry["image_id"] not in held_out:
            yield ref._replace(split="test") if ref.split in ("testA", "testB") else ref


def _folder_of(folder: FilePath, dataset: str, name: str) -> FilePath:
    """Returns where `name` is or, if it is nowhere, should be."""
    inner = folder / dataset
    return folder if (folder / name).exists() and not (inner / name).exists() else inner


def _read_refs(folder: FilePath, dataset: str, split_by: str, source: str) -> list[Ref]:
    name = f"refs({split_by}).p"
    path = _folder_of(folder, dataset, name) / name
    try:
        with path.open("rb") as file:
            entries = PlainUnpickler(
                file, encoding="latin1"
            ).load()  # the published files are of Python 2
    except OSError as e:
        raise UserError(
            f"{source}: {path}: {e.strerror or e}; the files there: {_names(path.parent)}"
        ) from e
    except CANNOT_UNPICKLE as e:
        raise UserError(
            f"{source}: {path} is no pickle of refs, or not all of one: {str(e) or type(e).__name__}"
        ) from e
    if not isinstance(entries, list) or not all(map(_is_ref, entries)):
        raise UserError(
            f"{source}: {path} holds {entries!r:.60}, not a list of refs with split, image_id and ann_id"
        )
    return [Ref(dataset, _one_name(entry["split"]), entry) for entry in entries]


def _is_ref(entry: Any) -> bool:
    kinds = {"split": str, "image_id": int, "ann_id": int}
    return isinstance(entry, dict) and all(
        isinstance(entry.get(name), kind) for name, kind in kinds.items()
    )


class PlainUnpickler(pickle.Unpickler):
    """Loads dicts, lists, tuples, numbers and text, and refuses all else: a pickle that names a class or function runs it."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        raise pickle.UnpicklingError(
            f"it asks for {module_name}.{global_name}, where plain values are wanted"
        )


def _names(folder: FilePath) -> str:
    """Returns the names of the refs files in a folder."""
    names = sorted(path.name for path in folder.glob("refs(*).p")) if folder.is_dir() else []
    return ", ".join(names) or "none"


def _read_all_coco(
    folder: FilePath, coco: str | None, refs: Sequence[Ref], source: str
) -> dict[str, Coco]:
    """Returns the annotations of the refs by dataset. Others are not kept: those of COCO are many."""
    wanted = {
        dataset: {r.entry["ann_id"] for r in refs if r.dataset == dataset}
        for dataset in {r.dataset for r in refs}
    }
    if coco:
        whole = _read_coco(to_path(coco), set().union(*wanted.values()), source)
        return dict.fromkeys(wanted, whole)
    name = "instances.json"
    return {
        dataset: _read_coco(_folder_of(folder, dataset, name) / name, ids, source)
        for dataset, ids in wanted.items()
    }


def _read_coco(path: FilePath, wanted: set[int], source: str) -> Coco:
    try:
        whole = json.loads(path.read_bytes())
        tables = (whole["images"], whole["annotations"], whole["categories"])
        images, annotations, categories = ({row["id"]: row for row in table} for table in tables)
        annotations = {i: row for i, row in annotations.items() if i in wanted}
        shown = {row["image_id"] for row in annotations.values()}
    except (OSError, ImportError) as e:
        raise UserError(f"{source}: {e}; coco=FILE names COCO annotations elsewhere") from e
    except (ValueError, TypeError, KeyError, RecursionError) as e:
        raise UserError(
            f"{source}: {path} is not COCO's images, annotations and categories: {e!r}"
        ) from e
    return Coco({i: row for i, row in images.items() if i in shown}, annotations, categories)


def _of(
    table: dict[int, dict[str, Any]], what: str, row: dict[str, Any], name: str
) -> dict[str, Any]:
    """Returns the row of `table` whose id is `row[name]`."""
    try:
        return table[row[name]]
    except (KeyError, TypeError) as e:
        raise BadRecord(
            f"missing_{what}", f"there is no {what} with the {name} {row.get(name)}"
        ) from e

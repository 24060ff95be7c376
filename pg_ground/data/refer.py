"""Referring expressions in the files of the UNC refer toolkit: RefCOCO/+/g and gRefCOCO.

The toolkit is github.com/lichengunc/refer. The uri is `refer:DIR?dataset=…&split=…` (see
`open_refer`). `refs(SPLIT_BY).p` and `instances.json` are in DIR/DATASET or in DIR itself. gRefCOCO
(github.com/henghuiding/gRefCOCO) has `grefs(SPLIT_BY).p` or `grefs(SPLIT_BY).json` instead.
"""

import itertools
import pickle
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from pg_ground.data.coco import SINGULAR, Key, id_key, positions_by_id, read_bbox
from pg_ground.data.records import BadRecord, Records, clip_text, list_names, short
from pg_ground.data.tables import BadEntry, split_options
from pg_ground.storage.codecs import unpack
from pg_ground.storage.json_values import Repeated, RepeatedKey, decode_json_lists, fields_of
from pg_ground.storage.paths import FilePath, children, to_path
from pg_ground.types import JsonDict, UserError, nearest

DATASETS = ("refcoco", "refcoco+", "refcocog", "grefcoco", "combined")

GENERALIZED = "grefcoco"
"""The refs of this dataset have any number of objects: `ann_id` is a list, and -1 is no object."""

NO_OBJECT = -1
"""The `ann_id` of a ref of gRefCOCO whose expression describes nothing in the image."""

COMBINED = (("refcocog", "umd"), ("refcoco", "unc"), ("refcoco+", "unc"))
"""The parts of big_vision's refcocox_combined, in its order (datasets/refcoco/refcoco.py)."""

REFS_FILES = ("refs(*).p", "grefs(*).p", "grefs(*).json")

MAX_FOLDERS = 20
"""Folders in which a refs file is looked for that is not where it should be."""

GET_AGAIN = "if the file was cut, download and unpack it again"

CANNOT_UNPICKLE = (
    pickle.UnpicklingError,
    EOFError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    OverflowError,
    MemoryError,
    RecursionError,
)
"""Reading a file that is no pickle or JSON, or not all of one, raises one of these."""


class Ref(NamedTuple):
    """One entry of a refs file."""

    dataset: str
    split: str | None
    """The split that the ref belongs to. In `combined` it may differ from the entry's split.

    None is the split of an entry that does not name its split.
    """
    entry: JsonDict | BadEntry


class Coco(NamedTuple):
    """COCO annotations by the keys of their ids."""

    images: dict[Any, JsonDict | Repeated]
    annotations: dict[Any, JsonDict | Repeated]
    categories: dict[Any, JsonDict | Repeated]


class Refs:
    """The refs of one split.

    A ref is an object, its box in pixels as COCO writes it (x, y, w, h), and sentences about it. A
    ref of gRefCOCO has lists of `boxes`, `categories` and `segmentations` instead, one entry for
    each object, and `no_target`, which is true if there is no object.
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
        if isinstance(ref, BadEntry):
            raise BadRecord(ref.kind, ref.message)
        coco = self._coco[dataset]
        if dataset == GENERALIZED:
            return _generalized_record(ref, coco)
        annotation = _look_up(coco.annotations, "annotation", ref, "ann_id")
        image = _look_up(coco.images, "image", annotation, "image_id")
        _check_image(ref, annotation)
        record = {
            "image": _required(image, "file_name", "image", ref),
            "image_id": ref["image_id"],
            "ann_id": ref["ann_id"],
            "bbox": _bbox(annotation, ref),
            "sentences": _required(ref, "sentences", "ref", ref),
            "dataset": dataset,
        }
        if annotation.get("category_id") is not None:
            category = _look_up(coco.categories, "category", annotation, "category_id")
            record |= {"category": category["name"]} if "name" in category else {}
        optional = ((ref, ("ref_id", "split")), (image, ("width", "height")))
        for entry, names in (*optional, (annotation, ("segmentation",))):
            record |= {name: entry[name] for name in names if name in entry}
        return record


def _check_image(ref: JsonDict, annotation: JsonDict) -> None:
    """Raises BadRecord if a ref and its annotation are about two images."""
    if id_key(ref["image_id"]) != id_key(annotation["image_id"]):
        raise BadRecord(
            "bad_entry",
            f"the ref is about image {short(ref['image_id'])}, but its annotation "
            f"{short(ref['ann_id'])} is of image {short(annotation['image_id'])}",
        )


def _generalized_record(ref: JsonDict, coco: Coco) -> JsonDict:
    """Returns the record of a ref of gRefCOCO, which has any number of objects."""
    image = _look_up(coco.images, "image", ref, "image_id")
    boxes, categories, segmentations = [], [], []
    for annotation_id in annotation_ids(ref):
        part = {**ref, "ann_id": annotation_id}
        annotation = _look_up(coco.annotations, "annotation", part, "ann_id")
        _check_image(part, annotation)
        boxes.append(_bbox(annotation, part))
        category = _look_up(coco.categories, "category", annotation, "category_id")
        categories.append(_required(category, "name", "category", part))
        segmentations.append(annotation.get("segmentation"))
    record = {
        "image": _required(image, "file_name", "image", ref),
        "image_id": ref["image_id"],
        "ann_id": ref["ann_id"],
        "boxes": boxes,
        "categories": categories,
        "segmentations": segmentations,
        "no_target": not boxes,
        "sentences": _required(ref, "sentences", "ref", ref),
        "dataset": GENERALIZED,
    }
    for entry, names in ((ref, ("ref_id", "split")), (image, ("width", "height"))):
        record |= {name: entry[name] for name in names if name in entry}
    return record


def annotation_ids(ref: JsonDict) -> list[Any]:
    """Returns the ids of the objects of a ref: one or several, or none in gRefCOCO."""
    value = ref.get("ann_id")
    ids = value if isinstance(value, list) else [value]
    return [] if [id_key(number) for number in ids] == [NO_OBJECT] else ids


def _required(entry: JsonDict, name: str, kind: str, ref: JsonDict) -> Any:
    if entry.get(name) is None:
        raise BadRecord(
            "missing_field", f"the {kind} of ann_id {short(ref['ann_id'])} has no {name}"
        )
    return entry[name]


def _bbox(annotation: JsonDict, ref: JsonDict) -> list[Any]:
    try:
        return read_bbox(annotation)
    except BadRecord as bad:
        raise BadRecord(bad.kind, f"annotation {short(ref['ann_id'])}: {bad}") from None


def open_refer(location: str) -> Records:
    """Returns the refs of one split, with their boxes.

    `dataset=combined` is big_vision's refcocox_combined. Its train split leaves out every image
    that another split of the three datasets shows. Its test split is test, testA and testB of them.

    Args:
      location: `DIR?dataset=D&split_by=S&split=SPLIT&images=DIR&coco=FILE`. D is refcoco,
        refcoco+, refcocog, grefcoco or combined; S is unc, google or umd (none for combined).
        `validation` is another name of the split val. `images` is the folder of the image files,
        by default DIR. `coco` is a file of COCO annotations, such as instances_train2017.json, that
        replaces instances.json.

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
    chosen = [ref for ref in refs if ref.split in (_canonical_split(split), None)]
    if not any(isinstance(ref.entry, dict) for ref in chosen):
        sizes = Counter(ref.split for ref in refs if isinstance(ref.entry, dict))
        existing = list_names(f"{name} ({n})" for name, n in sizes.items())
        raise UserError(f"{source}: {dataset} has no split {split!r}; there are {existing}")
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
    held_out = {_image_key(ref) for ref in refs if ref.split != "train"} - {None}
    for ref in refs:
        if ref.split == "train" and _image_key(ref) in held_out:
            continue
        yield ref._replace(split="test") if ref.split in ("testA", "testB") else ref


def _image_key(ref: Ref) -> Key | None:
    return id_key(ref.entry["image_id"]) if isinstance(ref.entry, dict) else None


def _folder_with(folder: FilePath, dataset: str, name: str) -> FilePath:
    """Returns the folder that holds the file `name`: DIR/DATASET, or DIR if only that has it."""
    inner = folder / dataset
    return folder if (folder / name).exists() and not (inner / name).exists() else inner


def _read_refs(folder: FilePath, dataset: str, split_by: str, source: str) -> list[Ref]:
    path = _refs_path(folder, dataset, split_by)
    name = path.name
    try:
        entries = _load_refs(path, source)
    except OSError as error:
        raise UserError(
            f"{source}: {path}: {error.strerror or error}; {_where_else(folder, path)}"
        ) from error
    except RepeatedKey as error:
        raise UserError(f"{source}: in {path}, {error}") from error
    except CANNOT_UNPICKLE as error:
        raise UserError(
            f"{source}: {path} is no {'JSON' if path.suffix == '.json' else 'pickle'} of refs, "
            f"or not all of one: {str(error) or type(error).__name__}; {GET_AGAIN}"
        ) from error
    values = entries if isinstance(entries, list) else [entries]
    refs = [_to_ref(value, dataset, f"ref {i} of {name}") for i, value in enumerate(values)]
    if refs and not any(isinstance(ref.entry, dict) for ref in refs):
        raise UserError(
            f"{source}: {path} holds {short(entries)}, "
            f"not a list of refs with split, image_id and ann_id"
        )
    return refs


def _refs_path(folder: FilePath, dataset: str, split_by: str) -> FilePath:
    """Returns the path of a refs file. gRefCOCO's is a pickle or, if there is none, JSON."""
    names = [f"refs({split_by}).p"]
    if dataset == GENERALIZED:
        names = [f"grefs({split_by}).p", f"grefs({split_by}).json"]
    paths = [_folder_with(folder, dataset, name) / name for name in names]
    return next((path for path in paths if path.exists()), paths[-1])


def _load_refs(path: FilePath, source: str) -> Any:
    if path.suffix == ".json":
        return decode_json_lists(unpack(path.read_bytes(), f"{source}: {path.name}"))
    with path.open("rb") as file:
        # The published files were written by Python 2.
        return PlainUnpickler(file, encoding="latin1").load()


def _to_ref(entry: object, dataset: str, where: str) -> Ref:
    """Returns an entry of a refs file. It must have split, image_id and ann_id.

    The `ann_id` of gRefCOCO may be a list. Its `no_target` must agree with it.
    """
    if isinstance(entry, Repeated):
        value = entry.fields.get("split")
        split = _canonical_split(value) if isinstance(value, str) else None
        return Ref(dataset, split, BadEntry("bad_json", f"{where}: {entry.fault}"))
    if not isinstance(entry, dict):
        return Ref(dataset, None, BadEntry("bad_entry", f"{where} is {short(entry)}, not a dict"))
    value = entry.get("split")
    split = _canonical_split(value) if isinstance(value, str) else None
    ids = {"image_id": [entry.get("image_id")], "ann_id": [entry.get("ann_id")]}
    if dataset == GENERALIZED:
        ids["ann_id"] = annotation_ids(entry)
    missing = [name for name, values in ids.items() if None in map(id_key, values)]
    missing += ["split"] if split is None else []
    if missing:
        text = f"{where}: {missing[0]} is {short(entry.get(missing[0]))}"
        kind = "missing_field" if entry.get(missing[0]) is None else "bad_entry"
        return Ref(dataset, split, BadEntry(kind, text))
    if dataset == GENERALIZED and entry.get("no_target") and ids["ann_id"]:
        text = f"{where}: no_target is true, but ann_id is {short(entry['ann_id'])}"
        return Ref(dataset, split, BadEntry("bad_entry", text))
    return Ref(dataset, split, entry)


class PlainUnpickler(pickle.Unpickler):
    """Loads dicts, lists, tuples, numbers and texts, and refuses everything else.

    A pickle that names a class or a function would run it.
    """

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        raise pickle.UnpicklingError(
            f"it asks for {module_name}.{global_name}, but it may hold plain values only"
        )


def _where_else(folder: FilePath, path: FilePath) -> str:
    """Returns in words where a refs file is that is not at `path`.

    Args:
      folder: DIR of the uri.
    """
    dataset, name = path.parent.name, path.name
    archive = folder / f"{dataset}.zip"
    if archive.is_file():
        return f"unpack {archive} there"
    for near in (folder.parent, *itertools.islice(children(folder), MAX_FOLDERS)):
        if (near / dataset / name).exists():
            return f"it is in {near}, which must be the folder"
    return f"the refs files in the folder: {_refs_files(path.parent)}"


def _refs_files(folder: FilePath) -> str:
    """Returns the names of the refs files in a folder, as a text."""
    names: list[str] = []
    if folder.is_dir():
        names = sorted(path.name for form in REFS_FILES for path in folder.glob(form))
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
    ids: dict[str, set[Key | None]] = {}
    image_ids: set[Key | None] = set()  # refs without objects need their images too
    for ref in refs:
        if isinstance(ref.entry, dict):
            ids.setdefault(ref.dataset, set()).update(map(id_key, annotation_ids(ref.entry)))
            if ref.dataset == GENERALIZED:
                image_ids.add(id_key(ref.entry["image_id"]))
    if coco:
        path = to_path(coco, source)
        annotations = _read_coco(path, set().union(*ids.values()), image_ids, source)
        return dict.fromkeys(ids, annotations)
    name = "instances.json"
    return {
        dataset: _read_coco(
            _folder_with(folder, dataset, name) / name, dataset_ids, image_ids, source
        )
        for dataset, dataset_ids in ids.items()
    }


def _read_coco(
    path: FilePath, ids: set[Key | None], image_ids: set[Key | None], source: str
) -> Coco:
    """Returns the annotations with these ids, their images and categories, and more images.

    Args:
      image_ids: the ids of the other images.

    Raises:
      UserError: the file cannot be read or has another form, or two entries of one list have the
        same id.
    """
    try:
        content = decode_json_lists(unpack(path.read_bytes(), f"{source}: {path.name}"))
        tables = [content[name] for name in SINGULAR]
    except (OSError, ImportError) as error:
        raise UserError(f"{source}: {error}; coco=FILE names COCO annotations elsewhere") from error
    except RepeatedKey as error:
        raise UserError(f"{source}: in {path}, {error}") from error
    except ValueError as error:
        raise UserError(f"{_no_coco(path, source, repr(error))}; {GET_AGAIN}") from error
    except (TypeError, KeyError, RecursionError) as error:
        raise UserError(_no_coco(path, source, repr(error))) from error
    by_key = []
    for name, table in zip(SINGULAR, tables, strict=True):
        if not isinstance(table, list):
            raise UserError(_no_coco(path, source, f"{name} is {short(table)}"))
        positions = positions_by_id(table, name, f"{source}: {path.name}")
        if table and not positions:
            raise UserError(_no_coco(path, source, f"no entry of {name} has an id"))
        by_key.append({key: table[position] for key, position in positions.items()})
    images, annotations, categories = by_key
    annotations = {key: row for key, row in annotations.items() if key in ids}
    image_keys = image_ids | {
        id_key(fields_of(row).get("image_id")) for row in annotations.values()
    }
    return Coco(
        {key: row for key, row in images.items() if key in image_keys}, annotations, categories
    )


def _no_coco(path: FilePath, source: str, reason: str) -> str:
    text = clip_text(reason, 200)
    return f"{source}: {path} does not hold COCO's images, annotations and categories: {text}"


def _look_up(
    table: dict[Any, JsonDict | Repeated], kind: str, row: JsonDict, name: str
) -> JsonDict:
    """Returns the row of `table` with the id `row[name]`. Raises BadRecord (missing_`kind`)."""
    key = id_key(row.get(name))
    if key is None or key not in table:
        raise BadRecord(
            f"missing_{kind}", f"there is no {kind} with the {name} {short(row.get(name))}"
        )
    entry = table[key]
    if isinstance(entry, Repeated):
        raise BadRecord("bad_json", f"{kind} {short(row.get(name))}: {entry.fault}")
    return entry

"""Mutated records of every reader: an example with correct geometry, or one bad record.

Each change states its effect: the same answer, other names, or a bad record. So the expected answer
comes from the test's own numbers.
"""

import json
import pickle
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub.constants
import msgpack
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image

from pg_ground.config import Data, Source
from pg_ground.data import arrayrecord
from pg_ground.data import tfds as pg_tfds
from pg_ground.data.arrayrecord import decode_any, encode, write_array_record
from pg_ground.data.batch_rows import to_batch_row
from pg_ground.data.datasets import Examples, open_examples
from pg_ground.data.records import BadRecord
from pg_ground.tokenizer import load as load_tokenizer
from pg_ground.types import Example

# A thread of an earlier test can draw a random number while a strategy runs. Hypothesis takes it
# for a number of the strategy.
pytestmark = pytest.mark.filterwarnings("ignore:Do not use the `random` module")

WIDTH, HEIGHT = 80, 60
NAMES = ["red square", "dog", "猫"]
TOKENIZER = load_tokenizer()
DATA = Data(max_boxes=4, prompt_length=96, suffix_length=160)
LOC = re.compile(r"<loc(\d{4})><loc(\d{4})><loc(\d{4})><loc(\d{4})> (.*)")

KINDS = {
    "bad_box",
    "bad_entry",
    "bad_json",
    "bad_record",
    "bad_text",
    "corrupt_image",
    "empty",
    "missing_annotation",
    "missing_category",
    "missing_field",
    "missing_image",
    "wrong_size",
}
"""The kinds of bad records that these changes cause."""

RECORDS_PER_FILE = 50
TEN_THOUSAND = 10_000 // RECORDS_PER_FILE

BAD = "bad"
SAME = "same"
NOTHING = "nothing"

Boxes = list[list[int]]
"""x1, y1, x2, y2 in pixels."""


class Item(NamedTuple):
    """The objects of a record, before any change."""

    boxes: Boxes
    labels: list[int]
    """Indices into `NAMES`."""


class Change(NamedTuple):
    """A new value of one field."""

    field: str
    value: Any
    """A value, a function of the item, or `ABSENT`."""
    effect: Any = BAD
    """`BAD`, `SAME`, `NOTHING` (no objects), the phrase, or the name of every object."""


ABSENT = object()


def xywh(box: list[int]) -> list[int]:
    return [box[0], box[1], box[2] - box[0], box[3] - box[1]]


def keyed(keys: str, box: Sequence[Any]) -> dict[str, Any]:
    return dict(zip(keys.split(), box, strict=True))


def changed_first(change: Callable[[list[int]], Any]) -> Callable[[Item], Any]:
    """Returns the boxes of an item with another first box."""
    return lambda item: [change(item.boxes[0]), *item.boxes[1:]]


NAN = float("nan")

BOXES = [
    Change("boxes", lambda item: [[float(n) for n in box] for box in item.boxes], SAME),
    Change("boxes", lambda item: [[str(n) for n in box] for box in item.boxes], SAME),
    Change("boxes", lambda item: json.dumps(item.boxes), SAME),
    Change("boxes", lambda item: [keyed("x1 y1 x2 y2", box) for box in item.boxes], SAME),
    Change("boxes", lambda item: [keyed("x y width height", xywh(b)) for b in item.boxes], SAME),
    Change("boxes", lambda item: [[box[:2], box[2:]] for box in item.boxes], SAME),
    Change(
        "boxes",
        lambda item: keyed("xmin ymin xmax ymax", list(zip(*item.boxes, strict=True))),
        SAME,
    ),
    *(Change("boxes", value, NOTHING) for value in (None, ABSENT, [], {}, " ")),
    *(Change("boxes", value) for value in (5, "no", {"a": 1}, [None], [[]])),
    *(Change("boxes", value) for value in (True, [[1, 2, 3]], "[1, 2, 3]", [{"x": 1}], [[[1]]])),
    Change("boxes", changed_first(lambda box: None)),
    Change("boxes", changed_first(lambda box: [*box, 1])),
    Change("boxes", changed_first(lambda box: [NAN, *box[1:]])),
    Change("boxes", changed_first(lambda box: [*box[:3], float("inf")])),
    Change("boxes", changed_first(lambda box: [box[0], box[1], box[0], box[3]])),
    Change("boxes", changed_first(lambda box: [box[2], box[1], box[0], box[3]])),
    Change("boxes", changed_first(lambda box: [n + 500 for n in box])),
    Change("boxes", changed_first(lambda box: [*box[:3], None])),
    Change("boxes", changed_first(lambda box: [*box[:3], 10**400])),
]

LABELS = [
    Change("labels", 7, "7"),
    Change("labels", 7.0, "7"),
    Change("labels", "  two  words ", "two words"),
    Change("labels", lambda item: ["x"] * len(item.boxes), "x"),
    *(Change("labels", value) for value in (None, ABSENT, "", [], NAN, 1.5, True, {}, "\ud83d")),
    *(Change("labels", value) for value in (["a"] * 9, "a;b", "<loc0001>", ["a", None, "b", 1])),
]

OTHERS = [
    Change("phrase", 3.0, "3"),
    Change("phrase", 12, "12"),
    Change("phrase", " a  b\n", "a b"),
    Change("phrase", "}{", "}{"),
    *(Change("phrase", value) for value in (None, ABSENT, "", " ", NAN, True, [], {}, "x\udc00")),
    Change("image", ["a.png"], SAME),
    Change("image", {"bytes": None, "path": "a.png"}, SAME),
    Change("image", ".\\a.png", SAME),
    *(Change("image", value) for value in (None, ABSENT, "", 5, "b.png", [], "a\0.png", "\ud800")),
    *(Change("image", value) for value in ("cut.png", "x" * 9000, {}, True, -1)),
    *(Change("width", value, SAME) for value in (None, ABSENT, 0, "80", "x", 80.0, [], True)),
    Change("width", 33),
    Change("extra", [{"a": ["\ud800", NAN]}], SAME),
]

ITEMS = st.lists(
    st.tuples(st.integers(0, 70), st.integers(0, 50), st.integers(4, 80), st.integers(4, 60)).map(
        lambda box: [box[0], box[1], min(box[0] + box[2], WIDTH), min(box[1] + box[3], HEIGHT)]
    ),
    min_size=1,
    max_size=3,
    unique_by=tuple,
).flatmap(
    lambda boxes: st.builds(
        Item,
        st.just(boxes),
        st.lists(st.integers(0, 2), min_size=len(boxes), max_size=len(boxes)),
    )
)


def mutated(changes: Sequence[Change]) -> st.SearchStrategy[list[tuple[Item, list[Change]]]]:
    """Draws the records of one file: each an item, and at most two changes of its fields."""
    few = st.lists(st.sampled_from(changes), max_size=2, unique_by=lambda change: change.field)
    size = RECORDS_PER_FILE
    return st.lists(st.tuples(ITEMS, few), min_size=size, max_size=size)


def applied(record: dict[str, Any], item: Item, changes: Sequence[Change]) -> dict[str, Any]:
    record = dict(record)
    for field, value, _ in changes:
        if value is ABSENT:
            record.pop(field, None)
        else:
            record[field] = value(item) if callable(value) else value
    return record


def expected(item: Item, changes: Sequence[Change]) -> tuple[str, list[tuple[list[int], str]]]:
    """Returns the prompt, and box and name of each object. The prompt is `BAD` for a bad record."""
    effects = {change.field: change.effect for change in changes}
    values = {change.field: change.value for change in changes}
    names = [NAMES[label] for label in item.labels]
    boxes = item.boxes
    if effects.get("boxes") == NOTHING:
        labels = values.get("labels", names)
        # A list of names says that there are objects; any other value is not read.
        effects["labels"] = BAD if callable(labels) or (_lists(labels) != []) else SAME
        boxes = []
    if BAD in effects.values():
        return BAD, []
    phrase = effects.get("phrase", "cat")
    if effects.get("labels", SAME) != SAME:
        names = [effects["labels"]] * len(names)
    return f"detect {phrase}", list(zip(boxes, names, strict=False))


def check(examples: Examples, index: int, answer: tuple[str, list[tuple[list[int], str]]]) -> None:
    """Fails if a question has another answer, or is good in place of bad or bad in place of good.

    Objects with the same name and the same loc bins count once, so the bins are compared as sets.
    """
    prompt, objects = answer
    example, slots = read(examples, index)
    if example is None:
        assert prompt == BAD, (answer, examples.record(index))
        return
    assert prompt != BAD, (example.suffix, examples.record(index))
    assert example.prompt == prompt and example.size == (WIDTH, HEIGHT)
    texts = [LOC.fullmatch(part) for part in example.suffix.split(" ; ")] if example.suffix else []
    bins = {(*(int(match[i]) for i in (2, 1, 4, 3)), match[5]) for match in texts if match}
    exact = {(*(int(n) for n in _bins(box)), name) for box, name in objects}
    assert len(texts) == len(bins) and _near(bins, exact), (example.suffix, answer)
    assert slots == len(bins)


def read(examples: Examples, index: int) -> tuple[Example | None, int]:
    """Returns a question and the number of boxes in its row; None for a bad record.

    Fails if the bad record has an unknown kind or a long message.
    """
    try:
        example = examples[index]
        row = to_batch_row(example, TOKENIZER, DATA, 0)
    except BadRecord as bad:
        message = str(bad)
        assert bad.kind in KINDS and 0 < len(message) <= 401 and "\n" not in message
        message.encode()
        return None, 0
    return example, int(row.gold.boxes.valid.sum())


def _bins(box: list[int]) -> Iterator[float]:
    """Yields the loc bins of x1, y1, x2, y2: the fraction of the image times 1023, rounded."""
    for value, side in zip(box, (WIDTH, HEIGHT, WIDTH, HEIGHT), strict=True):
        yield round(value / side * 1023)


def _near(bins: set[Any], others: set[Any]) -> bool:
    """Returns whether each of `others` has its partner: the same name, and bins at most 1 away."""
    if len(bins) != len(others):
        return False
    return all(
        any(
            name == near[4] and max(abs(a - b) for a, b in zip(box, near[:4], strict=True)) <= 1
            for near in bins
        )
        for *box, name in others
    )


def draw_images(folder: Path) -> None:
    image = Image.new("RGB", (WIDTH, HEIGHT))
    image.save(folder / "a.png")
    (folder / "cut.png").write_bytes((folder / "a.png").read_bytes()[:40])


SOURCE = {"boxes": "boxes", "label": "labels", "empty": "keep"}


def record_of(item: Item) -> dict[str, Any]:
    return {
        "image": "a.png",
        "width": WIDTH,
        "height": HEIGHT,
        "phrase": "cat",
        "boxes": item.boxes,
        "labels": [NAMES[label] for label in item.labels],
    }


def write_json(folder: Path, records: list[Any]) -> str:
    (folder / "a.json").write_text(json.dumps(records))
    return f"json:{folder}/a.json"


def write_json_lines(folder: Path, records: list[Any]) -> str:
    (folder / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return f"jsonl:{folder}/a.jsonl"


def write_packed(folder: Path, records: list[Any]) -> str:
    for record in records:
        if any(10**400 in _lists(box) for box in _lists(record.get("boxes"))):
            record["boxes"] = 5  # msgpack has no such number, and 5 is bad too
    write_array_record(folder / "a.array_record", json.loads(json.dumps(records)))
    return f"arrayrecord:{folder}/a.array_record"


def _lists(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def hypothesis_settings(files: int) -> settings:
    return settings(
        max_examples=files,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],  # a failure names its record, so a smaller file says no more
        suppress_health_check=list(HealthCheck),
    )


def run(files: int, strategy: st.SearchStrategy[Any], law: Callable[[Any], None]) -> None:
    hypothesis_settings(files)(given(strategy)(law))()


FILES = [pytest.param(2, id="few"), pytest.param(TEN_THOUSAND, marks=pytest.mark.slow, id="many")]


@pytest.mark.parametrize("files", FILES)
@pytest.mark.parametrize("write", [write_json, write_json_lines, write_packed])
def test_mutated_records_of_plain_values(tmp_path, write, files):
    draw_images(tmp_path)

    def law(rows: list[tuple[Item, list[Change]]]) -> None:
        records = [applied(record_of(item), item, changes) for item, changes in rows]
        examples = open_examples("a", Source(uri=write(tmp_path, records), **SOURCE), DATA, 14)
        assert len(examples) == len(rows)
        for index, (item, changes) in enumerate(rows):
            check(examples, index, expected(item, changes))

    run(files, mutated([*BOXES, *LABELS, *OTHERS]), law)


TYPED = [
    Change("boxes", lambda item: [[float(n) for n in box] for box in item.boxes], SAME),
    *(Change("boxes", value, NOTHING) for value in (None, [])),
    *(Change("boxes", value) for value in ([[]], [None], [[1, 2, 3]], [[None] * 4])),
    *(change for change in BOXES if change.effect == BAD and callable(change.value)),
    *(Change("labels", value) for value in (None, [], [-1] * 3, [99] * 3, [0] * 9)),
    *(Change("phrase", value) for value in (None, "", " ")),
    Change("phrase", "a  b", "a b"),
    *(Change("image", value) for value in (None, "", "b.png", "cut.png")),
    Change("width", None, SAME),
    Change("width", 0, SAME),
    Change("width", 33),
]
"""Changes that a column with a type can hold. The labels are class numbers."""

SCHEMA = pa.schema(
    [
        ("image", pa.string()),
        ("width", pa.int64()),
        ("height", pa.int64()),
        ("phrase", pa.string()),
        ("boxes", pa.list_(pa.list_(pa.float64()))),
        ("labels", pa.list_(pa.int64())),
    ]
)
LABEL_FEATURE = {"labels": {"feature": {"names": NAMES, "_type": "ClassLabel"}, "_type": "List"}}


def write_table(path: Path, records: list[Any], metadata: Any = None) -> None:
    table = pa.Table.from_pylist(records, SCHEMA)
    if metadata:
        table = table.replace_schema_metadata({b"huggingface": json.dumps(metadata).encode()})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=20)


def write_parquet(folder: Path, records: list[Any]) -> str:
    write_table(folder / "a.parquet", records, {"info": {"features": LABEL_FEATURE}})
    return f"parquet:{folder}/a.parquet"


def write_hub(folder: Path, records: list[Any]) -> str:
    snapshot = folder / "hub" / "datasets--org--ds" / "snapshots" / ("0" * 40)
    write_table(snapshot / "data" / "train-00000-of-00001.parquet", records)
    names = {"class_label": {"names": {str(i): name for i, name in enumerate(NAMES)}}}
    card = {"dataset_info": {"features": [{"name": "labels", "sequence": names}]}}
    (snapshot / "README.md").write_text(f"---\n{yaml.safe_dump(card)}---\n")
    (snapshot.parents[1] / "refs").mkdir(exist_ok=True)
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    return "hf:org/ds@train?offline=1"


@pytest.mark.parametrize("files", FILES)
@pytest.mark.parametrize("write", [write_parquet, write_hub])
def test_mutated_rows_of_typed_columns(tmp_path, monkeypatch, write, files):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    draw_images(tmp_path)
    too_large = [change for change in TYPED if _holds_huge(change)]
    changes = [change for change in TYPED if change not in too_large]

    def law(rows: list[tuple[Item, list[Change]]]) -> None:
        records = [
            applied(record_of(item) | {"labels": item.labels}, item, changes)
            for item, changes in rows
        ]
        source = Source(uri=write(tmp_path, records), image_root=str(tmp_path), **SOURCE)
        examples = open_examples("a", source, DATA, 14)
        for index, (item, changes) in enumerate(rows):
            check(examples, index, expected(item, changes))

    run(files, mutated(changes), law)


def _holds_huge(change: Change) -> bool:
    """Returns whether no column can hold the value."""
    if not callable(change.value):
        return False
    return any(10**400 in _lists(box) for box in change.value(Item([[1, 2, 3, 4]], [0])))


class Entries(NamedTuple):
    """Changes of an entry of COCO's lists."""

    list_name: str
    field: str
    value: Any
    effect: str
    """same, lost (the annotation), left_out, image (the image is lost), part (its question)."""


COCO_CHANGES = [
    *(Entries("annotations", "image_id", value, "lost") for value in (777, None, "x", [], True)),
    Entries("annotations", "image_id", float, "same"),
    Entries("annotations", "image_id", str, "same"),
    *(Entries("annotations", "category_id", v, "lost") for v in (99, None, "x", {}, True, NAN)),
    Entries("annotations", "category_id", str, "same"),
    *(Entries("annotations", "bbox", v, "lost") for v in (None, [], ABSENT, [1, 2, 3], "no", 5)),
    *(Entries("annotations", "bbox", v, "lost") for v in ([NAN, 1, 2, 3], [1, 2, True, 4], {})),
    Entries("annotations", "bbox", [1, 1, 0, 9], "lost"),
    Entries("annotations", "bbox", [500, 500, 9, 9], "part"),
    *(Entries("annotations", "iscrowd", v, "lost") for v in ("maybe", 2, [], {"a": 1})),
    *(Entries("annotations", "iscrowd", v, "same") for v in (0, "0", None, False, "no", ABSENT)),
    *(Entries("annotations", "iscrowd", v, "left_out") for v in (1, "1", True, "true", "YES")),
    *(Entries("annotations", "id", v, "same") for v in (None, ABSENT, [])),
    *(Entries("annotations", "", v, "lost") for v in (None, 5, "x", [])),
    *(Entries("images", "file_name", v, "image") for v in (None, ABSENT, 5, "", [])),
    *(Entries("images", "file_name", v, "part") for v in ("b.png", "cut.png", "\ud800")),
    *(Entries("images", "width", v, "same") for v in (None, ABSENT, 0, "80", 80.0)),
    Entries("images", "width", 33, "part"),
    Entries("images", "extra", ["\ud800"], "same"),
]


class Scene(NamedTuple):
    """One image of COCO's instances with its objects and one change."""

    item: Item
    change: Entries | None


def change_entry(entry: Any, change: Entries) -> Any:
    if not change.field:
        return change.value
    if change.value is ABSENT:
        return {name: value for name, value in entry.items() if name != change.field}
    is_type = change.value in (float, str)
    return entry | {change.field: change.value(entry[change.field]) if is_type else change.value}


def write_coco(folder: Path, scenes: list[Scene]) -> str:
    """Writes one image for each scene. A change concerns the image or its first annotation."""
    images: list[Any] = []
    annotations: list[Any] = []
    for number, (item, change) in enumerate(scenes):
        image = {"id": number, "file_name": "a.png", "width": WIDTH, "height": HEIGHT}
        things = [
            {
                "id": len(annotations) + i,
                "image_id": number,
                "category_id": label,
                "bbox": xywh(box),
                "iscrowd": 0,
            }
            for i, (box, label) in enumerate(zip(item.boxes, item.labels, strict=True))
        ]
        if change and change.list_name == "images":
            image = change_entry(image, change)
        elif change:
            things[0] = change_entry(things[0], change)
        images.append(image)
        annotations += things
    categories = [{"id": i, "name": name} for i, name in enumerate(NAMES)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "a.json").write_text(json.dumps(content))
    return f"coco:{folder}/a.json?ask=category"


def coco_questions(scene: Scene) -> tuple[list[tuple[str, frozenset[Any]]], int]:
    """Returns the good questions of a scene (prompt and bins), and the number of bad records."""
    boxes = scene.item.boxes
    labels = [NAMES[label] for label in scene.item.labels]
    effect = scene.change.effect if scene.change else "same"
    if effect == "image":
        return [], 1
    is_lost = effect in ("lost", "left_out")
    objects = list(zip(boxes, labels, strict=True))[is_lost:]
    names = list(dict.fromkeys(name for _, name in objects))
    spoiled: list[str] = []
    if effect == "part":
        spoiled = names if scene.change and scene.change.list_name == "images" else [labels[0]]
    questions = []
    for name in names:
        if name not in spoiled:
            bins = frozenset(tuple(_bins(box)) for box, label in objects if label == name)
            questions.append((f"detect {name}", bins))
    return questions, len(spoiled) + (effect == "lost")


@pytest.mark.parametrize("files", FILES)
def test_mutated_entries_of_coco(tmp_path, files):
    draw_images(tmp_path)
    scenes = st.builds(Scene, ITEMS, st.none() | st.sampled_from(COCO_CHANGES))

    def law(drawn: list[Scene]) -> None:
        source = Source(
            uri=write_coco(tmp_path, drawn),
            phrase="category",
            boxes="boxes",
            box_format="xywh_px",
        )
        examples = open_examples("a", source, DATA, 14)
        good: Counter[Any] = Counter()
        bad = 0
        for index in range(len(examples)):
            example, _ = read(examples, index)
            if example is None:
                bad += 1
                continue
            parts = [LOC.fullmatch(part) for part in example.suffix.split(" ; ")]
            bins = frozenset(tuple(int(m[i]) for i in (2, 1, 4, 3)) for m in parts if m)
            good[example.prompt, bins] += 1
        questions = [coco_questions(scene) for scene in drawn]
        assert good == Counter(question for part, _ in questions for question in part)
        assert bad == sum(count for _, count in questions)

    run(files, st.lists(scenes, min_size=RECORDS_PER_FILE, max_size=RECORDS_PER_FILE), law)


REFER_CHANGES = [
    *(Entries("refs", "ann_id", value, BAD) for value in (None, ABSENT, [], True, 99_999, "x")),
    Entries("refs", "ann_id", str, SAME),
    *(Entries("refs", "image_id", value, BAD) for value in (None, ABSENT, [], 99_999, {})),
    Entries("refs", "image_id", float, SAME),
    *(Entries("refs", "sentences", v, BAD) for v in (None, ABSENT, [], "x", [{"raw": NAN}], [5])),
    *(Entries("refs", "split", value, BAD) for value in (None, ABSENT, 5)),
    *(Entries("refs", "ref_id", value, SAME) for value in (None, ABSENT, "x")),
    *(Entries("refs", "", value, BAD) for value in (None, 5, "x", [])),
    *(Entries("annotations", "bbox", v, BAD) for v in (None, ABSENT, [], [1, 2], [NAN] * 4, "x")),
    *(Entries("annotations", "bbox", v, BAD) for v in ([1, 1, 0, 9], [500, 500, 9, 9])),
    *(Entries("annotations", "image_id", value, BAD) for value in (None, ABSENT, 99_999, [])),
    *(Entries("annotations", "category_id", value, BAD) for value in (99, "x", [], True)),
    *(Entries("annotations", "category_id", value, SAME) for value in (None, ABSENT, "0", 0.0)),
    *(Entries("annotations", "segmentation", value, SAME) for value in (ABSENT, None)),
    *(Entries("annotations", "", value, BAD) for value in (None, 5)),
    *(Entries("images", "file_name", value, BAD) for value in (None, ABSENT, 5, "b.png", "")),
    *(Entries("images", "width", value, SAME) for value in (None, ABSENT, 0, "80")),
    Entries("images", "width", 33, BAD),
    *(Entries("images", "", value, BAD) for value in (None, [])),
]


def write_refer_files(folder: Path, scenes: list[Scene]) -> str:
    """Writes a ref with an image for each scene. Its object is the scene's first object."""
    lists: dict[str, list[Any]] = {"refs": [], "images": [], "annotations": []}
    for number, (item, change) in enumerate(scenes):
        entries: dict[str, Any] = {
            "refs": {
                "split": "train",
                "ref_id": number,
                "ann_id": number,
                "image_id": number,
                "sentences": [{"raw": NAMES[item.labels[0]]}],
            },
            "images": {"id": number, "file_name": "a.png", "width": WIDTH, "height": HEIGHT},
            "annotations": {
                "id": number,
                "image_id": number,
                "category_id": 0,
                "bbox": xywh(item.boxes[0]),
                "segmentation": [],
            },
        }
        if change:
            entries[change.list_name] = change_entry(entries[change.list_name], change)
        for name, entry in entries.items():
            lists[name].append(entry)
    (folder / "refcoco").mkdir(exist_ok=True)
    (folder / "refcoco" / "refs(unc).p").write_bytes(pickle.dumps(lists.pop("refs")))
    content = lists | {"categories": [{"id": 0, "name": "thing"}]}
    (folder / "refcoco" / "instances.json").write_text(json.dumps(content))
    return f"refer:{folder}?dataset=refcoco&split_by=unc&split=train"


@pytest.mark.parametrize("files", FILES)
def test_mutated_refs_and_instances(tmp_path, files):
    draw_images(tmp_path)
    scenes = st.builds(Scene, ITEMS, st.none() | st.sampled_from(REFER_CHANGES))

    def law(drawn: list[Scene]) -> None:
        source = Source(
            uri=write_refer_files(tmp_path, drawn),
            phrase="sentences.0.raw",
            boxes="bbox",
            box_format="xywh_px",
        )
        examples = open_examples("a", source, DATA, 14)
        assert len(examples) == len(drawn)
        for index, (item, change) in enumerate(drawn):
            name = NAMES[item.labels[0]]
            is_bad = change is not None and change.effect == BAD
            answer = (BAD, []) if is_bad else (f"detect {name}", [(item.boxes[0], name)])
            check(examples, index, answer)

    run(files, st.lists(scenes, min_size=RECORDS_PER_FILE, max_size=RECORDS_PER_FILE), law)


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Returns bytes in which a few bytes are changed, missing or added."""
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 5])):
        at = rng.randrange(len(changed) or 1)
        noise = rng.randbytes(3)
        kind = rng.choice(["change", "change", "cut", "add"])
        changed[at : at + {"change": 3, "cut": 8, "add": 0}[kind]] = noise if kind != "cut" else b""
    return bytes(changed)


def read_damaged(good: bytes, decode: Callable[[bytes], Any], count: int) -> int:
    """Returns how many of `count` damaged records are bad. Each is a dict or a bad record."""
    rng = random.Random(0)
    bad = 0
    for _ in range(count):
        data = damaged(good, rng)
        try:
            assert isinstance(decode(data), dict)
        except BadRecord as fault:
            assert fault.kind == "bad_record" and len(str(fault)) <= 401
            bad += 1
    return bad


def test_damaged_packed_records_are_records_or_bad_records():
    record = record_of(Item([[1, 2, 3, 4]], [0])) | {"cells": np.zeros((2, 3), np.float32)}
    assert 5_000 < read_damaged(encode(record), decode_any, 20_000) < 20_000


def test_a_packed_array_of_an_unreadable_dtype_is_a_bad_record():
    for dtype in (",4", ",", "x" * 99, "O", "|S4", "<f3", "a,", b"<f4", 4, None):
        array = msgpack.ExtType(1, msgpack.packb([dtype, [1], b"1234"]))
        with pytest.raises(BadRecord, match="no msgpack of a record"):
            decode_any(msgpack.packb({"cells": array}))


def tfds_decoder() -> Callable[[bytes], Any]:
    """Returns what decodes the records of a dataset of tfds with boxes and class labels."""
    features = pytest.importorskip("tensorflow_datasets").features
    from tensorflow_datasets.core import example_parser

    objects = {
        "bbox": features.Tensor(shape=(4,), dtype=np.float32),
        "label": features.ClassLabel(names=NAMES),
    }
    spec = features.FeaturesDict(
        {
            "image": features.Image(encoding_format="png"),
            "phrase": features.Text(),
            "objects": features.Sequence(objects),
        }
    )
    parser = example_parser.ExampleParserNp(spec.get_serialized_info())
    return lambda data: pg_tfds._decode(spec, parser, data)


def tfds_record(image: bytes, boxes: list[list[float]], labels: list[int], phrase: str) -> bytes:
    """Returns a record as tfds stores it: a `tf.train.Example`."""
    example = arrayrecord._example_class()()
    for name, kind, values in (
        ("image", "bytes", [image]),
        ("phrase", "bytes", [phrase.encode("utf-8", "surrogatepass")]),
        ("objects/bbox", "floats", [number for box in boxes for number in box]),
        ("objects/label", "ints", labels),
    ):
        feature = example.features.feature.add()
        feature.key = name
        getattr(feature.value, kind).SetInParent()
        getattr(feature.value, kind).value.extend(values)
    return example.SerializeToString()


@pytest.mark.needs("tensorflow_datasets")
def test_damaged_records_of_tfds_are_records_or_bad_records(tmp_path):
    good = tfds_record(b"png", [[1, 2, 3, 4], [5, 6, 7, 8]], [0, 1], "cat")
    assert 3_000 < read_damaged(good, tfds_decoder(), 10_000) < 10_000


@dataclass(frozen=True)
class Decoded:
    """Records of tfds that are decoded when they are read."""

    parts: list[bytes]
    decode: Callable[[bytes], Any]
    root: None = None

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, index: Any) -> Any:
        return self.decode(self.parts[index])


TFDS_CHANGES = [
    *(Change("boxes", changed_first(lambda box, n=n: [n, *box[1:]])) for n in (NAN, float("inf"))),
    Change("boxes", changed_first(lambda box: [box[0], box[1], box[0], box[3]])),
    Change("boxes", changed_first(lambda box: [n + 500 for n in box])),
    Change("boxes", changed_first(lambda box: box[:3])),
    *(Change("labels", labels) for labels in ([], [99] * 3, [-1] * 3, [0] * 9)),
    *(Change("phrase", text) for text in ("", " ", "x\ud800")),
    Change("phrase", "a  b", "a b"),
    Change("image", b"\x89PNG"),
    Change("image", b""),
]


@pytest.mark.needs("tensorflow_datasets")
@pytest.mark.parametrize("files", FILES)
def test_mutated_records_of_tfds(tmp_path, files):
    draw_images(tmp_path)
    image = (tmp_path / "a.png").read_bytes()
    decode = tfds_decoder()
    source = Source(boxes="objects.bbox", label="objects.label", empty="keep")

    def law(rows: list[tuple[Item, list[Change]]]) -> None:
        parts = []
        for item, changes in rows:
            record = {"image": image, "phrase": "cat", **item._asdict()}
            parts.append(tfds_record(**applied(record, item, changes)))
        examples = Examples("a", source, Decoded(parts, decode), DATA, 14)
        for index, (item, changes) in enumerate(rows):
            check(examples, index, expected(item, changes))

    run(files, mutated(TFDS_CHANGES), law)

"""Names of classes that a dataset declares: from the files to the question and the answer."""

import io
import json
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from pg_ground.config import Data, Source
from pg_ground.data.class_names import names_of_features, names_of_schema
from pg_ground.data.datasets import open_examples
from pg_ground.data.records import BadRecord
from pg_ground.data.sources import open_records

NAMES = ["hard hat", "face shield"]
LABEL = {"names": NAMES, "_type": "ClassLabel"}
INT = {"dtype": "int64", "_type": "Value"}
LOC = "<loc0170><loc0128><loc0512><loc0384>"
"""The box [10, 10, 20, 20] (x, y, w, h) in an image of 80 x 60 pixels."""


def png() -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (80, 60)).save(out, "PNG")
    return out.getvalue()


def write_rows(path: Path, rows: list[dict[str, Any]], metadata: object = None) -> Path:
    """Writes rows as parquet, with the metadata of `datasets` if there are any."""
    table = pa.Table.from_pylist(rows)
    if metadata is not None:
        text = metadata if isinstance(metadata, bytes) else json.dumps(metadata).encode()
        table = table.replace_schema_metadata({b"huggingface": text})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)
    return path


def features(**fields: Any) -> dict[str, Any]:
    return {"info": {"features": fields}}


def answers(uri: str, **entry: Any) -> list[str]:
    """Returns the prompt and the answer of each question, or the kind of its fault."""
    source = Source(uri=uri, box_format="xywh_px", **entry)
    examples = open_examples("mine", source, Data(max_boxes=4), 14)
    texts = []
    for index in range(len(examples)):
        try:
            texts.append(f"{examples[index].prompt}: {examples[index].suffix}")
        except BadRecord as bad:
            texts.append(f"{bad.kind}: {bad}")
    return texts


def notes_of(records: Any) -> tuple[str, ...]:
    return records.notes


def objects(*categories: Any) -> dict[str, Any]:
    boxes = [[10, 10, 20, 20]] * len(categories)
    return {"image": png(), "objects": {"bbox": boxes, "category": list(categories)}}


COLUMNS = {"bbox": {"feature": {"feature": INT, "_type": "List"}, "_type": "List"}}
DECLARATIONS = {
    "List": {**COLUMNS, "category": {"feature": LABEL, "_type": "List"}},
    "Sequence of dict": {
        "feature": {"bbox": {"feature": INT, "length": 4, "_type": "Sequence"}, "category": LABEL},
        "length": -1,
        "_type": "Sequence",
    },
    "Sequence": {"category": {"feature": LABEL, "length": -1, "id": None, "_type": "Sequence"}},
    "LargeList": {"category": {"feature": LABEL, "_type": "LargeList"}},
    "list": {"category": [{"num_classes": 2, "names": NAMES, "id": None, "_type": "ClassLabel"}]},
}


@pytest.mark.parametrize("name", DECLARATIONS)
def test_labels_of_objects_are_the_declared_names(tmp_path, name):
    path = write_rows(
        tmp_path / "a.parquet",
        [objects(0), objects(1, 0), objects()],
        features(objects=DECLARATIONS[name], image={"_type": "Image"}),
    )
    entry = {"boxes": "objects.bbox", "label": "objects.category", "prompt": "detect all"}
    assert answers(f"parquet:{path}", empty="keep", **entry) == [
        f"detect all: {LOC} hard hat",
        f"detect all: {LOC} face shield ; {LOC} hard hat",
        "detect all: ",
    ]
    records = open_records(f"parquet:{path}")
    assert notes_of(records) == ("objects.category: 2 class names from the file",)


def test_a_list_of_structs_has_its_names(tmp_path):
    rows = [{"image": png(), "objects": [{"bbox": [10, 10, 20, 20], "category": 1}]}]
    declared = features(objects=[{"bbox": {"feature": INT, "_type": "List"}, "category": LABEL}])
    path = write_rows(tmp_path / "a.parquet", rows, declared)
    entry = {"boxes": "objects.bbox", "label": "objects.category", "prompt": "detect all"}
    assert answers(f"parquet:{path}", **entry) == [f"detect all: {LOC} face shield"]
    entry = {"boxes": "objects[].bbox", "phrase": "objects[].category"}
    assert answers(f"parquet:{path}", **entry) == [f"detect face shield: {LOC} face shield"]


def test_a_class_of_the_image_is_a_phrase_or_an_answer(tmp_path):
    labels = (0, 1, -1, None, 7)
    rows = [
        {"image": png(), "label": label, "split": n % 2, "n": n} for n, label in enumerate(labels)
    ]
    declared = features(
        label=LABEL,
        split={"names": ["left half", "right half"], "_type": "ClassLabel"},
        n=INT,
    )
    path = write_rows(tmp_path / "a.parquet", rows, declared)
    entry = {"target": "text", "prompt": "answer {split} {n}", "suffix": "{label}"}
    texts = answers(f"parquet:{path}", **entry)
    assert texts[:2] == ["answer left half 0: hard hat", "answer right half 1: face shield"]
    assert texts[2].startswith("bad_text") and texts[3].startswith("bad_text")
    assert texts[4] == "bad_record: class 7 of label: there are 2 names"
    notes = notes_of(open_records(f"parquet:{path}"))
    assert notes == ("label: 2 class names from the file", "split: 2 class names from the file")


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        b"{",
        b"[]",
        {"info": None},
        {"info": {"features": []}},
        features(label=INT),
        features(label={"num_classes": 2, "_type": "ClassLabel"}),
        features(other=LABEL),
        features(label={"names": ["0", "1"], "_type": "ClassLabel"}),
    ],
)
def test_numbers_stay_numbers_if_no_name_is_declared(tmp_path, metadata):
    rows = [{"label": 1, "text": "x"}, {"label": 0, "text": None}]
    path = write_rows(tmp_path / "a.parquet", rows, metadata)
    records = open_records(f"parquet:{path}")
    assert [records[0], records[1]] == rows


def test_a_column_of_text_stays_and_whole_floats_are_classes(tmp_path):
    rows = [{"label": "cat", "other": 1.0}, {"label": "1", "other": None}]
    path = write_rows(tmp_path / "a.parquet", rows, features(label=LABEL, other=LABEL))
    records = open_records(f"parquet:{path}")
    assert [records[0], records[1]] == [{"label": "cat", "other": "face shield"}, rows[1]]


def test_each_file_has_its_own_names(tmp_path):
    other = {"names": ["face shield", "hard hat", "boot"], "_type": "ClassLabel"}
    write_rows(tmp_path / "a.parquet", [{"label": 0}], features(label=LABEL))
    write_rows(tmp_path / "b.parquet", [{"label": 0}, {"label": 2}], features(label=other))
    write_rows(tmp_path / "c.parquet", [{"label": 0}])
    records = open_records(f"parquet:{tmp_path}")
    values = [records[i]["label"] for i in range(4)]
    assert values == ["hard hat", "face shield", "boot", 0]


def test_names_in_metadata():
    field = {"names": ["a b", "ä"], "_type": "ClassLabel"}
    assert names_of_features({"x.y": {"_type": field}}) == {("x.y", "_type"): ["a b", "ä"]}
    assert names_of_schema(None) == names_of_schema({b"pandas": b"{}"}) == {}
    assert names_of_features({"a": [[field]], "b": [field, field]}) == {("a",): ["a b", "ä"]}


CARD_TYPES = [
    [{"name": "label", "dtype": {"class_label": {"names": {"0": "cat", "1": "dog"}}}}],
    [{"name": "label", "dtype": {"class_label": {"names": {1: "dog", 0: "cat"}}}}],
    [{"name": "label", "dtype": {"class_label": {"names": ["cat", "dog"]}}}],
    [{"name": "label", "sequence": {"class_label": {"names": {"0": "cat", "1": "dog"}}}}],
    [{"name": "label", "list": {"class_label": {"names": {"0": "cat", "1": "dog"}}}}],
]


@pytest.fixture
def put(tmp_path, monkeypatch):
    """Writes a dataset of the hub with a README into the cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    folder = tmp_path / "hub" / "datasets--org--ds"

    def put_files(card: object, rows: dict[str, list[dict[str, Any]]], metadata: object = None):
        (folder / "refs").mkdir(parents=True, exist_ok=True)
        (folder / "refs" / "main").write_text("0" * 40)
        for name, values in rows.items():
            write_rows(folder / "snapshots" / ("0" * 40) / name, values, metadata)
        text = f"---\n{yaml.safe_dump(card)}---\n"
        (folder / "snapshots" / ("0" * 40) / "README.md").write_text(text)

    return put_files


def hub_labels(location: str) -> list[Any]:
    records = open_records(f"hf:{location}")
    return [records[i]["label"] for i in range(len(records))]


@pytest.mark.parametrize("fields", CARD_TYPES)
@pytest.mark.parametrize("config", [{}, {"config_name": "default"}, {"config_name": "other"}])
def test_names_of_a_readme_hold_for_files_without_names(put, fields, config):
    rows = {"data/train-00000-of-00001.parquet": [{"label": 1}, {"label": 0}, {"label": None}]}
    put({"dataset_info": config | {"features": fields}}, rows)
    assert hub_labels("org/ds@train?offline=1") == ["dog", "cat", None]
    notes = notes_of(open_records("hf:org/ds@train?offline=1"))
    assert notes == ("label: 2 class names from the README",)
    put({"dataset_info": config | {"features": fields}}, rows, features(label=LABEL))
    assert hub_labels("org/ds@train?offline=1") == ["face shield", "hard hat", None]


def test_each_config_of_a_readme_has_its_names(put):
    def info(config: str, *names: str) -> dict[str, Any]:
        label = {"class_label": {"names": {str(i): name for i, name in enumerate(names)}}}
        inner = {"name": "label", "struct": [{"name": "kind", "dtype": label}]}
        return {"config_name": config, "features": [inner]}

    configs = [
        {"config_name": "pets", "data_files": "pets/*.parquet", "default": True},
        {"config_name": "farm", "data_files": "farm/*.parquet"},
    ]
    rows = [{"label": {"kind": 1, "n": 1}}]
    card = {
        "configs": configs,
        "dataset_info": [info("farm", "pig", "cow"), info("pets", "a", "b")],
    }
    put(card, {"pets/0.parquet": rows, "farm/0.parquet": rows})
    assert hub_labels("org/ds@train?offline=1") == [{"kind": "b", "n": 1}]
    assert hub_labels("org/ds@train?config=farm&offline=1") == [{"kind": "cow", "n": 1}]
    assert hub_labels("org/ds@train?config=pets&offline=1") == [{"kind": "b", "n": 1}]


@pytest.mark.parametrize(
    "info",
    [
        None,
        [],
        "x",
        {"features": "x"},
        {"features": [{"dtype": 1}, 5, {"name": "label"}]},
        {"features": [{"name": "label", "dtype": {"class_label": {"names": {"a": "x"}}}}]},
        [{"config_name": "a", "features": CARD_TYPES[0]}, {"config_name": "b"}],
    ],
)
def test_a_readme_that_declares_no_names_leaves_numbers(put, info):
    put({"dataset_info": info}, {"train.parquet": [{"label": 1}]})
    assert hub_labels("org/ds@train?offline=1") == [1]


@pytest.mark.parametrize("path", [("label",), ("objects", "category")])
def test_declared_classes_that_share_one_name_are_listed(tmp_path, path):
    names = {"names": ["cat", "dog", "cat ", "ox"], "_type": "ClassLabel"}
    row = {"label": 1} if path == ("label",) else {"objects": {"category": [1]}}
    declared = (
        features(label=names) if path == ("label",) else features(objects={"category": names})
    )
    file = write_rows(tmp_path / "a.parquet", [row], declared)
    name = ".".join(path)
    assert notes_of(open_records(f"parquet:{file}", "a", True, True)) == (
        f"{name}: 4 class names from the file",
        f"{name}: 2 classes (0, 2) have the name 'cat' and are one class",
    )

"""One key twice in an object: no file loses a box, a row or a list of rows without a word."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import call
from PIL import Image

from pg_ground.config import Data, Source
from pg_ground.data.datasets import open_examples
from pg_ground.data.records import BadRecord
from pg_ground.data.sources import open_records
from pg_ground.readers import locations
from pg_ground.rewards.text_rewards import TEXT_REWARDS, TextExample
from pg_ground.types import UserError

LEFT = [10, 10, 30, 30]
RIGHT = [40, 10, 60, 30]
LOC_LEFT = "<loc0170><loc0128><loc0512><loc0384>"
LOC_RIGHT = "<loc0170><loc0512><loc0512><loc0767>"
TWICE = f'{{"image": "a.png", "bbox": {LEFT}, "bbox": {RIGHT}}}'
INSIDE = f'{{"image": "a.png", "bbox": {LEFT}, "more": [{{"k": 1, "k": 1}}]}}'
ONCE = f'{{"image": "a.png", "bbox": {RIGHT}}}'


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (80, 60)).save(tmp_path / "a.png")
    return tmp_path


def answers(uri: str, **settings: Any) -> tuple[list[str], list[str]]:
    """Returns the answers of a source, and its bad records (`kind: message`)."""
    fields: dict[str, Any] = {"prompt": "detect", "boxes": "bbox", "name": "x"} | settings
    examples = open_examples("mine", Source(uri=uri, **fields), Data(max_boxes=4), 14)
    good, bad = [], []
    for index in range(len(examples)):
        try:
            good.append(examples[index].suffix)
        except BadRecord as fault:
            bad.append(f"{fault.kind}: {fault}")
    return good, bad


def refusal(uri: str, **settings: Any) -> str:
    with pytest.raises(UserError) as refused:
        answers(uri, **settings)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 400
    return str(refused.value)


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.parametrize("scheme", ["jsonl", "json", "json#", "yaml"])
def test_a_record_with_a_key_twice_is_one_bad_record(folder, scheme):
    rows = [TWICE, ONCE, INSIDE]
    if scheme == "jsonl":
        uri = f"jsonl:{write(folder / 'a.jsonl', chr(10).join(rows))}"
    elif scheme == "json#":
        content = f'{{"val": [{", ".join(rows)}]}}'
        uri = f"json:{write(folder / 'a.json', content)}#val"
    else:
        path = write(folder / "a.json", f"[{','.join(rows)}]")
        mixture = f"datasets:\n- json_path: {path}\n"
        uri = f"json:{path}" if scheme == "json" else f"yaml:{write(folder / 'm.yaml', mixture)}"
    good, bad = answers(uri)
    assert good == [f"{LOC_RIGHT} x"] and len(bad) == 2
    for text, key in zip(bad, ("bbox", "k"), strict=True):
        assert text.startswith("bad_json: ") and f"the key '{key}' is there twice" in text


def test_a_list_of_records_under_a_key_twice_is_refused(folder):
    path = write(folder / "a.json", f'{{"val": [{ONCE}], "val": [{ONCE}, {ONCE}]}}')
    assert "in a.json, the key 'val' is there twice" in refusal(f"json:{path}#val")
    mixture = f"datasets:\n- json_path: {path}\n  json_path: {path}\n"
    path = write(folder / "m.yaml", mixture)
    assert "the key 'json_path' is there twice" in refusal(f"yaml:{path}")
    path = write(folder / "m.yaml", "datasets: []\ndatasets: []\n")
    assert "the key 'datasets' is there twice" in refusal(f"yaml:{path}")


def annotation(number: int, more: str = "") -> str:
    return f'{{"id": {number}, "image_id": {number}, "category_id": 0, "bbox": {LEFT}{more}}}'


def coco(folder: Path, images: str = "", annotations: str = "", categories: str = "") -> str:
    """Returns the uri of a file of two images. A list may be given as text."""
    images = images or ",".join(f'{{"id": {i}, "file_name": "a.png"}}' for i in range(2))
    annotations = annotations or f"{annotation(0)}, {annotation(1)}"
    categories = categories or '{"id": 0, "name": "cat"}'
    text = f'"images": [{images}], "annotations": [{annotations}], "categories": [{categories}]'
    return f"coco:{write(folder / 'c.json', f'{{{text}}}')}?ask=category"


COCO = {"boxes": "boxes", "box_format": "xywh_px", "name": "{category}"}
CAT = "<loc0170><loc0128><loc0682><loc0512> cat"


def test_an_entry_of_coco_with_a_key_twice_is_one_bad_record(folder):
    second = annotation(1, f', "bbox": {RIGHT}')
    uri = coco(folder, annotations=f"{annotation(0)}, {second}")
    assert answers(uri, **COCO) == (
        [CAT],
        ["bad_json: annotation 1 (id 1) of c.json: the key 'bbox' is there twice"],
    )
    names = '{"id": 0, "file_name": "a.png"}, {"id": 1, "file_name": "b.png", "file_name": "a.png"}'
    assert answers(coco(folder, images=names), **COCO) == (
        [CAT],
        ["bad_json: image 1 (id 1) of c.json: the key 'file_name' is there twice"],
    )
    uri = coco(folder, categories='{"id": 0, "name": "cat", "name": "dog"}')
    assert "category 0 (id 0) of c.json: the key 'name' is there twice" in refusal(uri, **COCO)


def test_a_list_of_coco_that_is_there_twice_is_refused(folder):
    uri = coco(folder, annotations=f'{annotation(0)}], "annotations": [{annotation(1)}')
    assert "in c.json, the key 'annotations' is there twice" in refusal(uri, **COCO)
    uri = coco(folder, images='{"id": 0, "file_name": "a.png"}, {"id": 0, "file_name": "a.png"}')
    assert "entries 0 (a.png) and 1 (a.png) of images have the same id 0" in refusal(uri, **COCO)


def refer(folder: Path, refs: str, annotations: str, top: str = "") -> str:
    write(folder / "grefs(unc).json", f"[{refs}]")
    lists = f'"images": [{{"id": 0, "file_name": "a.png"}}], "annotations": [{annotations}]'
    names = '"categories": [{"id": 0, "name": "cat"}]'
    write(folder / "instances.json", f"{{{top}{lists}, {names}}}")
    return f"refer:{folder}?dataset=grefcoco&split_by=unc&split=val"


REF = '{"split": "val", "image_id": 0, "ann_id": [0], "sentences": [{"sent": "cat"}]}'


def test_an_entry_of_refer_with_a_key_twice_is_one_bad_record(folder):
    settings = {"boxes": "boxes", "box_format": "xywh_px", "name": "cat"}
    twice = REF.replace('"ann_id"', '"ann_id": [1], "ann_id"')
    whole = annotation(0)
    assert answers(refer(folder, f"{REF}, {twice}", whole), **settings) == (
        [CAT],
        ["bad_json: ref 1 of grefs(unc).json: the key 'ann_id' is there twice"],
    )
    second = annotation(1, f', "bbox": {RIGHT}').replace('"image_id": 1', '"image_id": 0')
    refs = f"{REF}, {REF.replace('[0]', '[1]')}"
    assert answers(refer(folder, refs, f"{whole}, {second}"), **settings) == (
        [CAT],
        ["bad_json: annotation 1: the key 'bbox' is there twice"],
    )
    uri = refer(folder, REF, whole, '"annotations": [], ')
    assert "instances.json, the key 'annotations' is there twice" in refusal(uri, **settings)


def test_a_question_of_point_bench_with_a_key_twice_is_one_bad_record(folder):
    whole = '{"category": "c", "mask_filename": "m.png", "image_filename": "a.png"'
    write(folder / "data.json", f'[{whole}}}, {whole}, "category": "d"}}, 5]')
    records = open_records(f"pointarena:{folder}")
    assert len(records) == 3 and records[0]["category"] == "c"
    for index, message in (
        (1, "question 1 .*: the key 'category' is there twice"),
        (2, "is 5, not"),
    ):
        with pytest.raises(BadRecord, match=message):
            records[index]


@pytest.mark.parametrize("scheme", ["parquet", "arrow"])
def test_two_columns_with_one_name_are_refused(folder, scheme):
    table = pa.Table.from_arrays(
        [pa.array(["a.png"]), pa.array([LEFT]), pa.array([RIGHT])], ["image", "bbox", "bbox"]
    )
    path = folder / f"a.{scheme}"
    if scheme == "parquet":
        pq.write_table(table, path)
    else:
        with pa.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table)
    assert f"two columns of a.{scheme} are called 'bbox'" in refusal(f"{scheme}:{path}")


BOTH = [
    f'{{"cat": [{LEFT}], "cat": [{RIGHT}]}}',
    f"{{'cat': [{LEFT}], 'cat': [{RIGHT}]}}",
    f'{{"bbox_2d": {LEFT}, "label": "cat", "bbox_2d": {RIGHT}}}',
    f'{{"bbox_2d": {LEFT}, "label": "cat", "bbox_2d": {RIGHT}, "label": "cat"}}',
]
"""Texts of two cats."""


@pytest.mark.parametrize("text", BOTH)
def test_a_text_of_boxes_keeps_the_boxes_of_both_names(folder, text):
    row = json.dumps({"image": "a.png", "bbox": text})
    good = answers(f"jsonl:{write(folder / 'a.jsonl', row)}", name="")
    assert good == ([f"{LOC_LEFT} cat ; {LOC_RIGHT} cat"], [])


@pytest.mark.parametrize("text", [*BOTH, f"I see {BOTH[0]}", f'{{"cat": {LEFT}, "cat": {RIGHT}}}'])
def test_an_answer_keeps_the_boxes_of_both_names(text):
    read = locations.read_any(text, 4)
    assert [(list(item.numbers or ()), item.label) for item in read] == [
        (LEFT, "cat"),
        (RIGHT, "cat"),
    ]


@pytest.mark.parametrize("reader", [locations.json_boxes, locations.dict_boxes, locations.ovd])
def test_the_grammars_keep_the_boxes_of_both_names(reader):
    text = {
        locations.json_boxes: f"[{BOTH[3]}]",
        locations.dict_boxes: BOTH[0],
        locations.ovd: f"<answer>[{{'Position': {LEFT}, 'Confidence': 1, 'Position': {RIGHT}, "
        "'Confidence': 0.5}]</answer>",
    }[reader]
    reading = reader(text)
    assert reading.ok and [list(item.numbers) for item in reading.locations] == [LEFT, RIGHT]


NAMES = [name for name in TEXT_REWARDS if name.startswith("dict_")]


@pytest.mark.parametrize("name", NAMES)
def test_a_gold_answer_with_a_name_twice_earns_the_most_and_half_of_it_less(name):
    def earned(text: str, gold: str) -> float:
        example = TextExample("", gold, (), (), (), (80, 60), "text", "mine", 0, 9)
        return TEXT_REWARDS[name](text, example)

    joined, half = f'{{"cat": [{LEFT}, {RIGHT}]}}', f'{{"cat": [{LEFT}]}}'
    for gold in (BOTH[0], joined):
        assert earned(BOTH[0], gold) == earned(joined, gold) == 1
        assert earned(half, gold) < 1 or name == "dict_format"
    assert earned(BOTH[0], half) < 1 or name == "dict_format"


PREDICTION = f'{{"pred": {LEFT}, "gold": {LEFT}}}'
TWO = f'{{"pred": {RIGHT}, "pred": {LEFT}, "gold": {LEFT}}}'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.jsonl", f"{PREDICTION}\n{TWO}\n", "line 2: the key 'pred' is there twice"),
        ("p.jsonl", f"{TWO}\n{PREDICTION}\n", "line 1: the key 'pred' is there twice"),
        ("p.json", f"[{PREDICTION}, {TWO}]", "p.json: the key 'pred' is there twice"),
        ("p.json", f'{{"a": {PREDICTION}, "a": {PREDICTION}}}', "the key 'a' is there twice"),
        ("p.json", f'{{"results": [], "results": [{PREDICTION}]}}', "the key 'results' is there"),
        ("p.json", TWO.replace(", ", ",\n") * 2, "object at line 1: the key 'pred' is there twice"),
    ],
)
def test_predictions_with_a_key_twice_are_refused(tmp_path, name, content, message):
    path = write(tmp_path / name, content)
    with pytest.raises(UserError) as refused:
        call("evaluate", f"--predictions={path}", "--benchmark=rec", "--fields=pred=pred,gold=gold")
    assert message in str(refused.value)


def test_the_text_of_a_prediction_keeps_the_values_of_both_names(tmp_path):
    rows = [{"out": f'{{"box": {RIGHT}, "box": {LEFT}}}', "gold": [LEFT, RIGHT]}]
    path = write(tmp_path / "p.json", json.dumps(rows))
    folder = tmp_path / "scores"
    for pred in ("out", "out.box"):
        call(
            "evaluate",
            f"--predictions={path}",
            "--benchmark=objects",
            f"--fields=pred={pred},gold=gold",
            f"--out={folder}",
        )
        assert json.loads((folder / "eval.json").read_text())["acc50"] == 1

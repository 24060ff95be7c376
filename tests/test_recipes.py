"""The entries of configs/data.py, on real samples or on small files with the same schema."""

import io
import json
import re
import runpy
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pg_ground import config, tokenizer
from pg_ground.config import Data, Source
from pg_ground.data.bad_records import BadRecords
from pg_ground.data.batches import training_batches
from pg_ground.data.datasets import Examples, open_examples
from pg_ground.data.records import BadRecord
from pg_ground.data.text_budgets import check_budgets, measure_budget
from pg_ground.types import BOXES, TEXT, Example, UserError

ROOT = Path(__file__).parents[1]
SAMPLES = ROOT.parent / "shared" / "data"
needs_samples = pytest.mark.skipif(not SAMPLES.is_dir(), reason="shared/data is not here")

DATA = Data(prompt_length=96, suffix_length=128, max_boxes=10)
BOX = r"(<loc\d{4}>){4}"
POINT = r"(<loc\d{4}>){2}"
PHOTOGRAPHS = f"jsonl:{SAMPLES}/refcoco/triples.jsonl"


@pytest.fixture(scope="module")
def entries() -> dict[str, Source]:
    return runpy.run_path(str(ROOT / "configs/data.py"))["ENTRIES"]


def open_entry(source: Source, uri: str, **settings: Any) -> Examples:
    """Returns the questions of an entry whose records come from `uri`."""
    return open_examples("x", replace(source, uri=uri, **settings), DATA, 56)


def usable_examples(examples: Examples, *kinds: str) -> Iterator[Example]:
    """Yields the usable examples. Bad records must be of one of these kinds."""
    for index in range(len(examples)):
        try:
            example = examples[index]
        except BadRecord as bad:
            assert bad.kind in kinds
        else:
            yield example


def is_loc_answer(suffix: str, unit: str) -> bool:
    """Returns whether a suffix consists of objects of one kind, with or without names.

    It must not hold characters of JSON.

    Args:
      unit: the pattern of the loc tokens of an object: BOX or POINT.
    """
    has_form = re.fullmatch(rf"{unit}( [^;]+?)?( ; {unit}( [^;]+?)?)*", suffix)
    return bool(has_form) and not re.search(r'[\[\]{}"]', suffix)


def png(side: int = 20) -> bytes:
    """Returns the file of a random square image."""
    pixels = np.random.default_rng(0).integers(0, 255, (side, side, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def write_parquet(path: Path, rows: list[dict]) -> str:
    """Writes rows to a parquet file, and returns its uri."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return f"parquet:{path}"


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def pixmo_points(image_field: str, side: int = 20) -> list[dict[str, Any]]:
    """Returns the records of the PixMo sample, each with a random image."""
    image = {"bytes": png(side), "path": None}
    records = read_json_lines(SAMPLES / "pixmo/pixmo_points.jsonl")
    return [record | {image_field: image} for record in records]


@needs_samples
def test_refcoco_in_the_files_of_the_refer_toolkit(entries, tmp_path):
    """Not every photograph is among the samples."""
    shutil.copytree(SAMPLES / "refcoco/annotations/emma_refcocog", tmp_path / "refcocog")
    images = SAMPLES / "refcoco/images"
    uri = f"refer:{tmp_path}?dataset=refcocog&split_by=umd&split=train&images={images}"
    examples = open_entry(entries["refcoco_refer"], uri)
    prompts = set()
    for index in range(len(examples)):
        record, sentence = examples.record(index)
        prompts.add(record["sentences"][sentence]["raw"])
    assert len(examples) >= 5
    assert len(prompts) > 4
    usable = list(usable_examples(examples, "missing_image"))
    assert usable
    for example in usable:
        assert is_loc_answer(example.suffix, BOX)
        assert example.prompt.startswith("detect ")


@needs_samples
def test_photographs_with_boxes_agree_in_both_formats(entries):
    fields = {"image": "image", "image_root": "images", "phrase": "expression"}
    xywh = open_entry(entries["refcoco_refer"], PHOTOGRAPHS, boxes="bbox_xywh", **fields)
    xyxy = open_entry(entries["refcoco_jxu124"], PHOTOGRAPHS, boxes="bbox_xyxy", **fields)
    assert len(xywh) == 644
    for index in range(0, 644, 40):
        assert xywh[index].suffix == xyxy[index].suffix
        assert is_loc_answer(xywh[index].suffix, BOX)


def test_the_parquet_schemas_of_the_hub(entries, tmp_path):
    (tmp_path / "coco").mkdir()
    (tmp_path / "coco/1.jpg").write_bytes(png())
    jxu124 = {
        "sentences": [{"raw": "left dog", "sent": "left dog"}, {"raw": "it", "sent": "it"}],
        "bbox": [2.0, 4.0, 12.0, 14.0],
        "image_path": "1.jpg",
        "split": "train",
        "ref_id": 1,
    }
    uri = write_parquet(tmp_path / "j.parquet", [jxu124])
    examples = open_entry(entries["refcoco_jxu124"], uri)
    prompts = [example.prompt for example in usable_examples(examples)]
    assert prompts == ["detect left dog", "detect it"]
    assert examples[0].suffix == "<loc0205><loc0102><loc0716><loc0614> left dog"
    lmms = {
        "question_id": "1",
        "image": {"bytes": png(), "path": None},
        "question": "Please ...",
        "answer": ["a", "b", "c"],
        "segmentation": [1.0],
        "bbox": [2.0, 4.0, 10.0, 10.0],
        "iscrowd": 0,
        "file_name": "1.jpg",
    }
    examples = open_entry(entries["refcoco_lmms"], write_parquet(tmp_path / "l.parquet", [lmms]))
    assert len(examples) == 3
    assert examples[2].suffix == "<loc0205><loc0102><loc0716><loc0614> c"


@needs_samples
def test_pixmo_points_in_percent_are_limited_and_distinct(entries, tmp_path):
    records = pixmo_points("image_url", side=64)
    uri = write_parquet(tmp_path / "p.parquet", records)
    examples = open_entry(entries["pixmo_points"], uri)
    assert len(examples) == 4
    for example, record in zip(usable_examples(examples), records, strict=True):
        assert is_loc_answer(example.suffix, POINT)
        assert example.prompt == f"point to {record['label']}"
        bins = {(round(p["x"] * 10.23), round(p["y"] * 10.23)) for p in record["points"]}
        assert len(example.points.yx) == min(8, len(bins))
        annotated = np.array([[p["y"], p["x"]] for p in record["points"]]) / 100
        for yx in example.points.yx:
            assert np.abs(annotated - yx).sum(1).min() < 1e-6


def test_pixmo_counts_in_parquet(entries, tmp_path):
    image = {"bytes": png(), "path": None}
    record = {"image_url": image, "image_sha256": "", "label": "cows", "count": 8}
    uri = write_parquet(tmp_path / "c.parquet", [record])
    example = open_entry(entries["pixmo_count"], uri)[0]
    assert example.prompt == "answer en how many cows are there?"
    assert (example.suffix, example.target) == ("8", TEXT)


@needs_samples
def test_pixmo_count_rows(entries, tmp_path):
    text = (SAMPLES / "counting/pixmo_count_val540.jsonl").read_text()
    (tmp_path / "pixmo-count/validation").mkdir(parents=True)
    (tmp_path / "pixmo-count/validation/00000.jpg").write_bytes(png())
    (tmp_path / "c.jsonl").write_text(text.removesuffix("\n"))
    examples = open_entry(entries["count_jsonl"], f"jsonl:{tmp_path}/c.jsonl")
    assert len(examples) == len(text.splitlines()) == 538
    assert examples[0].prompt == "answer en how many cows are there?"
    assert examples[0].suffix == "8"


@needs_samples
def test_coco_detection_per_category_and_per_image(entries):
    file = SAMPLES / "refcoco/annotations/emma_refcocog/instances.json"
    images = SAMPLES / "refcoco/images"
    category_uri = f"coco:{file}?ask=category&images={images}"
    by_category = open_entry(entries["coco_detection"], category_uri)
    by_image = open_entry(entries["coco_all_classes"], f"coco:{file}?ask=image&images={images}")
    assert len(by_image) == 15 < len(by_category)
    for examples in (by_category, by_image):
        usable = list(usable_examples(examples, "missing_image", "empty"))
        assert usable
        for example in usable:
            assert is_loc_answer(example.suffix, BOX)
            assert 0 < len(example.boxes.yxyx) <= 10


@needs_samples
def test_files_of_easydistill(entries, tmp_path):
    path = SAMPLES / "multi_box/multi_box_grounding_RL_sample.json"
    records = json.loads(path.read_text())
    for record in records:
        size = (record["width"], record["height"])
        Image.new("RGB", size).save(tmp_path / record["image_path"])
    (tmp_path / "m.json").write_text(json.dumps(records))
    examples = open_entry(entries["easydistill_multi"], f"json:{tmp_path}/m.json")
    assert len(examples) == 3
    first = examples[0]
    assert first.suffix.startswith("<loc0479><loc0364><loc0791><loc0579> 0 ; ")
    assert first.names == ("0", "2")
    assert first.boxes.label.tolist() == [0, 1, 1]

    image_path = records[0]["image_path"]
    single = {"image_path": image_path, "instruction": "find it", "bbox": [0, 0, 64, 72]}
    (tmp_path / "s.json").write_text(json.dumps([single]))
    examples = open_entry(entries["easydistill_single"], f"json:{tmp_path}/s.json")
    assert examples[0].suffix == "<loc0000><loc0000><loc0102><loc0051>"

    (tmp_path / "d.yaml").write_text(
        "datasets:\n- {json_path: m.json, sampling_strategy: 'first:2'}\n- {json_path: m.json}\n"
    )
    assert len(open_entry(entries["easydistill_yaml"], f"yaml:{tmp_path}/d.yaml")) == 5


@needs_samples
def test_elements_of_screenshots(entries):
    uri = f"jsonl:{SAMPLES}/gui/test.jsonl"
    boxes = open_entry(entries["gui_boxes"], uri)
    points = open_entry(entries["gui_points"], uri)
    records = read_json_lines(SAMPLES / "gui/test.jsonl")
    elements = sum(len(record["test_samples"]) for record in records)
    assert len(boxes) == len(points) == elements
    for index in range(0, elements, 7):
        box, point = boxes[index], points[index]
        (y, x), (y1, x1, y2, x2) = point.points.yx[0], box.boxes.yxyx[0]
        assert y1 <= y <= y2
        assert x1 <= x <= x2
        assert is_loc_answer(box.suffix, BOX)
        assert is_loc_answer(point.suffix, POINT)


PIXMO_POINTS = Source(
    phrase="label",
    target="points",
    points="points",
    point_format="xy_percent",
    max_objects=8,
    prompt="point to {label}",
)


@needs_samples
def test_points_and_boxes_of_opentau_need_only_a_config(tmp_path):
    """The field names are the real ones. Every suffix consists of loc tokens and names."""
    uri = write_parquet(tmp_path / "p.parquet", pixmo_points("image"))
    points = replace(PIXMO_POINTS, uri=uri)
    boxes = Source(
        uri=PHOTOGRAPHS,
        image_root="images",
        phrase="expression",
        boxes="bbox_xywh",
        box_format="xywh_px",
        prompt="detect {expression}",
    )
    tokens = tokenizer.load()
    for source, unit, count, step in ((points, POINT, 4, 1), (boxes, BOX, 644, 30)):
        examples = open_examples("x", source, DATA, 28)
        assert len(examples) == count
        for index in range(0, count, step):
            assert is_loc_answer(examples[index].suffix, unit)
        check_budgets([measure_budget(examples, tokens, DATA)], DATA)


@needs_samples
def test_photographs_points_and_scenes_mix_two_to_one_to_one(tmp_path):
    points_uri = write_parquet(tmp_path / "p.parquet", pixmo_points("image"))
    sources = {
        "photographs": Source(
            uri=PHOTOGRAPHS,
            image_root="images",
            phrase="expression",
            boxes="bbox_xyxy",
            weight=2.0,
        ),
        "points": replace(PIXMO_POINTS, uri=points_uri),
        "scenes": Source(uri="synthetic:train?side=28", boxes="box"),
    }
    bad_records = BadRecords()
    batches = training_batches(
        sources,
        DATA,
        tokenizer.load(),
        image_size=28,
        batch_size=4,
        seed=0,
        bad_records=bad_records,
    )
    questions = []
    for _ in range(50):
        batch = next(batches)
        questions += zip(batch.source.tolist(), batch.index.tolist(), strict=True)
    counts = np.bincount([source for source, _ in questions])
    assert counts.tolist() == [100, 50, 50]
    assert not bad_records.entries()
    photographs = [index for source, index in questions if source == 0]
    assert len(set(photographs)) == 100


def test_rows_of_chats_give_gold_boxes(entries, tmp_path):
    """The boxes of PaliGemma's files and of chats come from the text of the answer."""
    Image.new("RGB", (80, 40)).save(tmp_path / "i.png")
    box = "<loc0256><loc0128><loc0767><loc0512>"
    chat = ["<image>\nFind the cat.", "It is at [10, 10, 40, 30]."]
    qwen = "<|object_ref_start|>cat<|object_ref_end|><|box_start|>(125,250),(500,750)<|box_end|>"
    rows = {
        "paligemma_jsonl": {"image": "i.png", "prefix": "detect cat", "suffix": f"{box} cat"},
        "llava": {
            "image": "i.png",
            "conversations": [{"from": who, "value": v} for who, v in zip("hg", chat, strict=True)],
        },
        "sharegpt": {
            "images": ["i.png"],
            "messages": [{"role": who, "content": v} for who, v in zip("ua", chat, strict=True)],
        },
        "qwen_grounding": {
            "images": ["i.png"],
            "messages": [{"content": chat[0]}, {"content": qwen}],
        },
        "ms_swift": {
            "images": ["i.png"],
            "objects": {"ref": ["cat"], "bbox": [[10, 10, 40, 30]]},
        },
    }
    named = ("paligemma_jsonl", "qwen_grounding", "ms_swift")
    for name, row in rows.items():
        (tmp_path / f"{name}.json").write_text(json.dumps([row]))
        source = replace(entries[name], uri=f"json:{tmp_path}/{name}.json")
        example = open_examples(name, source, DATA, 28)[0]
        assert example.suffix == (f"{box} cat" if name in named else box), name
        expected = "detect cat" if name in ("paligemma_jsonl", "ms_swift") else "Find the cat."
        assert (example.prompt, example.target) == (expected, BOXES), name


def test_every_entry_parses_and_a_wrong_name_is_refused(entries):
    get_config = runpy.run_path(str(ROOT / "configs/data.py"))["get_config"]
    for name in entries:
        assert config.parse(get_config(name)).sft.sources[name] == entries[name]
    both = config.parse(get_config("pixmo_points+gui_boxes")).sft.sources
    assert set(both) == {"pixmo_points", "gui_boxes"}
    with pytest.raises(Exception, match="did you mean pixmo_points"):
        get_config("pixmo_point")


@needs_samples
def test_questions_that_are_whole_sentences_have_their_own_entry(entries, tmp_path):
    lines = (SAMPLES / "counting/superclevr_test200.jsonl").read_text().splitlines()[:20]
    for line in lines:
        file = tmp_path / json.loads(line)["image_path"]
        file.parent.mkdir(exist_ok=True)
        Image.new("RGB", (48, 32)).save(file)
    (tmp_path / "q.jsonl").write_text("\n".join(lines))
    examples = open_entry(entries["count_questions"], f"jsonl:{tmp_path}/q.jsonl")
    assert examples[0].prompt == "answer en How many different items are there in the image?"
    assert examples[0].suffix == "4"
    nested = open_entry(entries["count_jsonl"], f"jsonl:{tmp_path}/q.jsonl")
    message = r"none of 16 questions can be used; .*repeats 'how many' of .*'answer en {phrase}'"
    with pytest.raises(UserError, match=message):
        measure_budget(nested, tokenizer.load(), DATA)

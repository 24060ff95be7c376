"""The entries of configs/data.py on real samples, and where there are none on small files of the true schema."""

import io
import json
import re
import runpy
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pg_ground import config, tokenizer
from pg_ground.config import Data, Source
from pg_ground.data.bad_records import BadRecords
from pg_ground.data.batches import training_batches
from pg_ground.data.datasets import open_examples
from pg_ground.data.records import BadRecord
from pg_ground.data.text_budgets import check_budgets, measure_budget
from pg_ground.types import TEXT

ROOT = Path(__file__).parents[1]
SAMPLES = ROOT.parent / "shared" / "data"
needs_samples = pytest.mark.skipif(not SAMPLES.is_dir(), reason="shared/data is not here")

DATA = Data(prompt_length=96, suffix_length=128, max_boxes=10)
BOX, POINT = r"(<loc\d{4}>){4}", r"(<loc\d{4}>){2}"


@pytest.fixture(scope="module")
def entries() -> dict[str, Source]:
    return runpy.run_path(str(ROOT / "configs/data.py"))["ENTRIES"]


def opened(source: Source, uri: str, **settings):
    return open_examples("x", replace(source, uri=uri, **settings), DATA, 56)


def grammatical(suffix: str, unit: str) -> bool:
    """Whether a suffix is answers of one kind, each with or without a name, and holds nothing of JSON."""
    return bool(re.fullmatch(rf"{unit}( [^;]+?)?( ; {unit}( [^;]+?)?)*", suffix)) and not re.search(
        r'[\[\]{}"]', suffix
    )


def png(side: int = 20) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (side, side, 3), np.uint8)).save(
        out, "PNG"
    )
    return out.getvalue()


def parquet(path: Path, rows: list[dict]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return f"parquet:{path}"


@needs_samples
def test_refcoco_by_the_refer_toolkits_files(entries, tmp_path):
    shutil.copytree(SAMPLES / "refcoco/annotations/emma_refcocog", tmp_path / "refcocog")
    images = SAMPLES / "refcoco/images"
    uri = f"refer:{tmp_path}?dataset=refcocog&split_by=umd&split=train&images={images}"
    found = opened(entries["refcoco_refer"], uri)
    prompts = [
        found.record(i)[0]["sentences"][found.record(i)[1]]["raw"] for i in range(len(found))
    ]
    assert len(found) >= 5 and len(set(prompts)) > 4
    seen = 0
    for i in range(len(found)):
        try:
            example = found[i]
        except BadRecord as bad:
            assert (
                bad.kind == "missing_image"
            )  # not every photograph of the pair is among the samples
            continue
        assert grammatical(example.suffix, BOX) and example.prompt.startswith("detect ")
        seen += 1
    assert seen


@needs_samples
def test_photographs_with_boxes_agree_in_both_formats(entries):
    uri = f"jsonl:{SAMPLES}/refcoco/triples.jsonl"
    base = {"image": "image", "image_root": "images", "phrase": "expression"}
    xywh = opened(entries["refcoco_refer"], uri, boxes="bbox_xywh", **base)
    xyxy = opened(entries["refcoco_jxu124"], uri, boxes="bbox_xyxy", **base)
    assert len(xywh) == 644
    for i in range(0, 644, 40):
        assert xywh[i].suffix == xyxy[i].suffix and grammatical(xywh[i].suffix, BOX)


def test_the_parquet_schemas_of_the_hub(entries, tmp_path):
    (tmp_path / "coco").mkdir()
    (tmp_path / "coco/1.jpg").write_bytes(png())
    jxu = {"sentences": [{"raw": "left dog", "sent": "left dog"}, {"raw": "it", "sent": "it"}], "bbox": [2.0, 4.0, 12.0, 14.0],
           "image_path": "1.jpg", "split": "train", "ref_id": 1}  # fmt: skip
    found = opened(entries["refcoco_jxu124"], parquet(tmp_path / "j.parquet", [jxu]))
    assert [found[i].prompt for i in range(len(found))] == ["detect left dog", "detect it"]
    assert found[0].suffix == "<loc0205><loc0102><loc0716><loc0614> left dog"
    lmms = {"question_id": "1", "image": {"bytes": png(), "path": None}, "question": "Please ...", "answer": ["a", "b", "c"],
            "segmentation": [1.0], "bbox": [2.0, 4.0, 10.0, 10.0], "iscrowd": 0, "file_name": "1.jpg"}  # fmt: skip
    found = opened(entries["refcoco_lmms"], parquet(tmp_path / "l.parquet", [lmms]))
    assert len(found) == 3 and found[2].suffix == "<loc0205><loc0102><loc0716><loc0614> c"


@needs_samples
def test_pixmo_points_in_percent_are_limited_and_distinct(entries, tmp_path):
    rows = [
        json.loads(line) for line in (SAMPLES / "pixmo/pixmo_points.jsonl").read_text().splitlines()
    ]
    for row in rows:
        row["image_url"] = {"bytes": png(64), "path": None}
    found = opened(entries["pixmo_points"], parquet(tmp_path / "p.parquet", rows))
    assert len(found) == 4
    for i, row in enumerate(rows):
        example = found[i]
        assert grammatical(example.suffix, POINT) and example.prompt == f"point to {row['label']}"
        assert len(example.points.yx) == min(
            8, len({(round(p["x"] * 10.23), round(p["y"] * 10.23)) for p in row["points"]})
        )
        everyone = np.array([[p["y"], p["x"]] for p in row["points"]]) / 100
        assert all(np.abs(everyone - yx).sum(1).min() < 1e-6 for yx in example.points.yx)
    text = parquet(
        tmp_path / "c.parquet",
        [
            {
                "image_url": {"bytes": png(), "path": None},
                "image_sha256": "",
                "label": "cows",
                "count": 8,
            }
        ],
    )
    counted = opened(entries["pixmo_count"], text)[0]
    assert (counted.prompt, counted.suffix, counted.target) == (
        "answer en how many cows are there?",
        "8",
        TEXT,
    )


@needs_samples
def test_pixmo_count_rows(entries, tmp_path):
    lines = (SAMPLES / "counting/pixmo_count_val540.jsonl").read_text().splitlines()
    (tmp_path / "pixmo-count/validation").mkdir(parents=True)
    (tmp_path / "pixmo-count/validation/00000.jpg").write_bytes(png())
    (tmp_path / "c.jsonl").write_text("\n".join(lines))
    found = opened(entries["count_jsonl"], f"jsonl:{tmp_path}/c.jsonl")
    assert len(found) == len(lines) == 538
    assert (found[0].prompt, found[0].suffix) == ("answer en how many cows are there?", "8")


@needs_samples
def test_coco_detection_per_category_and_per_image(entries):
    file = SAMPLES / "refcoco/annotations/emma_refcocog/instances.json"
    images = SAMPLES / "refcoco/images"
    by_category = opened(entries["coco_detection"], f"coco:{file}?ask=category&images={images}")
    by_image = opened(entries["coco_all_classes"], f"coco:{file}?ask=image&images={images}")
    assert len(by_image) == 15 < len(by_category)
    for part in (by_category, by_image):
        seen = 0
        for i in range(len(part)):
            try:
                example = part[i]
            except BadRecord as bad:
                assert bad.kind in ("missing_image", "empty")
                continue
            assert grammatical(example.suffix, BOX) and 0 < len(example.boxes.yxyx) <= 10
            seen += 1
        assert seen


@needs_samples
def test_easydistills_files(entries, tmp_path):
    rows = json.loads((SAMPLES / "multi_box/multi_box_grounding_RL_sample.json").read_text())
    for row in rows:
        Image.new("RGB", (row["width"], row["height"])).save(tmp_path / row["image_path"])
    (tmp_path / "m.json").write_text(json.dumps(rows))
    found = opened(entries["easydistill_multi"], f"json:{tmp_path}/m.json")
    assert len(found) == 3
    first = found[0]
    assert first.suffix.startswith("<loc0479><loc0364><loc0791><loc0579> 0 ; ") and first.names == (
        "0",
        "2",
    )
    assert first.boxes.label.tolist() == [0, 1, 1]
    (tmp_path / "s.json").write_text(
        json.dumps(
            [
                {
                    "image_path": rows[0]["image_path"],
                    "instruction": "find it",
                    "bbox": [0, 0, 64, 72],
                }
            ]
        )
    )
    assert (
        opened(entries["easydistill_single"], f"json:{tmp_path}/s.json")[0].suffix
        == "<loc0000><loc0000><loc0102><loc0051>"
    )
    (tmp_path / "d.yaml").write_text(
        "datasets:\n- {json_path: m.json, sampling_strategy: 'first:2'}\n- {json_path: m.json}\n"
    )
    assert len(opened(entries["easydistill_yaml"], f"yaml:{tmp_path}/d.yaml")) == 5


@needs_samples
def test_elements_of_screenshots(entries):
    uri = f"jsonl:{SAMPLES}/gui/test.jsonl"
    boxes, points = (opened(entries[name], uri) for name in ("gui_boxes", "gui_points"))
    rows = [json.loads(line) for line in (SAMPLES / "gui/test.jsonl").read_text().splitlines()]
    assert len(boxes) == len(points) == sum(len(row["test_samples"]) for row in rows)
    for i in range(0, len(boxes), 7):
        (yx,), (y1, x1, y2, x2) = points[i].points.yx, boxes[i].boxes.yxyx[0]
        assert y1 <= yx[0] <= y2 and x1 <= yx[1] <= x2
        assert grammatical(boxes[i].suffix, BOX) and grammatical(points[i].suffix, POINT)


@needs_samples
def test_the_two_entries_that_opentau_asked_for(tmp_path):
    """Points and boxes by config alone, with the real field names; every suffix is loc grammar and holds no JSON character."""
    rows = [
        json.loads(line) for line in (SAMPLES / "pixmo/pixmo_points.jsonl").read_text().splitlines()
    ]
    for row in rows:
        row["image"] = {"bytes": png(), "path": None}
    points = Source(
        uri=parquet(tmp_path / "p.parquet", rows), phrase="label", target="points", points="points", point_format="xy_percent",
        max_objects=8, prompt="point to {label}",
    )  # fmt: skip
    boxes = Source(
        uri=f"jsonl:{SAMPLES}/refcoco/triples.jsonl", image_root="images", phrase="expression", boxes="bbox_xywh",
        box_format="xywh_px", prompt="detect {expression}",
    )  # fmt: skip
    tokens = tokenizer.load()
    for source, unit, wanted in ((points, POINT, 4), (boxes, BOX, 644)):
        part = open_examples("x", source, DATA, 28)
        assert len(part) == wanted
        for i in range(0, wanted, 1 if wanted < 10 else 30):
            assert grammatical(part[i].suffix, unit)
        check_budgets([measure_budget(part, tokens, DATA)], DATA)


@needs_samples
def test_photographs_points_and_scenes_mix_two_to_one_to_one(tmp_path):
    rows = [
        json.loads(line) for line in (SAMPLES / "pixmo/pixmo_points.jsonl").read_text().splitlines()
    ]
    for row in rows:
        row["image"] = {"bytes": png(), "path": None}
    sources = {
        "photos": Source(uri=f"jsonl:{SAMPLES}/refcoco/triples.jsonl", image_root="images", phrase="expression",
                         boxes="bbox_xyxy", weight=2.0),
        "points": Source(uri=parquet(tmp_path / "p.parquet", rows), phrase="label", target="points", points="points",
                         point_format="xy_percent", max_objects=8, prompt="point to {label}"),
        "scenes": Source(uri="synthetic:train?side=28", boxes="box"),
    }  # fmt: skip
    bad = BadRecords()
    batches = training_batches(
        sources, DATA, tokenizer.load(), image_size=28, batch_size=4, seed=0, bad_records=bad
    )
    seen = [
        (int(s), int(i))
        for _ in range(50)
        for batch in [next(batches)]
        for s, i in zip(batch.source, batch.index, strict=True)
    ]
    counts = np.bincount([source for source, _ in seen])
    assert counts.tolist() == [100, 50, 50] and not bad.entries()
    photos = [index for source, index in seen if source == 0]
    assert len(set(photos)) == 100


def test_every_entry_parses_and_a_wrong_name_is_told(entries):
    module = runpy.run_path(str(ROOT / "configs/data.py"))
    for name in entries:
        assert config.parse(module["get_config"](name)).sft.sources[name] == entries[name]
    assert set(config.parse(module["get_config"]("pixmo_points+gui_boxes")).sft.sources) == {
        "pixmo_points",
        "gui_boxes",
    }
    with pytest.raises(Exception, match="did you mean pixmo_points"):
        module["get_config"]("pixmo_point")

"""`look --check` reads every record once and lists exactly the faults that are in a source."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import call
from PIL import Image

from pg_ground import cli
from pg_ground.config import Data, Source
from pg_ground.data.source_check import Findings, SourceId, check_source, name_collisions
from pg_ground.types import UserError

SIZE = (48, 36)

PLANTED = (
    *("missing_image", "corrupt_image", "wrong_size", "bad_box", "far_box", "missing_category"),
    *("orphan", "no_bbox", "unsafe_name", "no_name", "background"),
)
"""One fault of each of these is planted in every hundred images."""

KIND = {"far_box": "bad_box", "orphan": "missing_image", "no_bbox": "bad_box"} | {
    "unsafe_name": "bad_text",
    "no_name": "bad_text",
}
"""Fault → the kind under which it is counted, if that has another name."""


def write_coco(folder: Path, count: int) -> tuple[str, Counter[str]]:
    """Writes `count` images with faults in COCO's form. Returns the uri, and the faults by kind."""
    rng = np.random.default_rng(0)
    for i in range(8):
        Image.fromarray(rng.integers(0, 255, (SIZE[1], SIZE[0], 3), np.uint8)).save(
            folder / f"{i}.jpg"
        )
    (folder / "cut.jpg").write_bytes((folder / "0.jpg").read_bytes()[:150])
    categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog; left"}, {"id": 3, "name": None}]
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    planted: Counter[str] = Counter()
    for i in range(count):
        fault = PLANTED[i % 100] if i % 100 < len(PLANTED) else ""
        image = {"id": i, "file_name": f"{i % 8}.jpg", "width": SIZE[0], "height": SIZE[1]}
        low = rng.uniform(1, 12, 2)
        box = {"id": i, "image_id": i, "category_id": 1, "bbox": [*low, *rng.uniform(5, 20, 2)]}
        if fault == "missing_image":
            image["file_name"] = "none.jpg"
        elif fault == "corrupt_image":
            image["file_name"] = "cut.jpg"
        elif fault == "wrong_size":
            image["height"] = SIZE[1] * 2
        elif fault == "bad_box":
            box["bbox"] = [5, 5, 0, 9]
        elif fault == "far_box":
            box["bbox"] = [5, 5, 500, 9]
        elif fault == "missing_category":
            box["category_id"] = 9
        elif fault == "orphan":
            box["image_id"] = count + i
        elif fault == "no_bbox":
            del box["bbox"]
        elif fault == "unsafe_name":
            box["category_id"] = 2
        elif fault == "no_name":
            box["category_id"] = 3
        images.append(image)
        if fault != "background":
            annotations.append(box)
        if fault and fault != "background":
            planted[KIND.get(fault, fault)] += 1
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "train.json").write_text(json.dumps(content))
    return f"coco:{folder}/train.json?ask=category", planted


def source_of(uri: str) -> Source:
    return Source(uri=uri, phrase="category", boxes="boxes", box_format="xywh_px")


def check(uri: str, workers: int = 1, **data: Any) -> Any:
    settings = Data(max_boxes=4, prompt_length=32, suffix_length=32, **data)
    source_id = SourceId("sft/coco", source_of(uri), settings, 28, 0)
    return check_source(source_id, workers, lambda count: None)


def recipe(folder: Path, uri: str, share: float) -> str:
    path = folder / "recipe.py"
    path.write_text(
        "from pg_ground import config\n"
        "from pg_ground.config import Source\n\n"
        "def get_config():\n"
        "    c = config.template()\n"
        "    c.stages = ('sft',)\n"
        "    c.model.image_size = 28\n"
        f"    c.data.bad_record_share = {share}\n"
        f"    uri = '{uri}'\n"
        "    source = Source(uri, phrase='category', boxes='boxes', box_format='xywh_px')\n"
        "    c.sft.sources = {'coco': config.section(source)}\n"
        "    return c\n"
    )
    return f"--config={path}"


def test_each_planted_fault_is_counted_once_and_none_is_invented(tmp_path):
    uri, planted = write_coco(tmp_path, 400)
    result = check(uri, bad_record_share=0.2)
    assert result.findings.bad == planted and planted.total() == 40
    assert result.findings.usable == 400 - 40 - 4, "4 background images ask for no category"
    assert result.questions == result.findings.usable + planted.total() + result.findings.empty
    assert not result.problems
    for kind, texts in result.findings.faults.items():
        assert len(texts) == min(3, planted[kind])
        assert all(len(text) < 420 for _, text in texts)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [2, 3])
def test_processes_find_the_same_as_one_process(tmp_path, workers):
    uri, _ = write_coco(tmp_path, 1600)
    alone, several = check(uri, bad_record_share=0.2), check(uri, workers, bad_record_share=0.2)
    assert alone[:5] == several[:5]


@pytest.mark.slow
def test_one_percent_of_every_fault_in_20_000_images(tmp_path):
    uri, planted = write_coco(tmp_path, 20_000)
    result = check(uri, 0, bad_record_share=0.2)
    assert result.findings.bad == planted and planted.total() == 2000


def test_the_command_prints_tables_and_ends_with_2_if_training_would_stop(tmp_path, capsys):
    uri, _ = write_coco(tmp_path, 200)
    call("look", recipe(tmp_path, uri, 0.2), "--check")
    text = capsys.readouterr().out
    for part in (
        "records that cannot be used",
        "missing_category",
        "longest of the usable",
        "start",
    ):
        assert part in text
    assert "there is no file" in text and "none.jpg" in text
    with pytest.raises(
        UserError, match=r"^training would stop: source sft/coco: 20 of 198 records"
    ):
        call("look", recipe(tmp_path, uri, 0.01), "--check")
    assert not list(tmp_path.glob("*.html"))


def test_a_source_that_cannot_be_opened_is_named_and_the_others_are_read(tmp_path, capsys):
    uri, _ = write_coco(tmp_path, 4)
    content = json.loads((tmp_path / "train.json").read_text())
    content["images"][1]["id"] = content["images"][0]["id"]
    (tmp_path / "train.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="training would stop: .*entries 0 .* and 1 .*"):
        call("look", recipe(tmp_path, uri, 0.01), "--check")


@pytest.mark.slow
def test_rewards_that_apply_to_no_question_are_a_reason_to_stop(tmp_path, capsys):
    uri, _ = write_coco(tmp_path, 60)
    path = tmp_path / "recipe.py"
    path.write_text(
        "from pg_ground import config\n"
        "from pg_ground.config import Source\n\n"
        "def get_config(target=''):\n"
        "    c = config.template()\n"
        "    c.stages = ('grpo',)\n"
        "    c.model.image_size = 28\n"
        "    c.data.bad_record_share = 0.5\n"
        "    c.grpo.rewards = {'iou': 1.0, 'format': 0.2}\n"
        f"    source = Source('{uri}', phrase='category', boxes='boxes', box_format='xywh_px',\n"
        "                    target=target or 'boxes', suffix='{category}' if target else 'loc')\n"
        "    c.grpo.sources = {'coco': config.section(source)}\n"
        "    return c\n"
    )
    call("look", f"--config={path}", "--check")
    assert "rewards of each source" in capsys.readouterr().out
    with pytest.raises(UserError, match="training would stop: source grpo/coco: no reward .*exact"):
        call("look", f"--config={path}:text", "--check")


@pytest.mark.parametrize("flags", [["--workers=-1", "--check"], []])
def test_flags_that_cannot_be_used(tmp_path, flags):
    arguments = [recipe(tmp_path, "synthetic:train", 0.01), *flags]
    with pytest.raises(UserError, match=r"^--workers is -1|^--out is needed: .*or.* --check"):
        call("look", *arguments)
    assert cli.parse_config(arguments[:1]).stages == ("sft",)


def test_names_that_differ_only_in_case_are_listed():
    names = Counter({"Cat": 3, "cat": 9, "red  cat": 1, "redcat": 1, "dog": 5})
    assert name_collisions(names) == ["'Cat' (3), 'cat' (9)", "'red  cat' (1), 'redcat' (1)"]


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (["caf\u00e9", "cafe\u0301"], r"'cafe\u0301' (1), 'caf\xe9' (1)"),
        (["\uff23at", "cat"], r"'cat' (1), '\uff23at' (1)"),
        (["cat", "cat\u200b"], r"'cat' (1), 'cat\u200b' (1)"),
        (["\ufb01sh", "fish"], r"'fish' (1), '\ufb01sh' (1)"),
        (["猫", "犬"], None),
    ],
)
def test_names_in_another_unicode_form_are_listed_with_escapes(names, text):
    assert name_collisions(Counter(names)) == ([text] if text else [])


def test_findings_of_spans_add_up():
    first, second = Findings(), Findings()
    for i in range(5):
        first.add_fault(i, "bad_box", f"text {i}")
        second.add_fault(10 + i, "bad_box", "later")
    first.add_length("prompt", 7, 1)
    second.add_length("prompt", 7, 12)
    first.merge(second)
    assert first.bad == {"bad_box": 10} and [i for i, _ in first.faults["bad_box"]] == [0, 1, 2]
    assert first.longest == {"prompt": (7, 1)}

"""Answers of other models: the same answers have the same score in every format."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import call
from conftest import shared_folder

from pg_ground.evals import scoring
from pg_ground.evals.file_answers import Formats
from pg_ground.readers import answer_formats
from pg_ground.types import UserError

SIDE = 1024
"""Width and height of the images: 32 cells of 32 pixels, as in Kosmos-2's grid."""

NOT_STATED = Formats("", "", "")
"""Formats as the command line states them without flags."""


def golden_boxes() -> np.ndarray:
    """Returns 100 boxes whose corners are centres of cells."""
    rng = np.random.default_rng(0)
    corner = rng.integers(0, 18, (100, 2))
    sides = rng.integers(8, 13, (100, 2))
    return np.concatenate([corner, corner + sides], 1) * 32 + 16


def answered_boxes(gold: np.ndarray) -> np.ndarray:
    """Returns answers: 60 are exact, 25 are moved by a fifth of their width, 15 are elsewhere."""
    answers = gold.copy()
    width = (gold[:, 2] - gold[:, 0]) // 32
    step = np.maximum(np.round(width * 0.2).astype(int), 1) * 32
    answers[60:85, [0, 2]] += step[60:85, None]
    answers[85:] = np.where(gold[85:, :1] < SIDE / 2, [912, 912, 1008, 1008], [16, 912, 80, 1008])
    return answers


GOLD = golden_boxes()
ANSWERS = answered_boxes(GOLD)
NAMES = ["cat", "dog"] * 50


def thousandths(box: Sequence[int]) -> list[int]:
    return [round(edge * 1000 / SIDE) for edge in box]


def florence(box: Sequence[int], name: str) -> str:
    bins = "".join(f"<loc_{min(int(edge * 1000 / SIDE), 999)}>" for edge in box)
    return f"{name}{bins}</s>"


def kosmos(box: Sequence[int], name: str) -> str:
    x1, y1, x2, y2 = (edge // 32 for edge in box)
    cells = f"<patch_index_{y1 * 32 + x1:04d}><patch_index_{y2 * 32 + x2:04d}>"
    return f"<grounding><phrase>{name}</phrase><object>{cells}</object>"


def paligemma(box: Sequence[int], name: str) -> str:
    x1, y1, x2, y2 = (round(edge / SIDE * 1023) for edge in box)
    return f"<loc{y1:04d}><loc{x1:04d}><loc{y2:04d}><loc{x2:04d}> {name}"


def internvl(box: Sequence[int], name: str) -> str:
    return f"<ref>{name}</ref><box>[{thousandths(box)}]</box>"


def qwen_vl(box: Sequence[int], name: str) -> str:
    x1, y1, x2, y2 = thousandths(box)
    return f"<ref>{name}</ref><box>({x1},{y1}),({x2},{y2})</box>"


def qwen2_vl(box: Sequence[int], name: str) -> str:
    x1, y1, x2, y2 = thousandths(box)
    label = f"<|object_ref_start|>{name}<|object_ref_end|>"
    return f"{label}<|box_start|>({x1},{y1}),({x2},{y2})<|box_end|><|im_end|>"


def minicpm(box: Sequence[int], name: str) -> str:
    return f"<ref>{name}</ref><box>{' '.join(map(str, thousandths(box)))}</box>"


def deepseek(box: Sequence[int], name: str) -> str:
    numbers = [round(edge / SIDE * 999) for edge in box]
    return f"<|ref|>{name}<|/ref|><|det|>[{numbers}]<|/det|>"


def minigpt(box: Sequence[int], name: str) -> str:
    return f"<p>{name}</p> {{{''.join(f'<{round(edge / SIDE * 100)}>' for edge in box)}}}"


def gemini(box: Sequence[int], name: str) -> str:
    x1, y1, x2, y2 = thousandths(box)
    return f"```json\n{json.dumps([{'box_2d': [y1, x1, y2, x2], 'label': name}])}\n```"


def cogvlm(box: Sequence[int], name: str) -> str:
    return f"{name} [[{','.join(f'{number:03d}' for number in thousandths(box))}]]"


def moondream(box: Sequence[int], name: str) -> dict[str, Any]:
    keys = ("x_min", "y_min", "x_max", "y_max")
    return {"objects": [{k: edge / SIDE for k, edge in zip(keys, box, strict=True)}]}


def python_corners(box: Sequence[int], name: str) -> str:
    keys = ("xmin", "ymin", "xmax", "ymax")
    corners = dict(zip(keys, map(int, box), strict=True))
    return f"The {name} is at {{'label': {name!r}, 'box': {corners}}}."


def qwen25_json(box: Sequence[int], name: str) -> str:
    return json.dumps([{"bbox_2d": list(map(int, box)), "label": name}])


def detector_lists(box: Sequence[int], name: str) -> dict[str, Any]:
    return {"<OD>": {"bboxes": [list(map(int, box))], "labels": [name]}}


def names_in_prose(box: Sequence[int], name: str) -> str:
    x1, y1, x2, y2 = box
    return f"1 {name}: xmin={x1}, ymin={y1}, xmax={x2}, ymax={y2}."


def xml(box: Sequence[int], name: str) -> str:
    x1, y1, x2, y2 = box
    corners = f"<xmin>{x1}</xmin><ymin>{y1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax>"
    return f"<object><name>{name}</name><bndbox>{corners}</bndbox></object>"


def sides(box: Sequence[int], name: str) -> list[dict[str, Any]]:
    x1, y1, x2, y2 = map(int, box)
    return [{"label": name, "x": x1, "y": y1, "width": x2 - x1, "height": y2 - y1}]


def label_studio(box: Sequence[int], name: str) -> dict[str, Any]:
    x1, y1, x2, y2 = (100 * edge / SIDE for edge in box)
    sides = {"x": x1, "y": y1, "width": x2 - x1, "height": y2 - y1, "rotation": 0}
    return {**sides, "label": name, "rectanglelabels": [name]}


WRITERS: dict[str, tuple[str, Callable[[Sequence[int], str], Any]]] = {
    "paligemma": ("paligemma", paligemma),
    "florence": ("florence", florence),
    "kosmos": ("kosmos", kosmos),
    "qwen2_vl": ("qwen2_vl", qwen2_vl),
    "qwen_vl": ("qwen_vl", qwen_vl),
    "internvl": ("internvl", internvl),
    "minicpm": ("minicpm", minicpm),
    "deepseek_vl2": ("deepseek_vl2", deepseek),
    "gemini": ("gemini", gemini),
    "cogvlm": ("cogvlm", cogvlm),
    "moondream": ("moondream", moondream),
    "label_studio": ("label_studio", label_studio),
    "xmin keys in Python": ("plain", python_corners),
    "Qwen2.5-VL's JSON": ("plain", qwen25_json),
    "a detector's lists": ("plain", detector_lists),
    "x, y, width, height": ("plain", sides),
    "xmin in prose": ("plain", names_in_prose),
    "VOC's XML": ("plain", xml),
}
"""Writers of one named box, and the format in which it must be read."""


def records_in(write: Callable[[Sequence[int], str], Any], **fields: Any) -> list[dict[str, Any]]:
    return [
        {
            "pred": write(answer, name),
            "gold": [{"label": name, "bbox": list(map(int, gold))}],
            "width": SIDE,
            "height": SIDE,
            **fields,
        }
        for answer, gold, name in zip(ANSWERS, GOLD, NAMES, strict=True)
    ]


def score(
    tmp_path: Path,
    records: Sequence[Mapping[str, Any]],
    benchmark: str = "rec",
    formats: Formats = NOT_STATED,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    path = tmp_path / "answers.json"
    path.write_text(json.dumps(records))
    return scoring.rescore(path, benchmark, {"pred": "pred", "gold": "gold"}, formats)


@pytest.mark.parametrize("name", WRITERS)
def test_the_same_100_answers_have_the_same_score_in_every_format(name, tmp_path):
    form, write = WRITERS[name]
    report, rows = score(tmp_path, records_in(write))
    accuracy = [report[f"acc{percent}"] for percent in (30, 50, 75, 95)]
    assert accuracy == [0.85, 0.85, 0.6, 0.6]
    assert report["mean_iou"] == pytest.approx((60 + 25 * 2 / 3) / 100, abs=0.01)
    assert report["invalid"] == 0
    names = [row["prediction"]["boxes"][0]["label"] for row in rows]
    if name not in ("moondream", "xmin in prose", "VOC's XML"):  # their boxes have no names
        assert [label.removeprefix("The ") for label in names] == NAMES
    if form == "plain":
        assert "answers" not in report
    else:
        assert report["answers"]["formats"] == {form: 100}
        assert form in report["notes"][0]


def four_corners(box: Sequence[int], name: str) -> dict[str, Any]:
    x1, y1, x2, y2 = map(int, box)
    xs, ys = (x1, x2, x2, x1), (y1, y1, y2, y2)
    return {"label": name} | {
        f"{axis}{i + 1}": numbers[i] for i in range(4) for axis, numbers in (("x", xs), ("y", ys))
    }


@pytest.mark.parametrize("is_text", [False, True])
def test_four_corners_under_keys_are_a_box_and_two_of_them_are_none(tmp_path, is_text):
    def write(box: Sequence[int], name: str) -> Any:
        answer = four_corners(box, name)
        return json.dumps(answer) if is_text else answer

    def turned(box: Sequence[int], name: str) -> Any:
        answer = four_corners(box, name)
        answer["y2"] += 1
        return json.dumps(answer) if is_text else answer

    report, _ = score(tmp_path, records_in(write))
    assert (report["acc50"], report["invalid"]) == (0.85, 0)
    some = [*records_in(write)[:90], *records_in(turned)[90:]]
    assert score(tmp_path, some)[0]["invalid"] == 10


@pytest.mark.parametrize("name", [n for n, (form, _) in WRITERS.items() if form != "plain"])
def test_a_unit_that_is_relative_fits_an_image_of_any_size(name, tmp_path):
    """The answers of the square images, about images of 640 x 480 pixels."""
    records = records_in(WRITERS[name][1], width=640, height=480)
    for record in records:
        x1, y1, x2, y2 = record["gold"][0]["bbox"]
        box = [x1 * 640 / SIDE, y1 * 480 / SIDE, x2 * 640 / SIDE, y2 * 480 / SIDE]
        record["gold"] = [{"label": record["gold"][0]["label"], "bbox": box}]
    report, _ = score(tmp_path, records)
    assert (report["acc50"], report["acc95"]) == (0.85, 0.6)


def test_percent_in_brackets_are_read(tmp_path):
    """MiniGPT-v2 writes whole percent, which are too coarse for acc95."""
    report, _ = score(tmp_path, records_in(minigpt))
    assert (report["acc50"], report["acc75"], report["invalid"]) == (0.85, 0.6, 0)
    assert report["answers"]["formats"] == {"minigpt": 100}


def molmo_points(box: Sequence[int], name: str) -> str:
    x, y = ((box[axis] + box[axis + 2]) / 2 / SIDE * 100 for axis in (0, 1))
    return f'<point x="{x:.1f}" y="{y:.1f}" alt="{name}">{name}</point>'


def molmo_many(box: Sequence[int], name: str) -> str:
    x, y = ((box[axis] + box[axis + 2]) / 2 / SIDE * 100 for axis in (0, 1))
    return f'<points x1="{x:.1f}" y1="{y:.1f}" alt="{name}">{name}</points>'


def gemini_points(box: Sequence[int], name: str) -> str:
    x, y = (round((box[axis] + box[axis + 2]) / 2 / SIDE * 1000) for axis in (0, 1))
    return json.dumps([{"point": [y, x], "label": name}])


def moondream_points(box: Sequence[int], name: str) -> str:
    x, y = ((box[axis] + box[axis + 2]) / 2 / SIDE for axis in (0, 1))
    return json.dumps({"points": [{"x": x, "y": y}]})


def qwen_point(box: Sequence[int], name: str) -> str:
    x, y = (round((box[axis] + box[axis + 2]) / 2 / SIDE * 1000) for axis in (0, 1))
    return f"<|object_ref_start|>{name}<|object_ref_end|><|box_start|>({x},{y})<|box_end|>"


def paligemma_point(box: Sequence[int], name: str) -> str:
    x, y = (round((box[axis] + box[axis + 2]) / 2 / SIDE * 1023) for axis in (0, 1))
    return f"<loc{y:04d}><loc{x:04d}> {name}"


def molmo2_points(box: Sequence[int], name: str) -> str:
    x, y = (round((box[axis] + box[axis + 2]) / 2 / SIDE * 1000) for axis in (0, 1))
    return f'<points coords="1 1 {x:03d} {y:03d}">{name}</points>'


def click(box: Sequence[int], name: str) -> str:
    x, y = ((box[axis] + box[axis + 2]) / 2 for axis in (0, 1))
    return f"click(x={x}, y={y})"


POINT_WRITERS = {
    "molmo": molmo_points,
    "molmo, one tag": molmo_many,
    "molmo2": molmo2_points,
    "gemini": gemini_points,
    "moondream": moondream_points,
    "qwen2_vl": qwen_point,
    "paligemma": paligemma_point,
    "plain": click,
}


@pytest.mark.parametrize("name", POINT_WRITERS)
def test_the_same_100_points_have_the_same_score_in_every_format(name, tmp_path):
    records = records_in(POINT_WRITERS[name])
    for record in records:
        record["gold"] = record["gold"][0]["bbox"]
    report, _ = score(tmp_path, records, "screenspot")
    assert (report["accuracy"], report["invalid"]) == (0.85, 0)
    assert report["distance_px"] < 250
    formats = Formats("", "", "xyxy_px")
    pointing, _ = score(tmp_path, records, "pointing", formats)
    assert pointing["f1"] == 0.85


def test_a_file_may_mix_formats_and_both_are_named(tmp_path):
    records = records_in(qwen2_vl)[:50] + records_in(paligemma)[50:]
    report, _ = score(tmp_path, records)
    assert (report["acc50"], report["acc75"]) == (0.85, 0.6)
    assert report["answers"]["formats"] == {"qwen2_vl": 50, "paligemma": 50}
    assert report["notes"] == [
        "answers: 100 of 100 read: 50 as qwen2_vl (xyxy_permille), 50 as paligemma (yxyx_bin)"
    ]


def test_the_format_can_be_stated_and_a_wrong_one_is_an_error(tmp_path):
    records = records_in(florence)
    report, _ = score(tmp_path, records, formats=Formats("", "", "", "florence"))
    assert report["acc50"] == 0.85
    message = "none of 100 answers can be read as boxes; tried kosmos; for example row 0: 'cat<loc_"
    with pytest.raises(UserError, match=message):
        score(tmp_path, records, formats=Formats("", "", "", "kosmos"))
    with pytest.raises(UserError, match=r"--answer-format=florance does not exist: did you mean"):
        score(tmp_path, records, formats=Formats("", "", "", "florance"))


def test_a_stated_unit_overrules_a_detected_one(tmp_path):
    """Boxes of a model that was tuned on pixels, in InternVL's tags."""

    def pixels(box: Sequence[int], name: str) -> str:
        return f"<ref>{name}</ref><box>[{list(map(int, box))}]</box>"

    records = records_in(pixels)
    assert score(tmp_path, records, formats=Formats("xyxy_px"))[0]["acc50"] == 0.85
    records[3] = {**records[3], "pred": "<box>[[1000, 100, 4000, 400]]</box>"}
    doubled = [
        {**record, "pred": record["pred"].replace("[[", "[[1").replace("]]", "9]]")}
        for record in records
    ]
    with pytest.raises(UserError, match="coordinates outside the image, if they are xyxy_permille"):
        score(tmp_path, doubled)


def gemini_numbers(box: Sequence[float]) -> list[int]:
    x1, y1, x2, y2 = (round(number / SIDE * 1000) for number in box)
    return [y1, x1, y2, x2]


@pytest.mark.parametrize("formats", [Formats(), NOT_STATED, Formats("xyxy_px", "xy_px")])
@pytest.mark.parametrize("benchmark", ["rec", "screenspot", "objects"])
@pytest.mark.parametrize(
    "write_gold",
    [
        lambda box: {"box_2d": gemini_numbers(box), "label": "cat"},
        lambda box: json.dumps([{"box_2d": gemini_numbers(box), "label": "cat"}]),
        lambda box: (
            "```json\n" + json.dumps([{"label": "cat", "box_2d": gemini_numbers(box)}]) + "```"
        ),
    ],
)
def test_ground_truth_in_gemini_s_form_is_read_by_its_convention(
    write_gold, benchmark, formats, tmp_path
):
    """`--box-format` states the unit of the predictions, which are in another form."""
    records = [
        {"pred": [{"label": "cat", "bbox": box}], "gold": write_gold(box), "img_size": [SIDE, SIDE]}
        for box in ([10 * i, 300, 10 * i + 900, 1000] for i in range(10))
    ]
    report, _ = score(tmp_path, records, benchmark, formats)
    assert report.get("acc50", report.get("accuracy")) == 1
    assert "ground truth: 10 as gemini (yxyx_permille)" in report["notes"]


@pytest.mark.parametrize("column", ["pred", "gold"])
@pytest.mark.parametrize("as_text", [False, True])
def test_a_field_that_is_called_box_2d_holds_gemini_s_numbers(column, as_text, tmp_path):
    boxes = [[10 * i, 300, 10 * i + 900, 1000] for i in range(10)]
    other = "gold" if column == "pred" else "pred"
    records = [
        {
            "answer": {"box_2d": json.dumps(gemini_numbers(b)) if as_text else gemini_numbers(b)},
            "bbox": b,
            "img_size": [SIDE, SIDE],
        }
        for b in boxes
    ]
    path = tmp_path / "answers.json"
    path.write_text(json.dumps(records))
    fields = {column: "answer.box_2d", other: "bbox"}
    report, _ = scoring.rescore(path, "rec", fields, NOT_STATED)
    assert report["acc95"] == 1
    assert any("10 of 10 read: 10" in n or "ground truth: 10" in n for n in report["notes"])
    stated = (
        Formats("", "", "yxyx_permille")
        if column == "gold"
        else Formats("yxyx_permille", "", "xyxy_px")
    )
    assert scoring.rescore(path, "rec", fields, stated)[0]["acc95"] == 1


def test_a_field_box_2d_in_pixels_is_noticed(tmp_path):
    path = tmp_path / "answers.json"
    records = [{"box_2d": [10, 500, 2900, 1500], "bbox": [10, 500, 2900, 1500]}] * 10
    path.write_text(json.dumps([r | {"img_size": [SIDE, SIDE]} for r in records]))
    with pytest.raises(UserError, match="look like gemini .*--box-format"):
        scoring.rescore(path, "rec", {"pred": "box_2d", "gold": "bbox"}, NOT_STATED)
    stated = Formats("xyxy_px", "", "xyxy_px")
    assert scoring.rescore(path, "rec", {"pred": "box_2d", "gold": "bbox"}, stated)[0]["acc50"] == 1


def test_thousandths_need_the_size_of_an_image_in_pixels(tmp_path):
    records = [{"pred": r["pred"], "gold": r["gold"]} for r in records_in(qwen2_vl)]
    with pytest.raises(UserError, match=r"xyxy_permille \(the answers are qwen2_vl\) .* --fields"):
        score(tmp_path, records)


PROMPT = "Where is the cat?\nAnswer with a box."
ECHOES = {
    "a chat with its tokens": (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        "<|vision_start|><|image_pad|><|vision_end|>" + PROMPT + "<|im_end|>\n"
        "<|im_start|>assistant\n{answer}<|im_end|>"
    ),
    "instructions": f"[INST] <image>\n{PROMPT} [/INST] {{answer}}</s>",
    "Llama's chat": (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n" + PROMPT + "<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n{answer}<|eot_id|>"
    ),
    "Phi's chat": f"<|user|>\n{PROMPT}<|end|>\n<|assistant|>\n{{answer}}<|end|>",
    "another question": "user\nWhere does the other animal sit?\nassistant\n{answer}",
    "the prompt": PROMPT + "\n{answer}",
    "other blanks": "Where is  the cat? Answer with a box. {answer}",
    "speakers": f"USER: <image>\n{PROMPT} ASSISTANT: {{answer}}</s>",
    "a chat": f"user\n{PROMPT}\nmodel\n{{answer}}<end_of_turn>",
    "special tokens": f"<bos>{PROMPT}{{answer}}<eos><pad><pad>",
    "no prompt": "<|im_start|>assistant\n{answer}<|im_end|><|endoftext|>",
}


@pytest.mark.parametrize("form", ECHOES)
@pytest.mark.parametrize("write", [paligemma, qwen_vl, python_corners], ids=lambda w: w.__name__)
def test_special_tokens_and_an_echoed_prompt_are_no_part_of_an_answer(form, write, tmp_path):
    records = records_in(write, prompt=PROMPT)
    for record in records:
        record["pred"] = ECHOES[form].replace("{answer}", record["pred"])
        other = [{"label": "bird", "bbox": [0, 0, 1, 1]}] if record is records[0] else []
        record["gold"] = record["gold"] + other  # two names, so that names count
    report, rows = score(tmp_path, records, "objects")
    assert report["acc50"] == pytest.approx((84 + 2 / 3) / 100)
    assert [row["prediction"]["boxes"][0]["label"] for row in rows] == NAMES
    repeated = [note for note in report.get("notes", []) if "100 answers repeat" in note]
    assert bool(repeated) == (form != "no prompt")


@pytest.mark.parametrize(
    ("benchmark", "prompt", "text", "gold", "metric"),
    [
        ("counting", "How many of the 3 cats sit?", "How many of the 3 cats sit?\n2<eos>", 2, 1),
        ("multiple_choice", "Left (A) or right (B)?", "Left (A) or right (B)? (B)</s>", "B", 1),
        ("text", "Color?", "<bos>Color?\nred<eos>", "red", 1),
        ("text", "red", "red", "red", 1),
        ("counting", "How many?", "<|begin_of_box|>2<|end_of_box|>", 2, 1),
        ("multiple_choice", "?", "<|begin_of_box|>B<|end_of_box|>", "B", 1),
    ],
)
def test_an_echoed_prompt_is_no_part_of_other_answers(
    benchmark, prompt, text, gold, metric, tmp_path
):
    records = [{"pred": text, "gold": gold, "prompt": prompt, "choices": ["left", "right"]}]
    assert score(tmp_path, records, benchmark)[0]["accuracy"] == metric


LOC_CAT, LOC_CUP = "<loc0064><loc0032><loc0384><loc0320>", "<loc0426><loc0480><loc0703><loc0671>"
SEG = "".join(f"<seg{code:03d}>" for code in range(16))


@pytest.mark.parametrize(
    ("text", "names"),
    [
        (f"{LOC_CAT}{SEG} cat ; {LOC_CUP}{SEG} cup", ["cat", "cup"]),
        (f"{LOC_CAT} salt; pepper ; {LOC_CUP} cup", ["salt; pepper", "cup"]),
        (f"{LOC_CAT} salt ; pepper ; {LOC_CUP} a;b", ["salt; pepper", "a;b"]),
        (f"{LOC_CAT} cat ; {LOC_CUP} cup ; {LOC_CUP[:18]}", ["cat", "cup"]),
        (f"detect cat ; cup {LOC_CAT} cat ; {LOC_CUP}{SEG} cup", ["cat", "cup"]),
        (f"cat {LOC_CAT} ; cup {LOC_CUP}", ["cat", "cup"]),
        (f"<bos>detect cat ; cup\n{LOC_CAT} cat ; {LOC_CUP} cup<eos>", ["cat", "cup"]),
    ],
)
def test_names_in_loc_text_are_gold_names(text, names, tmp_path):
    boxes = ([20, 30, 200, 180], [300, 200, 420, 330])
    gold = [{"label": name, "bbox": box} for name, box in zip(names, boxes, strict=True)]
    records = [{"pred": text, "gold": gold, "width": 640, "height": 480}]
    report, _ = score(tmp_path, records, "objects")
    assert (report["acc95"], len(report["notes"])) == (1, 2 if "detect cat ; cup\n" in text else 1)


@pytest.mark.parametrize("benchmark", ["objects", "detection_f1", "grec"])
@pytest.mark.parametrize(
    "text",
    [
        f"{LOC_CAT} cat\n{LOC_CUP} cup",
        f"{LOC_CAT} cat, {LOC_CUP} cup",
        f"{LOC_CAT} {LOC_CUP}",
        f"{LOC_CAT}{LOC_CUP}",
        f"{LOC_CAT} cat and {LOC_CUP} cup<eos>",
        f"{LOC_CAT}{SEG} cat\n{LOC_CUP}{SEG} cup\n",
        f"detect cat ; cup\n{LOC_CAT} cat\n{LOC_CUP} cup",
    ],
)
def test_loc_boxes_without_semicolons_are_invalid_as_they_earn_no_reward(text, benchmark, tmp_path):
    """The first answer is right, so that the file can be read."""
    gold = [
        {"label": "cat", "bbox": [20, 30, 200, 180]},
        {"label": "cup", "bbox": [300, 200, 420, 330]},
    ]
    records = [
        {"pred": pred, "gold": gold, "width": 640, "height": 480}
        for pred in (f"{LOC_CAT} cat ; {LOC_CUP} cup", text)
    ]
    report, rows = score(tmp_path, records, benchmark)
    assert report["invalid"] == 1
    assert [len(row["prediction"]["boxes"]) for row in rows] == [2, 1]


def test_one_missing_semicolon_makes_an_answer_invalid(tmp_path):
    gold = [{"label": "cat", "bbox": [20, 30, 200, 180]}]
    text = f"{LOC_CAT} cat ; {LOC_CUP} cup\n{LOC_CUP} cup"
    records = [{"pred": text, "gold": gold, "width": 640, "height": 480}]
    report, rows = score(tmp_path, records, "objects")
    assert report["invalid"] == 1
    assert len(rows[0]["prediction"]["boxes"]) == 2


def test_loc_boxes_without_semicolons_are_no_rejection(tmp_path):
    texts = [f"{LOC_CAT} cat", f"{LOC_CAT} cat\n{LOC_CUP} cup"]
    records = [{"pred": t, "gold": None, "width": 640, "height": 480} for t in texts]
    records.append({"pred": texts[0], "gold": [20, 30, 200, 180], "width": 640, "height": 480})
    _, rows = score(tmp_path, records, "rejection")
    assert [len(row["prediction"]["boxes"]) for row in rows] == [1, 1, 1]


@pytest.mark.parametrize("name", ["plain", "seg", "echo", "special", "eos", "trailing", "case"])
def test_files_of_loc_text_score_as_they_should(name):
    cases = shared_folder("cases")
    path = cases / "22-seg-tokens-and-echoed-prompts-in-predictions" / f"{name}.jsonl"
    fields = {"pred": "pred", "gold": "gold"}
    for benchmark in ("objects", "detection"):
        report, _ = scoring.rescore(path, benchmark, fields, NOT_STATED)
        assert report["acc50"] == (0 if name == "case" else 1)
        note = "24 of 24 names are no gold name, for example 'Cat' (a gold name is 'cat')"
        assert any(note in text for text in report["notes"]) == (name == "case")


@pytest.mark.parametrize(
    ("benchmark", "texts", "message"),
    [
        (
            "rec",
            ["I cannot see it."] * 9,
            "none of 9 answers can be read as boxes; tried pali",
        ),
        ("objects", ["left", [1, 2, 3], {"a": 1}], "none of 3 answers can be read as boxes"),
        ("pointing", ["a", "b", "c"], "none of 3 answers can be read as points"),
        ("screenspot", ["a", "b", "c"], "none of 3 answers can be read as points"),
        ("screenspot", ["30%, 50%"], "none of 1 answers can be read as points"),
        (
            "counting",
            ["many", "4 or 5", None],
            "none of 3 answers can be read as numbers; for",
        ),
        ("multiple_choice", ["yes", "no", ""], "none of 3 answers can be read as options"),
        ("rec", ["", None, ""], "the field pred is empty in all 3 rows"),
        ("counting", [None, None, None], "the field pred is empty in all 3 rows"),
    ],
)
def test_a_file_without_an_answer_that_can_be_read_is_refused(benchmark, texts, message, tmp_path):
    golds = {"counting": 3, "multiple_choice": "A", "pointing": [5, 5]}
    gold = golds.get(benchmark, [1, 2, 30, 40])
    records = [{"pred": t, "gold": gold, "size": [50, 50], "choices": ["x", "y"]} for t in texts]
    with pytest.raises(UserError, match=message) as error:
        score(tmp_path, records, benchmark)
    assert "\n" not in str(error.value)


def test_no_answer_for_nothing_there_is_right(tmp_path):
    records = [{"pred": text, "gold": []} for text in ("", "[]", "There is none.")]
    assert score(tmp_path, records, "objects")[0]["acc50"] == 1


@pytest.mark.parametrize(
    ("value", "is_hit"),
    [
        ("[301,1284], [915,1284]", True),
        ("(301, 1284) or (915, 1290)", True),
        ("(301,1284),(915,1290)", True),
        ([[301, 1284], [915, 1284]], True),
        ("[[301, 1284], [915, 1300]]", True),
        ("[915,1284], [301,1284]", False),
        ("click(x=301, y=1284) click(x=915, y=1284)", True),
        ("[290,1270,320,1300]", True),
        ([290, 1270, 320, 1300], True),
        ("the box is [290, 1270, 320, 1300].", True),
        ("<box>(290,1270),(320,1300)</box>", True),
        ("<|box_start|>(290,1270),(320,1300)<|box_end|>", True),
        ("<|box_start|>(301,1284)<|box_end|>", True),
        ({"point_2d": [301, 1284]}, True),
        ({"bbox_2d": [290, 1270, 320, 1300]}, True),
        ('{"x": 301, "y": 1284}', True),
        ({"x": 290, "y": 1270, "width": 30, "height": 30}, True),
        ('<point x="301" y="1284" alt="b">b</point>', True),
        ("[[900, 1270, 930, 1300]]", False),
        # without brackets
        ("301,1284\n915,1284", True),
        ("301,1284 915,1284", True),
        ("301 1284; 915 1284", True),
        ("301, 1284\n915, 1284\n20, 20", True),
        ("915,1284\n301,1284", False),
        ("290, 1270, 320, 1300", True),
        ("290 1270 320 1300", True),
        ("301 1284", True),
        ("x=301, y=1284", True),
        ("X: 301, Y: 1284", True),
        ("x: 301px\ny: 1284px", True),
        ("x is 301 and y is 1284; x is 915 and y is 1284", True),
        ("x1=290, y1=1270, x2=320, y2=1300", True),
        ("1. (301, 1284)\n2. (915, 1284)", True),
        ("1. 301, 1284\n2. 915, 1284", True),
        ("1) 915, 1284\n2) 301, 1284", False),
        ("\uff08301\uff0c1284\uff09", True),
        ("(301,1284) then (915,1284)", True),
        ("(915,1284) then (301,1284)", False),
        ("click(start_box='(301,1284)')", True),
        ("click(start_box='(915,1284)', end_box='(301,1284)')", False),
        ("301px, 1284px", True),
        ("301, 1284 (0.9)", True),
    ],
)
def test_the_first_point_of_a_click_counts(value, is_hit, tmp_path):
    """A box counts by its centre if it is written as four numbers or in the tags of a box.

    Numbers without brackets are points if other separators stand between pairs than within them.
    """
    records = [{"pred": value, "gold": [290, 1270, 320, 1300]}]
    report, _ = score(tmp_path, records, "screenspot", Formats())
    assert report["accuracy"] == is_hit


def test_the_command_prints_the_format_and_takes_the_flag(tmp_path, capsys):
    path = tmp_path / "answers.json"
    path.write_text(json.dumps(records_in(gemini)))
    arguments = [f"--predictions={path}", "--benchmark=rec", "--fields=pred=pred,gold=gold"]
    call("evaluate", *arguments)
    printed = capsys.readouterr().out
    assert "answers: 100 of 100 read: 100 as gemini (yxyx_permille)" in printed
    call("evaluate", *arguments, "--answer-format=gemini", f"--out={tmp_path}")
    assert json.loads((tmp_path / "eval.json").read_text())["acc50"] == 0.85
    with pytest.raises(UserError, match="probably in another format than the gold boxes: yxyx"):
        call("evaluate", *arguments, "--answer-format=plain")


@pytest.mark.parametrize(
    ("values", "names"),
    [
        (["cat [[100,100,200,300]]"], ["plain"]),
        (["cat [[100,100,200,300]]", "cat [[012,100,200,300]]"], ["cogvlm", "cogvlm"]),
        ([[[100, 100, 200, 300]]], ["plain"]),
        (['{"points": [{"x": 1, "y": 0}]}'], ["plain"]),
        (['{"points": [{"x": 1, "y": 0}]}', '[{"x": 0.5, "y": 0.1}]'], ["moondream"] * 2),
        (["<think><box>[[1]]</box></think>[1, 2, 3, 4]"], ["plain"]),
        (['[{"label": "a", "point": [1, 2]}]', '{"point": [1, 2]}'], ["gemini"] * 2),
        (['{"point": [1, 2]}'], ["plain"]),
        (["<loc0001>", "<loc_1>"], ["paligemma", "florence"]),
        ([None, 3, {"a": b""}], ["plain"] * 3),
    ],
)
def test_a_format_is_detected_by_its_sign(values, names):
    assert [form.name for form in answer_formats.detect_all(values)] == names


def test_cells_of_one_row_bound_a_box_by_their_edges():
    """The decoder of Kosmos-2's processor: cells 5 and 7 of the first row are a strip."""
    text = "<object><patch_index_0005><patch_index_0007></object>"
    (location,) = answer_formats.read(text, 4)
    assert location.numbers == (5 / 32, 0, 8 / 32, 1 / 32)
    several = (
        "<phrase>cats</phrase><object><patch_index_0000><patch_index_0033>"
        "</delimiter_of_multi_objects/> <patch_index_0066> <patch_index_0132></object>"
    )
    read = answer_formats.read(several, 4)
    assert [location.label for location in read] == ["cats", "cats"]
    assert read[1].numbers == (2.5 / 32, 2.5 / 32, 4.5 / 32, 4.5 / 32)

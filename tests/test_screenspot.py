"""ScreenSpot-v2 and ScreenSpot-Pro: from the published files to accuracies by platform and type."""

import json
import runpy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import ROOT, call, run_here
from conftest import PG1
from PIL import Image
from test_eval_runner import copying_programs

from pg_ground import config
from pg_ground.config import Source
from pg_ground.data.bad_records import BadRecords
from pg_ground.evals import benchmarks, question_groups, runner
from pg_ground.evals.runner import EvalContext, Evaluation
from pg_ground.parallel import sharding
from pg_ground.tokenizer import load as load_tokenizer
from pg_ground.types import UserError

V2 = {
    "desktop": [("windows", "icon"), ("macos", "text")],
    "mobile": [("ios", "text"), ("android", "icon")],
    "web": [("shop", "text"), ("gitlab", "icon")],
}
"""The source and the type of each record, by the platform in the file's name."""

PRO = {"vscode_macos": ("Dev", "text"), "excel_macos": ("Office", "icon")}
"""The group and the type of the record of each application."""


def write_v2(folder: Path) -> Path:
    """Writes the layout of OS-Copilot/ScreenSpot-v2. Boxes are x, y, width, height."""
    (folder / "screenspotv2_image").mkdir(parents=True)
    for platform, kinds in V2.items():
        records = [
            {
                "img_filename": f"{platform}_{number}.png",
                "bbox": [10 + number, 20, 8, 6],
                "instruction": f"open the {kind} {number}",
                "data_type": kind,
                "data_source": source,
            }
            for number, (source, kind) in enumerate(kinds)
        ]
        (folder / f"screenspot_{platform}_v2.json").write_text(json.dumps(records))
        for record in records:
            Image.new("RGB", (64, 48)).save(
                folder / "screenspotv2_image" / str(record["img_filename"])
            )
    return folder


def write_pro(folder: Path) -> Path:
    """Writes the layout of likaixin/ScreenSpot-Pro. Boxes are x1, y1, x2, y2."""
    (folder / "annotations").mkdir(parents=True)
    for application, (group, kind) in PRO.items():
        name = f"{application}/screenshot_1.png"
        (folder / "images" / application).mkdir(parents=True)
        Image.new("RGB", (64, 48)).save(folder / "images" / name)
        record = {
            "img_filename": name,
            "bbox": [10, 20, 18, 26],
            "instruction": "run the program",
            "instruction_cn": "运行",
            "id": f"{application}_0",
            "application": application.partition("_")[0],
            "platform": "macos",
            "img_size": [64, 48],
            "ui_type": kind,
            "group": group,
        }
        (folder / "annotations" / f"{application}.json").write_text(json.dumps([record]))
    return folder


def entry(name: str, folder: Path, **changes: Any) -> Source:
    """Returns an entry of configs/data.py for the files in a folder."""
    source = runpy.run_path(str(ROOT / "configs/data.py"))["ENTRIES"][name]
    fields = {**vars(source), **changes}
    return Source(**{**fields, "uri": source.uri.replace("DIR", str(folder))})


def evaluate_entry(name: str, source: Source) -> Evaluation:
    """Returns the evaluation of a policy that writes the ground truth of the source."""
    settings = config.Eval(
        sources={name: source}, benchmarks={name: name}, batch_size=2, rollouts=0
    )
    data = config.Data(prompt_length=32, suffix_length=32, max_boxes=2)
    tokenizer = load_tokenizer()
    mesh = sharding.make_mesh(config.Mesh(data=1))
    context = EvalContext(settings, data, 0, tokenizer, mesh, BadRecords())
    sources = runner.open_eval_sources(settings, data, PG1.image_size)
    return runner.evaluate_sources(copying_programs(tokenizer, settings), {}, sources, context)


def test_a_model_is_measured_by_platform_and_type(tmp_path):
    result = evaluate_entry("screenspot_v2", entry("screenspot_v2", write_v2(tmp_path)))
    assert result.metrics["eval/screenspot_v2/questions"] == 6 and not result.bad_records
    assert [row["gold"]["groups"] for row in result.predictions][:3] == [
        ["desktop", "icon", "desktop_icon"],
        ["desktop", "text", "desktop_text"],
        ["mobile", "text", "mobile_text"],
    ]
    assert result.predictions[1]["gold"]["boxes"][0]["xyxy_px"] == [11, 20, 19, 26]
    assert {row["benchmark"] for row in result.predictions} == {"screenspot_v2@6"}
    assert result.predictions[0]["prompt"] == "point to open the icon 0"
    for group in ("accuracy", "mobile_text", "web_icon", "desktop", "icon", "macro_accuracy"):
        assert result.metrics[f"eval/screenspot_v2/{group}"] == 1


def test_a_model_is_measured_by_group_of_applications(tmp_path):
    result = evaluate_entry("screenspot_pro", entry("screenspot_pro", write_pro(tmp_path)))
    assert [row["gold"]["groups"][-1] for row in result.predictions] == ["office_icon", "dev_text"]
    for group in ("accuracy", "dev_text", "office_icon", "dev", "text"):
        assert result.metrics[f"eval/screenspot_pro/{group}"] == 1
    assert "eval/screenspot_pro/cad" not in result.metrics


@pytest.mark.parametrize(
    ("field", "value"), [("data_source", None), ("data_source", "fridge"), ("data_type", 3)]
)
def test_a_record_of_another_benchmark_is_refused(field, value, tmp_path):
    path = write_v2(tmp_path) / "screenspot_desktop_v2.json"
    records = json.loads(path.read_text())
    path.write_text(json.dumps([records[0], records[1] | {field: value}]))
    with pytest.raises(UserError, match=r"source eval/screenspot_v2: record 1: .*have ") as error:
        evaluate_entry("screenspot_v2", entry("screenspot_v2", tmp_path))
    assert field in str(error.value)


@pytest.mark.parametrize(
    ("suffix", "is_click"), [("<loc0512><loc0512>", 1), ("", 0), ("<loc0001>", 0), ("a", 0)]
)
def test_a_point_is_an_answer_although_the_ground_truth_is_a_box(suffix, is_click, tmp_path):
    write_v2(tmp_path)
    source = entry("screenspot_v2", tmp_path)
    path = tmp_path / "screenspot_web_v2.json"
    record = json.loads(path.read_text())[0] | {"bbox": [30, 20, 6, 8], "answer": suffix}
    path.write_text(json.dumps([record]))
    tokenizer = load_tokenizer()
    settings = config.Eval(
        sources={"web": Source(**{**vars(source), "uri": f"json:{path}"})},
        benchmarks={"web": "screenspot"},
        batch_size=1,
        rollouts=0,
    )
    programs = copying_programs(tokenizer, settings)
    ids = tokenizer.suffix(suffix)

    def answer(params: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        tokens, mask = np.zeros((1, 32), np.int32), np.zeros((1, 32), bool)
        tokens[0, : len(ids)], mask[0, : len(ids)] = ids, True
        return programs.answer(
            params, batch._replace(suffix=tokens, suffix_mask=mask), *args, **kwargs
        )

    data = config.Data(prompt_length=32, suffix_length=32)
    mesh = sharding.make_mesh(config.Mesh(data=1))
    context = EvalContext(settings, data, 0, tokenizer, mesh, BadRecords())
    sources = runner.open_eval_sources(settings, data, PG1.image_size)
    result = runner.evaluate_sources(programs._replace(answer=answer), {}, sources, context)
    assert result.metrics["eval/web/accuracy"] == is_click
    assert result.metrics["eval/web/malformed_fraction"] == 1 - is_click


def test_a_pattern_without_a_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"screenspot_\*_v2.json\): no file matches"):
        evaluate_entry("screenspot_v2", entry("screenspot_v2", tmp_path))


# Files of predictions


def cells(name: str) -> list[str]:
    """Returns a group of every question of the published benchmark."""
    published = question_groups.GROUPINGS[name].published
    return [cell for cell, count in published.items() for _ in range(count)]


def pro_details(groups: Sequence[str]) -> list[dict[str, Any]]:
    """Returns the details in the log of ScreenSpot-Pro's evaluator. Every third click is right."""
    details = []
    for number, cell in enumerate(groups):
        group, kind = cell.split("_")
        point = [[15.0, 25.0], [300.5, 20.0], None][number % 3]
        details.append(
            {
                "id": f"q_{number}",
                "img_path": f"images/{number // 2}.png",
                "group": {"dev": "Dev", "cad": "CAD", "os": "OS"}.get(group, group.capitalize()),
                "platform": "windows",
                "application": "x",
                "ui_type": kind,
                "pred": point,
                "bbox": [10, 20, 18, 26],
                "raw_response": "(15, 25)",
                "correctness": ["correct", "wrong", "wrong_format"][number % 3],
            }
        )
    return details


def evaluate_file(folder: Path, benchmark: str, content: Any, *flags: str) -> Any:
    path = folder / "log.json"
    path.write_text(json.dumps(content))
    return run_here(
        "evaluate", f"--predictions={path}", f"--benchmark={benchmark}", f"--out={folder}", *flags
    )


PRO_FLAGS = ("--rows=details", "--fields=pred=pred,gold=bbox,image=img_path")


def test_the_log_of_screenspot_pro_is_scored(tmp_path):
    details = pro_details(cells("screenspot_pro"))
    log = {"details": details, "metrics": {"overall": {"action_acc": 527 / 1581}}}
    result = evaluate_file(tmp_path, "screenspot_pro", log, *PRO_FLAGS)
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "eval.json").read_text())
    assert report["n"] == 1581 and report["accuracy"] == pytest.approx(527 / 1581)
    for cell in ("dev_text", "os_icon", "office", "icon"):
        right = [
            entry["correctness"] == "correct"
            for entry, name in zip(details, cells("screenspot_pro"), strict=True)
            if cell in (name, *name.split("_"))
        ]
        assert report[cell] == pytest.approx(sum(right) / len(right))
        low, high = report["intervals"][cell]
        assert low < report[cell] < high
    assert "scientific_icon" in result.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda details: details[1:], "screenspot_pro has 1581 questions, but there are 1580"),
        (
            lambda details: [details[0] | {"ui_type": "icon"}, *details[1:]],
            "has 154 questions of dev_text, but there are 153: --benchmark=screenspot takes any",
        ),
        (
            lambda details: [details[0] | {"group": "Games"}, *details[1:]],
            "row 0: group (group) is 'Games', but the questions of screenspot_pro have dev, ",
        ),
    ],
)
def test_other_questions_are_not_reported_under_its_name(change, message, tmp_path):
    details = change(pro_details(cells("screenspot_pro")))
    result = evaluate_file(tmp_path, "screenspot_pro", {"details": details}, *PRO_FLAGS)
    assert result.returncode == 2 and message in result.stderr
    result = evaluate_file(tmp_path, "screenspot", {"details": details}, *PRO_FLAGS)
    assert result.returncode == 0


def test_a_file_without_groups_has_accuracy_only(tmp_path):
    details = pro_details(cells("screenspot_pro"))
    rows = [{"answer": row["pred"], "box": row["bbox"]} for row in details]
    result = evaluate_file(
        tmp_path, "screenspot_pro", rows, "--fields=pred=answer,gold=box", "--missing=wrong"
    )
    assert result.returncode == 0 and "--fields gives no group and ui_type" in result.stdout
    report = json.loads((tmp_path / "eval.json").read_text())
    assert report["accuracy"] == pytest.approx(527 / 1581) and "dev" not in report


def test_fields_of_other_names_give_the_groups(tmp_path):
    names = {"mobile": "iOS", "desktop": "macOS", "web": "Forum"}
    rows = [
        {
            "answer": "(14, 23)",
            "box": [10, 20, 8, 6],
            "meta": {"os": names[cell.split("_")[0]], "kind": cell.split("_")[1]},
        }
        for cell in cells("screenspot_v2")
    ]
    result = evaluate_file(
        tmp_path,
        "screenspot_v2",
        rows,
        "--fields=pred=answer,gold=box,platform=meta.os,ui_type=meta.kind",
        "--gold-format=xywh_px",
    )
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "eval.json").read_text())
    assert report["n"] == 1272 and report["mobile_icon"] == report["macro_accuracy"] == 1
    call("evaluate", f"--predictions={tmp_path}/predictions.jsonl", f"--out={tmp_path}/again")
    again = json.loads((tmp_path / "again" / "eval.json").read_text())
    assert again["web_text"] == 1 and again["intervals"] == report["intervals"]


# The law: plain loops over 1,000 random answers


def plain_shares(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    right: dict[str, list[bool]] = {}
    for row in rows:
        points = row["prediction"]["points"]
        hit = False
        if points and points[0]["xy_px"] is not None:
            x, y = points[0]["xy_px"]
            x1, y1, x2, y2 = row["gold"]["boxes"][0]["xyxy_px"]
            hit = x1 <= x <= x2 and y1 <= y <= y2
        platform, kind = row["labels"]
        for group in ("accuracy", platform, kind, f"{platform}_{kind}"):
            right.setdefault(group, []).append(hit)
    shares = {group: sum(hits) / len(hits) for group, hits in right.items()}
    six = [
        shares[f"{platform}_{kind}"]
        for platform in ("mobile", "desktop", "web")
        for kind in ("text", "icon")
    ]
    return {**shares, "macro_accuracy": sum(six) / 6}


def test_1000_random_answers_equal_the_plain_implementation():
    rng = np.random.default_rng(0)
    rows = []
    for number in range(1000):
        x, y = rng.integers(0, 30, 2).tolist()
        width, height = rng.integers(1, 12, 2).tolist()
        points = [
            {"label": "", "xy_px": point if rng.random() < 0.95 else None}
            for point in rng.integers(0, 40, (rng.integers(0, 3), 2)).tolist()
        ]
        platform = str(rng.choice(["mobile", "desktop", "web"]))
        kind = str(rng.choice(["text", "icon"]))
        rows.append(
            {
                "source": "s",
                "benchmark": "screenspot_v2@1000",
                "id": number,
                "image": None,
                "size_px": [64, 48],
                "mode": "greedy",
                "rollout": 0,
                "prompt": "",
                "text": "",
                "prediction": {"points": points, "boxes": []},
                "gold": {
                    "boxes": [{"label": "", "xyxy_px": [x, y, x + width, y + height]}],
                    "groups": [platform, kind, f"{platform}_{kind}"],
                },
                "labels": (platform, kind),
            }
        )
    values = benchmarks.compute_metrics(benchmarks.score_rows(rows)).values
    expected = plain_shares(rows)
    assert len(expected) == 13
    for name, share in expected.items():
        assert values[name] == pytest.approx(share)
        assert 0 < share < 1

"""Point-Bench: from PointArena's files and files of predictions to accuracy by category."""

import json
import runpy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import ROOT, run_here
from conftest import PG1
from PIL import Image
from test_eval_runner import copying_programs

from pg_ground import config
from pg_ground.config import Source
from pg_ground.data import run_lengths
from pg_ground.data.bad_records import BadRecords
from pg_ground.data.records import BadRecord
from pg_ground.data.sources import open_records
from pg_ground.evals import benchmarks, runner
from pg_ground.evals.programs import EvalPrograms
from pg_ground.evals.runner import EvalContext, Evaluation
from pg_ground.parallel import sharding
from pg_ground.tokenizer import load as load_tokenizer
from pg_ground.types import UserError

CATEGORIES = ("affordable", "counting", "spatial", "reasoning", "steerable")
BOXES = [(8, 8, 24, 24), (40, 20, 56, 36)]
"""Two squares of the mask: x1, y1, x2, y2."""


def mask() -> np.ndarray:
    pixels = np.zeros((48, 64), bool)
    for x1, y1, x2, y2 in BOXES:
        pixels[y1:y2, x1:x2] = True
    return pixels


def write_point_bench(folder: Path, changes: Mapping[str, Any] | None = None) -> Path:
    """Writes the layout of PointArena/pointarena-data, with a question of each category.

    Args:
      changes: replaces fields of the question about counting.
    """
    questions: list[Any] = [{"image_filename": "x.jpg", "category": "spatial"}]  # without a mask
    for category in CATEGORIES:
        for name in ("selected_images", "selected_masks"):
            (folder / name / category).mkdir(parents=True)
        Image.new("RGB", (64, 48)).save(folder / "selected_images" / category / "a.png")
        Image.fromarray(mask()).save(folder / "selected_masks" / category / "a_mask.png")
        questions.append(
            {
                "image_filename": "a.png",
                "user_input": f"Point to the {category} things",
                "category": category,
                "count": 2 if category == "counting" else 1,
                "mask_filename": "a_mask.png",
            }
        )
    questions[2] |= changes or {}
    (folder / "data.json").write_text(json.dumps(questions))
    return folder


def test_the_files_of_pointarena_are_read(tmp_path):
    records = open_records(f"pointarena:{write_point_bench(tmp_path)}")
    assert [records[i]["category"] for i in range(len(records))] == list(CATEGORIES)
    assert records[1]["image"] == "selected_images/counting/a.png"
    assert records[1]["mask"] == "selected_masks/counting/a_mask.png" and records[1]["count"] == 2


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"category": None}, "missing_field"),
        ({"mask_filename": 3}, "bad_entry"),
        ({"image_filename": None}, "missing_field"),
    ],
)
def test_a_damaged_question_is_one_bad_record(changes, kind, tmp_path):
    records = open_records(f"pointarena:{write_point_bench(tmp_path, changes)}")
    with pytest.raises(BadRecord, match="question 2 of data.json: ") as bad:
        records[1]
    assert bad.value.kind == kind and records[0]["mask"] and len(records) == 5


@pytest.mark.parametrize(
    ("text", "message"),
    [("{}", "not a list of questions"), ("[{}]", "no question with a mask"), (None, "No such")],
)
def test_a_folder_without_questions_is_named(text, message, tmp_path):
    if text:
        (tmp_path / "data.json").write_text(text)
    with pytest.raises(UserError, match=message):
        open_records(f"pointarena:{tmp_path}")


# A model


def entry(folder: Path) -> Source:
    source = runpy.run_path(str(ROOT / "configs/data.py"))["ENTRIES"]["point_bench"]
    return Source(**{**vars(source), "uri": f"pointarena:{folder}"})


def answering(programs: EvalPrograms, answer: str) -> EvalPrograms:
    """Returns the programs of a policy that writes one answer to every question."""
    ids = load_tokenizer().suffix(answer)

    def write(params: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        tokens = np.zeros((len(batch.prompt), 32), np.int32)
        tokens[:, : len(ids)] = ids
        written = np.arange(32)[None] < np.full((len(tokens), 1), len(ids))
        return programs.answer(
            params, batch._replace(suffix=tokens, suffix_mask=written), *args, **kwargs
        )

    return programs._replace(answer=write)


def evaluate_answer(folder: Path, answer: str, source: Source, mask_size: int = 0) -> Evaluation:
    settings = config.Eval(
        sources={"point_bench": source},
        benchmarks={"point_bench": "point_bench"},
        batch_size=2,
        rollouts=0,
    )
    data = config.Data(prompt_length=32, suffix_length=32, mask_size=mask_size)
    tokenizer = load_tokenizer()
    programs = answering(copying_programs(tokenizer, settings), answer)
    mesh = sharding.make_mesh(config.Mesh(data=1))
    context = EvalContext(settings, data, 0, tokenizer, mesh, BadRecords())
    sources = runner.open_eval_sources(settings, data, PG1.image_size)
    return runner.evaluate_sources(programs, {}, sources, context)


FIRST, SECOND = "<loc0341><loc0256>", "<loc0596><loc0767>"  # in the two squares, y first


@pytest.mark.parametrize(
    ("answer", "counting", "others"),
    [
        (FIRST, 0, 1),
        (f"{FIRST} ; {SECOND}", 1, 1),
        (f"{FIRST} ; <loc0000><loc0000>", 0, 1),
        (f"<loc0000><loc0000> ; {FIRST}", 0, 0),
        ("", 0, 0),
    ],
)
@pytest.mark.parametrize("mask_size", [0, 8])
def test_a_model_is_measured_by_category(answer, counting, others, mask_size, tmp_path):
    result = evaluate_answer(tmp_path, answer, entry(write_point_bench(tmp_path)), mask_size)
    assert result.metrics["eval/point_bench/questions"] == 5 and not result.bad_records
    assert result.metrics["eval/point_bench/counting"] == counting
    for name in ("affordance", "spatial", "reasoning", "steerable"):
        assert result.metrics[f"eval/point_bench/{name}"] == others
    expected = (counting + 4 * others) / 5
    assert result.metrics["eval/point_bench/macro_accuracy"] == pytest.approx(expected)
    assert {row["benchmark"] for row in result.predictions} == {"point_bench@5"}
    assert result.predictions[0]["gold"]["masks"][0]["size"] == [48, 64]


def test_a_source_without_masks_is_refused(tmp_path):
    source = Source(**{**vars(entry(write_point_bench(tmp_path))), "mask": ""})
    with pytest.raises(UserError, match=r"needs the path of masks, config.eval.sources.point_ben"):
        evaluate_answer(tmp_path, FIRST, source)


# Files of predictions


def evaluate_file(folder: Path, benchmark: str, rows: Any, *flags: str) -> Any:
    path = folder / "answers.json"
    path.write_text(json.dumps(rows))
    return run_here(
        "evaluate", f"--predictions={path}", f"--benchmark={benchmark}", f"--out={folder}", *flags
    )


def full_file() -> list[dict[str, Any]]:
    """Returns 982 answers of Molmo, in percent. Every other answer is right."""
    rows = []
    for number in range(982):
        category = CATEGORIES[number % 5]
        points = [(25, 33), (75, 58)] if category == "counting" else [(25, 33)]
        if number % 2:
            points = points[:-1] if category == "counting" else [(1, 1)]
        text = " ".join(f'<point x="{x}" y="{y}" alt="a">a</point>' for x, y in points)
        rows.append(
            {
                "image": f"{number}.png",
                "category": category,
                "count": len(BOXES) if category == "counting" else 1,
                "mask": "selected_masks/spatial/a_mask.png",
                "answer": text,
            }
        )
    return rows


def test_a_file_with_the_masks_beside_it_is_scored(tmp_path):
    write_point_bench(tmp_path)
    result = evaluate_file(tmp_path, "point_bench", full_file(), "--fields=pred=answer,gold=mask")
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "eval.json").read_text())
    assert report["n"] == 982 and report["accuracy"] == 0.5
    for category in ("affordance", "counting", "macro_accuracy"):
        low, high = report["intervals"][category]
        assert low < report[category] < high
    assert report["count_accuracy"] == report["counting"]
    assert "982 read: 982 as molmo (xy_percent)" in result.stdout
    again = run_here(
        "evaluate", f"--predictions={tmp_path}/predictions.jsonl", f"--out={tmp_path}/again"
    )
    assert again.returncode == 0
    assert json.loads((tmp_path / "again/eval.json").read_text())["counting"] == report["counting"]
    part = evaluate_file(tmp_path, "point_bench", full_file()[:9], "--fields=pred=answer,gold=mask")
    assert part.returncode == 2 and "--benchmark=points_in_mask takes any" in part.stderr


RLE = run_lengths.encode(mask())


@pytest.mark.parametrize(
    ("gold", "more"),
    [
        (RLE, {}),
        (json.dumps(RLE), {}),
        ([[8, 8, 24, 8, 24, 24, 8, 24]], {"width": 64, "height": 48}),
        ("selected_masks/spatial/a_mask.png", {}),
    ],
)
def test_forms_of_masks(gold, more, tmp_path):
    write_point_bench(tmp_path)
    rows = [
        {"answer": answer, "gold": gold, **more}
        for answer in ([[16, 16]], [[16, 16], [1, 1]], [[1, 1], [16, 16]], [], [[64, 16]], "none")
    ]
    result = evaluate_file(tmp_path, "points_in_mask", rows, "--fields=pred=answer,gold=gold")
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "eval.json").read_text())
    assert report["accuracy"] == pytest.approx(2 / 6)
    assert report["point_share"] == pytest.approx((1 + 0.5 + 0.5) / 6)


@pytest.mark.parametrize(
    ("gold", "message"),
    [
        ("nowhere.png", "the mask of row 1 cannot be read: the mask is no image"),
        ([[8, 8, 24, 8, 24, 24]], "polygons need the size of the image"),
        ({"size": [4, 4], "counts": [3]}, "the mask of row 1 cannot be read"),
        (None, "there is no mask"),
    ],
)
def test_a_mask_that_cannot_be_read_is_named(gold, message, tmp_path):
    rows = [{"answer": [[1, 1]], "gold": RLE}, {"answer": [[1, 1]], "gold": gold}]
    result = evaluate_file(tmp_path, "points_in_mask", rows, "--fields=pred=answer,gold=gold")
    assert result.returncode == 2 and message in result.stderr and len(result.stderr) < 400


def test_answers_that_cannot_be_read_are_an_error(tmp_path):
    rows = [{"answer": "It is on the left.", "gold": RLE}] * 2
    result = evaluate_file(tmp_path, "points_in_mask", rows, "--fields=pred=answer,gold=gold")
    assert result.returncode == 2 and "can be read as points" in result.stderr


# The law: a plain implementation in loops


def plain_right(
    points: Sequence[Sequence[float] | None], pixels: np.ndarray, category: str, count: int
) -> bool:
    if category != "counting":
        points = points[:1]
    elif len(points) != count:
        return False
    if not points:
        return False
    for point in points:
        if point is None:
            return False
        x, y = int(point[0]), int(point[1])
        if x >= pixels.shape[1] or y >= pixels.shape[0] or not pixels[y][x]:
            return False
    return True


def test_1000_random_cases_equal_the_plain_implementation():
    rng = np.random.default_rng(0)
    names = ("affordance", "counting", "spatial", "reasoning", "steerable")
    rows, expected = [], []
    for number in range(1000):
        pixels = rng.random((rng.integers(1, 12), rng.integers(1, 12))) < 0.8
        height, width = pixels.shape
        points: list[list[float] | None] = [
            [float(rng.uniform(0, width + 0.5)), float(rng.uniform(0, height + 0.5))]
            for _ in range(rng.integers(0, 4))
        ]
        if points and rng.random() < 0.1:
            points[-1] = None
        category, count = names[number % 5], int(rng.integers(1, 4))
        if category == "counting" and rng.random() < 0.7:
            count = len(points)
        expected.append(plain_right(points, pixels, category, count))
        rows.append(
            {
                "source": "s",
                "benchmark": "point_bench@1000",
                "id": number,
                "image": None,
                "size_px": [width, height] if number % 2 else None,
                "mode": "greedy",
                "rollout": 0,
                "prompt": "",
                "text": "",
                "prediction": {"points": [{"label": "", "xy_px": point} for point in points]},
                "gold": {
                    "masks": [run_lengths.encode(pixels)],
                    "count": count,
                    "groups": [category],
                },
            }
        )
    scored = benchmarks.score_rows(rows)
    assert [row["correct"] for row in scored] == expected
    assert 0.2 < sum(expected) / 1000 < 0.8
    values = benchmarks.compute_metrics(scored).values
    for number, name in enumerate(names):
        assert values[name] == pytest.approx(np.mean(expected[number::5]))
    assert values["macro_accuracy"] == pytest.approx(values["accuracy"])

"""Laws of `pg_ground.report`: one page that needs nothing else, the same for the same run, and safe to open."""

import html
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from pg_ground import report

TABLE = report.Table(
    "Held out <b>", ("after", "acc50", "n", "note"), (("sft", 0.5, 256, None), ("grpo & more", 0.75, 8, "x")), "greedy"
)
EVIL = "<script>alert('&')</script>"


def lines(n=200):
    """A run of two stages with a gap, an evaluation of each, and a metric no chart knows."""
    rows = []
    for step in range(n):
        if step < n // 2:
            rows.append({"step": step, "stage": "sft", "sft/loss": 5.0 / (step + 1), "optim/lr": 1e-4})
        else:
            reward = None if step == n // 2 + 3 else step / n
            rows.append({"step": step, "stage": "grpo", "reward/total": reward, "reward/iou": 0.5, "own/thing": 1.0})
    rows.append({"step": n, "stage": "grpo", "eval/val <i>/acc50": 0.5, "eval/val <i>/sampled_acc50": 0.25})
    rows[-1]["eval/val <i>/questions"] = 256.0
    return rows


def written(tmp_path, **changed):
    given = {
        "title": "toy run",
        "config_json": {"seed": 0, "init": EVIL},
        "metrics": lines(),
        "tables": [TABLE],
        "pictures": [("step 10", Image.new("RGB", (20, 10), (255, 0, 0)))],
    }
    path = report.write_report(tmp_path, **(given | changed))
    return path, path.read_text(encoding="utf-8")


class Balance(HTMLParser):
    """Fails on a tag that is closed out of turn."""

    VOID = ("meta", "img", "br")

    def __init__(self):
        super().__init__()
        self.open = []
        self.seen = []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return written(tmp_path_factory.mktemp("run"))


def test_page_is_well_formed_and_complete(page):
    path, text = page
    assert path.name == "report.html" and not list(path.parent.glob("*.tmp"))
    tags = Balance()
    tags.feed(text)
    assert tags.open == []
    assert tags.seen.count("table") == 1 and tags.seen.count("img") == 1 and "details" in tags.seen


def test_page_asks_nothing_of_the_network(page):
    _, text = page
    assert "http:" not in text and "https:" not in text and "@import" not in text
    assert all(a.startswith("data:") for a in re.findall(r'src="([^"]*)"', text))
    assert all(a.startswith("#") for a in re.findall(r'href="([^"]*)"', text))
    assert all(a.startswith("#") for a in re.findall(r"url\(([^)]*)\)", text))
    assert "<script" not in text and "<link" not in text


def test_every_text_is_escaped(tmp_path):
    table = report.Table(EVIL, (EVIL,), ((EVIL,),), EVIL)
    rows = [{"step": 0, "stage": EVIL, f"eval/{EVIL}/acc50": 0.5, EVIL: 1.0}]
    picture = Image.new("RGB", (2, 2))
    _, text = written(tmp_path, title=EVIL, tables=[table], metrics=rows, pictures=[(f'{EVIL}" onload="x', picture)])
    assert "<script" not in text and '" onload' not in text
    assert text.count("&lt;script&gt;") >= 9
    tags = Balance()
    tags.feed(text)
    assert tags.open == []


def test_equal_runs_give_equal_bytes(page, tmp_path):
    path, _ = page
    again, _ = written(tmp_path)
    assert path.read_bytes() == again.read_bytes()


def test_every_metric_has_a_chart(page):
    _, text = page
    titles = [html.unescape(t) for t in re.findall(r"<h3>([^<]*)</h3><svg", text)]
    evaluations = ["Evaluation: val <i>, greedy answers", "Evaluation: val <i>, sampled answers"]
    assert titles == ["Reward", *evaluations, "SFT loss", "Learning rate", "own/thing"]
    for metric in ("total", "iou"):
        assert f">{metric}</text>" in text


def test_curves_follow_the_colours_of_the_page(page):
    _, text = page
    assert "currentColor" in text and report.INK not in text
    assert "prefers-color-scheme: dark" in text and 'name="viewport"' in text


def test_stage_starts_are_where_the_stage_before_ends():
    assert report._stage_starts(lines(200)) == [("sft", 0), ("grpo", 99)]


def test_running_mean_of_a_constant_is_the_constant_and_gaps_count_for_nothing():
    values = np.full(50, 3.0)
    values[[0, 7, 8]] = math.nan
    np.testing.assert_allclose(report._running_mean(values, 4), 3.0, rtol=1e-15)
    assert np.isnan(report._running_mean(np.array([math.nan]), 5)).all()
    np.testing.assert_allclose(report._running_mean(np.array([1.0, 2.0, 6.0]), 1), [1.5, 3.0, 4.0])


def test_pictures_from_a_file_and_from_memory_are_the_same(tmp_path):
    picture = Image.new("RGB", (30, 20), (9, 8, 7))
    picture.save(tmp_path / "p.png", optimize=True)
    _, a = written(tmp_path, metrics=[], pictures=[("x", tmp_path / "p.png")])
    _, b = written(tmp_path, metrics=[], pictures=[("x", picture)])
    assert a == b
    picture.save(tmp_path / "p.jpg")
    assert "data:image/jpeg;base64," in written(tmp_path, metrics=[], pictures=[("x", tmp_path / "p.jpg")])[1]


def test_a_run_that_has_measured_nothing_has_a_page(tmp_path):
    _, text = written(tmp_path, metrics=[], tables=[], pictures=[])
    assert "<svg" not in text and "<table" not in text and "every setting" in text
    rows = [{"step": 0, "stage": "grpo", "reward/total": None}]
    assert "<svg" in written(tmp_path, metrics=rows, tables=[], pictures=[])[1]


def test_ascii_table_lines_up_and_numbers_stand_right():
    assert report.ascii_table(TABLE).splitlines() == [
        "Held out <b>",
        "after         acc50    n  note",
        "-----------  ------  ---  ----",
        "sft          0.5000  256  –",
        "grpo & more  0.7500    8  x",
        "greedy",
    ]


def test_numbers_that_come_as_text_stand_right_too():
    table = report.Table("", ("name", "a", "b"), (("x", "0.5", "1e-05"), ("y", "", "12.25%"), ("z", "-10.5", "3")))
    assert [report._is_number_column(table, i) for i in range(3)] == [False, True, True]


def test_ascii_table_without_rows_is_its_head():
    assert report.ascii_table(report.Table("", ("a", "bc"), ())) == "a  bc\n-  --"

"""Laws of `pg_ground.report`: a page that needs nothing else, equal for equal files, safe to open, and true in a browser."""

import base64
import html
import io
import json
import math
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import call, killed_and_resumed, train_tiny
from PIL import Image

from pg_ground.reporting import drawing, metric_writers, report
from pg_ground.types import UserError

EVIL = "<script>alert('&')</script>"
SFT, GRPO = 100, 100


def lines(n: int = SFT + GRPO) -> list[dict[str, Any]]:
    """A run of two stages with a gap, an evaluation at the end of each, and a metric that no chart knows."""
    rows: list[dict[str, Any]] = []
    for step in range(1, n + 1):
        times = {"time/step_s": 9.0 if step in (1, SFT + 1) else 1.0, "time/update_s": 0.25}
        if step <= SFT:
            rows.append(
                {"step": step, "stage": "sft", "sft/loss": 5.0 / step, "optim/lr": 1e-4, **times}
            )
        else:
            reward = None if step == SFT + 3 else step / n
            rows.append(
                {
                    "step": step,
                    "stage": "grpo",
                    "reward/total": reward,
                    "reward/iou": 0.5,
                    "own/thing": 1.0,
                    **times,
                }
            )
        if step in (SFT, n):
            measures = {
                "eval/val <i>/acc50": step / n,
                "eval/val <i>/sampled_acc50": 0.25,
                "eval/val <i>/questions": 256.0,
            }
            rows.append({"step": step, "stage": rows[-1]["stage"], **measures})
    return rows


REWARDS = {
    "middling": (0.5, 0.5, 0.4, 0.4),
    "torn": (0.0, 1.0, 0.1, 0.9),
    "hopeless": (0.0, 0.1, 0.0, None),
    "good": (0.9,) * 4,
}
"""Of the group of each prompt: means 0.45, 0.5, 0.03 and 0.9; "torn" has the largest spread, "good" none."""


def prompts() -> list[dict[str, Any]]:
    image = drawing.photo_uri(np.full((48, 48, 3), 90, np.uint8))
    found = []
    for name, rewards in REWARDS.items():
        completions = []
        for g, reward in enumerate(rewards):
            low = 0.1 + 0.1 * g
            boxes = [{"at": [low, low, low + 0.4, low + 0.5], "label": "cat"}]
            said = {"text": f"<loc0100><loc0200> cat {name} {g} <b>", "boxes": boxes, "points": []}
            completions.append(
                {
                    **said,
                    "reward": reward,
                    "parts": {"iou": reward, "format": 1.0},
                    "advantage": 0.25,
                }
            )
        gold = {
            "text": "<loc0001> cat",
            "boxes": [{"at": [0.2, 0.2, 0.8, 0.8], "label": "cat"}],
            "points": [],
        }
        asked = {
            "source": "boxes",
            "index": 7,
            "prompt": f"detect {name}",
            "image": image,
            "size": [200, 100],
        }
        found.append({**asked, "gold": gold, "completions": completions})
    return found


def write_run(
    workdir: Path,
    rows: list[dict[str, Any]] | None = None,
    steps: tuple[int, ...] = (150, 200),
    **changed: Any,
) -> Path:
    """Returns the directory of a run, as a run leaves it."""
    (workdir / "samples").mkdir(parents=True)
    config = {
        "seed": 0,
        "init": EVIL,
        "stages": ["sft", "grpo"],
        "sft": {"steps": SFT},
        "grpo": {"steps": GRPO, "group_size": 4},
    }
    (workdir / "config.json").write_text(json.dumps(config | changed))
    (workdir / "metrics.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in (lines() if rows is None else rows))
    )
    machine = {"from_step": 0, "devices": "1 × cpu", "host": "<here>", "commit": None}
    (workdir / "hardware.json").write_text(json.dumps([machine]))
    for step in steps:
        sample = {"stage": "grpo", "step": step, "prompts": prompts()}
        (workdir / f"{report.samples_name('grpo', step)}.json").write_text(json.dumps(sample))
    return workdir


def embedded(text: str) -> dict[str, Any]:
    """Returns what the script of a page draws."""
    found = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    assert len(found) == 1
    return json.loads(found[0])


class Balance(HTMLParser):
    """Fails on a tag that is closed out of turn."""

    VOID = ("meta", "img", "br", "link")

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
def workdir(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "toy")


@pytest.fixture(scope="module")
def page(workdir) -> str:
    path = report.write_report(workdir)
    assert path == workdir / "report.html" and not list(workdir.glob("*.tmp"))
    return path.read_text(encoding="utf-8")


def test_page_is_well_formed_and_has_every_section(page):
    tags = Balance()
    tags.feed(page)
    assert tags.open == []
    assert re.findall(r'<section id="(\w+)"', page) == [
        "results",
        "curves",
        "rollouts",
        "settings",
        "hardware",
        "time",
    ]


def test_page_asks_nothing_of_the_network(page):
    assert "http:" not in page and "https:" not in page and "@import" not in page
    assert "default-src 'none'" in page, "and a browser would not let it"
    assert all(a.startswith(("data:", "#")) for a in re.findall(r'(?:src|href)="([^"]*)"', page))
    assert all(a.startswith("#") for a in re.findall(r"url\(([^)]*)\)", page))


def test_every_text_is_escaped(tmp_path):
    rows = [{"step": 0, "stage": EVIL, f"eval/{EVIL}/acc50": 0.5, EVIL: 1.0}]
    text = report.write_report(write_run(tmp_path / 'a"<b>', rows, **{EVIL: EVIL})).read_text(
        encoding="utf-8"
    )
    assert text.count("<script") == 2, "its data and its own"
    assert EVIL not in text and "a&quot;&lt;b&gt;" in text
    tags = Balance()
    tags.feed(text)
    assert tags.open == []


def test_equal_files_give_equal_bytes(workdir, page):
    assert report.write_report(workdir).read_text(encoding="utf-8") == page


def test_every_metric_has_a_chart(page):
    charts = {
        chart["title"]: [line["label"] for line in chart["lines"]]
        for chart in embedded(page)["charts"]
    }
    assert charts == {
        "Reward": ["total", "iou"],
        "Evaluation: val <i>, greedy answers": ["acc50"],
        "Evaluation: val <i>, sampled answers": ["acc50"],
        "SFT loss": ["loss"],
        "Learning rate": ["lr"],
        "Time of a step by phase (s)": ["step", "update"],
        "own/thing": ["thing"],
    }


def test_page_follows_the_light_of_the_room(page):
    assert "prefers-color-scheme: dark" in page and 'name="viewport"' in page


def test_stage_starts_are_where_the_stage_before_ends():
    assert report.stage_starts(lines()) == [("sft", 0), ("grpo", SFT)]


def test_results_have_a_column_for_the_end_of_each_stage_and_for_what_was_measured_last(tmp_path):
    early = [
        {"step": 0, "stage": "sft", "eval/val/acc50": 0.125},
        {"step": 60, "stage": "sft", "eval/val/acc50": 0.5},
    ]
    table = report.results(report.read_run(write_run(tmp_path / "run", early)))
    assert table.columns == ["metric", "start", "step 60"] and table.rows == [
        ["val/acc50", "0.125", "0.500"]
    ]
    table = report.results(report.read_run(write_run(tmp_path / "whole", early[:1] + lines())))
    assert table.columns == ["metric", "start", "after sft", "after grpo"]


def test_times_are_means_without_the_lines_that_compile(workdir):
    rows = report.times_table(report.read_run(workdir), "").rows
    assert rows == [
        [s, *r]
        for s in ("sft", "grpo")
        for r in (["step", "1.0000", ""], ["update", "0.2500", "25.0%"])
    ]


def test_settings_tell_what_was_chosen_from_what_is_the_default():
    for name, value, chosen in (
        ("grpo.group_size", 8, False),
        ("grpo.group_size", 4, True),
        ("stages", ["sft", "grpo"], False),
        ("grpo.sources.my.own.uri", "jsonl:x", True),
        ("grpo.sources.my.own.box_format", "xyxy_px", False),
        ("grpo.rewards.iou", 1.0, False),
        ("grpo.rewards.label", 0.0, True),
    ):
        assert report._is_chosen(name, value) == chosen, name


def test_running_mean_of_a_constant_is_the_constant_and_gaps_count_for_nothing():
    values = np.full(50, 3.0)
    values[[0, 7, 8]] = math.nan
    np.testing.assert_allclose(report.running_mean(values, 4), 3.0, rtol=1e-15)
    assert np.isnan(report.running_mean(np.array([math.nan]), 5)).all()
    np.testing.assert_allclose(report.running_mean(np.array([1.0, 2.0, 6.0]), 1), [1.5, 3.0, 4.0])


def test_thinning_keeps_the_ends_and_every_extreme():
    values = np.random.default_rng(0).normal(size=20_000)
    values[[77, 12_345]], values[500:600] = (-99.0, 99.0), math.nan
    kept = report.thinned(values)
    assert kept == sorted(set(kept)) and len(kept) <= report.POINTS + 2
    assert {0, 77, 12_345, 19_999} <= set(kept)
    assert report.thinned(values[:300]) == list(range(300))


def test_steps_that_fit_are_evenly_chosen_with_the_first_and_the_last():
    assert report.evenly(range(9), [1] * 9, 9) == list(range(9))
    assert report.evenly(range(9), [1] * 9, 5) == [0, 2, 4, 6, 8]
    assert report.evenly(range(9), [100] * 9, 5) == [0, 8]
    assert report.evenly([], [], 5) == [] and report.evenly([3], [100], 5) == [3]


def test_the_gallery_stays_within_its_budget(tmp_path):
    run = write_run(tmp_path / "run", steps=tuple(range(101, 201)))
    size = (tmp_path / "run" / "samples" / "grpo_00000101.json").stat().st_size
    found = report.read_run(run, samples_bytes=10 * size + 1)
    assert len(found.samples) == 10 and found.left_out == 90
    assert [found.samples[i]["step"] for i in (0, -1)] == [101, 200]


def test_steps_of_the_gallery_are_in_order_over_all_stages(tmp_path):
    run = write_run(tmp_path / "run", steps=(20, 100))
    (run / "samples" / "sft_00000060.json").write_text(
        json.dumps({"stage": "sft", "step": 60, "prompts": prompts()})
    )
    assert [sample["step"] for sample in report.read_run(run).samples] == [20, 60, 100]


def test_a_run_that_has_measured_nothing_has_a_page(tmp_path):
    run = write_run(tmp_path / "run", rows=[], steps=())
    (run / "hardware.json").unlink()
    text = report.write_report(run).read_text(encoding="utf-8")
    assert re.findall(r'<section id="(\w+)"', text) == ["settings"] and "every setting" in text


def test_samples_later_than_a_checkpoint_are_forgotten(tmp_path):
    run = write_run(tmp_path / "run", steps=(120, 140, 160))
    for own in ("notes.txt", "my_picture.png"):
        (run / "samples" / own).write_text("the user's own")
    report.forget_samples(run, 140)
    names = ["grpo_00000120.json", "grpo_00000140.json", "my_picture.png", "notes.txt"]
    assert sorted(path.name for path in (run / "samples").iterdir()) == names
    report.forget_samples(run, None)
    assert sorted(path.name for path in (run / "samples").iterdir()) == names[2:]


def test_several_runs_are_compared(tmp_path, capsys):
    runs = [write_run(tmp_path / "a" / "run"), write_run(tmp_path / "b" / "run", seed=1)]
    out = tmp_path / "both.html"
    call("report", f"--workdir={runs[0]}", "--workdir", str(runs[1]), f"--out={out}")
    assert capsys.readouterr().out == f"{out}\n"
    text = out.read_text(encoding="utf-8")
    data = embedded(text)
    assert [run["name"] for run in data["runs"]] == ["a/run", "b/run"]
    assert all(len(run["samples"]) == 2 for run in data["runs"])
    by_title = {
        chart["title"]: [line["label"] for line in chart["lines"]] for chart in data["charts"]
    }
    assert by_title["Reward: total"] == by_title["Reward: iou"] == ["a/run", "b/run"]
    differs = re.search(r"<h3>What differs</h3>.*?</table>", text, re.S)
    assert differs and re.findall(r"<td[^>]*>([^<]*)", differs[0]) == ["seed", "0", "1"]
    assert "a/run, after grpo" in html.unescape(text)
    call("report", str(runs[0]), str(runs[1]), f"--out={tmp_path / 'again.html'}")
    assert (tmp_path / "again.html").read_text(encoding="utf-8") == text


def test_the_command_rebuilds_the_page_of_a_run(workdir, page, capsys):
    (workdir / "report.html").unlink()
    call("report", f"--workdir={workdir}")
    assert capsys.readouterr().out == f"{workdir / 'report.html'}\n"
    assert (workdir / "report.html").read_text(encoding="utf-8") == page


def test_what_cannot_be_reported_ends_in_one_line(tmp_path):
    run = write_run(tmp_path / "run")
    for flags, said in (
        ([], "needs --workdir=DIR: the directory"),
        ([str(tmp_path)], "holds no run: there is no config.json"),
        ([str(run), str(run), "--out=x.html"], "twice"),
        ([str(run), str(tmp_path)], "--out=FILE is needed"),
    ):
        with pytest.raises(UserError, match=said):
            call("report", *flags)
    (run / "samples" / "grpo_00000150.json").write_text("{torn")
    with pytest.raises(UserError, match=r"grpo_00000150\.json is not JSON"):
        call("report", str(run))


# --- with a run ---


@pytest.fixture(scope="module")
def straight(environment, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("runs") / "run"
    done = train_tiny(environment, workdir, "--config.log.samples_every=2")
    assert done.returncode == 0, done.stderr
    return workdir


def without_times(data: dict[str, Any]) -> dict[str, Any]:
    """Returns what does not depend on the machine."""
    kept = [chart for chart in data["charts"] if not re.match("Time|Throughput", chart["title"])]
    return data | {"charts": kept}


@pytest.mark.slow
def test_a_killed_and_resumed_run_has_the_report_of_one_that_was_not(
    straight, environment, tmp_path
):
    killed_and_resumed(environment, tmp_path / "run", 6, 0.0, ["--config.log.samples_every=2"])
    one, other = (
        embedded((workdir / "report.html").read_text(encoding="utf-8"))
        for workdir in (straight, tmp_path / "run")
    )
    assert without_times(one) == without_times(other)
    assert [(s["stage"], s["step"]) for s in other["runs"][0]["samples"]] == [
        ("grpo", 8),
        ("grpo", 10),
        ("grpo", 12),
    ]
    for chart in other["charts"]:
        for line in chart["lines"]:
            assert line["steps"] == sorted(set(line["steps"])), chart["title"]
    reward = next(chart for chart in other["charts"] if chart["title"] == "Reward")
    assert all(line["steps"] == [8, 10, 12] for line in reward["lines"])
    folders = [
        sorted(p.name for p in (workdir / "samples").iterdir())
        for workdir in (straight, tmp_path / "run")
    ]
    assert folders[0] == folders[1] and len(folders[0]) == 6


def test_a_sample_says_what_its_picture_shows(straight):
    """Drawn again from the numbers of the file: gold in white where it says, answers as rewarded."""
    sample = json.loads((straight / "samples" / "grpo_00000012.json").read_text())
    assert sample["step"] == 12 and len(sample["prompts"]) == 8
    for asked in sample["prompts"]:
        assert asked["prompt"].startswith(("detect ", "point to ")) and asked["image"].startswith(
            "data:image/png;base64,"
        )
        kind = "boxes" if asked["source"] == "boxes" else "points"
        (gold,) = asked["gold"][kind]
        assert asked["gold"]["text"].endswith(gold["label"]) and asked["prompt"].endswith(
            gold["label"]
        )
        bins = [int(b) / 1023 for b in re.findall(r"<loc(\d{4})>", asked["gold"]["text"])]
        np.testing.assert_allclose(gold["at"], bins, atol=0.5 / 1023 + 5e-5)
        assert len(asked["completions"]) == 4
        for one in asked["completions"]:
            assert {"iou", "gaussian_point", "format"} == one["parts"].keys()
            known = [
                (one["parts"][name], w)
                for name, w in (("iou", 1), ("gaussian_point", 1), ("format", 0.2))
            ]
            total = sum(value * w for value, w in known if value is not None)
            assert one["reward"] == pytest.approx(total, abs=2e-4), (
                "each part is rounded to four places"
            )


def test_a_report_that_cannot_be_written_costs_no_run(environment, tmp_path, straight):
    workdir = tmp_path / "run"
    (workdir / "report.html.tmp").mkdir(parents=True)  # in the way of writing it
    done = train_tiny(environment, workdir, "--config.log.samples_every=2")
    assert done.stderr.count("report.html was not updated: IsADirectoryError") == 1
    assert done.returncode == 2 and "report.html.tmp" in done.stderr.splitlines()[-1], (
        "said again at the end, when all is saved"
    )
    mine, theirs = (metric_writers.read_metrics(path)[-1] for path in (workdir, straight))
    assert mine["step"] == 12 and mine == theirs


# --- in a browser ---

CHROMIUM = Path("/usr/bin/chromium")
PHONE, DESKTOP = {"width": 390, "height": 844}, {"width": 1280, "height": 900}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    import playwright.sync_api as api

    with api.sync_playwright() as playwright:
        own = {"executable_path": str(CHROMIUM)} if CHROMIUM.is_file() else {}
        try:
            browser = playwright.chromium.launch(args=["--no-sandbox"], **own)
        except api.Error as error:
            pytest.skip(f"no browser starts: {str(error).splitlines()[0]}")
        yield browser
        browser.close()


class Opened:
    """A page in a browser, and all that it said and asked for."""

    def __init__(
        self,
        browser: Any,
        path: Path,
        viewport: dict[str, int],
        scheme: str = "light",
        touch: bool = False,
    ):
        self.context = browser.new_context(viewport=viewport, color_scheme=scheme, has_touch=touch)
        self.page = self.context.new_page()
        self.said, self.asked = [], []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(path.as_uri())

    def __enter__(self) -> Any:
        return self.page

    def __exit__(self, *_: object) -> None:
        self.context.close()
        assert self.said == [], "nothing on the console"
        assert [url for url in self.asked if not url.startswith("data:")] == self.asked[:1], (
            "nothing but the page itself"
        )


def order(page: Any) -> list[str]:
    return [text.removeprefix("detect ") for text in page.locator(".prompt h3").all_text_contents()]


@pytest.mark.needs("playwright")
def test_sorting_orders_prompts_by_their_rewards(browser, workdir, page):
    with Opened(browser, workdir / "report.html", DESKTOP) as opened:
        assert order(opened) == list(REWARDS)
        judged = {name: [r for r in rewards if r is not None] for name, rewards in REWARDS.items()}
        means, spreads = (
            {name: float(f(rewards)) for name, rewards in judged.items()} for f in (np.mean, np.std)
        )
        for button, key in (
            ("worst", means.__getitem__),
            ("best", lambda name: -means[name]),
            ("spread", lambda name: -spreads[name]),
            ("in order", list(REWARDS).index),
        ):
            opened.get_by_role("button", name=button, exact=True).click()
            assert order(opened) == sorted(REWARDS, key=key), button
            assert opened.locator('.bar [aria-pressed="true"]').all_text_contents() == [button]


@pytest.mark.needs("playwright")
def test_hover_tap_and_keyboard_show_an_answer_alone_with_its_text_and_rewards(
    browser, workdir, page
):
    text = "<loc0100><loc0200> cat torn 1 <b>"
    with Opened(browser, workdir / "report.html", DESKTOP) as opened:
        asked = opened.locator(".prompt", has_text="detect torn")
        readout, lit = asked.locator(".readout"), asked.locator(".answer.on")
        rows = asked.locator(".answers button")
        assert rows.locator(".reward").all_text_contents() == ["1.00", "0.90", "0.10", "0.00"], (
            "the best first"
        )
        assert text not in readout.text_content() and lit.count() == 0
        rows.nth(0).hover()
        assert readout.locator(".raw").text_content() == text
        assert [x.text_content() for x in readout.locator(".parts div").all()] == [
            "reward1.00", "iou1.00", "format1.00", "advantage0.25",
        ]  # fmt: skip
        assert lit.count() == 1 and asked.locator(".view.lit").count() == 1
        opened.locator("h1").hover()
        assert lit.count() == 0, "and goes with the pointer"

        view = asked.locator(
            ".view"
        ).bounding_box()  # of 200 × 100: fractions of the image are fractions of it
        edge = {
            "x": 0.2 * view["width"] + 1,
            "y": (0.2 + 0.15) * view["height"],
        }  # left edge of the second answer's box
        asked.locator(".view").hover(position=edge)
        assert readout.locator(".raw").text_content() == text
        assert asked.locator(".answers button.on .reward").text_content() == "1.00", (
            "its row is lit with it"
        )
        opened.locator("h1").hover()

        rows.nth(3).focus()
        assert "torn 0" in readout.text_content()
        opened.keyboard.press("Enter")
        opened.locator("h1").hover()
        assert (
            rows.nth(3).get_attribute("aria-pressed") == "true"
            and "torn 0" in readout.text_content()
        ), "it stays"
    with Opened(browser, workdir / "report.html", PHONE, touch=True) as opened:
        asked = opened.locator(".prompt", has_text="detect torn")
        asked.locator(".answers button").nth(0).tap()
        assert text in asked.locator(".readout").text_content()


@pytest.mark.needs("playwright")
def test_boxes_lie_where_the_fractions_say_in_the_colours_of_their_rewards_gold_dashed(
    browser, workdir, page
):
    with Opened(browser, workdir / "report.html", DESKTOP) as opened:
        view = opened.locator(".prompt", has_text="detect torn").locator(".view")
        frame, found = view.bounding_box(), {}
        assert frame["width"] / frame["height"] == pytest.approx(2, rel=0.02), (
            "the aspect of the original, not of the square"
        )
        for path in view.locator(".answer .line").all():
            of_view = "e => { const b = e.getBBox(), v = e.ownerSVGElement.viewBox.baseVal; "
            of_view += (
                "return [b.y / v.height, b.x / v.width, b.height / v.height, b.width / v.width]; }"
            )
            found[path.get_attribute("stroke")] = path.evaluate(of_view)
        expected = {
            "rgb({} {} {})".format(*drawing.reward_color(reward)): g
            for g, reward in enumerate(REWARDS["torn"])
        }
        assert found.keys() == expected.keys()
        for colour, g in expected.items():
            np.testing.assert_allclose(
                found[colour], [0.1 + 0.1 * g, 0.1 + 0.1 * g, 0.4, 0.5], atol=1e-6, err_msg=colour
            )
        assert (
            view.locator(".gold .line").evaluate("e => getComputedStyle(e).strokeDasharray")
            != "none"
        )


@pytest.mark.needs("playwright")
def test_steps_are_chosen_with_buttons_and_by_name(browser, workdir, page):
    with Opened(browser, workdir / "report.html", DESKTOP) as opened:
        pick = opened.get_by_role("combobox", name="step")
        assert (
            pick.input_value() == "1"
            and opened.get_by_role("button", name="the next step").is_disabled()
        )
        opened.get_by_role("button", name="worst", exact=True).click()
        opened.get_by_role("button", name="the step before").click()
        assert pick.input_value() == "0" and order(opened)[0] == "hopeless", "the order stays"
        pick.select_option(label="grpo · step 200")
        assert opened.get_by_role("button", name="the step before").is_enabled()


@pytest.mark.needs("playwright")
def test_a_curve_says_its_values_at_the_pointer_and_by_arrow_keys(browser, workdir, page):
    with Opened(browser, workdir / "report.html", DESKTOP) as opened:
        plot = opened.get_by_role("slider", name="Reward", exact=True)
        plot.focus()
        opened.keyboard.press("Home")
        assert plot.get_attribute("aria-valuetext") == "step 101: total 0.505, iou 0.5"
        opened.keyboard.press("End")
        assert plot.get_attribute("aria-valuetext").startswith("step 200: total 1, ")
        box = plot.bounding_box()
        plot.hover(position={"x": box["width"] / 2, "y": 80})
        step = int(re.match(r"step (\d+):", plot.get_attribute("aria-valuetext"))[1])
        assert 135 <= step <= 155, (
            "the chart begins with its stage, at step 100; its left margin is the wider one"
        )
        key = opened.locator(".chart", has=plot).get_by_role("button", name="iou")
        before = opened.locator(".chart", has=plot).locator(".plot path").count()
        key.click()
        assert key.get_attribute("aria-pressed") == "false"
        assert opened.locator(".chart", has=plot).locator(".plot path").count() < before


@pytest.mark.needs("playwright")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(
    "viewport", [PHONE, {"width": 360, "height": 740}, DESKTOP], ids=["phone", "small", "desktop"]
)
def test_the_page_fits_its_screen(browser, workdir, page, viewport, scheme):
    with Opened(browser, workdir / "report.html", viewport, scheme) as opened:
        assert opened.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
        paper = opened.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (int(re.findall(r"\d+", paper)[0]) < 128) == (scheme == "dark")
        assert opened.locator(".plot svg").count() == 7 and opened.locator(".prompt").count() == 4


@pytest.mark.needs("playwright")
def test_a_comparison_overlays_curves_and_has_a_gallery_for_each_run(browser, tmp_path):
    runs = [write_run(tmp_path / name, seed=seed) for seed, name in enumerate(("one", "two"))]
    call("report", *map(str, runs), f"--out={tmp_path / 'both.html'}")
    with Opened(browser, tmp_path / "both.html", PHONE) as opened:
        plot = opened.get_by_role("slider", name="Reward: total")
        assert plot.get_attribute("aria-valuetext") == "step 200: one 1, two 1"
        opened.get_by_role("combobox", name="run").select_option(label="two")
        assert opened.locator(".prompt").count() == 4
        assert opened.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]


def test_a_picture_of_a_photograph_is_a_jpeg_and_of_a_drawing_exact():
    rng = np.random.default_rng(0)
    assert drawing.photo_uri(rng.integers(0, 255, (128, 128, 3)).astype(np.uint8)).startswith(
        "data:image/png;base64,"
    )
    large = drawing.photo_uri(np.full((896, 896, 3), 200, np.uint8))
    assert large.startswith("data:image/jpeg;base64,")
    with Image.open(io.BytesIO(base64.b64decode(large.partition(",")[2]))) as picture:
        assert picture.size == (drawing.PHOTO_PX, drawing.PHOTO_PX)

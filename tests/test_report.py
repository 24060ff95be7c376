"""Laws of the report: it needs no other file, equal files give equal bytes, no text becomes HTML.

The last part opens the page in a browser.
"""

import html
import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import call, killed_and_resumed, train_tiny

from pg_ground.reporting import drawing, metric_writers, report, run_files
from pg_ground.reporting.rollout_pictures import reward_color
from pg_ground.types import UserError

EVIL = "<script>alert('&')</script>"
SFT, GRPO = 100, 100


def metric_lines(n: int = SFT + GRPO) -> list[dict[str, Any]]:
    """Returns the metrics of two stages.

    They have a gap, an evaluation at the end of each stage, and a metric without a chart.
    """
    lines: list[dict[str, Any]] = []
    for step in range(1, n + 1):
        times = {"time/step_s": 9.0 if step in (1, SFT + 1) else 1.0, "time/update_s": 0.25}
        if step <= SFT:
            values = {"stage": "sft", "sft/loss": 5.0 / step, "optim/lr": 1e-4}
        else:
            reward = None if step == SFT + 3 else step / n
            values = {"stage": "grpo", "reward/total": reward, "reward/iou": 0.5, "own/thing": 1.0}
        lines.append({"step": step, **values, **times})
        if step in (SFT, n):
            metrics = {
                "eval/val <i>/acc50": step / n,
                "eval/val <i>/sampled_acc50": 0.25,
                "eval/val <i>/questions": 256.0,
            }
            lines.append({"step": step, "stage": values["stage"], **metrics})
    return lines


REWARDS = {
    "middling": (0.5, 0.5, 0.4, 0.4),
    "torn": (0.0, 1.0, 0.1, 0.9),
    "hopeless": (0.0, 0.1, 0.0, None),
    "good": (0.9, 0.9, 0.9, 0.9),
}
"""Rewards of the group of each prompt. Their means are 0.45, 0.5, 0.03 and 0.9.

The rewards of "torn" have the largest spread. The rewards of "good" have none.
"""


def prompts() -> list[dict[str, Any]]:
    """Returns the prompts of one step, as `samples/*.json` holds them."""
    image = drawing.photo_uri(np.full((48, 48, 3), 90, np.uint8))
    gold = {
        "text": "<loc0001> cat",
        "boxes": [{"at": [0.2, 0.2, 0.8, 0.8], "label": "cat"}],
        "points": [],
    }
    return [
        {
            "source": "boxes",
            "index": 7,
            "prompt": f"detect {name}",
            "image": image,
            "size": [200, 100],
            "gold": gold,
            "completions": [completion(name, g, reward) for g, reward in enumerate(rewards)],
        }
        for name, rewards in REWARDS.items()
    ]


def completion(name: str, g: int, reward: float | None) -> dict[str, Any]:
    low = 0.1 + 0.1 * g
    return {
        "text": f"<loc0100><loc0200> cat {name} {g} <b>",
        "boxes": [{"at": [low, low, low + 0.4, low + 0.5], "label": "cat"}],
        "points": [],
        "reward": reward,
        "parts": {"iou": reward, "format": 1.0},
        "advantage": 0.25,
    }


def write_run(
    workdir: Path,
    lines: list[dict[str, Any]] | None = None,
    steps: tuple[int, ...] = (150, 200),
    **changed: Any,
) -> Path:
    """Writes the files of a run, and returns its directory."""
    (workdir / "samples").mkdir(parents=True)
    config = {
        "seed": 0,
        "init": EVIL,
        "stages": ["sft", "grpo"],
        "sft": {"steps": SFT},
        "grpo": {"steps": GRPO, "group_size": 4},
    }
    (workdir / "config.json").write_text(json.dumps(config | changed))
    lines = metric_lines() if lines is None else lines
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    machine = {"from_step": 0, "devices": "1 × cpu", "host": "<here>", "commit": None}
    (workdir / "hardware.json").write_text(json.dumps([machine]))
    for step in steps:
        write_samples(workdir, "grpo", step)
    return workdir


def write_samples(workdir: Path, stage: str, step: int) -> None:
    samples = {"stage": stage, "step": step, "prompts": prompts()}
    (workdir / f"{run_files.samples_name(stage, step)}.json").write_text(json.dumps(samples))


def embedded_data(text: str) -> dict[str, Any]:
    """Returns the JSON that the script of a page draws."""
    pattern = r'<script type="application/json" id="data">(.*?)</script>'
    (data,) = re.findall(pattern, text, re.S)
    return json.loads(data)


class Balance(HTMLParser):
    """Fails if a tag is closed in the wrong order."""

    VOID = ("meta", "img", "br", "link")

    def __init__(self):
        super().__init__()
        self.open = []

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def assert_well_formed(text: str) -> None:
    tags = Balance()
    tags.feed(text)
    assert tags.open == []


def section_names(text: str) -> list[str]:
    return re.findall(r'<section id="(\w+)"', text)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "toy")


@pytest.fixture(scope="module")
def page(workdir) -> str:
    path = report.write_report(workdir)
    assert path == workdir / "report.html"
    assert not list(workdir.glob("*.tmp"))
    return path.read_text(encoding="utf-8")


# the page


def test_the_page_is_well_formed_and_has_every_section(page):
    assert_well_formed(page)
    names = ["results", "curves", "rollouts", "settings", "hardware", "time"]
    assert section_names(page) == names


def test_the_page_makes_no_request(page):
    assert "http:" not in page
    assert "https:" not in page
    assert "@import" not in page
    assert "default-src 'none'" in page, "a browser would refuse a request"
    addresses = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert all(address.startswith(("data:", "#")) for address in addresses)
    assert all(address.startswith("#") for address in re.findall(r"url\(([^)]*)\)", page))


def test_every_text_is_escaped(tmp_path):
    lines = [{"step": 0, "stage": EVIL, f"eval/{EVIL}/acc50": 0.5, EVIL: 1.0}]
    run = write_run(tmp_path / 'a"<b>', lines, **{EVIL: EVIL})
    text = report.write_report(run).read_text(encoding="utf-8")
    assert text.count("<script") == 2, "the data and the script of the page"
    assert EVIL not in text
    assert "a&quot;&lt;b&gt;" in text
    assert_well_formed(text)


def test_equal_files_give_equal_bytes(workdir, page):
    assert report.write_report(workdir).read_text(encoding="utf-8") == page


def test_every_metric_has_a_chart(page):
    charts = {
        chart["title"]: [line["label"] for line in chart["lines"]]
        for chart in embedded_data(page)["charts"]
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


def test_the_page_has_a_dark_scheme_and_fits_a_phone(page):
    assert "prefers-color-scheme: dark" in page
    assert 'name="viewport"' in page


def test_results_have_a_column_for_the_end_of_each_stage_and_for_the_newest_step(tmp_path):
    early = [
        {"step": 0, "stage": "sft", "eval/val/acc50": 0.125},
        {"step": 60, "stage": "sft", "eval/val/acc50": 0.5},
    ]
    table = report.results(run_files.read_run(write_run(tmp_path / "run", early)))
    assert table.columns == ["metric", "start", "step 60"]
    assert table.rows == [["val/acc50", "0.125", "0.500"]]
    whole = write_run(tmp_path / "whole", early[:1] + metric_lines())
    table = report.results(run_files.read_run(whole))
    assert table.columns == ["metric", "start", "after sft", "after grpo"]


def test_times_are_means_without_the_lines_in_which_programs_are_compiled(workdir):
    assert report.times_table(run_files.read_run(workdir), "").rows == [
        ["sft", "step", "1.0000", ""],
        ["sft", "update", "0.2500", "25.0%"],
        ["grpo", "step", "1.0000", ""],
        ["grpo", "update", "0.2500", "25.0%"],
    ]


@pytest.mark.parametrize(
    ("name", "value", "changed"),
    [
        ("grpo.group_size", 8, False),
        ("grpo.group_size", 4, True),
        ("stages", ["sft", "grpo"], False),
        ("grpo.sources.my.own.uri", "jsonl:x", True),
        ("grpo.sources.my.own.box_format", "xyxy_px", False),
        ("grpo.rewards.iou", 1.0, False),
        ("grpo.rewards.label", 0.0, True),
    ],
)
def test_a_setting_is_listed_if_it_is_not_the_default(name, value, changed):
    assert report._is_changed(name, value) == changed


def test_a_run_without_metrics_has_a_page(tmp_path):
    run = write_run(tmp_path / "run", lines=[], steps=())
    (run / "hardware.json").unlink()
    text = report.write_report(run).read_text(encoding="utf-8")
    assert section_names(text) == ["settings"]
    assert "every setting" in text


# rollouts


def test_the_gallery_stays_within_its_budget(tmp_path):
    workdir = write_run(tmp_path / "run", steps=tuple(range(101, 201)))
    size = (workdir / "samples" / "grpo_00000101.json").stat().st_size
    run = run_files.read_run(workdir, samples_bytes=10 * size + 1)
    assert len(run.samples) == 10
    assert run.omitted_samples == 90
    assert [run.samples[i]["step"] for i in (0, -1)] == [101, 200]


def test_steps_of_the_gallery_are_in_order_over_all_stages(tmp_path):
    workdir = write_run(tmp_path / "run", steps=(20, 100))
    write_samples(workdir, "sft", 60)
    steps = [sample["step"] for sample in run_files.read_run(workdir).samples]
    assert steps == [20, 60, 100]


def test_samples_after_a_checkpoint_are_deleted(tmp_path):
    run = write_run(tmp_path / "run", steps=(120, 140, 160))
    for name in ("notes.txt", "my_picture.png"):
        (run / "samples" / name).write_text("a file of the user")
    run_files.delete_samples_after(run, 140)
    names = ["grpo_00000120.json", "grpo_00000140.json", "my_picture.png", "notes.txt"]
    assert sorted(path.name for path in (run / "samples").iterdir()) == names
    run_files.delete_samples_after(run, None)
    assert sorted(path.name for path in (run / "samples").iterdir()) == names[2:]


# the command


def test_several_runs_are_compared(tmp_path, capsys):
    runs = [write_run(tmp_path / "a" / "run"), write_run(tmp_path / "b" / "run", seed=1)]
    out = tmp_path / "both.html"
    call("report", f"--workdir={runs[0]}", "--workdir", str(runs[1]), f"--out={out}")
    assert capsys.readouterr().out == f"{out}\n"
    text = out.read_text(encoding="utf-8")
    data = embedded_data(text)
    assert [run["name"] for run in data["runs"]] == ["a/run", "b/run"]
    assert all(len(run["samples"]) == 2 for run in data["runs"])
    labels = {
        chart["title"]: [line["label"] for line in chart["lines"]] for chart in data["charts"]
    }
    assert labels["Reward: total"] == labels["Reward: iou"] == ["a/run", "b/run"]
    table = re.search(r"<h3>What differs</h3>.*?</table>", text, re.S)
    assert table
    assert re.findall(r"<td[^>]*>([^<]*)", table[0]) == ["seed", "0", "1"]
    assert "a/run, after grpo" in html.unescape(text)
    call("report", str(runs[0]), str(runs[1]), f"--out={tmp_path / 'again.html'}")
    assert (tmp_path / "again.html").read_text(encoding="utf-8") == text


def test_the_command_rebuilds_the_page_of_a_run(workdir, page, capsys):
    (workdir / "report.html").unlink()
    call("report", f"--workdir={workdir}")
    assert capsys.readouterr().out == f"{workdir / 'report.html'}\n"
    assert (workdir / "report.html").read_text(encoding="utf-8") == page


def test_a_report_that_is_not_possible_is_one_line(tmp_path):
    run = write_run(tmp_path / "run")
    for flags, message in (
        ([], "needs --workdir=DIR: the directory"),
        ([str(tmp_path)], "holds no run: there is no config.json"),
        ([str(run), str(run), "--out=x.html"], "twice"),
        ([str(run), str(tmp_path)], "--out=FILE is needed"),
    ):
        with pytest.raises(UserError, match=message):
            call("report", *flags)
    (run / "samples" / "grpo_00000150.json").write_text("{torn")
    with pytest.raises(UserError, match=r"grpo_00000150\.json is not JSON"):
        call("report", str(run))


# with a run


def without_times(data: dict[str, Any]) -> dict[str, Any]:
    """Returns the charts that do not depend on the machine."""
    charts = [chart for chart in data["charts"] if not re.match("Time|Throughput", chart["title"])]
    return data | {"charts": charts}


@pytest.mark.slow
def test_a_killed_and_resumed_run_has_the_report_of_a_run_without_a_kill(environment, tmp_path):
    flags = ["--config.log.samples_every=2"]
    straight = tmp_path / "straight" / "run"
    finished = train_tiny(environment, straight, *flags)
    assert finished.returncode == 0, finished.stderr
    killed_and_resumed(environment, tmp_path / "run", 6, 0.0, flags)
    expected, resumed = (
        embedded_data((workdir / "report.html").read_text(encoding="utf-8"))
        for workdir in (straight, tmp_path / "run")
    )
    assert without_times(expected) == without_times(resumed)
    steps = [(sample["stage"], sample["step"]) for sample in resumed["runs"][0]["samples"]]
    assert steps == [("grpo", 8), ("grpo", 10), ("grpo", 12)]
    for chart in resumed["charts"]:
        for line in chart["lines"]:
            assert line["steps"] == sorted(set(line["steps"])), chart["title"]
    reward = next(chart for chart in resumed["charts"] if chart["title"] == "Reward")
    assert all(line["steps"] == [8, 10, 12] for line in reward["lines"])
    files = [
        sorted(path.name for path in (workdir / "samples").iterdir())
        for workdir in (straight, tmp_path / "run")
    ]
    assert files[0] == files[1]
    assert len(files[0]) == 6


def test_a_sample_file_describes_its_picture(tiny_run):
    """Compares the shapes with the tokens of the texts, and the rewards with their parts."""
    sample = json.loads((tiny_run / "samples" / "grpo_00000012.json").read_text())
    assert sample["step"] == 12
    assert len(sample["prompts"]) == 8
    weights = {"iou": 1, "gaussian_point": 1, "format": 0.2}
    for prompt in sample["prompts"]:
        assert prompt["prompt"].startswith(("detect ", "point to "))
        assert prompt["image"].startswith("data:image/png;base64,")
        kind = "boxes" if prompt["source"] == "boxes" else "points"
        (gold,) = prompt["gold"][kind]
        assert prompt["gold"]["text"].endswith(gold["label"])
        assert prompt["prompt"].endswith(gold["label"])
        bins = [int(b) / 1023 for b in re.findall(r"<loc(\d{4})>", prompt["gold"]["text"])]
        np.testing.assert_allclose(gold["at"], bins, atol=0.5 / 1023 + 5e-5)
        assert len(prompt["completions"]) == 4
        for item in prompt["completions"]:
            parts = item["parts"]
            assert parts.keys() == weights.keys()
            total = sum(w * parts[name] for name, w in weights.items() if parts[name] is not None)
            # each part is rounded to four decimals
            assert item["reward"] == pytest.approx(total, abs=2e-4)


@pytest.mark.slow
def test_a_report_that_cannot_be_written_does_not_end_the_run(environment, tmp_path, tiny_run):
    workdir = tmp_path / "run"
    (workdir / "report.html.tmp").mkdir(parents=True)  # a folder where the file is written
    finished = train_tiny(environment, workdir)
    assert finished.stderr.count("report.html was not updated: IsADirectoryError") == 1
    # The error is repeated at the end, when everything is saved.
    assert finished.returncode == 2
    assert "report.html.tmp" in finished.stderr.splitlines()[-1]
    last, expected = (metric_writers.read_metrics(path)[-1] for path in (workdir, tiny_run))
    assert last["step"] == 12
    assert last == expected


# in a browser

CHROMIUM = Path("/usr/bin/chromium")
PHONE, DESKTOP = {"width": 390, "height": 844}, {"width": 1280, "height": 900}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    import playwright.sync_api as api

    with api.sync_playwright() as playwright:
        path = {"executable_path": str(CHROMIUM)} if CHROMIUM.is_file() else {}
        try:
            browser = playwright.chromium.launch(args=["--no-sandbox"], **path)
        except api.Error as error:
            pytest.skip(f"no browser starts: {str(error).splitlines()[0]}")
        yield browser
        browser.close()


class OpenPage:
    """A page in a browser. Fails at the end if the page printed or requested anything."""

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
        self.messages, self.requests = [], []
        self.page.on("console", lambda message: self.messages.append(message.text))
        self.page.on("pageerror", lambda error: self.messages.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())

    def __enter__(self) -> Any:
        return self.page

    def __exit__(self, *_: object) -> None:
        self.context.close()
        assert self.messages == [], "the console is empty"
        urls = [url for url in self.requests if not url.startswith("data:")]
        assert urls == self.requests[:1], "the page is the only request"


def prompt_order(page: Any) -> list[str]:
    return [text.removeprefix("detect ") for text in page.locator(".prompt h3").all_text_contents()]


@pytest.mark.needs("playwright")
def test_sorting_orders_prompts_by_their_rewards(browser, workdir, page):
    scores = {name: [r for r in rewards if r is not None] for name, rewards in REWARDS.items()}
    means = {name: float(np.mean(values)) for name, values in scores.items()}
    spreads = {name: float(np.std(values)) for name, values in scores.items()}
    with OpenPage(browser, workdir / "report.html", DESKTOP) as opened:
        assert prompt_order(opened) == list(REWARDS)
        for button, key in (
            ("worst", means.__getitem__),
            ("best", lambda name: -means[name]),
            ("spread", lambda name: -spreads[name]),
            ("in order", list(REWARDS).index),
        ):
            opened.get_by_role("button", name=button, exact=True).click()
            assert prompt_order(opened) == sorted(REWARDS, key=key), button
            assert opened.locator('.bar [aria-pressed="true"]').all_text_contents() == [button]


TORN_1 = "<loc0100><loc0200> cat torn 1 <b>"
"""The second completion of the prompt "torn", which has the largest reward."""


@pytest.mark.needs("playwright")
def test_the_pointer_on_a_row_shows_its_answer_alone(browser, workdir, page):
    with OpenPage(browser, workdir / "report.html", DESKTOP) as opened:
        prompt = opened.locator(".prompt", has_text="detect torn")
        readout, lit = prompt.locator(".readout"), prompt.locator(".answer.on")
        rows = prompt.locator(".answers button")
        rewards = rows.locator(".reward").all_text_contents()
        assert rewards == ["1.00", "0.90", "0.10", "0.00"], "the best answer is first"
        assert TORN_1 not in readout.text_content()
        assert lit.count() == 0
        rows.nth(0).hover()
        assert readout.locator(".raw").text_content() == TORN_1
        parts = [part.text_content() for part in readout.locator(".parts div").all()]
        assert parts == ["reward1.00", "iou1.00", "format1.00", "advantage0.25"]
        assert lit.count() == 1
        assert prompt.locator(".view.lit").count() == 1
        opened.locator("h1").hover()
        assert lit.count() == 0, "the light goes with the pointer"


@pytest.mark.needs("playwright")
def test_the_pointer_on_a_box_shows_its_answer(browser, workdir, page):
    with OpenPage(browser, workdir / "report.html", DESKTOP) as opened:
        prompt = opened.locator(".prompt", has_text="detect torn")
        # The view has the aspect of the image, so fractions of the view are fractions of the image.
        view = prompt.locator(".view").bounding_box()
        left_edge = {"x": 0.2 * view["width"] + 1, "y": (0.2 + 0.15) * view["height"]}
        prompt.locator(".view").hover(position=left_edge)
        assert prompt.locator(".readout .raw").text_content() == TORN_1
        assert prompt.locator(".answers button.on .reward").text_content() == "1.00"


@pytest.mark.needs("playwright")
def test_the_keyboard_and_a_tap_show_an_answer(browser, workdir, page):
    with OpenPage(browser, workdir / "report.html", DESKTOP) as opened:
        prompt = opened.locator(".prompt", has_text="detect torn")
        readout, row = prompt.locator(".readout"), prompt.locator(".answers button").nth(3)
        row.focus()
        assert "torn 0" in readout.text_content()
        opened.keyboard.press("Enter")
        opened.locator("h1").hover()
        assert row.get_attribute("aria-pressed") == "true"
        assert "torn 0" in readout.text_content(), "a pressed row stays"
    with OpenPage(browser, workdir / "report.html", PHONE, touch=True) as opened:
        prompt = opened.locator(".prompt", has_text="detect torn")
        prompt.locator(".answers button").nth(0).tap()
        assert TORN_1 in prompt.locator(".readout").text_content()


FRACTIONS = """e => {
    const box = e.getBBox(), view = e.ownerSVGElement.viewBox.baseVal;
    return [box.y / view.height, box.x / view.width,
            box.height / view.height, box.width / view.width];
}"""


@pytest.mark.needs("playwright")
def test_boxes_lie_at_their_fractions_in_the_colours_of_their_rewards(browser, workdir, page):
    with OpenPage(browser, workdir / "report.html", DESKTOP) as opened:
        view = opened.locator(".prompt", has_text="detect torn").locator(".view")
        frame = view.bounding_box()
        aspect = frame["width"] / frame["height"]
        assert aspect == pytest.approx(2, rel=0.02), "the aspect of the original image"
        fractions = {
            path.get_attribute("stroke"): path.evaluate(FRACTIONS)
            for path in view.locator(".answer .line").all()
        }
        expected = {
            "rgb({} {} {})".format(*reward_color(reward)): [0.1 + 0.1 * g, 0.1 + 0.1 * g, 0.4, 0.5]
            for g, reward in enumerate(REWARDS["torn"])
        }
        assert fractions.keys() == expected.keys()
        for colour, box in expected.items():
            np.testing.assert_allclose(fractions[colour], box, atol=1e-6, err_msg=colour)
        gold = view.locator(".gold .line")
        assert gold.evaluate("e => getComputedStyle(e).strokeDasharray") != "none"


@pytest.mark.needs("playwright")
def test_steps_are_chosen_with_buttons_and_by_name(browser, workdir, page):
    with OpenPage(browser, workdir / "report.html", DESKTOP) as opened:
        pick = opened.get_by_role("combobox", name="step")
        before = opened.get_by_role("button", name="the step before")
        assert pick.input_value() == "1"
        assert opened.get_by_role("button", name="the next step").is_disabled()
        opened.get_by_role("button", name="worst", exact=True).click()
        before.click()
        assert pick.input_value() == "0"
        assert prompt_order(opened)[0] == "hopeless", "the order stays"
        pick.select_option(label="grpo · step 200")
        assert before.is_enabled()


@pytest.mark.needs("playwright")
def test_a_curve_shows_its_values_at_the_pointer_and_at_the_arrow_keys(browser, workdir, page):
    with OpenPage(browser, workdir / "report.html", DESKTOP) as opened:
        plot = opened.get_by_role("slider", name="Reward", exact=True)
        plot.focus()
        opened.keyboard.press("Home")
        assert plot.get_attribute("aria-valuetext") == "step 101: total 0.505, iou 0.5"
        opened.keyboard.press("End")
        assert plot.get_attribute("aria-valuetext").startswith("step 200: total 1, ")
        box = plot.bounding_box()
        plot.hover(position={"x": box["width"] / 2, "y": 80})
        step = int(re.match(r"step (\d+):", plot.get_attribute("aria-valuetext"))[1])
        # The chart begins with its stage, after step 100. Its left margin is wider than the right.
        assert 135 <= step <= 155
        chart = opened.locator(".chart", has=plot)
        key = chart.get_by_role("button", name="iou")
        paths = chart.locator(".plot path").count()
        key.click()
        assert key.get_attribute("aria-pressed") == "false"
        assert chart.locator(".plot path").count() < paths


@pytest.mark.needs("playwright")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(
    "viewport", [PHONE, {"width": 360, "height": 740}, DESKTOP], ids=["phone", "small", "desktop"]
)
def test_the_page_fits_its_screen(browser, workdir, page, viewport, scheme):
    with OpenPage(browser, workdir / "report.html", viewport, scheme) as opened:
        assert opened.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
        paper = opened.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (int(re.findall(r"\d+", paper)[0]) < 128) == (scheme == "dark")
        assert opened.locator(".plot svg").count() == 7
        assert opened.locator(".prompt").count() == 4


@pytest.mark.needs("playwright")
def test_a_comparison_overlays_curves_and_has_a_gallery_for_each_run(browser, tmp_path):
    runs = [write_run(tmp_path / name, seed=seed) for seed, name in enumerate(("one", "two"))]
    call("report", *map(str, runs), f"--out={tmp_path / 'both.html'}")
    with OpenPage(browser, tmp_path / "both.html", PHONE) as opened:
        plot = opened.get_by_role("slider", name="Reward: total")
        assert plot.get_attribute("aria-valuetext") == "step 200: one 1, two 1"
        opened.get_by_role("combobox", name="run").select_option(label="two")
        assert opened.locator(".prompt").count() == 4
        assert opened.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]

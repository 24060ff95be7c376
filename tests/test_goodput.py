"""Goodput, cost and the live view of a run: from the files of a run to their words.

The causes of lost time add up to the whole time since the first start, over kills and restarts.
"""

import json
import logging
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import fake_bucket
import pytest
from commands import ROOT, call, killed_and_resumed, rows, run_here

from pg_ground.reporting import goodput, report, timeline, watch
from pg_ground.reporting.run_files import read_run
from pg_ground.reporting.timeline import Session, Timeline
from pg_ground.types import UserError

NOW = 1_000_000.0
"""Unix time of the first start of the runs of this file."""

STEP = {"time/step_s": 2.0, "time/data_s": 0.5}
"""Seconds of a step, and of its waiting for data."""


class Clock:
    """A clock that a test sets forward."""

    def __init__(self, now: float = NOW):
        self.now = now

    def __call__(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture(autouse=True)
def closed_files():
    """Closes the files of the starts that a test has killed."""
    yield
    while WRITERS:
        WRITERS.pop().close()


WRITERS: list[Timeline] = []


def begin(workdir: Path | None, clock: Clock, resumed_step: int | None, **facts: Any) -> Timeline:
    """Returns the timeline of a start. A start whose timeline is not exited was killed."""
    writer = Timeline(clock=clock)
    WRITERS.append(writer)
    writer.open(workdir, resumed_step, facts)
    return writer


def write_config(workdir: Path, steps: int = 8, **evals: Any) -> Path:
    """Writes the settings of a run of one stage, which evaluates after every fourth step."""
    workdir.mkdir(parents=True, exist_ok=True)
    config = {
        "stages": ["sft"],
        "sft": {"steps": steps, "batch_size": 16},
        "eval": {"every": 4, "sources": {"val": {}}, "interim_examples": 0, **evals},
    }
    (workdir / "config.json").write_text(json.dumps(config))
    return workdir


def write_metrics(workdir: Path, step: int, **metrics: Any) -> None:
    """Appends a line to metrics.jsonl."""
    values = {"time/step_s": 2.0, "time/data_s": 0.5, "sft/loss": 8.0 / step, **metrics}
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": step, "stage": "sft", **values}) + "\n")


def open_timeline(
    workdir: Path, clock: Clock, resumed_step: int | None, chips: int = 4
) -> Timeline:
    """Returns the timeline of a start that took 10 seconds and restored for 3 seconds."""
    writer = Timeline(clock=clock)
    WRITERS.append(writer)
    clock.wait(10)
    with writer.during(timeline.RESTORE):
        clock.wait(3)
    writer.open(workdir, resumed_step, {"chips": chips, "settings": "a", "eval_every": {"sft": 4}})
    return writer


def make_steps(writer: Timeline, clock: Clock, steps: Sequence[int]) -> None:
    """Makes steps of 2 seconds, each with 0.1 second of which the timer knows nothing."""
    writer.enter(timeline.STEPS)
    for step in steps:
        clock.wait(2.1)
        writer.add_step("sft", step, STEP)
        writer.flush()


def write_killed_run(workdir: Path) -> Path:
    """Writes a run that is killed after step 6 and goes on from the checkpoint of step 4, a minute
    later. It has ended at step 8.
    """
    write_config(workdir)
    clock = Clock()
    writer = open_timeline(workdir, clock, None)
    make_steps(writer, clock, range(1, 5))
    with writer.during(timeline.EVALUATION, interim=True):
        clock.wait(20)
    with writer.during(timeline.CHECKPOINT):
        clock.wait(5)
    make_steps(writer, clock, (5, 6))
    clock.wait(60)
    writer = open_timeline(workdir, clock, 4)
    with writer:
        make_steps(writer, clock, range(5, 9))
        with writer.during(timeline.PICTURES):
            clock.wait(1)
    for step in range(1, 9):
        write_metrics(workdir, step)
    return workdir


def seconds_by_cause(sessions: Sequence[Session]) -> dict[str, float]:
    """Returns the causes of some time, after a check that they add up to the whole time."""
    measured = goodput.measure(sessions)
    assert sum(measured.seconds.values()) == pytest.approx(measured.wall_seconds, abs=0.01)
    return {cause: value for cause, value in measured.seconds.items() if value > 1e-6}


# goodput


def test_every_second_since_the_first_start_has_one_cause(tmp_path):
    sessions = timeline.read_sessions(write_killed_run(tmp_path / "run"))
    seconds = seconds_by_cause(sessions)
    assert seconds == pytest.approx(
        {
            goodput.STEPS: 8 * 1.5,
            goodput.DATA: 8 * 0.5,
            goodput.LOST_WORK: 2 * 2.0,
            goodput.IDLE: 60.0,
            goodput.UNEXPLAINED: 10 * 0.1,
            "start-up": 20.0,
            "restoring a checkpoint": 6.0,
            "evaluations": 20.0,
            "checkpoints": 5.0,
            "pictures and report": 1.0,
        },
        abs=0.01,
    )
    assert sessions[-1].last_time - sessions[0].started == pytest.approx(133.0)


def test_steps_count_as_lost_up_to_the_lowest_step_from_which_a_later_start_goes_on(tmp_path):
    """Three starts: steps 1 to 6, then 5 to 8 from step 4, then 3 to 4 from the older step 2."""
    write_config(tmp_path)
    clock = Clock()
    for resumed_step, steps in ((None, range(1, 7)), (4, range(5, 9)), (2, range(3, 5))):
        writer = open_timeline(tmp_path, clock, resumed_step)
        make_steps(writer, clock, steps)
    seconds = seconds_by_cause(timeline.read_sessions(tmp_path))
    assert seconds[goodput.LOST_WORK] == pytest.approx(8 * 2.0)  # 3 to 6 and 5 to 8
    assert seconds[goodput.STEPS] == pytest.approx(4 * 1.5)  # 1, 2 and 3, 4


def test_a_run_that_ends_before_its_first_checkpoint_loses_all_its_steps(tmp_path):
    write_config(tmp_path)
    clock = Clock()
    make_steps(open_timeline(tmp_path, clock, None), clock, (1, 2, 3))
    make_steps(open_timeline(tmp_path, clock, None), clock, (1,))
    seconds = seconds_by_cause(timeline.read_sessions(tmp_path))
    assert seconds[goodput.LOST_WORK] == pytest.approx(3 * 2.0)
    assert seconds[goodput.STEPS] == pytest.approx(1.5)


def test_a_line_of_several_steps_is_lost_in_part():
    start = {"time": 0.0, "event": "start", "resumed_step": None}
    line = {"phase": "steps", "seconds": 8.0, "step": 8, "steps": 4, "step_s": 8.0, "data_s": 4.0}
    sessions = [
        Session(start, [{"time": 8.0, **line}], [], None),
        Session({**start, "time": 8.0, "resumed_step": 7}, [], [], None),
    ]
    expected = {goodput.STEPS: 3.0, goodput.DATA: 3.0, goodput.LOST_WORK: 2.0}
    assert seconds_by_cause(sessions) == pytest.approx(expected)


def test_a_pause_after_a_finished_run_costs_nothing_and_clocks_may_differ(tmp_path):
    clock = Clock()
    write_config(tmp_path)
    with open_timeline(tmp_path, clock, None) as writer:
        make_steps(writer, clock, (1, 2))
    clock.wait(3 * 24 * 3600)
    with open_timeline(tmp_path, clock, 2) as writer:  # with more steps
        make_steps(writer, clock, (3,))
    clock.wait(-5)  # the next host's clock is late
    open_timeline(tmp_path, clock, 2)
    sessions = timeline.read_sessions(tmp_path)
    assert goodput.IDLE not in seconds_by_cause(sessions)
    measured = goodput.measure(sessions)
    assert measured.wall_seconds == pytest.approx(17.2 + 15.1 + 13.0)


def test_compilation_is_taken_out_of_the_phase_in_which_it_happens():
    lines = [
        {"phase": "start-up", "seconds": 10.0, "step": 0, "compile_s": 4.0},
        {"phase": "steps", "seconds": 9.0, "step": 2, "compile_s": 6.0, "steps": 2, "step_s": 9.0},
        {"phase": "evaluation", "seconds": 3.0, "step": 2, "compile_s": 1.0},
        {"phase": "steps", "seconds": 1.0, "step": 2, "compile_s": 2.0},  # rounded
    ]
    start = {"time": 0.0, "event": "start"}
    sessions = [Session(start, [{"time": 23.0, **line} for line in lines], [], None)]
    assert seconds_by_cause(sessions) == pytest.approx(
        {goodput.COMPILATION: 12.0, goodput.STEPS: 3.0, "start-up": 6.0, "evaluations": 2.0}
    )


def test_nested_compilations_count_once():
    """A program of 1 to 9 traces two functions, of 2 to 3 and of 4 to 8, which calls 5 to 6."""
    compilation = timeline._Compilation()
    for begin, end in ((2.0, 3.0), (5.0, 6.0), (4.0, 8.0), (1.0, 9.0), (9.0, 10.0)):
        compilation.add(begin, end)
    assert compilation.seconds == 9.0


@pytest.mark.parametrize(
    "line",
    [
        b'{"time": 1.0, "phase": "steps", "sec',
        b"\0\0\0\0\n",
        b"[1, 2]\n",
        b'{"time": "yesterday", "event": "start"}\n',
        b'{"time": 5.0, "phase": "steps", "seconds": "long", "step": 1}\n',
        b'{"event": "end"}\n',
    ],
)
def test_the_time_of_a_damaged_line_is_unexplained(tmp_path, line):
    clock = Clock()
    make_steps(open_timeline(tmp_path, clock, None), clock, (1, 2, 3))
    whole = (tmp_path / "timeline.jsonl").read_bytes().splitlines(keepends=True)
    content = b"".join([*whole[:-2], line, *whole[-1:]])
    seconds = seconds_by_cause(timeline.parse(content))
    if line.endswith(b"\n"):
        assert seconds[goodput.UNEXPLAINED] == pytest.approx(2.1 + 2 * 0.1)
        assert seconds[goodput.STEPS] == pytest.approx(2 * 1.5)
    else:  # it swallows the last line, as a torn line inside a file would
        assert seconds[goodput.STEPS] == pytest.approx(1.5)


# the file


def test_a_start_appends_and_cuts_off_half_a_line(tmp_path):
    clock = Clock()
    make_steps(open_timeline(tmp_path, clock, None), clock, (1, 2))
    file = tmp_path / "timeline.jsonl"
    before = file.read_bytes()
    file.write_bytes(before + b'{"time": 10')
    open_timeline(tmp_path, clock, 2)
    content = file.read_bytes()
    assert content.startswith(before)
    assert content[len(before) :].startswith(b'{"time": ')
    assert len(timeline.parse(content)) == 2


@pytest.mark.parametrize(
    ("resumed_step", "settings", "starts"), [(None, "a", 2), (None, "b", 1), (1, "b", 2)]
)
def test_only_a_new_run_with_other_settings_removes_earlier_starts(
    tmp_path, resumed_step, settings, starts
):
    begin(tmp_path, Clock(), None, settings="a")
    begin(tmp_path, Clock(), resumed_step, settings=settings)
    assert len(timeline.read_sessions(tmp_path)) == starts


def test_a_process_that_is_not_the_first_writes_nothing(tmp_path):
    with begin(None, Clock(), None) as writer:
        writer.add_step("sft", 1, STEP)
        writer.flush()
        writer.warn("a warning")
    assert not list(tmp_path.iterdir())


def test_an_error_ends_the_timeline_in_its_phase_with_its_reason(tmp_path):
    clock = Clock()
    writer = open_timeline(tmp_path, clock, None)
    with pytest.raises(UserError), writer, writer.during(timeline.EVALUATION):
        clock.wait(4)
        raise UserError("the bucket\nis gone")
    (session,) = timeline.read_sessions(tmp_path)
    assert session.intervals[-1]["phase"] == timeline.EVALUATION
    assert session.intervals[-1]["seconds"] == 4.0
    assert session.end is not None
    assert session.end["reason"] == "UserError: the bucket is gone"
    assert not session.is_finished


def test_warnings_of_the_package_are_in_the_timeline(tmp_path):
    logger = logging.getLogger("pg_ground.data")
    writer = Timeline(clock=Clock())
    WRITERS.append(writer)
    with timeline.warnings_to(writer):
        logger.warning("before the %s is checked", "directory")
        writer.open(tmp_path, None, {})
        logger.info("nothing to worry about")
        for number in range(2 * timeline.WARNINGS_LIMIT):
            logger.warning("source %d: %s", number, "x" * 500)
    logger.warning("after the run")
    (session,) = timeline.read_sessions(tmp_path)
    texts = [line["text"] for line in session.warnings]
    assert texts[0] == "before the directory is checked"
    assert len(texts) == timeline.WARNINGS_LIMIT
    assert max(map(len, texts)) == timeline.TEXT_LIMIT


def test_the_process_started_before_now_and_after_the_machine():
    started = timeline.process_start()
    script = "import time; from pg_ground.reporting.timeline import process_start as f; print(f())"
    before = time.time()
    finished = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert started < before - 0.1
    # The kernel counts in hundredths of a second.
    assert before - 0.1 <= float(finished.stdout) <= time.time()


# time left and cost


def test_time_left_is_steps_and_evaluations_at_their_medians(tmp_path):
    run = write_config(tmp_path, steps=12)
    clock = Clock()
    writer = open_timeline(run, clock, None)
    make_steps(writer, clock, range(1, 5))
    for seconds in (20.0, 30.0, 25.0):  # at the start, and after kills
        with writer.during(timeline.EVALUATION, interim=True):
            clock.wait(seconds)
    for step, step_s in ((1, 90.0), (2, 2.0), (3, 2.0), (4, 8.0), (5, 2.0)):
        write_metrics(run, step, **{"time/step_s": step_s})
    left = goodput.time_left(read_run(run))
    assert (left.steps, left.evaluations, left.unmeasured) == (7, 2, ())
    assert left.seconds == pytest.approx(7 * 2.0 + 2 * 25.0)
    assert left.in_words() == "1m04s (7 steps, 2 evaluations)"


def test_what_was_not_measured_is_no_part_of_the_time_left(tmp_path):
    """The evaluation at the end asks more questions than the interim ones."""
    run = write_config(tmp_path, steps=12, interim_examples=100)
    assert goodput.time_left(read_run(run)).in_words() == (
        "not measured yet (12 steps, 3 evaluations)"
    )
    clock = Clock()
    with open_timeline(run, clock, None).during(timeline.EVALUATION, interim=True):
        clock.wait(20)
    write_metrics(run, 4)
    assert goodput.time_left(read_run(run)).in_words() == (
        "at least 36s (8 steps, 2 evaluations; not measured yet: the evaluation of a stage's end)"
    )


@pytest.mark.parametrize(
    ("every", "evaluations"), [({"sft": 3}, 3), ({"sft": 0}, 1), ({}, 2), ({"sft": 100}, 1)]
)
def test_evaluations_left_follow_the_schedule_that_the_run_wrote(tmp_path, every, evaluations):
    """`eval.every_epochs` needs the number of questions, which only the run knows."""
    run = write_config(tmp_path, steps=8)
    begin(run, Clock(), None, eval_every=every)
    assert goodput.time_left(read_run(run)).evaluations == evaluations


def test_a_run_without_sources_has_no_evaluation_left(tmp_path):
    assert goodput.time_left(read_run(write_config(tmp_path, sources={}))).evaluations == 0


def test_the_cost_is_chips_times_hours_and_money_only_with_a_price(tmp_path):
    run = read_run(write_killed_run(tmp_path))
    measured = goodput.measure(run.sessions)
    assert measured.chip_seconds == pytest.approx(4 * (133 - 60))
    assert measured.idle_chip_seconds == pytest.approx(4 * 60)
    assert goodput.cost_words(measured, run, None) == (
        "0.0811 chip-hours so far; 0.0667 more if the chips were kept between starts"
    )
    assert goodput.cost_words(measured, run, 100.0) == (
        "0.0811 chip-hours (8.11) so far, at 100 a chip-hour; "
        "0.0667 (6.67) more if the chips were kept between starts"
    )


def test_the_cost_at_the_end_counts_the_chips_of_the_newest_start(tmp_path):
    run = write_config(tmp_path, steps=3608, sources={})
    make_steps(open_timeline(run, Clock(), None, chips=4), Clock(), ())
    make_steps(open_timeline(run, Clock(NOW + 13), None, chips=8), Clock(), ())
    for step in range(1, 9):
        write_metrics(run, step)
    content = read_run(run)
    measured = goodput.measure(content.sessions)
    assert measured.chip_seconds == pytest.approx(13 * 4 + 13 * 8)
    words = goodput.cost_words(measured, content, None)
    assert words == "0.0433 chip-hours so far, about 16.0 at the end"  # 3,600 steps of 2 s


# the page


def test_the_page_has_goodput_and_cost_in_its_section_of_times(tmp_path):
    workdir = write_killed_run(tmp_path / "run")
    page = report.write_page([workdir], tmp_path / "a.html").read_text()
    section = page[page.index('<section id="time"') :]
    for text in ("lost work (steps made again)", "idle between starts", "unexplained", "0.0811"):
        assert text in section
    assert "100 a chip-hour" not in page
    call("report", f"--workdir={workdir}", f"--out={tmp_path}/b.html", "--price_per_chip_hour=100")
    assert "(8.11) so far, at 100 a chip-hour" in (tmp_path / "b.html").read_text()


# --watch


def watch_while(
    workdir: Path, actions: Sequence[Callable[[], object]], capsys: Any, **flags: Any
) -> list[str]:
    """Watches a run while a test writes its files, and returns the blocks.

    Args:
      actions: are called one after the other instead of pauses. Then Ctrl-C ends the watch.
    """
    steps = iter(actions)

    def sleep(_: float) -> None:
        action = next(steps, None)
        if action is None:
            raise KeyboardInterrupt
        action()

    watch.watch(workdir, 1.0, sleep=sleep, **flags)
    return capsys.readouterr().out.split("\n\n")[:-1]


def line_of(block: str, label: str) -> str:
    """Returns the text behind a label in a block, "" without one."""
    match = re.search(rf"^{label} +(.*)$", block, re.M)
    return match[1] if match else ""


def test_a_finished_run_ends_the_watch_at_once(tmp_path):
    workdir = write_killed_run(tmp_path / "run")
    finished = run_here("report", f"--workdir={workdir}", "--watch")
    assert (finished.returncode, finished.stderr) == (0, "")
    assert line_of(finished.stdout, "run") == "run: sft, step 8 of 8 (100%)"
    assert line_of(finished.stdout, "metrics") == "loss 1  (step 8)"
    assert line_of(finished.stdout, "speed") == (
        "2 s a step, 8 examples/s, 25.0% of it waiting for data"
    )
    assert line_of(finished.stdout, "goodput") == (
        "9.0% of 2m13s; lost: idle between starts 45.1%, start-up 15.0%, evaluations 15.0%, "
        "restoring a checkpoint 4.5%, checkpoints 3.8%"
    )
    assert line_of(finished.stdout, "last line").endswith("ago: finished")
    assert not (workdir / "report.html").exists(), "only --out asks for a page"


def test_the_view_follows_the_files_from_an_empty_folder_to_the_end(tmp_path, capsys):
    """A page is written with every change. Half a line is no line. A run without timeline, of an
    earlier version, ends with its last step.
    """
    workdir, page = tmp_path / "run", tmp_path / "page.html"

    def write_half_a_line() -> None:
        with (workdir / "metrics.jsonl").open("a") as file:
            file.write('{"step": 6, "stage": "sft", "sft/lo')

    def complete_the_line() -> None:
        with (workdir / "metrics.jsonl").open("a") as file:
            file.write('ss": 0.25, "time/step_s": null}\n')

    blocks = watch_while(
        workdir,
        [
            lambda: write_config(workdir),
            lambda: write_metrics(workdir, 2),
            lambda: None,
            lambda: write_metrics(workdir, 4),
            lambda: write_metrics(workdir, 4, **{"eval/val/acc50": 0.5, "time/step_s": None}),
            write_half_a_line,
            complete_the_line,
            lambda: write_metrics(workdir, 8, **{"data/bad_records/missing_image": 3.0}),
            lambda: pytest.fail("the watch goes on after the end"),
        ],
        capsys,
        page=page,
    )
    assert [line_of(block, "run") for block in blocks] == [
        "",
        "run: sft, step 0 of 8 (0%)",
        "run: sft, step 2 of 8 (25%)",
        "run: sft, step 4 of 8 (50%)",
        "run: sft, step 4 of 8 (50%)",
        "run: sft, step 6 of 8 (75%)",
        "run: sft, step 8 of 8 (100%)",
    ]
    assert blocks[0] == f"{workdir} holds no run yet: waiting for config.json"
    assert line_of(blocks[2], "left").startswith("at least 12s (6 steps, 2 evaluations; not")
    assert line_of(blocks[4], "evaluation") == "val: acc50 0.5  (step 4)"
    assert line_of(blocks[5], "metrics") == "loss 0.25  (step 6)"
    assert line_of(blocks[6], "warning") == "3 bad records (3 missing_image)"
    assert "finished" in page.read_text()


def test_the_view_names_the_phase_and_the_newest_warnings(tmp_path):
    workdir = write_config(tmp_path / "run")
    clock = Clock()
    writer = open_timeline(workdir, clock, None)
    make_steps(writer, clock, (1, 2))
    write_metrics(workdir, 2)
    for number in range(5):
        writer.warn(f"doubt {number}")
    writer.enter(timeline.EVALUATION)
    text = "\n".join(watch.look(workdir, clock.now + 30).lines)
    assert line_of(text, "run") == "run: sft, step 2 of 8 (25%), phase evaluation"
    assert line_of(text, "last line") == "30s ago"
    warnings = re.findall(r"^warning +(.*)$", text, re.M)
    assert warnings == [f"30s ago: doubt {number}" for number in (2, 3, 4)]


def test_silence_is_reported_after_a_time_that_depends_on_the_usual_one(tmp_path):
    workdir = write_config(tmp_path / "run")
    clock = Clock()
    make_steps(open_timeline(workdir, clock, None), clock, (1, 2))

    def life(seconds: float) -> str:
        return line_of("\n".join(watch.look(workdir, clock.now + seconds).lines), "last line")

    assert life(-3.0) == "0s ago", "the clocks of two hosts differ"
    assert life(119.0) == "1m59s ago"
    assert life(3600.0) == (
        "no new line for 1h00m: the run has ended, is evaluating, or hangs (phase steps); "
        "4 chip-hours since then, if its chips are kept"
    )
    writer = open_timeline(workdir, clock, 2)
    with writer.during(timeline.EVALUATION):
        clock.wait(200.0)
    assert life(599.0) == "9m59s ago"
    assert life(601.0).startswith("no new line for 10m01s")


def test_a_killed_run_is_watched_until_it_has_started_again_and_ended(tmp_path, capsys):
    workdir = write_killed_run(tmp_path / "run")
    lines = (workdir / "timeline.jsonl").read_bytes().splitlines(keepends=True)
    start = next(i for i in range(1, len(lines)) if b'"start"' in lines[i])

    def append(count: int) -> None:
        (workdir / "timeline.jsonl").write_bytes(b"".join(lines[:count]))

    append(start)
    actions = [lambda count=count: append(count) for count in (start + 3, len(lines))]
    blocks = watch_while(workdir, actions, capsys)
    assert len(blocks) == 3
    assert "no new line for" in line_of(blocks[0], "last line")
    assert "lost work" not in line_of(blocks[0], "goodput")
    assert "idle between starts" in line_of(blocks[1], "goodput")
    assert line_of(blocks[2], "last line").endswith(": finished")


def test_an_error_of_the_run_ends_the_watch_with_its_reason(tmp_path):
    workdir = write_config(tmp_path / "run")
    with pytest.raises(UserError), open_timeline(workdir, Clock(), None):
        raise UserError("step 3: every reward is NaN")
    finished = run_here("report", f"--workdir={workdir}", "--watch=0.01")
    assert finished.returncode == 0
    assert line_of(finished.stdout, "last line").endswith(
        "ago: ended, UserError: step 3: every reward is NaN"
    )


def test_a_terminal_has_one_block_that_is_overwritten(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "30")
    monkeypatch.setenv("LINES", "8")
    workdir = write_config(tmp_path / "run")
    steps = iter((2, 4))

    def sleep(_: float) -> None:
        write_metrics(workdir, next(steps, 8))

    watch.watch(workdir, 1.0, sleep=sleep)
    blocks = re.split(r"\x1b\[(\d+)A\r\x1b\[J", capsys.readouterr().out)
    texts, moves = blocks[::2], [int(number) for number in blocks[1::2]]
    assert len(texts) == 4
    assert moves == [text.count("\n") for text in texts[:-1]]
    lines = [line for text in texts for line in text.splitlines()]
    assert max(map(len, lines)) <= 29
    assert max(moves) == 7, "a block never moves above the first line of the terminal"
    assert texts[1].splitlines()[:4] == [
        "run        run: sft, step 2",
        "           of 8 (25%)",
        "metrics    loss 4  (step 2)",
        "speed      2 s a step, 8",
    ]


def test_a_file_that_is_broken_for_a_moment_does_not_end_the_watch(tmp_path, capsys):
    workdir = write_killed_run(tmp_path / "run")
    content = (workdir / "metrics.jsonl").read_bytes()
    (workdir / "metrics.jsonl").write_bytes(b"\0\0\0\n" + content)
    blocks = watch_while(
        workdir, [lambda: (workdir / "metrics.jsonl").write_bytes(content)], capsys
    )
    assert blocks[0].startswith("waiting: ") and "metrics.jsonl:1" in blocks[0]
    assert line_of(blocks[1], "last line").endswith("finished")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--watch=0"], "--watch=0: it must be a number of seconds above 0"),
        (["--watch=-1"], "--watch=-1: it must be a number of seconds above 0"),
        (["--watch=nan"], "--watch=nan: it must be a number of seconds above 0"),
        (["--watch=soon"], "--watch=soon: it must be of type float"),
        (["--watch", "5"], "--watch shows one run, but there are 2 directories"),
        (["--price_per_chip_hour=-1"], "--price_per_chip_hour=-1: it must be a number from 0"),
        (["--price_per_chip_hour=inf"], "--price_per_chip_hour=inf: it must be a number from 0"),
    ],
)
def test_a_wrong_flag_is_one_line(tmp_path, flags, message):
    workdir = write_killed_run(tmp_path / "run")
    finished = run_here("report", f"--workdir={workdir}", *flags)
    assert finished.returncode == 2
    assert finished.stderr.startswith(f"error: {message}")
    assert finished.stderr.count("\n") == 1


# with a run


def test_a_run_writes_the_time_of_all_its_phases(tiny_run):
    (session,) = timeline.read_sessions(tiny_run)
    assert session.is_finished
    for before, after in pairwise(session.intervals):
        assert before["next"] == after["phase"]
        assert after["time"] - after["seconds"] == pytest.approx(before["time"], abs=0.01)
    steps = [line for line in session.intervals if "steps" in line]
    assert sum(line["steps"] for line in steps) == 12
    assert [line["stage"] for line in steps] == ["sft"] * 3 + ["grpo"] * 3
    causes = seconds_by_cause([session])
    assert {goodput.STEPS, goodput.COMPILATION, "start-up", "evaluations"} <= causes.keys()
    assert causes[goodput.UNEXPLAINED] < 0.1 * session.seconds
    assert "goodput and losses" in (tiny_run / "report.html").read_text()
    assert run_here("report", f"--workdir={tiny_run}", "--watch").returncode == 0


@pytest.mark.slow
def test_a_killed_and_resumed_run_has_lost_work_and_idle_time(environment, tiny_run, tmp_path):
    workdir = tmp_path / "run"
    before = time.time()
    killed_and_resumed(environment, workdir, 6, 0.0, between=lambda: time.sleep(1.0))
    elapsed = time.time() - before
    sessions = timeline.read_sessions(workdir)
    assert len(sessions) == 2
    assert sessions[1].resumed_step in (4, 6)
    causes = seconds_by_cause(sessions)
    assert causes[goodput.LOST_WORK] > 0
    assert 0.9 < causes[goodput.IDLE] < 5
    measured = goodput.measure(sessions)
    # Before the first line is only the start of the process; after the last one, its end.
    assert elapsed - 5 < measured.wall_seconds < elapsed
    assert rows(workdir) == rows(tiny_run), "the timeline changes no metric"


@pytest.mark.slow
@pytest.mark.needs("gcsfs")
def test_a_run_in_a_bucket_is_watched(environment, tmp_path):
    """A process watches gs://bucket/run while the files of a run arrive there."""
    folder = write_killed_run(tmp_path / "run")
    command = [sys.executable, "-m", "pg_ground", "report", "--workdir=gs://bucket/run"]
    with fake_bucket.serve() as server:
        variables = environment | server.environment | {"PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(
            [*command, "--watch=0.2", "--out=gs://bucket/page.html"],
            env=variables, cwd=tmp_path, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        assert process.stdout is not None
        assert "holds no run yet" in process.stdout.readline()
        server.put("run/config.json", (folder / "config.json").read_bytes())
        assert process.stdout.readline() == "\n"
        assert "step 0 of 8" in process.stdout.readline()
        half = (folder / "metrics.jsonl").read_bytes()[:-30]
        server.put("run/metrics.jsonl", half)
        while "step 7 of 8" not in process.stdout.readline():
            assert process.poll() is None
        for name in ("metrics.jsonl", "timeline.jsonl"):
            server.put(f"run/{name}", (folder / name).read_bytes())
        output, errors = process.communicate(timeout=60)
        assert (process.returncode, errors) == (0, "")
        assert line_of(output.split("\n\n")[-2], "last line").endswith("finished")
        assert b"idle between starts" in server.objects["page.html"].data
        refused = subprocess.run(
            [*command[:-1], "--workdir=gs://forbidden/run", "--watch"],
            env=variables, cwd=tmp_path, capture_output=True, text=True, check=False,
        )  # fmt: skip
    assert refused.returncode == 2
    assert "a bucket cannot be used" in refused.stderr
    assert not os.path.exists(tmp_path / "gs:")

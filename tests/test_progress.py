"""The position of a run is in every log record and on the terminal."""

import io
import logging
import math
import re
import sys

import pytest

from pg_ground.reporting import progress


@pytest.fixture(autouse=True)
def no_position():
    progress.reset()
    yield
    progress.reset()


def record(level=logging.INFO, message="compiled %d programs", *arguments):
    return logging.LogRecord(
        "pg_ground.training", level, __file__, 1, message, arguments or (3,), None
    )


# position


def test_the_position_names_step_stage_and_phase():
    assert str(progress.position()) == ""
    progress.set_step("grpo", 141)
    assert str(progress.position()) == "step 141 of grpo"
    with progress.phase("rollout"):
        assert str(progress.position()) == "step 141 of grpo, phase rollout"
        with progress.phase("score"):
            assert progress.position().phase == "score"
        assert progress.position().phase == "rollout"
    assert str(progress.position()) == "step 141 of grpo"


def test_a_failure_keeps_its_phase_and_the_next_step_clears_it():
    progress.set_step("sft", 3)
    with pytest.raises(ZeroDivisionError), progress.phase("update"):
        raise ZeroDivisionError
    assert str(progress.position()) == "step 3 of sft, phase update"
    progress.set_step("sft", 4)
    assert str(progress.position()) == "step 4 of sft"


def test_a_phase_before_the_first_step_has_no_stage():
    with progress.phase("compilation"):
        assert str(progress.position()) == "phase compilation"


# log


def test_a_log_line_has_time_process_and_position():
    text = progress.LogFormatter().format(record())
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d process 0: compiled 3 programs", text)
    progress.set_step("grpo", 7)
    with progress.phase("score"):
        text = progress.LogFormatter().format(record(logging.WARNING, "a reward failed %d times"))
    assert text.endswith(
        " process 0, step 7 of grpo, phase score: warning: a reward failed 3 times"
    )


def test_only_process_0_logs_information_and_every_process_logs_warnings(monkeypatch):
    handler = progress.LogHandler()
    assert handler.filter(record())
    monkeypatch.setattr(progress._State, "process", 2)
    assert not handler.filter(record())
    assert handler.filter(record(logging.WARNING))
    assert " process 2: " in handler.format(record(logging.ERROR))


def test_logs_go_to_stderr_inside_a_block_and_nothing_remains(capsys):
    package = logging.getLogger("pg_ground")
    before = (list(package.handlers), package.level, package.propagate)
    progress.set_step("sft", 3)
    with progress.logs_to_stderr():
        logging.getLogger("pg_ground.training").info("compiled %d programs", 3)
    logging.getLogger("pg_ground.training").info("after the block")
    assert re.fullmatch(r"\d{4}.* process 0: compiled 3 programs\n", capsys.readouterr().err)
    assert (package.handlers, package.level, package.propagate) == before


def test_a_record_starts_below_an_open_progress_line(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "stderr", terminal)
    progress.Progress().show(1, 9, "sft", {})
    progress.LogHandler().emit(record())
    assert re.search(r"sft  1/9\n\d{4}.* compiled 3 programs\n$", terminal.getvalue())


# progress line


def test_the_progress_line_has_step_metrics_speed_and_time_left():
    metrics = {
        "reward/total": 0.75,
        "policy/kl": 0.01,
        "time/step_s": 2.0,
        "optim/lr": 1e-6,
        "perf/images_per_s": 16.0,
    }
    line = progress.progress_line(40, 100, "grpo", {**metrics, "accuracy": 0.5})
    assert line == "grpo  40/100  reward 0.75  acc 0.5  kl 0.01  16 examples/s  2m00s left"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_has_one_line_that_is_overwritten_and_evaluations_remain(monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    display = progress.Progress()
    display.show(1, 90, "grpo", {"reward/total": 0.25})
    metrics = {"reward/total": 0.5, "policy/kl": 0.125, "perf/images_per_s": 1234.0}
    display.show(2, 90, "grpo", metrics)
    display.show(2, 90, "grpo", {"eval/val/acc50": 0.75})
    display.show(3, 90, "grpo", {"reward/total": 0.5})
    display.end()
    display.end()
    lines = terminal.getvalue().split("\r\x1b[K")[1:]
    assert lines[0] == "grpo  1/90  reward 0.25"
    assert len(lines[1]) == 29, "a longer line could not be overwritten"
    assert lines[2] == "grpo  2/90  val: acc50 0.75\n"
    # The last line has the newest accuracy, and is cut to the width of the terminal.
    assert lines[3] == "grpo  3/90  reward 0.5  acc 0\n"


def test_a_log_has_one_line_per_minute_each_evaluation_and_the_last_step(monkeypatch, caplog):
    caplog.set_level(logging.INFO, "pg_ground")
    seconds = [0.0]
    stdout = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stdout)
    display = progress.Progress(clock=lambda: seconds[0])
    for step in range(1, 301):
        seconds[0] += 1.0
        display.show(step, 300, "sft", {"sft/loss": 1.0}, keep=step == 300)
        if step == 100:
            display.show(step, 300, "sft", {"eval/val/acc50": 0.5})
    steps = [int(re.match(r"sft +(\d+)/300  ", line)[1]) for line in caplog.messages]
    assert steps == [1, 61, 100, 160, 220, 280, 300]
    assert stdout.getvalue() == ""


def test_the_progress_line_of_an_evaluation_names_the_benchmarks():
    metrics = {
        "eval/val/acc50": 0.5,
        "eval/val/acc95": 0.1,
        "eval/val/mean_iou": 0.25,
        "eval/clicks/hit": 0.9,
    }
    line = progress.progress_line(0, 9, "sft", metrics)
    assert line == "sft  0/9  val: acc50 0.5 mean_iou 0.25  clicks: hit 0.9"


def test_the_progress_line_is_one_line_if_a_number_is_not_finite():
    line = progress.progress_line(1, 2, "sft", {"sft/loss": math.nan, "time/step_s": math.inf})
    assert "\n" not in line
    assert "loss nan" in line
    assert "left" not in line

"""The whole program as a user runs it: both stages, the files of a run, and a resumed run."""

import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from commands import (
    ROOT,
    assert_same_arrays,
    assert_same_run,
    command,
    killed_and_resumed,
    rows,
    run,
    run_here,
    train_tiny,
)
from PIL import Image

from pg_ground.__main__ import COMMANDS

STEPS = 12

METRICS = {
    "sft/loss",
    "reward/total",
    "reward/iou",
    "reward/std",
    "group/zero_std_fraction",
    "policy/kl",
    "policy/entropy",
    "policy/clip_fraction",
    "policy/logp_diff_max",
    "completion/length",
    "completion/malformed_fraction",
    "completion/unfinished_fraction",
    "optim/grad_norm",
    "optim/lr",
    "eval/boxes/acc50",
    "eval/points/point_in_box",
}


# train


def test_a_run_leaves_the_files_and_metrics_of_the_contract(tiny_run):
    for name in ("config.json", "metrics.jsonl", "checkpoints", "tb", "samples", "report.html"):
        assert (tiny_run / name).exists(), name
    lines = rows(tiny_run)
    stages = [line["stage"] for line in lines]
    assert stages == sorted(stages, reverse=True)
    assert {name for line in lines for name in line} >= METRICS
    pictures = list((tiny_run / "samples").glob("*.png"))
    assert pictures
    with Image.open(pictures[0]) as picture:
        assert min(picture.size) > 200


def test_a_run_prints_its_report_and_logs_time_process_and_step(tiny_start):
    workdir, finished = tiny_start
    assert finished.stdout.splitlines()[-1] == f"{workdir / 'report.html'}"
    prefix = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d process 0"
    assert re.search(rf"^{prefix}, step 12 of grpo.*: grpo +12/12  ", finished.stderr, re.M)
    assert re.search(rf"^{prefix}, step 6 of sft.*: sft +6/12  ", finished.stderr, re.M)


def test_sampler_and_trainer_agree_at_every_step(tiny_run):
    name = "policy/logp_diff_max"
    differences = [line[name] for line in rows(tiny_run) if name in line]
    assert len(differences) == 3
    assert max(differences) < 1e-5


@pytest.mark.slow
def test_a_second_start_of_a_finished_run_changes_nothing(tiny_run, environment, tmp_path):
    workdir = shutil.copytree(tiny_run, tmp_path / "run")
    finished = train_tiny(environment, workdir)
    assert finished.returncode == 0, finished.stderr
    metrics = (workdir / "metrics.jsonl").read_bytes()
    assert metrics == (tiny_run / "metrics.jsonl").read_bytes()


@pytest.mark.slow
def test_checkpoints_of_an_older_orbax_without_commit_files_are_continued(
    tiny_run, environment, tmp_path
):
    workdir = shutil.copytree(tiny_run, tmp_path / "run")
    commit_files = list(workdir.rglob("commit_success.txt"))
    assert len(commit_files) > 6
    for path in commit_files:
        path.unlink()
    finished = train_tiny(environment, workdir, "--config.grpo.steps=7", "--accept=grpo.steps")
    assert finished.returncode == 0, finished.stderr
    lines = (tiny_run / "metrics.jsonl").read_bytes().splitlines()
    assert (workdir / "metrics.jsonl").read_bytes().splitlines()[: len(lines)] == lines
    assert (workdir / "checkpoints" / "13").is_dir()


@pytest.mark.slow
def test_other_settings_in_the_same_directory_are_refused(tiny_run):
    flags = ("--config=configs/tiny.py", f"--workdir={tiny_run}", "--config.grpo.group_size=2")
    finished = run_here("train", *flags)
    assert finished.returncode == 2
    line = r"error: .*config\.grpo\.group_size is 2, was 4.*--accept=grpo\.group_size\n"
    assert re.fullmatch(line, finished.stderr), finished.stderr


@pytest.mark.slow
def test_a_resumed_run_equals_a_run_without_a_kill(tiny_run, environment, tmp_path):
    killed_and_resumed(environment, tmp_path / "run", lines=6, delay_s=0.0)
    assert_same_run(tiny_run, tmp_path / "run")


HEAR_CTRL_C = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.execv(sys.argv[1], sys.argv[1:])
"""
"""Runs a command that hears Ctrl-C. A shell's background jobs, and what they start, ignore it."""


@pytest.mark.slow
def test_a_run_that_is_interrupted_says_how_to_go_on_and_continues(tiny_run, environment, tmp_path):
    train = command("train", "--config=configs/tiny.py", f"--workdir={tmp_path / 'run'}")
    process = subprocess.Popen(
        [sys.executable, "-c", HEAR_CTRL_C, *train],
        env=environment,
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    file = tmp_path / "run" / "metrics.jsonl"
    while process.poll() is None and not (file.exists() and file.read_bytes().count(b"\n") >= 6):
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    last_line = process.communicate()[1].splitlines()[-1]
    assert process.returncode == 130
    assert last_line.startswith("error: stopped by Ctrl-C at step ")
    assert last_line.endswith(": the same command continues from the newest checkpoint")
    finished = train_tiny(environment, tmp_path / "run")
    assert finished.returncode == 0, finished.stderr
    assert_same_run(tiny_run, tmp_path / "run")


@pytest.mark.slow
def test_a_finished_run_that_gets_more_steps_equals_a_longer_run(tiny_run, environment, tmp_path):
    """The learning rate of configs/tiny.py is constant, so it does not depend on the steps."""
    extended, longer = tmp_path / "extended", tmp_path / "longer"
    shutil.copytree(tiny_run, extended)
    for workdir in (extended, longer):
        arguments = ["--config=configs/tiny.py", f"--workdir={workdir}", "--config.grpo.steps=12"]
        finished = run(environment, "train", *arguments)
        assert finished.returncode == 0, finished.stderr
    assert_same_arrays(extended, longer)
    extended_lines, longer_lines = (
        {line["step"]: line for line in rows(workdir) if "reward/total" in line}
        for workdir in (extended, longer)
    )
    assert list(extended_lines) == list(longer_lines) == [8, 10, 12, 14, 16, 18]
    for step, line in extended_lines.items():
        numbers = {name for name in line if not name.startswith(("time/", "perf/"))}
        longer_line = longer_lines[step]
        assert {name: line[name] for name in numbers} == {n: longer_line[n] for n in numbers}


@pytest.mark.slow
@pytest.mark.parametrize("lines", [2, 6], ids=["sft", "grpo"])
@pytest.mark.parametrize("attempt", [0, 1, 2])
def test_a_run_resumes_exactly_from_a_random_moment(
    tiny_run, environment, tmp_path, lines, attempt
):
    delay_s = random.Random(10 * lines + attempt).uniform(0, 0.3)
    killed_and_resumed(environment, tmp_path / "run", lines, delay_s)
    assert_same_run(tiny_run, tmp_path / "run")


@pytest.mark.slow
def test_the_best_parameters_stay_and_give_their_metric_again(environment, tmp_path):
    flags = (
        "--config.checkpoint.best=-eval/boxes/mean_iou",
        "--config.eval.every=2",
        "--config.checkpoint.every=4",
    )
    workdir = tmp_path / "run"
    killed_and_resumed(environment, workdir, lines=7, delay_s=0.0, flags=flags)
    name = "eval/boxes/mean_iou"
    by_step = {line["step"]: line[name] for line in rows(workdir) if name in line}
    assert len(by_step) > 4
    best = min(by_step, key=lambda step: (by_step[step], step))
    assert [step.name for step in (workdir / "best").iterdir()] == [str(best)]
    arguments = [f"--params={workdir / 'best'}", f"--out={tmp_path}"]
    assert run(environment, "evaluate", "--config=configs/tiny.py", *arguments).returncode == 0
    assert json.loads((tmp_path / "eval.json").read_text())[name] == by_step[best]


# other commands


@pytest.mark.slow
def test_evaluate_repeats_the_metrics_of_the_run(tiny_run, environment, tmp_path):
    arguments = ["--config=configs/tiny.py", f"--workdir={tiny_run}", f"--out={tmp_path}"]
    finished = run(environment, "evaluate", *arguments)
    assert finished.returncode == 0, finished.stderr
    document = json.loads((tmp_path / "eval.json").read_text())
    last_line = rows(tiny_run)[-1]
    metrics = {name: value for name, value in last_line.items() if name.startswith("eval/")}
    assert metrics
    assert metrics == {name: document[name] for name in metrics}
    predictions = (tmp_path / "predictions.jsonl").read_text().splitlines()
    assert len(predictions) == 2 * 2 * 32
    assert {"source", "index", "mode", "text"} <= json.loads(predictions[0]).keys()


@pytest.mark.slow
def test_predict_answers_in_pixels_and_draws(tiny_run, environment, tmp_path):
    Image.fromarray(np.full((60, 90, 3), 128, np.uint8)).save(tmp_path / "grey.png")
    finished = run(
        environment,
        "predict",
        f"--params={tiny_run}",
        f"--image={tmp_path / 'grey.png'}",
        "--prompt=detect red circle",
        f"--out={tmp_path / 'drawn.png'}",
        "--max_new_tokens=8",
    )
    assert finished.returncode == 0, finished.stderr
    assert json.loads(finished.stdout).keys() == {"text", "boxes", "points"}
    with Image.open(tmp_path / "drawn.png") as picture:
        assert picture.size[0] >= 90


def python(environment: dict[str, str], *arguments: str) -> str:
    """Returns the stdout of a Python process that succeeds."""
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout


@pytest.mark.parametrize("flags", [[], ["--help"]])
def test_the_package_lists_its_commands(environment, flags):
    names = re.findall(r"^  (\w+) ", python(environment, "-m", "pg_ground", *flags), re.M)
    assert tuple(names) == COMMANDS


def test_a_command_is_a_module_and_an_argument_of_the_package(environment):
    help_text = python(environment, "-m", "pg_ground.report", "--help")
    assert help_text == python(environment, "-m", "pg_ground", "report", "--help")
    assert help_text.startswith("Usage: pg-ground report ")


# errors

ERRORS = {
    "an unknown setting": (
        ["--config=configs/tiny.py", "--config.typo=1"],
        r"config\.typo does not exist",
    ),
    "a misspelt setting": (
        ["--config=configs/tiny.py", "--config.grpo.group_sise=4"],
        r"did you mean group_size\?",
    ),
    "a group of one": (
        ["--config=configs/tiny.py", "--config.grpo.group_size=1"],
        r"config\.grpo\.group_size is 1: .* 2",
    ),
    "no such file": (["--config=configs/nowhere.py"], r"configs/nowhere\.py"),
    "a word for a number": (
        ["--config=configs/tiny.py", "--config.grpo.steps=many"],
        r"steps.*many",
    ),
    "an unknown flag": (["--config=configs/tiny.py", "--wrokdir=x"], r"wrokdir.*workdir"),
    "a file that does not run": (["--config=README.md"], r"README\.md does not run: SyntaxError"),
    "an unknown algorithm": (
        ["--config=configs/tiny.py", "--config.grpo.algorithm=grop"],
        r"did you mean grpo\?",
    ),
    "an unknown reward": (
        ["--config=configs/tiny.py", "--config.grpo.rewards.iuo=1"],
        r"did you mean iou\?",
    ),
    "a missing source": (
        ["--config=configs/photos.py"],
        r"config\.grpo\.sources\.photos\.uri \(jsonl:photos\.jsonl\)",
    ),
    "a best metric that no evaluation has": (
        ["--config=configs/tiny.py", "--config.checkpoint.best=eval/dogs/acc50"],
        r'must be "eval/boxes/…"',
    ),
    "a field of a source that does not exist": (
        ["--config=configs/tiny.py", "--config.eval.sources.dogs.boxes=box"],
        r"config\.eval\.sources\.dogs does not exist: .*\.sources\.dogs\.uri=… adds a source",
    ),
    "a missing checkpoint": (
        ["--config=configs/tiny.py", "--config.init=none.npz"],
        r"none\.npz: no such file",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_bad_input_is_one_line_and_ends_with_2(name, tmp_path):
    arguments, message = ERRORS[name]
    finished = run_here("train", *arguments, f"--workdir={tmp_path / 'run'}")
    assert finished.returncode == 2, finished.stderr
    assert finished.stderr.startswith("error: "), finished.stderr
    assert finished.stderr.count("\n") == 1, finished.stderr
    assert re.search(message, finished.stderr), finished.stderr
    assert not (tmp_path / "run").exists()

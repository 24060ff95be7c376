"""The whole program as a user runs it: both stages, what it leaves behind, and going on after a kill."""

import json
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from commands import ROOT, assert_same_run, killed_and_resumed, rows, run, run_here, train_tiny
from PIL import Image

from pg_ground.__main__ import COMMANDS

STEPS = 12


@pytest.fixture(scope="session")
def straight(environment, tmp_path_factory) -> Path:
    """The working directory of a run of 6 + 6 steps that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("runs") / "straight"
    done = train_tiny(environment, workdir)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("report.html")
    return workdir


def test_a_run_leaves_what_the_contract_names(straight):
    for name in ("config.json", "metrics.jsonl", "checkpoints", "tb", "samples", "report.html"):
        assert (straight / name).exists(), name
    written = rows(straight)
    assert [row["stage"] for row in written] == sorted(
        (row["stage"] for row in written), reverse=True
    )
    last = {name for row in written for name in row}
    assert {"sft/loss", "reward/total", "reward/iou", "reward/std", "group/zero_std_fraction", "policy/kl", "policy/entropy",
            "policy/clip_fraction", "policy/logp_diff_max", "completion/length", "completion/malformed_fraction",
            "completion/unfinished_fraction", "optim/grad_norm", "optim/lr", "eval/boxes/acc50",
            "eval/points/point_in_box"} <= last  # fmt: skip
    pictures = list((straight / "samples").glob("*.png"))
    assert pictures
    with Image.open(pictures[0]) as picture:
        assert min(picture.size) > 200


def test_sampler_and_trainer_agree_at_every_step(straight):
    differences = [
        row["policy/logp_diff_max"] for row in rows(straight) if "policy/logp_diff_max" in row
    ]
    assert len(differences) == 3 and max(differences) < 1e-5


def test_starting_a_finished_run_again_changes_nothing(straight, environment):
    before = (straight / "metrics.jsonl").read_bytes()
    done = train_tiny(environment, straight)
    assert done.returncode == 0, done.stderr
    assert (straight / "metrics.jsonl").read_bytes() == before


def test_other_settings_in_the_same_directory_are_refused(straight, environment):
    done = train_tiny(environment, straight, "--config.grpo.group_size=2")
    assert done.returncode == 2
    assert re.fullmatch(
        r"error: .*config\.grpo\.group_size is 2, was 4.*--workdir\n", done.stderr
    ), done.stderr


def test_resume_continues_the_same_trajectory(straight, environment, tmp_path):
    killed_and_resumed(environment, tmp_path / "run", lines=6, delay_s=0.0)
    assert_same_run(straight, tmp_path / "run")


@pytest.mark.slow
def test_the_best_parameters_stay_and_are_those_of_their_measurement(environment, tmp_path):
    flags = (
        "--config.checkpoint.best=-eval/boxes/mean_iou",
        "--config.eval.every=2",
        "--config.checkpoint.every=4",
    )
    killed_and_resumed(environment, tmp_path / "run", lines=7, delay_s=0.0, flags=flags)
    measured = {
        row["step"]: row["eval/boxes/mean_iou"]
        for row in rows(tmp_path / "run")
        if "eval/boxes/mean_iou" in row
    }
    least = min(measured, key=lambda step: (measured[step], step))
    assert [step.name for step in (tmp_path / "run" / "best").iterdir()] == [str(least)] and len(
        measured
    ) > 4
    arguments = [f"--params={tmp_path / 'run' / 'best'}", f"--out={tmp_path}"]
    assert run(environment, "evaluate", "--config=configs/tiny.py", *arguments).returncode == 0
    assert (
        json.loads((tmp_path / "eval.json").read_text())["eval/boxes/mean_iou"] == measured[least]
    )


@pytest.mark.slow
@pytest.mark.parametrize("lines", [2, 6], ids=["sft", "grpo"])
@pytest.mark.parametrize("attempt", [0, 1, 2])
def test_resume_is_exact_from_a_random_moment(straight, environment, tmp_path, lines, attempt):
    delay_s = random.Random(10 * lines + attempt).uniform(0, 0.3)
    killed_and_resumed(environment, tmp_path / "run", lines, delay_s)
    assert_same_run(straight, tmp_path / "run")


def test_evaluate_repeats_the_measures_of_the_run(straight, environment, tmp_path):
    done = run(
        environment,
        "evaluate",
        "--config=configs/tiny.py",
        f"--workdir={straight}",
        f"--out={tmp_path}",
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "eval.json").read_text())
    last = rows(straight)[-1]
    measures = {name: value for name, value in last.items() if name.startswith("eval/")}
    assert measures and measures == {name: found[name] for name in measures}
    predictions = (tmp_path / "predictions.jsonl").read_text().splitlines()
    assert (
        len(predictions) == 2 * 2 * 32
        and {"source", "index", "mode", "text"} <= json.loads(predictions[0]).keys()
    )


def test_predict_answers_in_pixels_and_draws(straight, environment, tmp_path):
    Image.fromarray(np.full((60, 90, 3), 128, np.uint8)).save(tmp_path / "grey.png")
    arguments = [
        f"--params={straight}",
        f"--image={tmp_path / 'grey.png'}",
        "--prompt=detect red circle",
    ]
    done = run(
        environment, "predict", *arguments, f"--out={tmp_path / 'drawn.png'}", "--max_new_tokens=8"
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout).keys() == {"text", "boxes", "points"}
    with Image.open(tmp_path / "drawn.png") as picture:
        assert picture.size[0] >= 90


@pytest.mark.parametrize("command", [["-m", "pg_ground"], ["-m", "pg_ground", "--help"]])
def test_the_package_lists_its_commands(environment, command):
    done = subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, check=True
    )
    names = re.findall(r"^  (\w+) ", done.stdout, re.M)
    assert tuple(names) == COMMANDS


def test_a_command_is_a_module_and_an_argument_of_the_package(environment):
    outputs = [
        subprocess.run(
            [sys.executable, "-m", *program, "--help"],
            env=environment, cwd=ROOT, capture_output=True, text=True, check=True,
        ).stdout
        for program in (["pg_ground.report"], ["pg_ground", "report"])
    ]  # fmt: skip
    assert outputs[0] == outputs[1]
    assert outputs[0].startswith("Usage: pg-ground report ")


ERRORS = {
    "a name that does not exist": (
        ["--config=configs/tiny.py", "--config.typo=1"],
        r"config\.typo does not exist",
    ),
    "a near miss": (
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
    "the best of what is not measured": (
        ["--config=configs/tiny.py", "--config.checkpoint.best=eval/dogs/acc50"],
        r'must be "eval/boxes/…"',
    ),
    "an entry of an empty section": (
        ["--config=configs/tiny.py", "--config.eval.benchmarks.boxes=rec"],
        r"config\.eval\.benchmarks is empty, and is filled in the config file: c\.eval\.bench",
    ),
    "a missing checkpoint": (
        ["--config=configs/tiny.py", "--config.init=none.npz"],
        r"none\.npz: no such file",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_bad_input_ends_in_one_line_and_exit_code_2(name, tmp_path):
    arguments, message = ERRORS[name]
    done = run_here("train", *arguments, f"--workdir={tmp_path / 'run'}")
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert re.search(message, done.stderr), done.stderr
    assert not (tmp_path / "run").exists()

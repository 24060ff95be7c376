"""Runs of several processes: the same trajectory however many there are, and a clear end and an exact rerun where one dies.

Devices are virtual ones of the CPU; processes meet on the loopback, and reduce over them by gloo.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import ROOT, arrays, assert_same_run, command, rows, write_recipe

from pg_ground import config, tokenizer
from pg_ground.checkpoints import manager
from pg_ground.config import Data, Source
from pg_ground.data.bad_records import BadRecords
from pg_ground.data.batches import training_batches
from pg_ground.parallel import multiprocess, sharding
from pg_ground.training.recorder import own_part
from pg_ground.types import POLICY, TrainState, UserError

RECIPE = """
import runpy

def get_config():
    c = runpy.run_path("configs/tiny.py")["get_config"]().unlock()
    c.sft.steps = c.grpo.steps = 3
    c.grpo.update(batch_size=16, rollout_parts=2, dynamic_sampling=1, text_rewards={"FOLDER/mine.py:length": 0.5})
    c.grpo.reward_workers.update(error_share=1.0, count=1)
    c.eval.update(examples=12, batch_size=8)  # no multiple of the batch
    c.data.check_records = 20
    c.log.every, c.checkpoint.every = 1, 2
    return c.lock()
"""

MINE = """
def length(completion, example):
    if len(completion) % 5 == 0:
        raise ValueError("a fifth")
    return len(completion) / 100 + example.index % 3
"""

Process = subprocess.Popen[str]

WAIT_S = 600
"""Long enough for any machine: no test is about speed."""


@pytest.fixture(scope="module")
def setting(environment) -> dict[str, str]:
    """That of every process, but for its number of devices; compiled as fast as the rest of the tests."""
    return {**environment, "XLA_FLAGS": os.environ["XLA_FLAGS"]}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> str:
    """Both stages with a reward of text, which is judged where its rows are, and sometimes fails."""
    return write_recipe(tmp_path_factory.mktemp("recipe"), MINE, RECIPE)


def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def start(
    setting: dict[str, str], count: int, flags: list[tuple[str, ...]], module: str = "train"
) -> list[subprocess.Popen[str]]:
    """Returns as many processes of eight devices together, each with its own flags."""
    ours = {**setting, "JAX_NUM_CPU_DEVICES": str(8 // count)}
    where = f"127.0.0.1:{port()}"
    return [
        subprocess.Popen(
            command(module, *own, f"--distributed={where},{index}/{count}"),
            env=ours, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for index, own in enumerate(flags)
    ]  # fmt: skip


def finish(started: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """Returns exit code, stdout and stderr of each."""
    try:
        outputs = [process.communicate(timeout=WAIT_S) for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, *output) for process, output in zip(started, outputs, strict=True)]


def together(setting: dict[str, str], recipe: str, count: int, workdir: Path) -> list[str]:
    """Returns what each of several processes that train together prints."""
    found = finish(start(setting, count, [(recipe, f"--workdir={workdir}")] * count))
    assert all(code == 0 for code, _, _ in found), "\n".join(error for _, _, error in found)
    return [output for _, output, _ in found]


@pytest.fixture(scope="module")
def two(setting, recipe, tmp_path_factory) -> tuple[Path, list[str]]:
    """An undisturbed run of 2 processes of 4 devices, and what each printed."""
    workdir = tmp_path_factory.mktemp("runs") / "two"
    return workdir, together(setting, recipe, 2, workdir)


@pytest.mark.slow
def test_one_process_and_two_have_the_same_trajectory(two, setting, recipe, tmp_path):
    """Bit for bit: gloo's order of sums goes by device, and eight devices of one process reduce by it too where it has joined."""
    together(setting, recipe, 1, tmp_path / "one")
    assert_same_run(two[0], tmp_path / "one")


def test_files_and_lines_are_written_once(two):
    workdir, (first, second) = two
    steps = [
        (row["stage"], row["step"])
        for row in rows(workdir)
        if not any(name.startswith("eval/") for name in row)
    ]
    assert steps == [("sft", 1), ("sft", 2), ("sft", 3), ("grpo", 4), ("grpo", 5), ("grpo", 6)]
    assert first.strip().endswith("report.html") and not [
        line for line in second.splitlines() if "Gloo" not in line
    ]
    assert len(list((workdir / "tb").iterdir())) == 1


def test_two_processes_evaluate_as_one_does(two, setting, recipe, tmp_path):
    outputs = {}
    for count in (1, 2):
        flags = (recipe, f"--workdir={two[0]}", f"--out={tmp_path / str(count)}")
        found = finish(start(setting, count, [flags] * count, "evaluate"))
        assert all(code == 0 for code, _, _ in found), found
        outputs[count] = [
            (tmp_path / str(count) / name).read_text()
            for name in ("eval.json", "predictions.jsonl")
        ]
    assert outputs[1] == outputs[2]
    lines = [json.loads(line) for line in outputs[2][1].splitlines()]
    assert (
        len(lines) == 2 * 2 * 12
        and [line["mode"] for line in lines[:16]] == ["greedy"] * 8 + ["sampled"] * 8
    )


@pytest.mark.slow
def test_eight_processes_have_the_trajectory_of_two(two, setting, recipe, tmp_path):
    together(setting, recipe, 8, tmp_path / "eight")
    assert_same_run(two[0], tmp_path / "eight")


@pytest.mark.slow
def test_a_process_that_has_not_joined_sums_in_another_order(two, setting, recipe, tmp_path):
    """XLA adds what eight devices of one process have in their order, gloo in a ring, so runs differ by rounding.

    The loss of the first step is a sum of eight terms of one sign; each order of it is off by at most 7 roundings of 2^-24 (of
    the sum), and so they differ by 14. Later, Adam makes a step of the learning rate's size out of any gradient, whatever its
    rounding: at most twice that is between two runs after each of six steps.
    """
    ours = {**setting, "JAX_NUM_CPU_DEVICES": "8"}
    done = subprocess.run(
        command("train", recipe, f"--workdir={tmp_path}"),
        env=ours,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=WAIT_S,
    )
    assert done.returncode == 0, done.stderr
    one, other = (
        next(row for row in rows(workdir) if "sft/loss" in row) for workdir in (two[0], tmp_path)
    )
    assert one["sft/loss"] == pytest.approx(other["sft/loss"], rel=14 * 2**-24)
    mine, theirs = arrays(two[0]), arrays(tmp_path)
    for name in mine:
        if name.startswith("params"):
            assert np.abs(mine[name] - theirs[name]).max() <= 6 * 2 * 1e-3, name


def killed(
    setting: dict[str, str], recipe: str, workdir: Path, index: int, lines: int
) -> tuple[int, str]:
    """Returns exit code and stderr of one of two processes after the other, `index`, is killed at so many lines of metrics."""
    started = start(setting, 2, [(recipe, f"--workdir={workdir}")] * 2)
    file = workdir / "metrics.jsonl"
    try:
        while all(process.poll() is None for process in started) and not (
            file.exists() and file.read_bytes().count(b"\n") >= lines
        ):
            time.sleep(0.01)
        assert all(process.poll() is None for process in started), (
            "the run was over before the kill"
        )
        started[index].send_signal(signal.SIGKILL)
        at = time.monotonic()
        _, error = started[1 - index].communicate(timeout=WAIT_S)
        print(
            f"process {index} killed: the other ended after {time.monotonic() - at:.1f} s, {started[1 - index].returncode}"
        )
    finally:
        for process in started:
            process.kill()
            process.communicate()
    return started[1 - index].returncode, error


@pytest.mark.slow
def test_where_a_process_dies_the_other_ends_and_both_go_on_exactly(two, setting, recipe, tmp_path):
    code, error = killed(setting, recipe, tmp_path / "run", index=1, lines=6)
    assert code == multiprocess.EXIT_PROCESS_LOST
    assert re.search(
        r"^error: another process of this run ended: (process 1|.*Gloo.*); start all of them again",
        error,
        re.M,
    ), error
    together(setting, recipe, 2, tmp_path / "run")
    assert_same_run(two[0], tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("lines", [2, 6])
def test_where_process_0_dies_the_other_ends_and_both_go_on_exactly(
    two, setting, recipe, tmp_path, lines
):
    """By the connection between them, or by what jax has of its own: whichever notices first."""
    code, error = killed(setting, recipe, tmp_path / "run", index=0, lines=lines)
    assert code == multiprocess.EXIT_PROCESS_LOST or code == -signal.SIGABRT, (code, error)
    assert (
        "error: another process of this run ended: process 0" in error
        or "another task died" in error
    ), error
    together(setting, recipe, 2, tmp_path / "run")
    assert_same_run(two[0], tmp_path / "run")


@pytest.mark.slow
def test_another_number_of_processes_goes_on(two, setting, recipe, tmp_path):
    """Killed as two, continued as one that has joined: no record is bad, so nothing differs."""
    killed(setting, recipe, tmp_path / "run", index=1, lines=6)
    together(setting, recipe, 1, tmp_path / "run")
    assert_same_run(two[0], tmp_path / "run")


def test_processes_with_other_settings_are_refused_before_anything_is_compiled(
    setting, recipe, tmp_path
):
    flags = [
        (recipe, f"--workdir={tmp_path / 'run'}", f"--config.grpo.group_size={size}")
        for size in (4, 8)
    ]
    for code, _, error in finish(start(setting, 2, flags)):
        assert code == 2, error
        assert re.search(
            r"^error: config\.grpo\.group_size is 4 in process 0 and 8 in process 1: all processes .* same settings$",
            error,
            re.M,
        ), error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "where",
    ["yes", "localhost,0/2", "localhost:99,2/2", "localhost:99,0/0", "localhost:99,0", "auto "],
)
def test_a_place_that_is_none_is_refused(where):
    with pytest.raises(
        UserError, match=r"--distributed=.*: it must be auto, or HOST:PORT,INDEX/COUNT"
    ):
        multiprocess.initialize(where)


def test_no_cluster_to_find_is_one_line(setting, recipe, tmp_path):
    done = subprocess.run(
        command("train", recipe, f"--workdir={tmp_path}", "--distributed=auto"),
        env=setting, cwd=ROOT, capture_output=True, text=True, timeout=WAIT_S,
    )  # fmt: skip
    assert done.returncode == 2 and re.search(r"^error: --distributed=auto: ", done.stderr, re.M), (
        done.stderr
    )


def test_who_waits_in_vain_for_the_others_says_so(setting):
    program = f"from pg_ground.parallel import multiprocess; multiprocess.JOIN_TIMEOUT_S = 2; multiprocess.initialize('127.0.0.1:{port()},1/2')"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=setting,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=WAIT_S,
    )
    assert done.returncode == 2
    assert re.search(
        r"^error: --distributed=127.*,1/2: not all of the processes came within 2 s$",
        done.stderr,
        re.M,
    ), done.stderr


# one process


def test_one_process_speaks_for_all():
    value = {"a": [1, None, float("inf")], "b": "ö"}
    assert multiprocess.all_gather(value) == [value] and multiprocess.is_main_process()
    assert (
        multiprocess.sum_over_processes({"a": 2.0}) == {"a": 2.0}
        and multiprocess.sum_over_processes({}) == {}
    )
    multiprocess.barrier("here")
    multiprocess.check_same_settings({"config.seed": 1})
    assert multiprocess.initialize("") == ""


def test_settings_that_differ_are_named_with_both_values(monkeypatch):
    settings = [
        multiprocess.flatten_settings({"config": {"grpo": {"batch_size": size}, "seed": 0}})
        for size in (8, 8, 16)
    ]
    monkeypatch.setattr(multiprocess, "all_gather", lambda mine: settings)
    with pytest.raises(
        UserError, match=r"^config\.grpo\.batch_size is 8 in process 0 and 16 in process 2: "
    ):
        multiprocess.check_same_settings(settings[0])


SHAPES = {"data": config.Mesh(), "replica": config.Mesh(replica=2), "model": config.Mesh(model=2)}


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_put_on_a_mesh_are_taken_back_in_order(shape):
    mesh = sharding.make_mesh(SHAPES[shape])
    rows = {"image": np.arange(48.0).reshape(16, 3), "index": np.arange(16)}
    assert sharding.local_rows(mesh, 16).tolist() == list(range(16))
    placed = sharding.put_batch(mesh, rows)
    jax.tree.map(np.testing.assert_array_equal, sharding.fetch_local_rows(mesh, placed), rows)
    elsewhere = jax.device_put(placed, sharding.replicated(mesh))
    jax.tree.map(np.testing.assert_array_equal, sharding.fetch_local_rows(mesh, elsewhere), rows)


@pytest.mark.parametrize("after", [4, 1])
def test_a_checkpoint_of_eight_devices_goes_on_with_fewer(tmp_path, after):
    def state(count: int) -> TrainState:
        mesh = sharding.make_mesh(config.Mesh(data=count), jax.devices()[:count])
        rng = np.random.default_rng(0)
        params = {
            "llm/layers/mlp/linear": rng.normal(size=(2, 1024, 1024)).astype(np.float32),
            "small": np.float32(2.5),
        }
        places = sharding.infer_shardings(mesh, jax.eval_shape(lambda: params))
        placed = jax.device_put(params, places)
        step = jax.device_put(jnp.int32(7), sharding.replicated(mesh))
        return TrainState(
            step,
            {POLICY: placed},
            {"mu": placed},
            jax.device_put(jnp.float32(0.5), sharding.replicated(mesh)),
        )

    whole, like = state(8), state(after)
    assert (
        len(whole.params[POLICY]["llm/layers/mlp/linear"].addressable_shards[0].data[0])
        == 1024 // 8
    )
    with manager.Checkpoints(tmp_path, keep=1) as saved:
        saved.save(7, whole, {"stage": "sft"})
    with manager.Checkpoints(tmp_path, keep=1) as saved:
        found = saved.restore(
            7,
            jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like
            ),
        )
    jax.tree.map(np.testing.assert_array_equal, found, whole)
    assert jax.tree.map(lambda x: x.sharding, found) == jax.tree.map(lambda x: x.sharding, like)


# the data, by rows


DATA = Data(prompt_length=8, suffix_length=8)


def streams(
    count: int, uri: str = "synthetic:train?side=16", bad: BadRecords | None = None
) -> list:
    """Returns the batches of 8 rows of each of `count` processes."""
    sources = {
        "a": Source(uri=uri, boxes="box"),
        "b": Source(uri="synthetic:heldout?side=16", boxes="box", weight=0.5),
    }
    return [
        training_batches(
            sources, DATA, tokenizer.load(), image_size=8, batch_size=8, seed=0, bad_records=bad or BadRecords(),
            rows=np.split(np.arange(8), count)[index],
        )
        for index in range(count)
    ]  # fmt: skip


def steps(opened: list, count: int) -> list:
    """Returns the next global batches."""
    parts = zip(*(islice(one, count) for one in opened), strict=True)
    return [jax.tree.map(lambda *leaves: np.concatenate(leaves), *part) for part in parts]


def handed_on(opened: list, count: int, uri: str = "synthetic:train?side=16") -> list:
    """Returns as many processes that go on where others stopped."""
    parts = [
        json.loads(
            json.dumps({"batches": one.get_state(), "bad_records": BadRecords().get_state()})
        )
        for one in opened
    ]
    fresh = streams(count, uri)
    for index, one in enumerate(fresh):
        one.set_state(own_part(parts, index, count)["batches"])
    return fresh


def test_global_batches_are_the_same_whatever_the_number_of_processes():
    expected = steps(streams(1), 6)
    for count in (2, 4):
        jax.tree.map(np.testing.assert_array_equal, steps(streams(count), 6), expected)


def test_the_number_of_processes_may_change_and_change_back():
    expected = steps(streams(1), 9)
    opened, found = streams(1), []
    for count in (1, 2, 4, 2, 1):
        opened = handed_on(opened, count)
        found += steps(opened, 1)
    jax.tree.map(np.testing.assert_array_equal, found, expected[:5])


def test_after_bad_records_as_many_processes_go_on_exactly_and_others_with_a_batch_that_none_had_begun(
    tmp_path,
):
    lines = [
        {"image": "i.png", "phrase": "cat", "box": [0, 0, 4, 4 if i % 8 else -4]} for i in range(64)
    ]
    from PIL import Image

    Image.new("RGB", (8, 8)).save(tmp_path / "i.png")
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    uri = f"jsonl:{tmp_path}/a.jsonl"
    opened = streams(2, uri)
    steps(opened, 4)
    states = [one.get_state() for one in opened]
    assert any(state["next"] % state["rows"] for state in states), (
        "no process came upon a bad record"
    )
    again = handed_on(opened, 2, uri)
    jax.tree.map(np.testing.assert_array_equal, steps(again, 3), steps(opened, 3))
    (one,) = handed_on(again, 1, uri)
    begun = max(
        -(-state["next"] // state["rows"]) for state in (part.get_state() for part in again)
    )
    assert one.get_state() == {"next": 8 * begun, "rows": 8}


def test_what_was_counted_goes_on_once():
    bad = BadRecords()
    bad.read("a", 10, 3)
    bad.add("a", 4, "bad_box", "flat")
    judged = {"calls": {"r": 5}, "errors": {"r": 1}, "first_error": {"r": "odd"}}
    parts = [
        {"batches": {"next": 8, "rows": 4}, "bad_records": bad.get_state(), "judges": judged}
    ] * 2
    assert own_part(parts, 1, 2) is parts[1]
    first, *others = (own_part(parts, index, 4) for index in range(4))
    assert first["bad_records"]["read"] == {"a": 6} and first["judges"]["calls"] == {"r": 10}
    for other in others:
        assert (
            other["bad_records"] == {"size": {}, "read": {}, "entries": []}
            and other["judges"]["calls"] == {}
        )
        assert other["batches"] == {"next": 2, "rows": 1}

"""Runs of several processes: the same trajectory for any number of them, and exact resumption.

The devices are virtual devices of the CPU. The processes meet on the loopback interface and reduce
with gloo.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import ROOT, arrays, assert_same_run, command, rows, write_recipe
from PIL import Image

from pg_ground import config, tokenizer
from pg_ground.checkpoints import manager, run_directory
from pg_ground.config import Data, Source
from pg_ground.data.bad_records import BadRecords
from pg_ground.data.batches import training_batches
from pg_ground.parallel import multiprocess, sharding
from pg_ground.reporting import timeline
from pg_ground.training.recorder import process_record
from pg_ground.types import POLICY, Batch, TrainState, UserError

RECIPE = """
import runpy

def get_config():
    c = runpy.run_path("configs/tiny.py")["get_config"]().unlock()
    c.sft.steps = c.grpo.steps = 3
    c.grpo.update(batch_size=16, rollout_parts=2, dynamic_sampling=1)
    c.grpo.text_rewards = {"FOLDER/mine.py:length": 0.5}
    c.grpo.reward_workers.update(error_share=1.0, count=1)
    c.eval.update(examples=12, batch_size=8)  # no multiple of the batch
    c.data.check_records = 20
    c.log.every, c.checkpoint.every = 1, 2
    return c.lock()
"""

TEXT_REWARD = """
def length(completion, example):
    if len(completion) % 5 == 0:
        raise ValueError("a fifth")
    return len(completion) / 100 + example.index % 3
"""

WAIT_S = 600
"""Long enough for any machine: no test here is about speed."""

Process = subprocess.Popen[str]


@pytest.fixture(scope="module")
def process_environment(environment) -> dict[str, str]:
    """The environment of every process, without its number of devices."""
    return {**environment, "XLA_FLAGS": os.environ["XLA_FLAGS"]}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> str:
    """Both stages, with a text reward that sometimes fails. Each process scores its own rows."""
    return write_recipe(tmp_path_factory.mktemp("recipe"), TEXT_REWARD, RECIPE)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def start(
    environment: dict[str, str], flags: Sequence[tuple[str, ...]], module: str = "train"
) -> list[Process]:
    """Starts one process for each tuple of flags. Together they have eight devices."""
    count = len(flags)
    environment = {**environment, "JAX_NUM_CPU_DEVICES": str(8 // count)}
    address = f"127.0.0.1:{free_port()}"
    return [
        subprocess.Popen(
            command(module, *process_flags, f"--distributed={address},{index}/{count}"),
            env=environment,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index, process_flags in enumerate(flags)
    ]


def finish(processes: list[Process]) -> list[tuple[int, str, str]]:
    """Returns exit code, stdout and stderr of each process."""
    try:
        outputs = [process.communicate(timeout=WAIT_S) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [
        (process.returncode, *output) for process, output in zip(processes, outputs, strict=True)
    ]


def train_together(
    environment: dict[str, str], recipe: str, count: int, workdir: Path, *flags: str
) -> list[str]:
    """Returns the stdout of each of `count` processes that train together."""
    results = finish(start(environment, [(recipe, f"--workdir={workdir}", *flags)] * count))
    assert all(code == 0 for code, _, _ in results), "\n".join(stderr for _, _, stderr in results)
    return [stdout for _, stdout, _ in results]


@pytest.fixture(scope="module")
def run_of_two(process_environment, recipe, tmp_path_factory) -> tuple[Path, list[str]]:
    """An undisturbed run of 2 processes with 4 devices each, and the stdout of both."""
    workdir = tmp_path_factory.mktemp("runs") / "two"
    return workdir, train_together(process_environment, recipe, 2, workdir)


@pytest.mark.slow
def test_one_process_and_two_have_the_same_trajectory(
    run_of_two, process_environment, recipe, tmp_path
):
    """Bit for bit: gloo sums in the order of the devices, and a joined process uses gloo too."""
    train_together(process_environment, recipe, 1, tmp_path / "one")
    assert_same_run(run_of_two[0], tmp_path / "one")


@pytest.fixture(scope="module")
def sft_of_two(process_environment, recipe, tmp_path_factory) -> tuple[Path, list[str]]:
    """A run of 2 processes that has only the first stage, and the stdout of both."""
    workdir = tmp_path_factory.mktemp("runs") / "sft_of_two"
    flags = ("--config.stages=sft", "--config.eval.examples=8")
    return workdir, train_together(process_environment, recipe, 2, workdir, *flags)


SFT_STEPS = [("sft", 1), ("sft", 2), ("sft", 3)]
GRPO_STEPS = [("grpo", 4), ("grpo", 5), ("grpo", 6)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("run", "expected_steps"),
    [
        ("sft_of_two", SFT_STEPS),
        ("run_of_two", SFT_STEPS + GRPO_STEPS),
    ],
)
def test_files_and_lines_are_written_once(request, run, expected_steps):
    workdir, (first, second) = request.getfixturevalue(run)
    steps = [
        (row["stage"], row["step"])
        for row in rows(workdir)
        if not any(name.startswith("eval/") for name in row)
    ]
    assert steps == expected_steps
    assert first.strip().endswith("report.html")
    assert not [line for line in second.splitlines() if "Gloo" not in line]
    assert len(list((workdir / "tb").iterdir())) == 1


@pytest.mark.slow
def test_two_processes_evaluate_as_one_does(run_of_two, process_environment, recipe, tmp_path):
    documents = {}
    for count in (1, 2):
        out = tmp_path / str(count)
        flags = (recipe, f"--workdir={run_of_two[0]}", f"--out={out}")
        results = finish(start(process_environment, [flags] * count, "evaluate"))
        assert all(code == 0 for code, _, _ in results), results
        documents[count] = [(out / name).read_text() for name in ("eval.json", "predictions.jsonl")]
    assert documents[1] == documents[2]
    predictions = [json.loads(line) for line in documents[2][1].splitlines()]
    assert len(predictions) == 2 * 2 * 12
    modes = [prediction["mode"] for prediction in predictions[:16]]
    assert modes == ["greedy"] * 8 + ["sampled"] * 8


@pytest.mark.slow
def test_eight_processes_have_the_trajectory_of_two(
    run_of_two, process_environment, recipe, tmp_path
):
    train_together(process_environment, recipe, 8, tmp_path / "eight")
    assert_same_run(run_of_two[0], tmp_path / "eight")


@pytest.mark.slow
def test_a_process_that_has_not_joined_sums_in_another_order(
    run_of_two, process_environment, recipe, tmp_path
):
    """Two runs differ by rounding if one has not joined.

    XLA sums over the devices of one process in their order, gloo sums in a ring.

    The loss of the first step is a sum of eight terms of one sign. Each order of summation is off
    by at most 7 roundings of 2^-24 (of the sum), so two orders differ by at most 14. Later, Adam
    turns any gradient into a step of the size of the learning rate, whatever its rounding. After
    six steps two runs therefore differ by at most twice the learning rate per step.
    """
    finished = subprocess.run(
        command("train", recipe, f"--workdir={tmp_path}"),
        env={**process_environment, "JAX_NUM_CPU_DEVICES": "8"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=WAIT_S,
    )
    assert finished.returncode == 0, finished.stderr
    workdirs = (run_of_two[0], tmp_path)
    first_losses = [
        next(row["sft/loss"] for row in rows(workdir) if "sft/loss" in row) for workdir in workdirs
    ]
    assert first_losses[0] == pytest.approx(first_losses[1], rel=14 * 2**-24)
    joined, alone = (arrays(workdir) for workdir in workdirs)
    for name in joined:
        if name.startswith("params"):
            assert np.abs(joined[name] - alone[name]).max() <= 6 * 2 * 1e-3, name


def kill_one_of_two(
    environment: dict[str, str], recipe: str, workdir: Path, index: int, lines: int
) -> tuple[int, str]:
    """Kills process `index` of two once metrics.jsonl has so many lines.

    Returns the exit code and stderr of the other process.
    """
    processes = start(environment, [(recipe, f"--workdir={workdir}")] * 2)
    survivor = processes[1 - index]
    file = workdir / "metrics.jsonl"
    try:
        while all(process.poll() is None for process in processes) and not (
            file.exists() and file.read_bytes().count(b"\n") >= lines
        ):
            time.sleep(0.01)
        are_running = all(process.poll() is None for process in processes)
        assert are_running, "the run was over before the kill"
        processes[index].send_signal(signal.SIGKILL)
        killed_at = time.monotonic()
        _, stderr = survivor.communicate(timeout=WAIT_S)
        seconds = time.monotonic() - killed_at
        print(f"{seconds:.1f} s after the kill the survivor ended with {survivor.returncode}")
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    return survivor.returncode, stderr


@pytest.mark.slow
def test_if_a_process_dies_the_other_ends_and_the_run_resumes_exactly(
    run_of_two, process_environment, recipe, tmp_path
):
    workdir = tmp_path / "run"
    code, stderr = kill_one_of_two(process_environment, recipe, workdir, index=1, lines=6)
    assert code == multiprocess.EXIT_PROCESS_LOST
    line = (
        r"^error: another process of this run ended: (process 1|.*Gloo.*); start all of them again"
    )
    assert re.search(line, stderr, re.M), stderr
    (session,) = timeline.read_sessions(workdir)
    assert session.end is None, "who watches the run waits for its next start"
    train_together(process_environment, recipe, 2, workdir)
    assert_same_run(run_of_two[0], workdir)
    assert [session.is_finished for session in timeline.read_sessions(workdir)] == [False, True]


@pytest.mark.slow
@pytest.mark.parametrize("lines", [2, 6])
def test_if_process_0_dies_the_other_ends_and_the_run_resumes_exactly(
    run_of_two, process_environment, recipe, tmp_path, lines
):
    """Either our connection or jax's own heartbeat notices first."""
    workdir = tmp_path / "run"
    code, stderr = kill_one_of_two(process_environment, recipe, workdir, index=0, lines=lines)
    assert code == multiprocess.EXIT_PROCESS_LOST or code == -signal.SIGABRT, (code, stderr)
    our_line = "error: another process of this run ended: process 0"
    assert our_line in stderr or "another task died" in stderr, stderr
    train_together(process_environment, recipe, 2, workdir)
    assert_same_run(run_of_two[0], workdir)


@pytest.mark.slow
def test_another_number_of_processes_resumes(run_of_two, process_environment, recipe, tmp_path):
    """Two processes are killed, one joined process resumes.

    No record is bad, so nothing differs.
    """
    workdir = tmp_path / "run"
    kill_one_of_two(process_environment, recipe, workdir, index=1, lines=6)
    train_together(process_environment, recipe, 1, workdir)
    assert_same_run(run_of_two[0], workdir)


@pytest.mark.slow
@pytest.mark.parametrize("part", ["params/_METADATA", "rest/ocdbt.process_1/d"])
def test_two_processes_continue_before_a_damaged_checkpoint(
    run_of_two, process_environment, recipe, tmp_path, part
):
    """Only process 1 reads the values that it has written."""
    workdir = tmp_path / "run"
    shutil.copytree(run_of_two[0], workdir)
    newest = max(run_directory.steps(workdir))
    damaged = workdir / "checkpoints" / str(newest) / part
    for file in damaged.iterdir() if damaged.is_dir() else [damaged]:
        file.write_bytes(file.read_bytes()[:10])
    flags = [(recipe, f"--workdir={workdir}")] * 2
    results = finish(start(process_environment, flags))
    assert [code for code, _, _ in results] == [0, 0], results
    assert_same_run(run_of_two[0], workdir)
    warnings = [stderr.count(" is damaged (") for _, _, stderr in results]
    assert warnings == [1, 0], results[0][2]
    assert "and writes the damaged one again" in results[0][2]


@pytest.mark.slow
def test_different_settings_are_refused_before_anything_is_compiled(
    process_environment, recipe, tmp_path
):
    workdir = tmp_path / "run"
    flags = [
        (recipe, f"--workdir={workdir}", f"--config.grpo.group_size={size}") for size in (4, 8)
    ]
    line = (
        r"^error: config\.grpo\.group_size is 4 in process 0 and 8 in process 1: "
        r"all processes .* same settings$"
    )
    for code, _, stderr in finish(start(process_environment, flags)):
        assert code == 2, stderr
        assert re.search(line, stderr, re.M), stderr
    assert not workdir.exists()


@pytest.mark.parametrize(
    "distributed",
    ["yes", "localhost,0/2", "localhost:99,2/2", "localhost:99,0/0", "localhost:99,0", "auto "],
)
def test_a_wrong_address_is_refused(distributed):
    with pytest.raises(
        UserError, match=r"--distributed=.*: it must be auto, or HOST:PORT,INDEX/COUNT"
    ):
        multiprocess.initialize(distributed)


@pytest.mark.slow
def test_a_missing_cluster_is_reported_in_one_line(process_environment, recipe, tmp_path):
    finished = subprocess.run(
        command("train", recipe, f"--workdir={tmp_path}", "--distributed=auto"),
        env=process_environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=WAIT_S,
    )
    assert finished.returncode == 2
    assert "error: --distributed=auto: there is no TPU slice" in finished.stderr, finished.stderr


@pytest.mark.slow
def test_a_process_that_waits_in_vain_for_the_others_reports_it(process_environment):
    program = (
        "from pg_ground.parallel import multiprocess; multiprocess.JOIN_TIMEOUT_S = 2; "
        f"multiprocess.initialize('127.0.0.1:{free_port()},1/2')"
    )
    finished = subprocess.run(
        [sys.executable, "-c", program],
        env=process_environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=WAIT_S,
    )
    assert finished.returncode == 2
    line = r"^error: --distributed=127.*,1/2: not all of the processes came within 2 s$"
    assert re.search(line, finished.stderr, re.M), finished.stderr


# One process


def test_in_a_run_of_one_process_every_function_is_the_identity():
    value = {"a": [1, None, float("inf")], "b": "ö"}
    assert multiprocess.all_gather(value) == [value]
    assert multiprocess.is_main_process()
    assert multiprocess.sum_over_processes({"a": 2.0}) == {"a": 2.0}
    assert multiprocess.sum_over_processes({}) == {}
    multiprocess.barrier("here")
    multiprocess.check_same_settings({"config.seed": 1})
    assert multiprocess.initialize("") == ""


def test_settings_that_differ_are_named_with_both_values(monkeypatch):
    settings = [
        multiprocess.flatten_settings({"config": {"grpo": {"batch_size": size}, "seed": 0}})
        for size in (8, 8, 16)
    ]
    monkeypatch.setattr(multiprocess, "all_gather", lambda value: settings)
    line = r"^config\.grpo\.batch_size is 8 in process 0 and 16 in process 2: "
    with pytest.raises(UserError, match=line):
        multiprocess.check_same_settings(settings[0])


MESHES = {"data": config.Mesh(), "replica": config.Mesh(replica=2), "model": config.Mesh(model=2)}


@pytest.mark.parametrize("name", MESHES)
def test_rows_put_on_a_mesh_are_fetched_in_order(name):
    mesh = sharding.make_mesh(MESHES[name])
    batch = {"image": np.arange(48.0).reshape(16, 3), "index": np.arange(16)}
    assert sharding.local_rows(mesh, 16).tolist() == list(range(16))
    split = sharding.put_batch(mesh, batch)
    replicated = jax.device_put(split, sharding.replicated(mesh))
    for arrays_on_mesh in (split, replicated):
        fetched = sharding.fetch_local_rows(mesh, arrays_on_mesh)
        jax.tree.map(np.testing.assert_array_equal, fetched, batch)


def make_state(device_count: int) -> TrainState:
    """Returns the same train state on any number of devices."""
    mesh = sharding.make_mesh(config.Mesh(data=device_count), jax.devices()[:device_count])
    random = np.random.default_rng(0)
    params = {
        "llm/layers/mlp/linear": random.normal(size=(2, 1024, 1024)).astype(np.float32),
        "small": np.float32(2.5),
    }
    shardings = sharding.infer_shardings(mesh, jax.eval_shape(lambda: params))
    params = jax.device_put(params, shardings)
    scalars = (jnp.int32(7), jnp.float32(0.5))
    step, kl_coef = jax.device_put(scalars, sharding.replicated(mesh))
    return TrainState(step, {POLICY: params}, {"mu": params}, kl_coef)


@pytest.mark.parametrize("device_count", [4, 1])
def test_a_checkpoint_of_eight_devices_is_restored_on_fewer(tmp_path, device_count):
    saved = make_state(8)
    expected = make_state(device_count)
    linear = saved.params[POLICY]["llm/layers/mlp/linear"]
    assert len(linear.addressable_shards[0].data[0]) == 1024 // 8
    with manager.Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(7, saved, {"stage": "sft"})
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), expected
    )
    with manager.Checkpoints(tmp_path, keep=1) as checkpoints:
        restored = checkpoints.restore(7, abstract)
    jax.tree.map(np.testing.assert_array_equal, restored, saved)
    shardings, expected_shardings = (
        jax.tree.map(lambda x: x.sharding, state) for state in (restored, expected)
    )
    assert shardings == expected_shardings


# The rows of each process


DATA = Data(prompt_length=8, suffix_length=8)


def open_streams(
    count: int, uri: str = "synthetic:train?side=16", bad_records: BadRecords | None = None
) -> list[Any]:
    """Returns the batches of each of `count` processes; a global batch has 8 rows."""
    sources = {
        "a": Source(uri=uri, boxes="box"),
        "b": Source(uri="synthetic:heldout?side=16", boxes="box", weight=0.5),
    }
    return [
        training_batches(
            sources,
            DATA,
            tokenizer.load(),
            image_size=8,
            batch_size=8,
            seed=0,
            bad_records=bad_records or BadRecords(),
            rows=process_rows,
        )
        for process_rows in np.split(np.arange(8), count)
    ]


def global_batches(streams: list[Any], count: int) -> list[Batch]:
    """Returns the next `count` batches of all processes together."""
    parts = zip(*(islice(stream, count) for stream in streams), strict=True)
    return [jax.tree.map(lambda *leaves: np.concatenate(leaves), *part) for part in parts]


def resumed_streams(
    streams: list[Any], count: int, uri: str = "synthetic:train?side=16"
) -> list[Any]:
    """Returns the streams of `count` processes that resume where `streams` stopped."""
    records = [
        json.loads(
            json.dumps({"batches": stream.get_state(), "bad_records": BadRecords().get_state()})
        )
        for stream in streams
    ]
    resumed = open_streams(count, uri)
    for index, stream in enumerate(resumed):
        stream.set_state(process_record(records, index, count)["batches"])
    return resumed


def assert_same_batches(batches: list[Batch], expected: list[Batch]) -> None:
    jax.tree.map(np.testing.assert_array_equal, batches, expected)


def test_global_batches_do_not_depend_on_the_number_of_processes():
    expected = global_batches(open_streams(1), 6)
    for count in (2, 4):
        assert_same_batches(global_batches(open_streams(count), 6), expected)


def test_the_number_of_processes_may_change_and_change_back():
    expected = global_batches(open_streams(1), 9)
    streams = open_streams(1)
    batches = []
    for count in (1, 2, 4, 2, 1):
        streams = resumed_streams(streams, count)
        batches += global_batches(streams, 1)
    assert_same_batches(batches, expected[:5])


def test_after_bad_records_as_many_processes_resume_exactly_and_others_at_a_fresh_batch(tmp_path):
    """Processes skip different numbers of records.

    Another number of processes starts a new batch.
    """
    records = [
        {"image": "i.png", "phrase": "cat", "box": [0, 0, 4, 4 if i % 8 else -4]} for i in range(64)
    ]
    Image.new("RGB", (8, 8)).save(tmp_path / "i.png")
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    uri = f"jsonl:{tmp_path}/a.jsonl"
    streams = open_streams(2, uri)
    global_batches(streams, 4)
    states = [stream.get_state() for stream in streams]
    has_skipped = any(state["next"] % state["rows"] for state in states)
    assert has_skipped, "no process read a bad record"
    same_count = resumed_streams(streams, 2, uri)
    assert_same_batches(global_batches(same_count, 3), global_batches(streams, 3))
    (alone,) = resumed_streams(same_count, 1, uri)
    states = [stream.get_state() for stream in same_count]
    started_batches = max(-(-state["next"] // state["rows"]) for state in states)
    assert alone.get_state() == {"next": 8 * started_batches, "rows": 8}


def test_counts_are_resumed_once():
    bad_records = BadRecords()
    bad_records.read("a", 10, 3)
    bad_records.add("a", 4, "bad_box", "flat")
    reward_workers = {"calls": {"r": 5}, "errors": {"r": 1}, "first_error": {"r": "odd"}}
    record = {
        "batches": {"next": 8, "rows": 4},
        "bad_records": bad_records.get_state(),
        "reward_workers": reward_workers,
    }
    parts = [record] * 2
    assert process_record(parts, 1, 2) is parts[1]
    first, *others = (process_record(parts, index, 4) for index in range(4))
    assert first["bad_records"]["read"] == {"a": 6}
    assert first["reward_workers"]["calls"] == {"r": 10}
    for other in others:
        assert other["bad_records"] == {"size": {}, "read": {}, "entries": []}
        assert other["reward_workers"]["calls"] == {}
        assert other["batches"] == {"next": 2, "rows": 1}

"""Helpers that run commands, and helpers that compare two runs."""

import importlib
import io
import json
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from pg_ground import cli
from pg_ground.checkpoints.run_directory import newest

ROOT = Path(__file__).parents[1]


# commands


def command(name: str, *arguments: str) -> list[str]:
    """Returns the command line that runs a command in a new process."""
    return [sys.executable, "-m", f"pg_ground.{name}", *arguments]


def call(name: str, *arguments: str) -> None:
    """Runs the `main` of a command in this process."""
    module = importlib.import_module(f"pg_ground.{name}")
    module.main(cli.parse(module.COMMAND, arguments))


def run_here(name: str, *arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Runs a command in this process, to its exit code.

    A new process would import the package first, which takes 2 s.
    """
    module = importlib.import_module(f"pg_ground.{name}")
    stdout, stderr = io.StringIO(), io.StringIO()
    try:
        with redirect_stdout(stdout), redirect_stderr(stderr), chdir(cwd):
            cli.run(module.COMMAND, module.main, arguments)
    except SystemExit as end:
        code = int(end.code or 0)
    return subprocess.CompletedProcess(list(arguments), code, stdout.getvalue(), stderr.getvalue())


def run(
    environment: dict[str, str], name: str, *arguments: str
) -> subprocess.CompletedProcess[str]:
    """Runs a command in a new process."""
    return subprocess.run(
        command(name, *arguments),
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def train_tiny(
    environment: dict[str, str], workdir: Path, *flags: str
) -> subprocess.CompletedProcess[str]:
    """Runs `train` with configs/tiny.py in a new process."""
    return run(environment, "train", "--config=configs/tiny.py", f"--workdir={workdir}", *flags)


def write_recipe(folder: Path, rewards: str, recipe: str) -> str:
    """Writes a recipe, and rewards of a user in mine.py, and returns the flag for the recipe.

    FOLDER in the recipe is replaced by the folder.
    """
    (folder / "mine.py").write_text(rewards)
    (folder / "recipe.py").write_text(recipe.replace("FOLDER", str(folder)))
    return f"--config={folder / 'recipe.py'}"


# runs


def rows(workdir: Path) -> list[dict[str, float]]:
    """Returns the lines of metrics.jsonl without the values that depend on the machine."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if not k.startswith(("time/", "perf/"))}
        for line in lines
    ]


def arrays(workdir: Path) -> dict[str, np.ndarray]:
    """Returns every array of the newest checkpoint (parameters, optimizer, step) by name."""
    by_name: dict[str, np.ndarray] = {}
    folder = newest(workdir)
    for item in ("params", "rest"):
        with warnings.catch_warnings(), ocp.PyTreeCheckpointer() as checkpointer:
            warnings.simplefilter("ignore")  # orbax: its metadata may change
            metadata = checkpointer.metadata(folder / item).item_metadata.tree
            on_host = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), metadata)
            tree = checkpointer.restore(folder / item, restore_args=on_host)
        by_name |= {
            item + jax.tree_util.keystr(path): np.asarray(leaf)
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        }
    return by_name


def assert_same_run(workdir: Path, other_workdir: Path) -> None:
    """Fails if the metrics or the newest checkpoints of two runs differ in any bit."""
    assert rows(workdir) == rows(other_workdir)
    assert_same_arrays(workdir, other_workdir)


def assert_same_arrays(workdir: Path, other_workdir: Path) -> None:
    """Fails if the newest checkpoints of two runs differ in any bit."""
    first, second = arrays(workdir), arrays(other_workdir)
    assert first.keys() == second.keys()
    assert len(first) > 30
    for name, array in first.items():
        np.testing.assert_array_equal(array, second[name], err_msg=name, strict=True)


def killed_and_resumed(
    environment: dict[str, str],
    workdir: Path,
    lines: int,
    delay_s: float,
    flags: Sequence[str] = (),
    between: Callable[[], object] = lambda: None,
) -> int:
    """Kills a run with SIGKILL, resumes it, and returns the number of metrics lines at the kill.

    Args:
      lines: the number of metrics lines that the run writes before the kill.
      delay_s: seconds between the last of these lines and the kill.
      between: is called between the kill and the second start.
    """
    process = subprocess.Popen(
        command("train", "--config=configs/tiny.py", f"--workdir={workdir}", *flags),
        env=environment,
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    file = workdir / "metrics.jsonl"
    while process.poll() is None and not (
        file.exists() and file.read_bytes().count(b"\n") >= lines
    ):
        time.sleep(0.005)
    time.sleep(delay_s)
    was_running = process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    lines_at_kill = file.read_bytes().count(b"\n")
    assert was_running, "the run ended before the kill"
    between()
    finished = train_tiny(environment, workdir, *flags)
    assert finished.returncode == 0, finished.stderr
    return lines_at_kill

"""The commands as a user starts them, and what two runs are compared by."""

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


def write_recipe(folder: Path, mine: str, recipe: str) -> str:
    """Returns the flag for a config written into `folder` beside a user's rewards; FOLDER in it becomes the folder."""
    (folder / "mine.py").write_text(mine)
    (folder / "recipe.py").write_text(recipe.replace("FOLDER", str(folder)))
    return f"--config={folder / 'recipe.py'}"


def command(module: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", f"pg_ground.{module}", *arguments]


def call(name: str, *arguments: str) -> None:
    """Runs the `main` of a command in this process, with a command line."""
    module = importlib.import_module(f"pg_ground.{name}")
    module.main(cli.parse(module.COMMAND, arguments))


def run_here(name: str, *arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Runs a command in this process, to its exit code. A new process imports the package for 2 s."""
    module = importlib.import_module(f"pg_ground.{name}")
    stdout, stderr = io.StringIO(), io.StringIO()
    try:
        with redirect_stdout(stdout), redirect_stderr(stderr), chdir(cwd):
            cli.run(module.COMMAND, module.main, arguments)
    except SystemExit as end:
        code = int(end.code or 0)
    return subprocess.CompletedProcess(list(arguments), code, stdout.getvalue(), stderr.getvalue())


def run(
    environment: dict[str, str], module: str, *arguments: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(module, *arguments),
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def train_tiny(
    environment: dict[str, str], workdir: Path, *flags: str
) -> subprocess.CompletedProcess[str]:
    return run(environment, "train", "--config=configs/tiny.py", f"--workdir={workdir}", *flags)


def rows(workdir: Path) -> list[dict[str, float]]:
    """Returns the lines of metrics.jsonl without what depends on the machine."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if not k.startswith(("time/", "perf/"))}
        for line in lines
    ]


def arrays(workdir: Path) -> dict[str, np.ndarray]:
    """Returns every array of the newest checkpoint (parameters, optimizer, step) by name."""
    found: dict[str, np.ndarray] = {}
    folder = newest(workdir)
    for item in ("params", "rest"):
        with warnings.catch_warnings(), ocp.PyTreeCheckpointer() as checkpointer:
            warnings.simplefilter("ignore")  # orbax: its metadata may change
            stored = checkpointer.metadata(folder / item).item_metadata.tree
            on_host = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), stored)
            tree = checkpointer.restore(folder / item, restore_args=on_host)
        found |= {
            item + jax.tree_util.keystr(path): np.asarray(x)
            for path, x in jax.tree_util.tree_leaves_with_path(tree)
        }
    return found


def assert_same_run(one: Path, other: Path) -> None:
    assert rows(one) == rows(other)
    mine, theirs = arrays(one), arrays(other)
    assert mine.keys() == theirs.keys() and len(mine) > 30
    for name, value in mine.items():
        np.testing.assert_array_equal(value, theirs[name], err_msg=name, strict=True)


def killed_and_resumed(
    environment: dict[str, str],
    workdir: Path,
    lines: int,
    delay_s: float,
    flags: Sequence[str] = (),
    between: Callable[[], object] = lambda: None,
) -> int:
    """Returns the number of metrics lines at the kill -9, which comes `delay_s` after line number `lines`."""
    process = subprocess.Popen(
        command("train", "--config=configs/tiny.py", f"--workdir={workdir}", *flags),
        env=environment, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    file = workdir / "metrics.jsonl"
    while process.poll() is None and not (
        file.exists() and file.read_bytes().count(b"\n") >= lines
    ):
        time.sleep(0.005)
    time.sleep(delay_s)
    alive = process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    written = file.read_bytes().count(b"\n")
    assert alive, "the run was over before the kill"
    between()
    done = train_tiny(environment, workdir, *flags)
    assert done.returncode == 0, done.stderr
    return written

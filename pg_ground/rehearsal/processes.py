"""The commands that a rehearsal runs, as a user runs them: in processes of their own."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from pg_ground.checkpoints import run_directory
from pg_ground.config import Config
from pg_ground.types import UserError

TIMEOUT_S = 900
POLL_S = 0.2

ENDING_SIGNALS = (signal.SIGTERM, signal.SIGHUP)
"""Signals that end a process at once, without its `finally` clauses. Ctrl-C raises an exception."""

CONFIG_FILE = '''"""The settings of a rehearsal."""

import json
from pathlib import Path

from ml_collections import ConfigDict


def get_config():
    settings = json.loads(Path(__file__).with_name("settings.json").read_text())
    return ConfigDict(settings, allow_dotted_keys=True)
'''


@contextlib.contextmanager
def signals_exit() -> Iterator[None]:
    """Lets the signals of `ENDING_SIGNALS` end the block as `sys.exit` does, with 128 + the signal.

    So the processes that the block has started end with it. A signal that this process ignores, as
    under `nohup`, stays ignored. Only the main thread can do this.
    """

    def exit_by(number: int, _: object) -> None:
        sys.exit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.getsignal(number) for number in ENDING_SIGNALS}
    handlers = {number: old for number, old in handlers.items() if old == signal.SIG_DFL}
    for number in handlers:
        signal.signal(number, exit_by)
    try:
        yield
    finally:
        for number, old in handlers.items():
            signal.signal(number, old)


def write_config(config: Config, folder: Path) -> Path:
    """Writes a config as a Python file that `--config` takes, and returns the file."""
    (folder / "settings.json").write_text(json.dumps(asdict(config), indent=1))
    file = folder / "config.py"
    file.write_text(CONFIG_FILE)
    return file


class Processes:
    """Starts commands of the package with the same devices and log folder."""

    def __init__(self, folder: Path, count: int, devices: int):
        """Args:
        folder: gets the logs.
        count: processes of a training run.
        devices: virtual CPU devices of each process.
        """
        self._folder = folder
        self._count = count
        self._environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(devices),
            # Each program runs a few times only. Two steps of GRPO took 141 CPU-seconds with level
            # 1, and 268 with level 0, whose programs compile faster and run slower.
            "XLA_FLAGS": "--xla_backend_optimization_level=1",
        }

    def run(self, name: str, *arguments: str) -> str:
        """Runs one command and returns its output.

        Raises:
          UserError: it fails. The text is its error line.
        """
        with self._started(name, [list(arguments)], {"JAX_NUM_CPU_DEVICES": "1"}) as processes:
            self._wait(name, processes)
        return self._log(name, 0).read_text(errors="replace")

    def train(self, *arguments: str) -> None:
        """Runs `train` in all processes, to its end.

        Raises:
          UserError: a process fails.
        """
        with self._started("train", self._distributed(arguments)) as processes:
            self._wait("train", processes)

    def train_until_killed(self, workdir: Path, step: int, *arguments: str) -> int:
        """Runs `train` until checkpoint `step` is complete, and kills all processes with SIGKILL.

        Returns the newest complete checkpoint.

        Raises:
          UserError: a process fails, or the run ends before the kill.
        """
        deadline = time.monotonic() + TIMEOUT_S
        with self._started("train", self._distributed(arguments)) as processes:
            while not [done for done in run_directory.steps(workdir) if done >= step]:
                ended = [process.poll() for process in processes]
                if any(code is not None for code in ended) or time.monotonic() > deadline:
                    self._wait("train", processes)
                    raise UserError("the run ended before it was killed")
                time.sleep(POLL_S)
        return max(run_directory.steps(workdir))

    def _distributed(self, arguments: Sequence[str]) -> list[list[str]]:
        if self._count == 1:
            return [list(arguments)]
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        return [
            [*arguments, f"--distributed=localhost:{port},{index}/{self._count}"]
            for index in range(self._count)
        ]

    @contextlib.contextmanager
    def _started(
        self, name: str, lines: Sequence[Sequence[str]], environment: dict[str, str] | None = None
    ) -> Iterator[list[subprocess.Popen[bytes]]]:
        """Starts a process for each line of arguments. All of them end with the block.

        An error, Ctrl-C and `signals_exit` end the block too, also while processes are started.
        """
        processes: list[subprocess.Popen[bytes]] = []
        try:
            for index, arguments in enumerate(lines):
                with self._log(name, index).open("wb") as log:
                    processes.append(
                        subprocess.Popen(
                            [sys.executable, "-m", f"pg_ground.{name}", *arguments],
                            env=self._environment | (environment or {}),
                            stdout=log,
                            stderr=subprocess.STDOUT,
                        )
                    )
            yield processes
        finally:
            _kill(processes)

    def _wait(self, name: str, processes: Sequence[subprocess.Popen[bytes]]) -> None:
        """Waits for the end of processes.

        Raises:
          UserError: a process fails, or one does not end in time.
        """
        deadline = time.monotonic() + TIMEOUT_S
        try:
            codes = [process.wait(max(1, deadline - time.monotonic())) for process in processes]
        except subprocess.TimeoutExpired:
            raise UserError(
                f"{name} did not end within {TIMEOUT_S} s: {self._log(name, 0)}"
            ) from None
        # A process that lost the others exits with 3. Its own error is not the cause.
        for index in sorted(range(len(codes)), key=lambda index: codes[index] == 3):
            if codes[index]:
                raise UserError(self._failure(name, index, codes[index]))

    def _failure(self, name: str, index: int, code: int) -> str:
        log = self._log(name, index)
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("error: ")]
        if errors:
            return f"{name}: {errors[-1].removeprefix('error: ')}"
        last = lines[-1][:300] if lines else "no output"
        return f"{name} ended with exit code {code}: {last} ({log})"

    def _log(self, name: str, index: int) -> Path:
        return self._folder / f"{name}.{index}.log"


def _kill(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ends processes with SIGKILL, and waits for them."""
    for process in processes:
        process.kill()
    for process in processes:
        process.wait()

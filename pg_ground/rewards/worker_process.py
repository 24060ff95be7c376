"""The process in which text rewards run, and how a reward is found: the standard library and the
rewards, nothing else.

It imports no jax (half a second, and memory) and is started by `judges` with a plain `exec`, not by
`multiprocessing`, whose children import the run's own program again: 3 s and all of jax for each
worker of `python -m pg_ground.train`.

On the wire, pickled: first `Setup`; then for each `(name, [Call, …])` an acknowledgement, once
everything is imported, and a list of outcomes as each call returns, so that the other side always
knows which call a silent or dead worker is in.
"""

import asyncio
import contextlib
import importlib.util
import inspect
import math
import os
import pickle
import resource
import signal
import sys
import traceback
from collections.abc import Awaitable, Callable
from multiprocessing.connection import Connection
from types import ModuleType
from typing import Any, NamedTuple

OUT_OF_MEMORY = 86
"""Exit code of a worker that has reached its limit: what it holds is then unknown, and a fresh one
follows.
"""

FLOAT32_MAX = 3.4028235e38

BATCH = ("completions", "examples")
"""Parameters of a reward that judges all completions in one call; any other is called for each."""


class Setup(NamedTuple):
    """What a worker is told at its start."""

    rewards: dict[str, str | bytes]
    """By name, `path/to/file.py:function` or a pickled function."""
    timeout_s: float
    memory_bytes: int


class Call(NamedTuple):
    """The arguments of one call: one completion, or all of them for a batch reward."""

    completions: list[str]
    examples: list[Any]


class Outcome(NamedTuple):
    """The score of one completion: NaN where the reward does not apply, 0 with an error."""

    score: float
    error: str = ""


def load(spec: str) -> Any:
    """Returns what `path/to/file.py:name` names."""
    path, _, name = spec.rpartition(":")
    return getattr(module(path), name)


def module(path: str) -> ModuleType:
    """Returns a file as a module. It runs once in a process, and its folder need not be importable.
    """
    key = os.path.abspath(path)
    if key not in sys.modules:
        found = importlib.util.spec_from_file_location(key, path)
        assert found is not None and found.loader is not None, path  # the name ends in .py
        sys.modules[key] = importlib.util.module_from_spec(
            found
        )  # before it runs: dataclasses look there
        try:
            found.loader.exec_module(sys.modules[key])
        except BaseException:
            del sys.modules[key]
            raise
    return sys.modules[key]


def required(function: Callable[..., Any]) -> tuple[str, ...]:
    """Returns the names of the parameters without a default."""
    stars = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = inspect.signature(function).parameters.values()
    return tuple(p.name for p in parameters if p.default is p.empty and p.kind not in stars)


def main(descriptor: int) -> None:
    """Serves calls until the other side hangs up."""
    os.environ["JAX_PLATFORMS"] = (
        "cpu"  # a reward that imports jax leaves the accelerator to the run
    )
    os.set_inheritable(descriptor, False)
    with (
        contextlib.suppress(EOFError, OSError),
        Connection(descriptor) as connection,
        asyncio.Runner() as runner,
    ):
        setup: Setup = connection.recv()
        if setup.memory_bytes:
            resource.setrlimit(resource.RLIMIT_AS, (setup.memory_bytes, setup.memory_bytes))
        rewards = {name: _loaded(source) for name, source in setup.rewards.items()}
        while True:
            name, calls = connection.recv()
            connection.send(None)
            for call in calls:
                # The other side kills what takes too long; where that side is gone, the alarm does.
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
                signal.setitimer(signal.ITIMER_REAL, 2 * setup.timeout_s + 1)
                outcomes = judged(rewards[name], call, runner)
                signal.setitimer(signal.ITIMER_REAL, 0)
                connection.send(outcomes)


def _loaded(source: str | bytes) -> Callable[..., Any] | BaseException:
    try:
        return load(source) if isinstance(source, str) else pickle.loads(source)
    except BaseException as error:
        return error


def judged(
    reward: Callable[..., Any] | BaseException, call: Call, runner: asyncio.Runner
) -> list[Outcome]:
    """Returns one outcome per completion of a call; what a reward raises, `SystemExit` too, is an
    error of all of them.
    """
    try:
        if isinstance(reward, BaseException):
            raise reward
        batch = required(reward) == BATCH
        value = reward(*call) if batch else reward(call.completions[0], call.examples[0])
        if inspect.isawaitable(value):
            value = runner.run(_awaited(value))
        values = list(value) if batch else [value]
        if len(values) != len(call.completions):
            raise ValueError(
                f"it returned {len(values)} scores for {len(call.completions)} completions"
            )
        return [_outcome(value) for value in values]
    except MemoryError:
        os._exit(OUT_OF_MEMORY)
    except BaseException as error:
        return [Outcome(0.0, _described(error))] * len(call.completions)


async def _awaited(value: Awaitable[Any]) -> Any:
    return await value


def _outcome(value: Any) -> Outcome:
    if value is None:
        return Outcome(math.nan)
    try:
        number = math.inf if isinstance(value, (str, bytes)) else float(value)
    except (TypeError, ValueError):
        number = math.inf
    if abs(number) > FLOAT32_MAX:
        return Outcome(0.0, f"it returned {repr(value)[:100]}, which is no finite number")
    return Outcome(number)


def _described(error: BaseException) -> str:
    """Returns the exception and where it was raised, in one line."""
    text = "its text cannot be had"
    with contextlib.suppress(BaseException):  # the text is the user's program too
        text = " ".join(str(error).split())[:300]
    where = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {text} ({os.path.basename(where.filename)}:{where.lineno})"

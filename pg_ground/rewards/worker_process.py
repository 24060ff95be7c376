"""The process in which text rewards run, and the loading of rewards from files.

The module imports the standard library only, and no JAX (half a second, and memory). `workers`
starts the process with a plain `exec`. `multiprocessing` is not used because its children import
the run's main module again: 3 s and all of JAX for each worker of a training run.

Messages are pickled. The parent sends a `Setup` first. For each `(name, [Call, …])` the process
answers with an acknowledgement after all imports, and then with a list of outcomes after each call.
So the parent always knows which call a silent or dead process was in.
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
"""Exit code of a process at its memory limit. Its state is unknown then, so a new one replaces it.
"""

FLOAT32_MAX = 3.4028235e38

BATCH = ("completions", "examples")
"""Parameters of a reward that scores all completions in one call. Any other reward is called for
each completion."""


class Setup(NamedTuple):
    """The first message to a process."""

    rewards: dict[str, str | bytes]
    """By name: `path/to/file.py:function`, or a pickled function."""
    timeout_s: float
    memory_bytes: int


class Call(NamedTuple):
    """The arguments of one call: one completion, or all completions for a batch reward."""

    completions: list[str]
    examples: list[Any]


class Outcome(NamedTuple):
    """The score of one completion: NaN if the reward does not apply, 0 after an error."""

    score: float
    error: str = ""


def load(spec: str) -> Any:
    """Returns the object that `path/to/file.py:name` names."""
    path, _, name = spec.rpartition(":")
    return getattr(load_module(path), name)


def load_module(path: str) -> ModuleType:
    """Returns a file as a module. The file runs once in a process.

    The folder of the file need not be on sys.path.
    """
    key = os.path.abspath(path)
    if key not in sys.modules:
        spec = importlib.util.spec_from_file_location(key, path)
        assert spec is not None and spec.loader is not None, path  # the name ends in .py
        # the module is registered before it runs, because dataclasses look it up there
        sys.modules[key] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(sys.modules[key])
        except BaseException:
            del sys.modules[key]
            raise
    return sys.modules[key]


def required_parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    """Returns the names of the parameters without a default."""
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = inspect.signature(function).parameters.values()
    return tuple(p.name for p in parameters if p.default is p.empty and p.kind not in variadic)


def main(descriptor: int) -> None:
    """Serves calls over the pipe `descriptor` until the parent closes it."""
    # a reward that imports JAX must leave the accelerator to the run
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.set_inheritable(descriptor, False)
    with (
        contextlib.suppress(EOFError, OSError),
        Connection(descriptor) as connection,
        asyncio.Runner() as runner,
    ):
        setup: Setup = connection.recv()
        if setup.memory_bytes:
            resource.setrlimit(resource.RLIMIT_AS, (setup.memory_bytes, setup.memory_bytes))
        rewards = {name: _load_or_error(source) for name, source in setup.rewards.items()}
        while True:
            name, calls = connection.recv()
            connection.send(None)
            for call in calls:
                # The parent kills a process that takes too long. The alarm is for a process
                # whose parent is gone.
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
                signal.setitimer(signal.ITIMER_REAL, 2 * setup.timeout_s + 1)
                outcomes = call_reward(rewards[name], call, runner)
                signal.setitimer(signal.ITIMER_REAL, 0)
                connection.send(outcomes)


def _load_or_error(source: str | bytes) -> Callable[..., Any] | BaseException:
    try:
        return load(source) if isinstance(source, str) else pickle.loads(source)
    except BaseException as error:
        return error


def call_reward(
    reward: Callable[..., Any] | BaseException, call: Call, runner: asyncio.Runner
) -> list[Outcome]:
    """Returns one outcome for each completion of a call.

    An exception of the reward, `SystemExit` too, is the error of all completions of the call.
    """
    try:
        if isinstance(reward, BaseException):
            raise reward
        is_batch = required_parameters(reward) == BATCH
        value = reward(*call) if is_batch else reward(call.completions[0], call.examples[0])
        if inspect.isawaitable(value):
            value = runner.run(_wait_for(value))
        values = list(value) if is_batch else [value]
        if len(values) != len(call.completions):
            raise ValueError(
                f"it returned {len(values)} scores for {len(call.completions)} completions"
            )
        return [_outcome(value) for value in values]
    except MemoryError:
        os._exit(OUT_OF_MEMORY)
    except BaseException as error:
        return [Outcome(0.0, _describe(error))] * len(call.completions)


async def _wait_for(value: Awaitable[Any]) -> Any:
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


def _describe(error: BaseException) -> str:
    """Returns the exception and the line that raised it, in one line."""
    text = "its text is not available"
    with contextlib.suppress(BaseException):  # the exception's text is also code of the user
        text = " ".join(str(error).split())[:300]
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {text} ({os.path.basename(frame.filename)}:{frame.lineno})"

"""Completions judged as text, by the package's rewards or a user's own, in processes that cannot
hurt the run.

A text reward is `(completion, example) -> float`, or, with parameters of these names,
`(completions, examples) -> floats`; either may be `async`. None and NaN say that it does not apply.
Whatever else goes wrong, an exception, a crash, a call that takes too long, too much memory, no
finite number, scores 0 and is counted, and the first time said on stderr with its completion.

A worker is an own process behind a pipe. It answers call by call, so a silent or dead one costs
exactly the call it was in: it is killed with what it started, a fresh one goes on with the next
call. No call is made twice and none depends on which worker makes it, so scores and counts are the
same with any number of workers.
"""

import collections
import contextlib
import multiprocessing
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float

from pg_ground.config import RewardWorkerSettings, nearest
from pg_ground.rewards import worker_process
from pg_ground.rewards.worker_process import OUT_OF_MEMORY, Call, Outcome, Setup
from pg_ground.types import UserError

SIGNATURES: dict[tuple[str, ...], tuple[Literal["device", "text"], bool]] = {
    ("completion", "example"): ("text", False),
    worker_process.BATCH: ("text", True),
    ("answer", "batch", "settings"): ("device", True),
}
"""Parameters of a user's reward: its kind, and whether one call judges many completions."""

CHUNK = 16
"""Calls handed to a worker at once: a message of a few kilobytes, and work for every worker from a
small batch.
"""

START_S = 120.0
"""Seconds in which a worker must have imported its rewards."""

FIRST_CALLS = 100
"""The share of errors is taken of at least so many calls: an early one stops no run."""


class UserReward(NamedTuple):
    """A function of a user's file."""

    kind: Literal["device", "text"]
    batched: bool
    function: Callable[..., Any]


class Judgement(NamedTuple):
    """What each text reward says about N completions."""

    scores: dict[str, Float[np.ndarray, " N"]]
    """NaN where a reward does not apply."""
    errors: dict[str, int]
    """How many of the scores are 0 because of an error."""


def load_reward(spec: str) -> UserReward:
    """Returns the reward that `path/to/file.py:function` names; its parameters say of which kind it
    is.

    Raises:
      UserError: no such file or function, a file that does not run, other parameters.
    """
    path, _, name = spec.rpartition(":")
    if not Path(path).is_file():
        raise UserError(f"the reward {spec}: there is no file {path}")
    try:
        names = vars(worker_process.module(path))
    except (
        Exception,
        SystemExit,
    ) as error:  # the file is a program of the user's: whatever it raises is theirs to read
        raise UserError(
            f"the reward {spec} does not run: {type(error).__name__}: {error}"
        ) from None
    if name not in names:
        raise UserError(
            f"the reward {spec}: {path} has no {name}: {nearest(name, [n for n in names if n[0] != '_'])}"
        )
    function = names[name]
    if not callable(function):
        raise UserError(f"the reward {spec} is {function!r}, not a function")
    parameters = worker_process.required(function)
    if parameters not in SIGNATURES:
        right = " or ".join(f"({', '.join(names)})" for names in SIGNATURES)
        raise UserError(
            f"the reward {spec} has the parameters ({', '.join(parameters)}): they must be {right}"
        )
    return UserReward(*SIGNATURES[parameters], function)


def merged(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the counts of several `RewardWorkers` as those of one."""
    first_error = {
        name: error for state in reversed(states) for name, error in state["first_error"].items()
    }
    calls, errors = (
        dict(sum((Counter(state[of]) for state in states), Counter())) for of in ("calls", "errors")
    )
    return {"calls": calls, "errors": errors, "first_error": first_error}


class Pending:
    """Scores on their way."""

    def __init__(
        self,
        judges: "RewardWorkers",
        completions: Sequence[str],
        jobs: Mapping[str, Sequence[Future[list[Outcome]]]],
    ):
        self._judges, self._completions, self._jobs = judges, completions, jobs
        self._judgement: Judgement | None = None

    def result(self) -> Judgement:
        """Returns the scores when all are there, and has them counted the first time."""
        if self._judgement is None:
            outcomes = {
                name: [outcome for job in jobs for outcome in job.result()]
                for name, jobs in self._jobs.items()
            }
            self._judgement = self._judges._counted(self._completions, outcomes)
        return self._judgement


class RewardWorkers:
    """Text rewards at work: `with RewardWorkers(…) as judges: judges.submit(completions,
    examples).result()`.
    """

    def __init__(
        self,
        rewards: Mapping[str, str],
        registry: Mapping[str, Callable[..., Any]],
        settings: RewardWorkerSettings,
    ):
        """Looks up `rewards`, name to `path/to/file.py:function` or to a name in `registry`.

        Raises:
          UserError: a reward that does not exist, does not run or is none of text.
        """
        functions = {name: _text_reward(spec, registry) for name, spec in rewards.items()}
        self._batched = {
            name: worker_process.required(function) == worker_process.BATCH
            for name, function in functions.items()
        }
        sources = {
            name: spec if ".py:" in spec else pickle.dumps(functions[name])
            for name, spec in rewards.items()
        }
        self._setup = Setup(sources, settings.timeout_s, settings.memory_bytes)
        self._settings = settings
        self._submitted: Counter[str] = Counter()
        self._calls: Counter[str] = Counter()
        self._errors: Counter[str] = Counter()
        self._first_error: dict[str, str] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """The rewards, in order."""
        return tuple(self._batched)

    def __enter__(self) -> "RewardWorkers":
        """Starts the workers, which import their rewards while the run does something else."""
        count = self._settings.count if self._batched else 0
        self._workers = [_Worker(self._setup) for _ in range(count)]
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(max(count, 1), thread_name_prefix="judges")
        return self

    def __exit__(self, *_: object) -> None:
        """Ends the workers, whatever they are doing."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for worker in self._workers:
            worker.close()
        self._threads.shutdown()

    def submit(self, completions: Sequence[str], examples: Sequence[Any]) -> Pending:
        """Returns at once; the scores of each completion, under the example beside it, come with
        `result()`.
        """
        pairs = list(zip(completions, examples, strict=True))
        jobs = {}
        for name, batched in self._batched.items():
            calls = (
                [Call(list(completions), list(examples))]
                if batched and pairs
                else [Call([c], [e]) for c, e in pairs]
            )
            self._submitted[name] += len(pairs)
            allowed = (
                self._settings.error_share * max(self._submitted[name], FIRST_CALLS)
                - self._errors[name]
            )
            lost: list[Outcome] = []
            chunks = [calls[start : start + CHUNK] for start in range(0, len(calls), CHUNK)]
            jobs[name] = [
                self._threads.submit(self._judge, name, chunk, lost, allowed) for chunk in chunks
            ]
        return Pending(self, completions, jobs)

    def errors(self) -> dict[str, int]:
        """Returns how many scores of each reward were errors, in the whole run."""
        return {name: self._errors[name] for name in self._batched}

    def check(self) -> None:
        """Raises UserError where more of a reward's scores are errors than the allowed share."""
        for name in self._batched:
            failed, calls = self._errors[name], self._calls[name]
            if failed > self._settings.error_share * max(calls, FIRST_CALLS):
                raise UserError(
                    f"the reward {name} failed on {failed} of {calls} completions, a larger share than the "
                    f"{self._settings.error_share:g} of reward_workers.error_share; first with: {self._first_error[name]}"
                )

    def get_state(self) -> dict[str, Any]:
        """Returns the counts as JSON, for an exact resume. What is submitted and not asked for is
        not in them.
        """
        return {
            "calls": dict(self._calls),
            "errors": dict(self._errors),
            "first_error": dict(self._first_error),
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `get_state` returned."""
        self._calls, self._errors = Counter(state["calls"]), Counter(state["errors"])
        self._submitted, self._first_error = Counter(state["calls"]), dict(state["first_error"])

    def _judge(
        self, name: str, calls: Sequence[Call], lost: list[Outcome], allowed: float
    ) -> list[Outcome]:
        worker = self._idle.get()
        try:
            return worker.judge(name, calls, lost, allowed)
        finally:
            self._idle.put(worker)

    def _counted(
        self, completions: Sequence[str], outcomes: Mapping[str, Sequence[Outcome]]
    ) -> Judgement:
        for name, of_reward in outcomes.items():
            failed = [
                (completion, o.error)
                for completion, o in zip(completions, of_reward, strict=True)
                if o.error
            ]
            self._calls[name] += len(of_reward)
            self._errors[name] += len(failed)
            if failed and name not in self._first_error:
                completion, self._first_error[name] = failed[0]
                print(
                    f"the reward {name} scores 0, from now on silently: {failed[0][1]}, for {completion!r}",
                    file=sys.stderr,
                )
        scores = {
            name: np.array([o.score for o in of_reward], np.float32)
            for name, of_reward in outcomes.items()
        }
        return Judgement(
            scores,
            {name: sum(bool(o.error) for o in of_reward) for name, of_reward in outcomes.items()},
        )


class _Worker:
    """A process that calls rewards, replaced when it dies or a call takes too long."""

    def __init__(self, setup: Setup):
        self._setup = setup
        self._lock = threading.Lock()  # between `close` and a thread that replaces the process
        self._closed = False
        self._start()

    def judge(
        self, name: str, calls: Sequence[Call], lost: list[Outcome], allowed: float
    ) -> list[Outcome]:
        """Returns the outcomes of some calls; those that did not come back are added to `lost`,
        which a whole batch shares.

        Once these are more than `allowed`, `RewardWorkers.check` is bound to fail: what is left is
        not called, so that a reward that always hangs ends the run after a few calls and not after
        a batch of them.
        """
        outcomes: list[Outcome] = []
        waiting = collections.deque(calls)
        while waiting and len(lost) <= allowed:
            self._hand_over(name, list(waiting))
            try:
                while waiting:
                    if not self._connection.poll(self._setup.timeout_s):
                        raise TimeoutError
                    outcomes += self._connection.recv()
                    waiting.popleft()
            except (EOFError, OSError) as error:
                self._replace()
                failed = _failed(waiting.popleft(), self._fate(error))
                lost += failed
                outcomes += failed
        return outcomes + [
            outcome
            for call in waiting
            for outcome in _failed(call, "it was not called after so many errors")
        ]

    def close(self) -> None:
        """Ends the process for good; a thread that waits for it gets an error."""
        with self._lock:
            self._closed = True
            self._kill()

    def _hand_over(self, name: str, calls: list[Call]) -> None:
        """Sends calls and waits until they are read, by a fresh process if this one has died since
        its last call.
        """
        for _ in range(2):
            with contextlib.suppress(EOFError, OSError):
                self._connection.send((name, calls))
                if self._connection.poll(START_S):
                    return self._connection.recv()
            self._replace()
        raise UserError(
            f"a worker for text rewards does not start: exit code {self._exit_code}, its own message is above"
        )

    def _start(self) -> None:
        self._connection, theirs = multiprocessing.Pipe()
        with theirs:
            descriptor = theirs.fileno()
            # -c and not -m: the package may be importable only by what the run has put on its path.
            program = f"import sys; sys.path[:] = {sys.path!r}; from {worker_process.__name__} import main; main({descriptor})"
            self._process = subprocess.Popen(
                [sys.executable, "-c", program],
                pass_fds=[descriptor],
                stdin=subprocess.DEVNULL,
                stdout=2,  # the run's stdout is for what the command returns
                start_new_session=True,  # a group to kill, out of the reach of Ctrl-C
            )
        with contextlib.suppress(OSError):  # one that died at once is found out by `_hand_over`
            self._connection.send(self._setup)

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._exit_code = self._process.wait()

    def _replace(self) -> None:
        with self._lock:
            if self._closed:
                raise CancelledError
            self._kill()
            self._connection.close()
            self._start()

    def _fate(self, error: Exception) -> str:
        if isinstance(error, TimeoutError):
            return f"it took more than {self._setup.timeout_s:g} s"
        if self._exit_code == OUT_OF_MEMORY:
            return f"it needed more than {self._setup.memory_bytes} bytes"
        return f"it ended its process, exit code {self._exit_code}"


def _failed(call: Call, error: str) -> list[Outcome]:
    return [Outcome(0.0, error)] * len(call.completions)


def _text_reward(spec: str, registry: Mapping[str, Callable[..., Any]]) -> Callable[..., Any]:
    if ".py:" in spec:
        reward = load_reward(spec)
        if reward.kind != "text":
            raise UserError(
                f"the reward {spec} judges on the device: it belongs under grpo.rewards"
            )
        return reward.function
    if spec not in registry:
        raise UserError(f"the text reward {spec} does not exist: {nearest(spec, registry)}")
    return registry[spec]

"""Runs text rewards, the package's or a user's, in processes that cannot harm the training run.

A text reward is `(completion, example) -> float`. With the parameters `(completions, examples)` it
returns the scores of a whole batch. Either may be `async`. None and NaN mean that the reward does
not apply. After an error the score is 0, and the error is counted. Errors are: an exception, a
crash, a call that takes too long, too much memory, a value that is no finite number. The first
error of a reward is logged with its completion.

A worker is a process behind a pipe. It answers call by call, so a silent or dead worker costs
exactly the call that it was in. The worker is killed with all processes that it started, and a new
worker goes on with the next call. No call is repeated, and no call depends on which worker makes
it. So scores and counts are the same for any number of workers.
"""

import collections
import contextlib
import logging
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

from pg_ground.config import RewardWorkerSettings
from pg_ground.rewards import worker_process
from pg_ground.rewards.worker_process import OUT_OF_MEMORY, Call, Outcome, Setup
from pg_ground.storage.paths import local_path
from pg_ground.types import JsonDict, JsonObject, UserError, nearest

logger = logging.getLogger(__name__)

SIGNATURES: dict[tuple[str, ...], tuple[Literal["device", "text"], bool]] = {
    ("completion", "example"): ("text", False),
    worker_process.BATCH: ("text", True),
    ("answer", "batch", "settings"): ("device", True),
}
"""Parameters of a user's reward: its kind, and whether one call scores many completions."""

CHUNK = 16
"""Calls in one message to a worker. A message then has a few kilobytes, and a small batch gives
work to every worker."""

START_S = 120.0
"""Seconds in which a worker must have imported its rewards."""

MIN_CALLS = 100
"""The share of errors is taken of at least this many calls, so that an early error stops no run."""


class UserReward(NamedTuple):
    """A reward from a user's file."""

    kind: Literal["device", "text"]
    batched: bool
    function: Callable[..., Any]


class TextScores(NamedTuple):
    """Scores of N completions by each text reward."""

    scores: dict[str, Float[np.ndarray, " N"]]
    """NaN if a reward does not apply."""
    errors: dict[str, int]
    """Number of scores that are 0 because of an error."""


def load_reward(spec: str) -> UserReward:
    """Returns the reward `path/to/file.py:function`. Its parameters define its kind.

    Raises:
      UserError: there is no such file or function, the file does not run, or the parameters are
        of no kind.
    """
    path, _, name = spec.rpartition(":")
    path = str(local_path(path, "config.grpo.text_rewards"))
    if not Path(path).is_file():
        raise UserError(f"the reward {spec}: there is no file {path}")
    try:
        names = vars(worker_process.load_module(path))
    except (Exception, SystemExit) as error:  # the file is code of the user and may raise anything
        message = f"the reward {spec} does not run: {type(error).__name__}: {error}"
        raise UserError(message) from None
    if name not in names:
        public = [other for other in names if not other.startswith("_")]
        raise UserError(f"the reward {spec}: {path} has no {name}: {nearest(name, public)}")
    function = names[name]
    if not callable(function):
        raise UserError(f"the reward {spec} is {function!r}, not a function")
    parameters = worker_process.required_parameters(function)
    if parameters not in SIGNATURES:
        allowed = " or ".join(f"({', '.join(names)})" for names in SIGNATURES)
        raise UserError(
            f"the reward {spec} has the parameters ({', '.join(parameters)}): "
            f"they must be {allowed}"
        )
    return UserReward(*SIGNATURES[parameters], function)


def merge_states(states: Sequence[JsonObject]) -> JsonDict:
    """Returns the states of several `RewardWorkers` (see `get_state`) as one state."""
    first_error: dict[str, str] = {}
    for state in states:
        first_error = {**state["first_error"], **first_error}
    calls, errors = (
        dict(sum((Counter(state[field]) for state in states), Counter()))
        for field in ("calls", "errors")
    )
    return {"calls": calls, "errors": errors, "first_error": first_error}


class PendingScores:
    """Scores that workers are computing."""

    def __init__(
        self,
        workers: "RewardWorkers",
        completions: Sequence[str],
        jobs: Mapping[str, Sequence[Future[list[Outcome]]]],
    ):
        self._workers = workers
        self._completions = completions
        self._jobs = jobs
        self._scores: TextScores | None = None

    def result(self) -> TextScores:
        """Waits for all scores and returns them. The first call also counts them."""
        if self._scores is None:
            outcomes = {
                name: [outcome for job in jobs for outcome in job.result()]
                for name, jobs in self._jobs.items()
            }
            self._scores = self._workers._count(self._completions, outcomes)
        return self._scores


class RewardWorkers:
    """Worker processes for text rewards.

    with RewardWorkers(…) as workers:
        scores = workers.submit(completions, examples).result()
    """

    def __init__(
        self,
        rewards: Mapping[str, str],
        registry: Mapping[str, Callable[..., Any]],
        settings: RewardWorkerSettings,
        log_errors: bool = True,
    ):
        """Loads the rewards. No process is started yet.

        Args:
          rewards: name to `path/to/file.py:function`, or to a name in `registry`.
          log_errors: logs the first error of each reward.

        Raises:
          UserError: a reward does not exist, does not run or is no text reward.
        """
        functions = {name: _text_reward(spec, registry) for name, spec in rewards.items()}
        self._is_batched = {
            name: worker_process.required_parameters(function) == worker_process.BATCH
            for name, function in functions.items()
        }
        sources = {
            name: spec if ".py:" in spec else pickle.dumps(functions[name])
            for name, spec in rewards.items()
        }
        self._setup = Setup(sources, settings.timeout_s, settings.memory_bytes)
        self._settings = settings
        self._log_errors = log_errors
        self._submitted: Counter[str] = Counter()
        self._calls: Counter[str] = Counter()
        self._errors: Counter[str] = Counter()
        self._first_error: dict[str, str] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """The rewards, in order."""
        return tuple(self._is_batched)

    def __enter__(self) -> "RewardWorkers":
        """Starts the workers. They import their rewards while the run does something else."""
        count = self._settings.count if self._is_batched else 0
        self._processes = [_Worker(self._setup) for _ in range(count)]
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for worker in self._processes:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(max(count, 1), thread_name_prefix="reward_workers")
        return self

    def __exit__(self, *_: object) -> None:
        """Ends the workers, also during a call."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for worker in self._processes:
            worker.close()
        self._threads.shutdown()

    def submit(self, completions: Sequence[str], examples: Sequence[Any]) -> PendingScores:
        """Returns at once. `result()` of the returned value gives the scores.

        Args:
          examples: the question of each completion.
        """
        pairs = list(zip(completions, examples, strict=True))
        jobs = {}
        for name, is_batched in self._is_batched.items():
            calls = [Call([completion], [example]) for completion, example in pairs]
            if is_batched and pairs:
                calls = [Call(list(completions), list(examples))]
            self._submitted[name] += len(pairs)
            allowed = self._allowed_errors(self._submitted[name]) - self._errors[name]
            lost: list[Outcome] = []
            chunks = [calls[start : start + CHUNK] for start in range(0, len(calls), CHUNK)]
            jobs[name] = [
                self._threads.submit(self._call, name, chunk, lost, allowed) for chunk in chunks
            ]
        return PendingScores(self, completions, jobs)

    def _allowed_errors(self, calls: int) -> float:
        return self._settings.error_share * max(calls, MIN_CALLS)

    def errors(self) -> dict[str, int]:
        """Returns the number of errors of each reward in the whole run."""
        return {name: self._errors[name] for name in self._is_batched}

    def check(self) -> None:
        """Raises UserError if the share of errors of a reward is larger than the setting allows."""
        for name in self._is_batched:
            errors, calls = self._errors[name], self._calls[name]
            if errors > self._allowed_errors(calls):
                raise UserError(
                    f"the reward {name} failed on {errors} of {calls} completions, a larger share "
                    f"than the {self._settings.error_share:g} of reward_workers.error_share; "
                    f"first with: {self._first_error[name]}"
                )

    def check_any_success(self) -> None:
        """Raises UserError if a reward failed on every completion."""
        for name in self._is_batched:
            if self._calls[name] and self._errors[name] == self._calls[name]:
                raise UserError(
                    f"the reward {name} failed on {self._errors[name]} of {self._calls[name]} "
                    f"completions; first with: {self._first_error[name]}"
                )

    def get_state(self) -> JsonDict:
        """Returns the counts as JSON, for an exact resume.

        Scores that were submitted and whose result nobody has taken are not in the counts.
        """
        return {
            "calls": dict(self._calls),
            "errors": dict(self._errors),
            "first_error": dict(self._first_error),
        }

    def set_state(self, state: JsonObject) -> None:
        """Continues from a state of `get_state`."""
        self._calls = Counter(state["calls"])
        self._errors = Counter(state["errors"])
        self._submitted = Counter(state["calls"])
        self._first_error = dict(state["first_error"])

    def _call(
        self, name: str, calls: Sequence[Call], lost: list[Outcome], allowed: float
    ) -> list[Outcome]:
        worker = self._idle.get()
        try:
            return worker.call(name, calls, lost, allowed)
        finally:
            self._idle.put(worker)

    def _count(
        self, completions: Sequence[str], outcomes: Mapping[str, Sequence[Outcome]]
    ) -> TextScores:
        """Returns the scores, counts the errors and logs the first error of each reward."""
        errors = {}
        for name, of_reward in outcomes.items():
            failures = [
                (completion, outcome.error)
                for completion, outcome in zip(completions, of_reward, strict=True)
                if outcome.error
            ]
            errors[name] = len(failures)
            self._calls[name] += len(of_reward)
            self._errors[name] += len(failures)
            if failures and name not in self._first_error:
                completion, error = failures[0]
                self._first_error[name] = error
                if not self._log_errors:
                    continue
                logger.warning(
                    "the reward %s scores 0 (later errors are only counted): %s, for %r",
                    name,
                    error,
                    completion,
                )
        scores = {
            name: np.array([outcome.score for outcome in of_reward], np.float32)
            for name, of_reward in outcomes.items()
        }
        return TextScores(scores, errors)


class _Worker:
    """A process that calls rewards. It is replaced if it dies or if a call takes too long."""

    def __init__(self, setup: Setup):
        self._setup = setup
        self._lock = threading.Lock()  # between `close` and a thread that replaces the process
        self._closed = False
        self._start()

    def call(
        self, name: str, calls: Sequence[Call], lost: list[Outcome], allowed: float
    ) -> list[Outcome]:
        """Returns the outcomes of some calls.

        A reward that always hangs must end the run after a few calls, not after a whole batch of
        them. So no more calls are made if `lost` has more outcomes than `allowed`: the check of the
        error share will fail anyway.

        Args:
          lost: outcomes of calls that did not return. This method adds to the list, which all
            chunks of a batch share.
          allowed: number of lost outcomes after which calls are skipped.
        """
        outcomes: list[Outcome] = []
        waiting = collections.deque(calls)
        while waiting and len(lost) <= allowed:
            self._send(name, list(waiting))
            try:
                while waiting:
                    if not self._connection.poll(self._setup.timeout_s):
                        raise TimeoutError
                    outcomes += self._connection.recv()
                    waiting.popleft()
            except (EOFError, OSError) as error:
                self._replace()
                failures = _failures(waiting.popleft(), self._reason(error))
                lost += failures
                outcomes += failures
        skipped = "the call was skipped after too many errors"
        return outcomes + [outcome for call in waiting for outcome in _failures(call, skipped)]

    def close(self) -> None:
        """Ends the process for good. A thread that waits for it gets an error."""
        with self._lock:
            self._closed = True
            self._kill()

    def _send(self, name: str, calls: list[Call]) -> None:
        """Sends calls and waits for the acknowledgement.

        A new process gets the calls if this one has died since its last call.
        """
        for _ in range(2):
            with contextlib.suppress(EOFError, OSError):
                self._connection.send((name, calls))
                if self._connection.poll(START_S):
                    return self._connection.recv()
            self._replace()
        raise UserError(
            f"a worker for text rewards does not start: exit code {self._exit_code}; "
            f"its own message is above"
        )

    def _start(self) -> None:
        self._connection, worker_end = multiprocessing.Pipe()
        with worker_end:
            descriptor = worker_end.fileno()
            # -c and not -m: the package may be importable only through the run's sys.path
            program = (
                f"import sys; sys.path[:] = {sys.path!r}; "
                f"from {worker_process.__name__} import main; main({descriptor})"
            )
            self._process = subprocess.Popen(
                [sys.executable, "-c", program],
                pass_fds=[descriptor],
                stdin=subprocess.DEVNULL,
                stdout=2,  # the run's stdout is for the results of the command
                start_new_session=True,  # a process group to kill, which Ctrl-C does not reach
            )
        with contextlib.suppress(OSError):  # `_send` notices a process that died at once
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

    def _reason(self, error: Exception) -> str:
        """Returns why a call did not return."""
        if isinstance(error, TimeoutError):
            return f"it took more than {self._setup.timeout_s:g} s"
        if self._exit_code == OUT_OF_MEMORY:
            return f"it needed more than {self._setup.memory_bytes} bytes"
        return f"it ended its process, exit code {self._exit_code}"


def _failures(call: Call, error: str) -> list[Outcome]:
    return [Outcome(0.0, error)] * len(call.completions)


def _text_reward(spec: str, registry: Mapping[str, Callable[..., Any]]) -> Callable[..., Any]:
    if ".py:" in spec:
        reward = load_reward(spec)
        if reward.kind != "text":
            raise UserError(f"the reward {spec} is a device reward: it belongs under grpo.rewards")
        return reward.function
    if spec not in registry:
        raise UserError(f"the text reward {spec} does not exist: {nearest(spec, registry)}")
    return registry[spec]

"""Seconds of the phases of a step, without making devices wait for the host."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import jax

T = TypeVar("T")


class StepTimer:
    """Measures each phase of the steps of a stage.

    A separate thread waits for the devices; the host goes on.

    Devices work in the order of dispatch. A phase lasts from the end of the phase before it until
    its results are computed.
    """

    def __init__(self) -> None:
        self._waiter = ThreadPoolExecutor(1, thread_name_prefix="step-timer")
        self._laps: list[tuple[str, Future[float]]] = []
        self._last_end = 0.0
        self._is_read = True

    def start_step(self) -> Callable[[], dict[str, float]]:
        """Starts a step.

        Returns a function that waits for its devices and returns seconds as `time/<phase>_s`.

        The step starts where the step before ended. If the step before has been read, it starts
        now: work between the two is not part of it.
        """
        if self._is_read:
            self._last_end = time.perf_counter()
        laps: list[tuple[str, Future[float]]] = []
        self._laps = laps
        self._is_read = False

        def read_seconds() -> dict[str, float]:
            seconds: dict[str, float] = {}
            for phase, end in laps:
                name = f"time/{phase}_s"
                start = self._last_end
                self._last_end = end.result()
                seconds[name] = seconds.get(name, 0.0) + self._last_end - start
            self._is_read = laps is self._laps
            return seconds

        return read_seconds

    def lap(self, phase: str, value: T) -> T:
        """Returns `value` at once.

        It is the result of `phase`, and must not be donated to a later program.
        """
        self._laps.append((phase, self._waiter.submit(_time_when_ready, value)))
        return value


def _time_when_ready(value: object) -> float:
    jax.block_until_ready(value)
    return time.perf_counter()

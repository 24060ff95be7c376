"""The work that every peer does, and the protocol by which `benchmarks/versus.py` drives the peers.

A peer is a program: `python benchmarks/peers/NAME.py JSON`, with the fields of a `Work` as JSON. It
prints one JSON line with its versions and its number of parameters. Then it does one step for each
line on its input, and prints one JSON line with the measurements of the step.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any, NamedTuple

LOC, SEG, FILLER = 1024, 128, 64
"""Vocabulary entries after the text entries.

Hugging Face's PaliGemma has 64 filler rows after big_vision's entries. All models here have them.
"""

KL_COEF = 0.04
LR = 1e-6
CLIP_NORM = 1.0


class Size(NamedTuple):
    """An architecture, and the default sizes of a step."""

    image: int
    """Side in pixels."""
    patch: int
    vision_width: int
    vision_depth: int
    vision_mlp: int
    vision_heads: int
    width: int
    depth: int
    mlp: int
    heads: int
    head_dim: int
    text_vocab: int
    prompts: int
    group: int
    tokens: int

    @property
    def vocab(self) -> int:
        """All vocabulary entries."""
        return self.text_vocab + LOC + SEG + FILLER

    @property
    def image_tokens(self) -> int:
        """Number of image tokens of a prompt."""
        return (self.image // self.patch) ** 2


_3b = Size(224, 14, 1152, 27, 4304, 16, 2048, 18, 16384, 8, 256, 256_000, 32, 8, 64)

SIZES = {
    "tiny": Size(96, 8, 128, 4, 512, 4, 128, 4, 1024, 4, 32, 1024, 8, 8, 32),
    "small": Size(224, 16, 768, 12, 3072, 12, 1024, 12, 4096, 8, 128, 6976, 2, 4, 16),
    "3b_224": _3b,
    "3b_448": _3b._replace(image=448),
}
"""PaliGemma's architecture with one key-value head."""


class Work(NamedTuple):
    """One step: its sizes and its device."""

    size: str
    prompts: int
    group: int
    tokens: int
    """Length of every completion: none ends early."""
    prompt_tokens: int
    """BOS and newline included."""
    dtype: str
    """Of activations, float32 or bfloat16. Parameters and Adam are float32."""
    checkpointing: bool
    """Whether layers are computed again in the backward pass."""
    device: str
    """cpu or cuda."""
    threads: int
    grad_accum_steps: int
    variant: str
    """Chooses between the things that a peer can do."""

    @property
    def model_size(self) -> Size:
        """The architecture."""
        return SIZES[self.size]

    @property
    def completions(self) -> int:
        """Number of completions of a step."""
        return self.prompts * self.group


_messages = sys.stdout
"""The stream of the JSON lines."""


def read_work() -> Work:
    """Returns the work of this program's first argument.

    From here on, everything else that is printed to stdout goes to stderr.
    """
    global _messages
    _messages = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return Work(**json.loads(sys.argv[1]))


def send(**message: Any) -> None:
    """Prints one JSON line for `benchmarks/versus.py`."""
    print(json.dumps(message), file=_messages, flush=True)


def wait_for_request() -> bool:
    """Waits for a line on the input. Returns whether another step is requested."""
    return bool(sys.stdin.readline().strip())


def versions(*packages: str) -> dict[str, str]:
    """Returns the versions of installed packages."""
    return {package: metadata.version(package) for package in packages}


class PhaseTimer:
    """Measures wall and CPU seconds (of all threads) of the phases of one step."""

    def __init__(self, wait: Callable[[], Any], reset_peak: Callable[[], Any]):
        """Starts the first phase.

        Args:
          wait: waits until the device has finished.
          reset_peak: resets the counter of peak memory.
        """
        self.seconds: dict[str, float] = {}
        self.cpu_seconds: dict[str, float] = {}
        self._wait = wait
        wait()
        reset_peak()
        self._wall_start = time.perf_counter()
        self._cpu_start = time.process_time()

    def end_phase(self, phase: str) -> None:
        """Adds the time since the last call to `phase`."""
        self._wait()
        wall, cpu = time.perf_counter(), time.process_time()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + wall - self._wall_start
        self.cpu_seconds[phase] = self.cpu_seconds.get(phase, 0.0) + cpu - self._cpu_start
        self._wall_start, self._cpu_start = wall, cpu

    def send(self, peak_bytes: float, **checks: float) -> None:
        """Sends the measurements of the step, with numbers that show that the work was done."""
        send(
            seconds=self.seconds,
            cpu_seconds=self.cpu_seconds,
            peak_bytes=peak_bytes,
            checks=checks,
        )


def reset_peak_rss() -> None:
    """Resets Linux's counter of this process's peak memory."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def peak_rss() -> float:
    """Returns this process's peak resident memory in bytes."""
    with open("/proc/self/status") as file:
        return next(1024.0 * int(line.split()[1]) for line in file if line.startswith("VmHWM"))

"""The work that every peer does, and how each is timed: one JSON line a step, asked for by a line on its input.

A peer is a program: `python benchmarks/peers/NAME.py JSON` with a `Work` in JSON. It says what it is in its first line, then does
one step for each line it reads, `benchmarks/versus.py` having the peers take turns.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any, NamedTuple

LOC, SEG, FILLER = 1024, 128, 64
"""Entries behind the text vocabulary: Hugging Face's PaliGemma has 64 filler rows after big_vision's, all models here too."""


class Size(NamedTuple):
    """An architecture."""

    image: int
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
        return self.text_vocab + LOC + SEG + FILLER

    @property
    def image_tokens(self) -> int:
        return (self.image // self.patch) ** 2


_3b = Size(224, 14, 1152, 27, 4304, 16, 2048, 18, 16384, 8, 256, 256_000, 32, 8, 64)

SIZES = {
    "tiny": Size(96, 8, 128, 4, 512, 4, 128, 4, 1024, 4, 32, 1024, 8, 8, 32),
    "small": Size(224, 16, 768, 12, 3072, 12, 1024, 12, 4096, 8, 128, 6976, 2, 4, 16),
    "3b_224": _3b,
    "3b_448": _3b._replace(image=448),
}
"""PaliGemma's architecture with one head of keys and values; the last three are prompts, group and forced completion tokens."""


class Work(NamedTuple):
    """What a step consists of."""

    size: str
    prompts: int
    group: int
    tokens: int
    """Of every completion: none ends early."""
    prompt_tokens: int
    """BOS and newline included."""
    dtype: str
    """Of activations, float32 or bfloat16; parameters and Adam are float32."""
    checkpointing: bool
    """Whether layers are computed again in the backward pass."""
    device: str
    """cpu or cuda."""
    threads: int
    grad_accum_steps: int
    variant: str
    """What a peer is to do, of several things it can."""

    @property
    def of(self) -> Size:
        return SIZES[self.size]

    @property
    def rows(self) -> int:
        return self.prompts * self.group


KL_COEF, LR, CLIP_NORM = 0.04, 1e-6, 1.0


def work() -> Work:
    """Returns the work this program was started for; what it prints to stdout goes to stderr from here on."""
    global _out
    _out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return Work(**json.loads(sys.argv[1]))


_out = sys.stdout


def say(**line: Any) -> None:
    print(json.dumps(line), file=_out, flush=True)


def versions(*names: str) -> dict[str, str]:
    return {name: metadata.version(name) for name in names}


class Laps:
    """Wall and CPU seconds (of all threads) of the phases of one step, and the step's peak memory."""

    def __init__(self, wait: Callable[[], Any], reset_peak: Callable[[], Any]):
        self.seconds: dict[str, float] = {}
        self.cpu_seconds: dict[str, float] = {}
        self._wait = wait
        wait()
        reset_peak()
        self._last = time.perf_counter(), time.process_time()

    def lap(self, phase: str) -> None:
        """Adds what has passed since the last lap to `phase`."""
        self._wait()
        now = time.perf_counter(), time.process_time()
        for found, before, after in zip(
            (self.seconds, self.cpu_seconds), self._last, now, strict=True
        ):
            found[phase] = found.get(phase, 0.0) + after - before
        self._last = now

    def report(self, peak_bytes: float, **checks: float) -> None:
        say(
            seconds=self.seconds, cpu_seconds=self.cpu_seconds, peak_bytes=peak_bytes, checks=checks
        )


def asked() -> bool:
    """Returns True once another step is asked for, False when there are no more."""
    return bool(sys.stdin.readline().strip())


def reset_peak_rss() -> None:
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def peak_rss() -> float:
    with open("/proc/self/status") as file:
        return next(1024.0 * int(line.split()[1]) for line in file if line.startswith("VmHWM"))

"""A run's programs, compiled for TPUs that are not there: do they fit, what do they move, how long do they take at best?

python -m pg_ground.compile --config=configs/tpu.py:pg1_3b_224 --topology=v5e:2x4 [--json=O] [--full] [--search]
    [--programs=rollout,update]

Needs `pip install 'pg-ground[tpu]'` and no TPU; without it, says what the analytic table says. Without `--full` a compilation is
stopped once XLA has assigned memory, which answers whether it fits and takes seconds; code generation would take minutes. Exit
code 0: it fits; 3: it does not.
"""

import glob
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pg_ground.aot import hlo_analysis, tpu_specs
from pg_ground.aot.tpu_specs import CHIPS, GIB, Chip
from pg_ground.config import Config
from pg_ground.parallel.memory_model import KINDS, image_tokens
from pg_ground.reporting.html_page import Table
from pg_ground.training import programs
from pg_ground.types import UserError

REPORT, PROGRAM = "after_optimizations-memory-usage-report.txt", "after_optimizations.txt"
"""Ends of the names of what XLA writes down, the first one last: long before it has generated code."""


class Fit(NamedTuple):
    """One program on one chip."""

    program: str
    compile_s: float
    """Until memory was assigned, or to the end with `--full`."""
    hbm_bytes: float
    """Of this program and of what lies beside it."""
    kinds: dict[str, float]
    expected: float
    """Activations as `memory` would have them."""
    flops: float
    """Of one run, on one chip, with what is recomputed."""
    useful_flops: float
    """Without."""
    moved: hlo_analysis.Traffic
    largest: list[tuple[float, str]]
    """Buffers of the compiler's own, bytes and shapes."""

    def seconds(self, chip: Chip) -> dict[str, float]:
        """Returns what each resource alone would need: a step takes at least the largest of them."""
        collectives = sum(size for _, size in self.moved.collectives.values())
        return {
            "FLOPs": self.flops / chip.flops,
            "HBM": self.moved.hbm_bytes / chip.hbm_bandwidth,
            "links": collectives / chip.link_bandwidth,
        }


def environment(directory: Path, chip: str) -> dict[str, str]:
    """Returns the environment of a process that compiles for TPUs: libtpu does not look for one, XLA writes down what it does."""
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",  # any that exists: the topology is asked for by name
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # or the second of two processes finds a lock file
        "XLA_FLAGS": f"--xla_dump_to={directory} --xla_dump_hlo_as_text",
        "JAX_ENABLE_COMPILATION_CACHE": "false",
    }


def fits(
    argv: Sequence[str], names: Sequence[str], chip: str, full: bool, overrides: Sequence[str] = ()
) -> list[Fit]:
    """Returns what compiling each named program found; two at once, each in a process of its own.

    Raises:
      UserError: a process ended for another reason than too little memory.
    """
    with tempfile.TemporaryDirectory() as folder:
        waiting, running, found = list(names), {}, {}
        while waiting or running:
            while waiting and len(running) < 2:
                name = waiting.pop(0)
                directory = Path(folder) / name
                directory.mkdir()
                command = [
                    sys.executable,
                    "-m",
                    "pg_ground.compile",
                    *argv,
                    *overrides,
                    f"--child={name}",
                    f"--out={directory}",
                ]
                log = (directory / "log").open("w")
                process = subprocess.Popen(
                    command, env=environment(directory, chip), stdout=log, stderr=log
                )
                running[name] = (process, directory, time.monotonic())
            time.sleep(0.1)
            for name, (process, directory, started) in list(running.items()):
                ended = process.poll() is not None
                if not ended and (full or not _written(directory)):
                    continue
                took = time.monotonic() - started
                process.kill()
                process.wait()
                found[name] = _read(name, directory, took)
                del running[name]
        return [found[name] for name in names]


def _written(directory: Path) -> bool:
    """Returns whether XLA has written the report of the program, whole."""
    reports = _of_program(directory, REPORT)
    return bool(reports) and time.time() - os.path.getmtime(reports[0]) > 0.5


def _of_program(directory: Path, end: str) -> list[str]:
    started = (directory / "facts.json").exists()
    after = (directory / "facts.json").stat().st_mtime if started else 0
    return [
        path
        for path in glob.glob(f"{directory}/*.{end}")
        if started and "cpu_after" not in path and os.path.getmtime(path) >= after
    ]


def _read(name: str, directory: Path, took: float) -> Fit:
    log = (directory / "log").read_text(errors="replace")
    reports = _of_program(directory, REPORT)
    if not reports:
        said = [
            line
            for line in log.splitlines()
            if line.strip() and not line.startswith(("*", "@", "PC:"))
        ]
        raise UserError(
            f"compiling {name}: {said[-1][:400] if said else 'the process ended without a word'}"
        )
    facts = json.loads((directory / "facts.json").read_text())
    report = Path(reports[0]).read_text()
    own = float(re.search(r"Memory Space: default.*?\nTotal bytes: (\d+)", report)[1])  # pyright: ignore[reportOptionalSubscript]
    beside = facts["beside"]
    inside = facts["inside"]
    kinds = {kind: beside.get(kind, 0.0) + inside.get(kind, 0.0) for kind in KINDS}
    kinds["activations"] = own - sum(inside.values())
    moved = hlo_analysis.measure_traffic(
        Path(_of_program(directory, PROGRAM)[0]).read_text(), facts["turns"]
    )
    seconds = (
        json.loads((directory / "done.json").read_text())["seconds"]
        if (directory / "done.json").exists()
        else took
    )
    return Fit(
        name,
        seconds,
        own + sum(beside.values()),
        kinds,
        facts["expected"],
        facts["flops"],
        facts["useful_flops"],
        moved,
        largest_buffers(report),
    )


def largest_buffers(report: str, count: int = 5) -> list[tuple[float, str]]:
    """Returns the largest buffers of XLA's memory report, bytes and what lies there one after the other."""
    unit = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
    rows = re.findall(r"\);\s+([\d.]+)(B|KiB|MiB|GiB);\s+\d+;\s+\d+; (.*)", report)
    found = sorted(
        ((float(number) * unit[u], shapes.strip()) for number, u, shapes in rows), reverse=True
    )
    return found[:count]


def search(probe: Callable[[int], bool], step: int, start: int) -> int:
    """Returns the largest multiple of `step` for which `probe` holds, 0 if there is none; it doubles, then halves the gap."""
    low, high = 0, max(start // step, 1)
    while probe(high * step):
        low, high = high, 2 * high
    while high - low > max(1, low // 16):
        middle = (low + high) // 2
        low, high = (middle, high) if probe(middle * step) else (low, middle)
    return low * step


def found_by_search(c: Config, argv: list[str], version: str) -> str:
    """Returns in words the largest batch whose programs fit."""
    limit = CHIPS[version].hbm_bytes
    stage = "grpo" if "grpo" in c.stages else "sft"
    names = [
        name for name in programs.names(c) if name in ("rollout", "update", "sft", "reference")
    ]
    section = c.grpo if stage == "grpo" else c.sft
    tried: list[str] = []

    def probe(batch: int) -> bool:
        override = f"--config.{stage}.batch_size={batch}"
        worst = max(fit.hbm_bytes for fit in fits(argv, names, version, False, [override]))
        tried.append(f"{batch}: {worst / GIB:.2f} GiB")
        print(tried[-1], flush=True)
        return worst <= limit

    devices = tpu_specs.device_count(
        next(a.partition("=")[2] for a in argv if a.startswith("--topology="))
    )
    parts = section.grad_accum_steps * (c.grpo.minibatches if stage == "grpo" else 1)
    found = search(probe, devices // c.mesh.model * parts, section.batch_size)
    return f"largest {stage}.batch_size that fits {limit / GIB:.2f} GiB a chip: {found} (tried {', '.join(tried)})"


def mfu(fit: Fit, chip: Chip) -> float:
    """Returns the share of the chip's peak that useful operations have, were the step to take as long as its binding resource."""
    return fit.useful_flops / chip.flops / max(fit.seconds(chip).values())


def table(found: Sequence[Fit], topology: str, chip: Chip) -> Table:
    """Returns one row per program."""
    moved = ["TFLOP", "HBM GB", "link GB", "FLOPs s", "HBM s", "links s", "bound by", "MFU"]
    heads = ["program", "compiled in", "HBM GiB", *KINDS, "(by arithmetic)", *moved]
    rows = []
    for fit in found:
        seconds = fit.seconds(chip)
        collectives = sum(size for _, size in fit.moved.collectives.values())
        rows.append(
            [
                fit.program,
                f"{fit.compile_s:.0f} s",
                f"{fit.hbm_bytes / GIB:.2f}",
                *(f"{fit.kinds[kind] / GIB:.2f}" for kind in KINDS),
                f"{fit.expected / GIB:.2f}",
                f"{fit.flops / 1e12:.1f}",
                f"{fit.moved.hbm_bytes / 1e9:.0f}",
                f"{collectives / 1e9:.1f}",
                *(f"{seconds[name]:.3f}" for name in ("FLOPs", "HBM", "links")),
                max(seconds, key=lambda name: seconds[name]),
                f"{mfu(fit, chip):.0%}",
            ]
        )
    worst = max(fit.hbm_bytes for fit in found)
    verdict = "fits" if worst <= chip.hbm_bytes else "does not fit"
    return Table(
        f"{topology}: {worst / GIB:.2f} of {chip.hbm_bytes / GIB:.2f} GiB a chip, {verdict}",
        heads,
        rows,
        "a chip, one run",
    )


def as_json(found: Sequence[Fit], topology: str, chip: Chip) -> dict[str, Any]:
    """Returns all there is to say, for programs."""
    return {
        "topology": topology,
        "fits": max(fit.hbm_bytes for fit in found) <= chip.hbm_bytes,
        "hbm_bytes_available": chip.hbm_bytes,
        "programs": {
            fit.program: {
                "compile_s": fit.compile_s,
                "hbm_bytes": fit.hbm_bytes,
                "hbm_bytes_by_kind": fit.kinds,
                "hbm_bytes_by_arithmetic": fit.hbm_bytes - fit.kinds["activations"] + fit.expected,
                "flops": fit.flops,
                "useful_flops": fit.useful_flops,
                "hbm_traffic_bytes": fit.moved.hbm_bytes,
                "collectives": {
                    kind: {"count": n, "bytes": size}
                    for kind, (n, size) in fit.moved.collectives.items()
                },
                "roofline_s": fit.seconds(chip),
                "step_s": max(fit.seconds(chip).values()),
                "bound_by": max(fit.seconds(chip), key=fit.seconds(chip).__getitem__),
                "mfu": mfu(fit, chip),
                "largest_buffers": [{"bytes": size, "holds": what} for size, what in fit.largest],
            }
            for fit in found
        },
    }


def advice(c: Config, fit: Fit, chip: Chip) -> str:
    """Returns the largest buffers of a program that does not fit, and what would make it smaller."""
    lines = [
        f"{fit.program} needs {fit.hbm_bytes / GIB:.2f} GiB, a chip has {chip.hbm_bytes / GIB:.2f}. Largest buffers:"
    ]
    lines += [f"  {size / GIB:6.2f} GiB  {what[:110]}" for size, what in fit.largest]
    kept: Mapping[str, float] = {
        kind: size
        for kind, size in fit.kinds.items()
        if kind in ("parameters", "optimizer", "reference")
    }
    said = []
    if sum(kept.values()) > chip.hbm_bytes / 2:
        said.append(
            "more chips along config.mesh.data"
            + ("" if c.model.lora.rank else ", or adapters: config.model.lora.rank=16")
        )
    if fit.kinds["activations"] > chip.hbm_bytes / 4:
        if c.model.remat != "nothing_saveable":
            said.append("config.model.remat=nothing_saveable")
        stage = "sft" if fit.program == "sft" else "grpo"
        said.append(
            f"twice config.{stage}.grad_accum_steps, or a smaller config.{stage}.batch_size"
        )
        if c.model.logits_block > 2:
            said.append(f"config.model.logits_block=2 (now {c.model.logits_block})")
        if not c.model.attention_block and image_tokens(c) > 1024:
            said.append("config.model.attention_block=512")
    if fit.kinds["rollout weights"] and fit.program in ("rollout", "evaluation"):
        said.append("config.grpo.rollout_weights=sharded")
    return "\n".join([*lines, "What would help: " + "; ".join(said or ["more chips"])])

"""Compiles the programs of a run for TPUs that this machine does not have.

The reports show memory, traffic and the roofline time. This needs libtpu (`pip install libtpu`) and
no TPU. Each program is compiled in a process of its own, see `compile_worker.py`. By default a
process is stopped once XLA has assigned memory. This answers whether the program fits, and takes
seconds. Generating the code would take minutes.
"""

import dataclasses
import importlib.util
import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from pg_ground.aot import hlo_analysis, hlo_proto, jobs, tpu_specs
from pg_ground.aot.bounds import find_violation
from pg_ground.aot.tpu_specs import CHIPS, GIB, Chip
from pg_ground.config import Config, Model
from pg_ground.parallel import sharding
from pg_ground.parallel.memory_model import KINDS
from pg_ground.reporting.tables import Table, ascii_table
from pg_ground.training.memory_table import memory_table
from pg_ground.training.setup import make_setup
from pg_ground.training.stages import make_stages
from pg_ground.types import JsonDict, UserError, nearest

logger = logging.getLogger(__name__)

OPTIMISED_HLO = ".after_optimizations.hlo.pb"
"""The end of the name of the file in which XLA writes the optimised program with its buffers. XLA
writes it long before it has generated code, and also if the buffers do not fit."""

PARALLEL_COMPILATIONS = 2

POLL_S = 0.1


class ProgramReport(NamedTuple):
    """The result of compiling one program for one chip."""

    program: str
    compile_s: float
    """Seconds until XLA had assigned memory, or until the end if the compilation was full."""
    hbm_bytes: float
    """Bytes of this program and of everything else that the chip holds at the same time."""
    bytes_by_kind: dict[str, float]
    estimated_activations: float
    """Bytes of activations by the memory model."""
    flops: float
    """Operations of one run on one chip, recomputation included."""
    useful_flops: float
    """Operations without recomputation."""
    traffic: hlo_analysis.Traffic
    largest_buffers: list[tuple[float, str]]
    """Bytes and shapes of the largest buffers that XLA allocates."""

    @property
    def collective_bytes(self) -> int:
        return sum(size for _, size in self.traffic.collectives.values())

    def roofline_seconds(self, chip: Chip) -> dict[str, float]:
        """Returns the time that each resource alone would need.

        A run takes at least the largest of them.
        """
        return {
            "FLOPs": self.flops / chip.flops,
            "HBM": self.traffic.hbm_bytes / chip.hbm_bandwidth,
            "links": self.collective_bytes / chip.link_bandwidth,
        }

    def bound_by(self, chip: Chip) -> str:
        """Returns the resource that needs the most time."""
        seconds = self.roofline_seconds(chip)
        return max(seconds, key=lambda resource: seconds[resource])

    def mfu(self, chip: Chip) -> float:
        """Returns the useful operations as a share of the chip's peak over the roofline time."""
        return self.useful_flops / chip.flops / max(self.roofline_seconds(chip).values())


class UnreadableProgramError(Exception):
    """A figure of XLA's program is outside the bounds of arithmetic, so none can be trusted."""


class CompileResult(NamedTuple):
    """The answer of the `compile` command."""

    text: str
    """For people."""
    document: JsonDict
    """For programs, as JSON; empty if libtpu is not installed."""
    fits: bool


def compile_run(
    config: Config, topology: str, names: Sequence[str] = (), full: bool = False
) -> CompileResult:
    """Returns whether the programs of a run fit a TPU slice, and how long they take at best.

    Without libtpu the memory model answers.

    Args:
      config: the run.
      topology: for example v5e:2x4.
      names: the programs; empty means all programs of the run.
      full: whether to compile to the end.

    Raises:
      UserError: a setting, a program or the topology is wrong, or XLA fails for another reason than
        memory.
    """
    chip = CHIPS[tpu_specs.parse_topology(topology)[0]]
    mesh = sharding.abstract_mesh(config.mesh, tpu_specs.device_count(topology))
    programs = jobs.make_programs(config, mesh, chip.hbm_bytes)
    for name in names:
        if name not in programs:
            raise UserError(f"--programs={','.join(names)}: {nearest(name, programs)}")
    names = names or list(programs)
    if importlib.util.find_spec("libtpu") is None:
        chosen = {name: programs[name] for name in names}
        estimates = memory_table(chosen, chip.hbm_bytes, topology)
        hint = "libtpu is not installed, so XLA was not asked: pip install libtpu"
        fits = all(float(row[1]) <= chip.hbm_bytes / GIB for row in estimates.rows)
        return CompileResult(f"{ascii_table(estimates)}\n{hint}", {}, fits)
    reports = compile_programs(dataclasses.asdict(config), topology, names, full)
    text = ascii_table(report_table(reports, topology, chip))
    largest = max(reports, key=lambda report: report.hbm_bytes)
    fits = largest.hbm_bytes <= chip.hbm_bytes
    if not fits:
        stage = jobs.stage_name(config, mesh, largest.program)
        text = f"{text}\n{advice(largest, chip, config.model, stage)}"
    return CompileResult(text, report_document(reports, topology, chip), fits)


def compile_programs(
    settings: JsonDict, topology: str, names: Sequence[str], full: bool = False
) -> list[ProgramReport]:
    """Returns the reports of the named programs.

    Two programs are compiled at a time, each in its own process.

    Args:
      settings: the run's configuration as nested dicts.
      topology: for example v5e:2x4.
      names: the programs.
      full: whether to compile to the end.

    Raises:
      UserError: a process ended for another reason than too little memory.
    """
    stop = threading.Event()

    def compile_one(name: str) -> ProgramReport:
        directory = Path(folder) / name
        directory.mkdir()
        request = {"settings": settings, "topology": topology, "program": name}
        (directory / "request.json").write_text(json.dumps(request))
        seconds = _run_compiler(directory, full, stop)
        return _read_report(name, directory, seconds)

    with (
        tempfile.TemporaryDirectory() as folder,
        ThreadPoolExecutor(PARALLEL_COMPILATIONS) as pool,
    ):
        try:
            return list(pool.map(compile_one, names))
        finally:
            stop.set()  # the other processes need not go on after an error
            pool.shutdown(cancel_futures=True)


def _run_compiler(directory: Path, full: bool, stop: threading.Event) -> float:
    """Runs the compiling process until it ends or has written its memory report.

    Returns the seconds.
    """
    command = [sys.executable, "-m", "pg_ground.aot.compile_worker", str(directory)]
    start = time.monotonic()
    with (
        (directory / "log").open("w") as log,
        subprocess.Popen(
            command, env=compiler_environment(directory), stdout=log, stderr=log
        ) as process,
    ):
        while process.poll() is None and not stop.is_set() and (full or not _has_report(directory)):
            time.sleep(POLL_S)
        seconds = time.monotonic() - start
        process.kill()
    return seconds


def compiler_environment(directory: Path) -> dict[str, str]:
    """Returns the environment of a process that compiles for TPUs. XLA writes to `directory`."""
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        # libtpu must not look for a TPU or for a cloud project.
        "TPU_SKIP_MDS_QUERY": "1",
        # Any type that exists: jax passes the name of the topology separately.
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
        # Without this the second of two processes fails on a lock file.
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "XLA_FLAGS": f"--xla_dump_to={directory} --xla_dump_hlo_as_proto",
        "JAX_ENABLE_COMPILATION_CACHE": "false",
    }


def _has_report(directory: Path) -> bool:
    """Returns whether XLA has written the whole optimised program."""
    files = _dumped_files(directory)
    return bool(files) and time.time() - files[0].stat().st_mtime > 0.5


def _dumped_files(directory: Path) -> list[Path]:
    """Returns the files with the optimised program.

    Files of the small programs before it (for example random keys) are left out.
    """
    facts = directory / jobs.FACTS_FILE  # the worker writes it just before it compiles the program
    if not facts.exists():
        return []
    start = facts.stat().st_mtime
    return [
        file
        for file in directory.glob(f"*{OPTIMISED_HLO}")
        if "cpu_after" not in file.name and file.stat().st_mtime >= start
    ]


def _read_report(name: str, directory: Path, seconds: float) -> ProgramReport:
    files = _dumped_files(directory)
    if not files:
        log = (directory / "log").read_text(errors="replace")
        raise UserError(f"compiling {name}: {_last_message(log)}")
    facts = json.loads((directory / jobs.FACTS_FILE).read_text())
    program = hlo_proto.read_hlo(files[0].read_bytes())
    # "inside" lies in the program's own memory, "beside" lies in the chip's memory next to it.
    inside = facts["inside"]
    beside = facts["beside"]
    program_bytes = buffer_bytes(program)
    bytes_by_kind = {kind: beside.get(kind, 0.0) + inside.get(kind, 0.0) for kind in KINDS}
    bytes_by_kind["activations"] = program_bytes - sum(inside.values())
    done = directory / jobs.DONE_FILE
    traffic = hlo_analysis.measure_traffic(program, facts["while_trip_count"])
    link_bytes = sum(size for _, size in traffic.collectives.values())
    violation = find_violation(facts["bounds"], traffic.hbm_bytes, link_bytes, program_bytes)
    if violation:
        raise UnreadableProgramError(
            f"the program {name} of libtpu {version('libtpu')} (jax {version('jax')}) was read "
            f"wrongly: {violation}. Another version of libtpu may help"
        )
    return ProgramReport(
        program=name,
        compile_s=json.loads(done.read_text())["seconds"] if done.exists() else seconds,
        hbm_bytes=program_bytes + sum(beside.values()),
        bytes_by_kind=bytes_by_kind,
        estimated_activations=facts["expected"],
        flops=facts["flops"],
        useful_flops=facts["useful_flops"],
        traffic=traffic,
        largest_buffers=largest_buffers(program),
    )


def _last_message(log: str) -> str:
    """Returns the last message in a process's log. The frames of a C++ stack trace are skipped."""
    lines = [line for line in log.splitlines() if line.strip()]
    messages = [line for line in lines if not line.startswith(("*", "@", "PC:"))]
    return messages[-1][:400] if messages else "the process ended without a message"


def buffer_bytes(program: hlo_proto.Program) -> int:
    """Returns the bytes of HBM that XLA has assigned to a program: arguments, results, constants
    and everything in between."""
    return sum(
        buffer.bytes for buffer in program.buffers if buffer.memory_space == hlo_analysis.HBM
    )


def largest_buffers(
    program: hlo_proto.Program, count: int = 5, shapes: int = 4
) -> list[tuple[float, str]]:
    """Returns bytes and contents of the largest buffers in HBM.

    A buffer can hold many arrays. The `shapes` largest shapes among them are named, with the number
    of arrays: "5 x f32[18,2048,2048], bf16[64,8,2,32144]".
    """
    buffers = [buffer for buffer in program.buffers if buffer.memory_space == hlo_analysis.HBM]
    buffers.sort(key=lambda buffer: buffer.bytes, reverse=True)
    return [(float(buffer.bytes), _contents_text(buffer, shapes)) for buffer in buffers[:count]]


def _contents_text(buffer: hlo_proto.Buffer, shapes: int) -> str:
    numbers = Counter(buffer.contents)
    largest = sorted(numbers, key=lambda shape: shape.bytes, reverse=True)[:shapes]
    return ", ".join(
        f"{numbers[shape]} x {shape}" if numbers[shape] > 1 else str(shape) for shape in largest
    )


def search_batch_size(config: Config, topology: str) -> str:
    """Returns a line with the largest batch size of the last stage for which all its programs fit.

    Raises:
      UserError: as `compile_programs` raises.
    """
    chip = CHIPS[tpu_specs.parse_topology(topology)[0]]
    mesh = sharding.abstract_mesh(config.mesh, tpu_specs.device_count(topology))
    stage = make_stages(make_setup(config, mesh, chip.hbm_bytes))[-1]
    names = list(stage.programs())
    trials: list[str] = []

    def fits(batch_size: int) -> bool:
        settings = dataclasses.asdict(config)
        settings[stage.name]["batch_size"] = batch_size
        reports = compile_programs(settings, topology, names)
        largest = max(report.hbm_bytes for report in reports)
        trials.append(f"{batch_size}: {largest / GIB:.2f} GiB")
        logger.info("batch size %s", trials[-1])
        return largest <= chip.hbm_bytes

    step = tpu_specs.device_count(topology) // config.mesh.model * stage.settings.parts_per_step
    batch_size = largest_multiple(fits, step, stage.settings.batch_size)
    return (
        f"largest {stage.name}.batch_size that fits {chip.hbm_bytes / GIB:.2f} GiB a chip: "
        f"{batch_size} (tried {', '.join(trials)})"
    )


def largest_multiple(fits: Callable[[int], bool], step: int, start: int) -> int:
    """Returns about the largest multiple of `step` for which `fits` holds, 0 if there is none.

    The search doubles the number until it does not fit, then halves the interval until it is 1/16
    of the number or one step.
    """
    low = 0
    high = max(start // step, 1)
    while fits(high * step):
        low = high
        high = 2 * high
    while high - low > max(1, low // 16):
        middle = (low + high) // 2
        if fits(middle * step):
            low = middle
        else:
            high = middle
    return low * step


def report_table(reports: Sequence[ProgramReport], topology: str, chip: Chip) -> Table:
    """Returns a table with one row per program."""
    roofline = ["TFLOP", "HBM GB", "link GB", "FLOPs s", "HBM s", "links s", "bound by", "MFU"]
    columns = ["program", "compiled in", "HBM GiB", *KINDS, "(by arithmetic)", *roofline]
    largest = max(report.hbm_bytes for report in reports)
    verdict = "fits" if largest <= chip.hbm_bytes else "does not fit"
    return Table(
        f"{topology}: {largest / GIB:.2f} of {chip.hbm_bytes / GIB:.2f} GiB a chip, {verdict}",
        columns,
        [_table_row(report, chip) for report in reports],
        "a chip, one run",
    )


def _table_row(report: ProgramReport, chip: Chip) -> list[str]:
    seconds = report.roofline_seconds(chip)
    return [
        report.program,
        f"{report.compile_s:.0f} s",
        f"{report.hbm_bytes / GIB:.2f}",
        *(f"{report.bytes_by_kind[kind] / GIB:.2f}" for kind in KINDS),
        f"{report.estimated_activations / GIB:.2f}",
        f"{report.flops / 1e12:.1f}",
        f"{report.traffic.hbm_bytes / 1e9:.0f}",
        f"{report.collective_bytes / 1e9:.1f}",
        *(f"{seconds[resource]:.3f}" for resource in ("FLOPs", "HBM", "links")),
        report.bound_by(chip),
        f"{report.mfu(chip):.0%}",
    ]


def report_document(reports: Sequence[ProgramReport], topology: str, chip: Chip) -> JsonDict:
    """Returns everything in the reports as a JSON document."""
    return {
        "topology": topology,
        "fits": max(report.hbm_bytes for report in reports) <= chip.hbm_bytes,
        "hbm_bytes_available": chip.hbm_bytes,
        "programs": {report.program: _program_document(report, chip) for report in reports},
    }


def _program_document(report: ProgramReport, chip: Chip) -> JsonDict:
    compiler_bytes = report.bytes_by_kind["activations"]
    return {
        "compile_s": report.compile_s,
        "hbm_bytes": report.hbm_bytes,
        "hbm_bytes_by_kind": report.bytes_by_kind,
        "hbm_bytes_by_arithmetic": report.hbm_bytes - compiler_bytes + report.estimated_activations,
        "flops": report.flops,
        "useful_flops": report.useful_flops,
        "hbm_traffic_bytes": report.traffic.hbm_bytes,
        "collectives": {
            kind: {"count": count, "bytes": size}
            for kind, (count, size) in report.traffic.collectives.items()
        },
        "roofline_s": report.roofline_seconds(chip),
        "step_s": max(report.roofline_seconds(chip).values()),
        "bound_by": report.bound_by(chip),
        "mfu": report.mfu(chip),
        "largest_buffers": [
            {"bytes": size, "holds": shapes} for size, shapes in report.largest_buffers
        ],
    }


def advice(report: ProgramReport, chip: Chip, model: Model, stage: str) -> str:
    """Returns why a program does not fit: its largest buffers, and settings that reduce them.

    Args:
      stage: name of the stage that runs the program.
    """
    needs = f"{report.hbm_bytes / GIB:.2f} GiB, a chip has {chip.hbm_bytes / GIB:.2f}"
    buffers = [f"  {size / GIB:6.2f} GiB  {text[:110]}" for size, text in report.largest_buffers]
    settings = _smaller_settings(report, chip, model, stage)
    return "\n".join(
        [
            f"{report.program} needs {needs}. Largest buffers:",
            *buffers,
            "What would help: " + "; ".join(settings or ["more chips"]),
        ]
    )


def _smaller_settings(report: ProgramReport, chip: Chip, model: Model, stage: str) -> list[str]:
    """Returns changes of settings that reduce the memory of a program."""
    settings = []
    bytes_by_kind = report.bytes_by_kind
    state_bytes = sum(bytes_by_kind[kind] for kind in ("parameters", "optimizer", "reference"))
    if state_bytes > chip.hbm_bytes / 2:
        adapters = "" if model.lora.rank else ", or adapters: config.model.lora.rank=16"
        settings.append("more chips along config.mesh.data" + adapters)
    if bytes_by_kind["activations"] > chip.hbm_bytes / 4:
        if model.remat != "nothing_saveable":
            settings.append("config.model.remat=nothing_saveable")
        settings.append(
            f"twice config.{stage}.grad_accum_steps, or a smaller config.{stage}.batch_size"
        )
        if model.logits_block > 2:
            settings.append(f"config.model.logits_block=2 (now {model.logits_block})")
        image_tokens = (model.image_size // model.vision.patch_size) ** 2
        if not model.attention_block and image_tokens > 1024:
            settings.append("config.model.attention_block=512")
    if bytes_by_kind["rollout weights"]:
        settings.append("config.grpo.rollout_weights=sharded")
    return settings

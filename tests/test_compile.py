"""Programs compiled for TPUs that this machine does not have, and the memory model.

The memory model answers if libtpu is not installed.
"""

import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import pytest
from commands import call

from pg_ground import cli, config
from pg_ground.aot import compilation, hlo_proto, tpu_specs
from pg_ground.aot.bounds import find_violation, make_bounds
from pg_ground.aot.hlo_proto import Buffer, Program, Shape
from pg_ground.aot.jobs import make_programs, trace
from pg_ground.aot.tpu_specs import CHIPS, GIB, TOPOLOGIES
from pg_ground.parallel import sharding
from pg_ground.training.evaluation import all_programs
from pg_ground.training.setup import make_setup
from pg_ground.training.stages import make_stages
from pg_ground.types import UserError

ROOT = Path(__file__).parents[1]

PALIGEMMA_PARAMETERS = 2_923_466_480
"""The numbers in the published checkpoint of PaliGemma 1 3B."""

needs_libtpu = pytest.mark.needs("libtpu")


def run(*flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pg_ground.compile", *flags]
    return subprocess.run(
        command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=600
    )


def compiled(out: Path, *flags: str) -> dict[str, Any]:
    """Returns the programs in the JSON document of a compilation that fits."""
    finished = run(*flags, f"--json={out}")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return json.loads(out.read_text())["programs"]


def parsed(*flags: str, recipe: str = "configs/tpu.py") -> config.Config:
    return cli.parse_config([f"--config={recipe}", *flags])


@pytest.mark.parametrize("name", ["v5e:2x3", "v7:2x4", "v5e", "", "0*v5e:2x4", "x*v5e:2x4"])
def test_an_unknown_topology_is_refused_with_the_known_ones(name):
    with pytest.raises(UserError, match=r"does not exist: there are v4:\{1x1x1.*v5e:\{1x1\|2x2"):
        tpu_specs.parse_topology(name)


def test_a_topology_has_as_many_devices_as_its_shape():
    names = ("v5e:2x4", "v5p:2x2x2", "2*v5e:16x16", "tpu7x:2x2x1")
    assert [tpu_specs.device_count(name) for name in names] == [8, 8, 512, 8]
    assert set(TOPOLOGIES) == set(CHIPS) == set(tpu_specs.DEVICE_KINDS.values())


WRONG_FLAGS = {
    "--topology=v5e:3x3 does not exist: there are": ("--topology=v5e:3x3",),
    "--topology is needed: one of v4:": (),
    "grpo.batch_size / grad_accum_steps / minibatches is 12: it must be a multiple of 8": (
        "--topology=v5e:2x4",
        "--config.grpo.batch_size=12",
    ),
    "replica * model must divide 8": ("--topology=v5e:2x4", "--config.mesh.replica=3"),
    "is the first match of no parameter": (
        "--topology=v5e:2x4",
        '--config.mesh.rules=(("llm/nothing",("data",)),)',
    ),
    "did you mean update?": ("--topology=v5e:2x4", "--programs=updat"),
    "set config.mesh.replica": ("--topology=v5e:16x16",),
}


@pytest.mark.parametrize("message", WRONG_FLAGS)
def test_wrong_settings_are_reported_before_anything_is_compiled(message, capsys):
    with pytest.raises(UserError, match=re.escape(message)):
        call("compile", "--config=configs/tpu.py", *WRONG_FLAGS[message])
    assert capsys.readouterr().out == ""


@pytest.mark.slow
def test_wrong_input_is_one_line():
    finished = run("--config=configs/tpu.py", "--topology=v5e:3x3")
    assert (finished.returncode, finished.stdout) == (2, "")
    assert len(finished.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(("prompts", "code"), [(64, 0), (1024, 3)])
def test_without_libtpu_the_memory_model_answers(monkeypatch, capsys, prompts, code):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    flags = ["--topology=v5e:2x4", f"--config.grpo.batch_size={prompts}"]
    with pytest.raises(SystemExit) as ended:
        call("compile", "--config=configs/tpu.py", *flags)
    assert ended.value.code == code
    output = capsys.readouterr().out
    assert "GiB per device, by arithmetic" in output
    assert "pip install libtpu" in output


def test_parameters_and_optimizer_have_the_size_of_the_published_checkpoint():
    """PaliGemma 1: one float32 per parameter, and two more for Adam, over eight chips."""
    c = parsed()
    mesh = sharding.abstract_mesh(c.mesh, 8)
    memory = make_programs(c, mesh, CHIPS["v5e"].hbm_bytes)["update"].memory.by_kind
    bytes_per_chip = PALIGEMMA_PARAMETERS * 4 / 8
    # Small arrays are on every chip, hence the tolerance.
    assert memory["parameters"] == pytest.approx(bytes_per_chip, rel=0.01)
    assert memory["optimizer"] == pytest.approx(2 * bytes_per_chip, rel=0.01)


def test_sampling_reads_gathered_weights_if_they_fit():
    c = parsed("--config.grpo.batch_size=64")
    mesh = sharding.abstract_mesh(c.mesh, 8)

    def gathered_bytes(settings: config.Config, hbm_bytes: float | None) -> float:
        return make_programs(settings, mesh, hbm_bytes)["rollout"].memory.inside["rollout weights"]

    assert gathered_bytes(c, 15.75 * GIB) > 0
    assert gathered_bytes(c, 8.0 * GIB) == 0
    assert gathered_bytes(c, None) == 0
    sharded = parsed("--config.grpo.rollout_weights=sharded")
    assert gathered_bytes(sharded, 95.0 * GIB) == 0


def test_frozen_weights_that_need_no_cast_are_not_copied():
    """LoRA on one chip: sampling copies only the adapters, to bfloat16."""
    c = parsed(recipe="configs/tpu.py:pg1_3b_224_lora_v5e_1")
    programs = make_programs(c, sharding.abstract_mesh(c.mesh, 1), CHIPS["v5e"].hbm_bytes)
    adapters = programs["rollout"].memory.by_kind["rollout weights"]
    assert 0 < adapters < 0.01 * programs["rollout"].memory.by_kind["parameters"]
    assert programs["update"].memory.by_kind["rollout weights"] == 0


def test_the_search_finds_the_largest_multiple_that_fits():
    trials: list[int] = []

    def fits(batch_size: int) -> bool:
        trials.append(batch_size)
        return batch_size <= 200

    assert compilation.largest_multiple(fits, 8, 64) == 200
    assert len(trials) < 10
    assert compilation.largest_multiple(lambda batch_size: False, 8, 64) == 0


def test_the_memory_of_a_program_is_the_sum_of_its_buffers_in_hbm():
    scalar, row, matrix = (
        Shape("f32", dimensions, 4 * math.prod(dimensions), 0, ())
        for dimensions in ((), (5,), (5, 25))
    )
    buffers = (
        Buffer(300, 0, (row,)),
        Buffer(500, 0, (scalar, row, matrix, scalar, row)),
        Buffer(900, 1, (matrix,)),  # in VMEM
        *(Buffer(1, 0, (scalar,)) for _ in range(4)),
    )
    program = Program({}, 0, buffers)
    assert compilation.buffer_bytes(program) == 804
    assert compilation.largest_buffers(program, count=2, shapes=2) == [
        (500.0, "f32[5,25], 2 x f32[5]"),
        (300.0, "f32[5]"),
    ]


def tiny_bounds(program: str) -> tuple[dict[str, Any], float]:
    """Returns the bounds of a program of configs/tiny.py on four devices, and the bytes of its
    weights."""
    c = parsed(recipe="configs/tiny.py")
    mesh = sharding.make_mesh(config.Mesh(), jax.devices()[:4])
    setup = make_setup(c, mesh, None)
    programs = all_programs(setup, make_stages(setup))
    jaxpr = trace(programs[program], c, mesh).jaxpr.jaxpr
    bounds = make_bounds(setup, mesh, programs[program], jaxpr, trip_count=1)
    weights = sum(4.0 * math.prod(leaf.shape) for leaf in setup.trained.values())
    return json.loads(json.dumps(bounds._asdict())), weights


def test_figures_outside_the_bounds_of_arithmetic_are_found():
    """The figures that a wrong reading of libtpu 0.0.50 gave were 2.7 to 176 times too large."""
    bounds, weights = tiny_bounds("update")
    low, high = bounds["hbm_traffic"]
    assert 0 < low < high < 1000 * weights
    memory = 2 * bounds["memory"][0]
    right = {"hbm_traffic": 2 * low, "collectives": 3 * weights, "memory": memory}
    assert find_violation(bounds, **right) is None
    for name, value in (
        ("hbm_traffic", 0.5 * low),
        ("hbm_traffic", 1.1 * high),
        ("collectives", 20 * weights),
        ("memory", 0.4 * memory),
    ):
        violation = find_violation(bounds, **{**right, name: value})
        assert violation and re.search(r"but arithmetic allows .* to ", violation)


@needs_libtpu
def test_a_planted_fault_of_the_reader_is_found(tmp_path, monkeypatch):
    """Each operand counts as the whole tuple around it, as in a wrong reading of libtpu 0.0.50."""
    read_hlo = hlo_proto.read_hlo

    def read_wrongly(data: bytes) -> Program:
        program = read_hlo(data)
        return program._replace(
            computations={
                number: computation._replace(
                    instructions=tuple(
                        instruction._replace(shape=computation.instructions[0].shape)
                        if instruction.operation == "get-tuple-element"
                        else instruction
                        for instruction in computation.instructions
                    )
                )
                for number, computation in program.computations.items()
            }
        )

    c = parsed("--config.grpo.batch_size=64")
    assert compilation.compile_run(c, "v5e:2x4", ["rollout"]).fits
    monkeypatch.setattr(hlo_proto, "read_hlo", read_wrongly)
    with pytest.raises(compilation.UnreadableProgramError, match="rollout of libtpu .* wrongly"):
        compilation.compile_run(c, "v5e:2x4", ["rollout"])


@needs_libtpu
def test_full_fine_tuning_of_paligemma_fits_eight_chips_and_is_bound_by_flops(tmp_path):
    """PaliGemma 1 3B, every parameter, 64 prompts on eight v5e chips: a target of the project."""
    update = compiled(
        tmp_path / "o.json",
        "--config=configs/tpu.py",
        "--topology=v5e:2x4",
        "--programs=update",
        "--config.grpo.batch_size=64",
    )["update"]
    assert update["hbm_bytes"] <= 7.9 * GIB
    assert update["hbm_bytes_by_arithmetic"] == pytest.approx(update["hbm_bytes"], rel=0.15)
    assert update["bound_by"] == "FLOPs" and update["mfu"] >= 0.55
    assert set(update["collectives"]) >= {"all-gather", "reduce-scatter"}
    # Every weight in bfloat16 is gathered in the forward and in the backward pass, and little else.
    assert update["collectives"]["all-gather"]["bytes"] <= 2.1 * PALIGEMMA_PARAMETERS * 2


@needs_libtpu
def test_a_program_that_does_not_fit_ends_with_advice(tmp_path):
    out = tmp_path / "o.json"
    finished = run(
        "--config=configs/tpu.py",
        "--topology=v5e:2x4",
        "--programs=update",
        "--config.grpo.batch_size=1024",
        f"--json={out}",
    )
    assert finished.returncode == 3
    assert not json.loads(out.read_text())["fits"]
    assert "Largest buffers:" in finished.stdout and "grad_accum_steps" in finished.stdout


@needs_libtpu
@pytest.mark.slow
def test_every_program_of_a_tiny_run_compiles_to_the_end(tmp_path):
    programs = compiled(
        tmp_path / "o.json",
        "--config=configs/tiny.py",
        "--topology=v5e:2x2",
        "--full",
        "--config.grpo.kl_coef=0.05",
    )
    assert list(programs) == ["sft", "rollout", "reference", "update", "evaluation"]
    for program in programs.values():
        assert program["flops"] > 0 and program["hbm_bytes"] > 0 and program["step_s"] > 0


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "topology", "flags"),
    [
        ("pg1_3b_448_v5e_8", "v5e:2x4", ()),
        ("pg1_3b_224_lora_v5e_1", "v5e:1x1", ()),
        ("pg2_3b_224_v5e_8", "v5e:2x4", ("--config.grpo.grad_accum_steps=2",)),
        ("pg2_10b_224_v5p_16", "v5p:2x2x2", ()),
        ("pg2_3b_224_lora_v5e_8", "v5e:2x4", ()),
    ],
)
def test_the_memory_model_agrees_with_xla(tmp_path, recipe, topology, flags):
    programs = compiled(
        tmp_path / "o.json",
        f"--config=configs/tpu.py:{recipe}",
        f"--topology={topology}",
        "--programs=rollout,update",
        *flags,
    )
    for program in programs.values():
        assert program["hbm_bytes_by_arithmetic"] == pytest.approx(program["hbm_bytes"], rel=0.15)

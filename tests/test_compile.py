"""Programs compiled for TPUs that are not there. Where libtpu is absent the arithmetic is left, and it is tested too."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pg_ground import cli, compile, config
from pg_ground.aot import compilation, tpu_specs
from pg_ground.aot.jobs import make_programs
from pg_ground.aot.tpu_specs import CHIPS, GIB, TOPOLOGIES
from pg_ground.parallel import sharding
from pg_ground.types import UserError

ROOT = Path(__file__).parents[1]

needs_libtpu = pytest.mark.needs("libtpu")


def run(*flags: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pg_ground.compile", *flags]
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True, timeout=600
    )


def parsed(*flags: str, recipe: str = "configs/tpu.py") -> config.Config:
    return cli.parse([f"--config={recipe}", *flags], {})[0]


@pytest.mark.parametrize("name", ["v5e:2x3", "v7:2x4", "v5e", "", "0*v5e:2x4", "x*v5e:2x4"])
def test_a_topology_that_does_not_exist_is_told_those_that_do(name):
    with pytest.raises(UserError, match=r"does not exist: there are v4:\{1x1x1.*v5e:\{1x1\|2x2"):
        tpu_specs.parse_topology(name)


def test_topologies_have_the_chips_their_shapes_multiply_to():
    assert [
        tpu_specs.device_count(name)
        for name in ("v5e:2x4", "v5p:2x2x2", "2*v5e:16x16", "tpu7x:2x2x1")
    ] == [8, 8, 512, 8]
    assert set(TOPOLOGIES) == set(CHIPS) and set(tpu_specs.DEVICE_KINDS.values()) == set(CHIPS)


WRONG = {
    "--topology=v5e:3x3 does not exist: there are": ("--topology=v5e:3x3",),
    "--topology is needed: one of v4:": (),
    "batch_size (of a program) is 12: it must be a multiple of 8": (
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


@pytest.mark.parametrize("said", WRONG)
def test_what_cannot_be_is_said_before_anything_is_compiled(said, capsys):
    with pytest.raises(UserError, match=re.escape(said)):
        compile.main(["--config=configs/tpu.py", *WRONG[said]])
    assert capsys.readouterr().out == ""


def test_bad_input_is_one_line():
    done = run("--config=configs/tpu.py", "--topology=v5e:3x3")
    assert (done.returncode, done.stdout) == (2, "") and len(done.stderr.strip().splitlines()) == 1


def test_without_libtpu_arithmetic_answers(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for prompts, code in ((64, 0), (1024, 3)):
        flags = [
            "--config=configs/tpu.py",
            "--topology=v5e:2x4",
            f"--config.grpo.batch_size={prompts}",
        ]
        with pytest.raises(SystemExit) as ended:
            compile.main(flags)
        assert ended.value.code == code
        said = capsys.readouterr().out
        assert "GiB a device, by arithmetic" in said and "pip install 'pg-ground[tpu]'" in said


def test_what_is_counted_exactly_is_what_a_device_holds():
    """Parameters and optimizer of PaliGemma 1: 2.92e9 float32 numbers and two more of each, over eight chips."""
    c = parsed()
    mesh = sharding.abstract_mesh(c.mesh, 8)
    programs = make_programs(c, mesh, CHIPS["v5e"].hbm_bytes)
    found = programs["update"].memory.by_kind
    whole = 2_923_466_480 * 4  # by the count of the published checkpoint's numbers
    assert found["parameters"] == pytest.approx(
        whole / 8, rel=0.01
    )  # what is small is on every chip
    assert found["optimizer"] == pytest.approx(2 * whole / 8, rel=0.01)


def test_sampling_reads_gathered_weights_where_they_fit():
    c = parsed("--config.grpo.batch_size=64")
    mesh = sharding.abstract_mesh(c.mesh, 8)
    for hbm, gathered in ((15.75 * GIB, True), (8.0 * GIB, False), (None, False)):
        memory = make_programs(c, mesh, hbm)["rollout"].memory
        assert bool(memory.inside["rollout weights"]) == gathered
    sharded = parsed("--config.grpo.rollout_weights=sharded")
    memory = make_programs(sharded, mesh, 95.0 * GIB)["rollout"].memory
    assert memory.inside["rollout weights"] == 0


def test_search_finds_the_largest_that_fits():
    tried: list[int] = []

    def probe(batch: int) -> bool:
        tried.append(batch)
        return batch <= 200

    assert compilation.largest_multiple(probe, 8, 64) == 200
    assert len(tried) < 10
    assert compilation.largest_multiple(lambda batch: False, 8, 64) == 0


REPORT = """Memory Space: default (color=0)
Total bytes: 8644457472 (8.05GiB)
  cumulative_size;       size;       offset; used_by_n_values; shapes_list
  ------------------------------------------------------------
  288.00MiB(  8%);  288.00MiB;   2053308416;               10; f32[64,8,2,32144]
    1.41GiB( 19%);    1.12GiB;   2657288192;                5; 5×f32[18,2048,2048]
"""


def test_the_largest_buffers_are_named():
    assert [(round(size / 2**20), what) for size, what in compilation.largest_buffers(REPORT)] == [
        (1147, "5×f32[18,2048,2048]"),
        (288, "f32[64,8,2,32144]"),
    ]


@needs_libtpu
def test_a_recipe_of_the_real_size_fits_and_says_what_binds(tmp_path):
    """PaliGemma 1 3B, every parameter, 64 prompts on eight chips: a target of the project, here held."""
    out = tmp_path / "o.json"
    flags = (
        "--config.grpo.batch_size=64",
        "--programs=update",
        f"--json={out}",
        "--topology=v5e:2x4",
    )
    done = run("--config=configs/tpu.py", *flags)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())["programs"]["update"]
    assert found["hbm_bytes"] <= 7.9 * GIB
    assert found["hbm_bytes_by_arithmetic"] == pytest.approx(found["hbm_bytes"], rel=0.15)
    assert found["bound_by"] == "FLOPs" and found["mfu"] >= 0.55
    assert set(found["collectives"]) >= {"all-gather", "reduce-scatter"}
    gathered = found["collectives"]["all-gather"]["bytes"]
    assert (
        gathered <= 2.1 * 2_923_466_480 * 2
    )  # every weight in bfloat16, forward and backward, and hardly more


@needs_libtpu
def test_what_does_not_fit_ends_with_what_would_help(tmp_path):
    out = tmp_path / "o.json"
    flags = (
        "--config.grpo.batch_size=1024",
        "--programs=update",
        f"--json={out}",
        "--topology=v5e:2x4",
    )
    done = run("--config=configs/tpu.py", *flags)
    assert done.returncode == 3 and not json.loads(out.read_text())["fits"]
    assert "Largest buffers:" in done.stdout and "grad_accum_steps" in done.stdout


@needs_libtpu
@pytest.mark.slow
def test_every_program_of_a_tiny_run_compiles_to_the_end(tmp_path):
    out = tmp_path / "o.json"
    flags = ("--config.grpo.kl_coef=0.05", "--topology=v5e:2x2", "--full", f"--json={out}")
    done = run("--config=configs/tiny.py", *flags)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())["programs"]
    assert list(found) == ["sft", "rollout", "reference", "update", "evaluation"]
    assert all(
        program["flops"] > 0 and program["hbm_bytes"] > 0 and program["step_s"] > 0
        for program in found.values()
    )


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
def test_arithmetic_agrees_with_xla(tmp_path, recipe, topology, flags):
    out = tmp_path / "o.json"
    done = run(
        f"--config=configs/tpu.py:{recipe}",
        f"--topology={topology}",
        "--programs=rollout,update",
        f"--json={out}",
        *flags,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for found in json.loads(out.read_text())["programs"].values():
        assert found["hbm_bytes_by_arithmetic"] == pytest.approx(found["hbm_bytes"], rel=0.15)

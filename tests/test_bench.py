"""What `bench` counts and measures."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import pytest

from pg_ground import cli
from pg_ground.aot import benchmark, roofline
from pg_ground.config import Config
from pg_ground.parallel import sharding
from pg_ground.training.setup import make_setup
from pg_ground.training.stages import make_stages

TINY = str(Path(__file__).parents[1] / "configs" / "tiny.py")


@pytest.fixture(scope="module")
def config() -> Config:
    return cli.parse_config([f"--config={TINY}"])


def minimum_work(config: Config, program: str, decode_steps: int) -> roofline.MinimumWork:
    """Returns the minimum work of a program of the last stage on one device."""
    setup = make_setup(config, sharding.make_mesh(config.mesh, jax.devices()[:1]), None)
    stage = make_stages(setup)[-1]
    group_size = config.grpo.group_size
    return roofline.minimum_work(setup, stage, program, decode_steps, group_size)


def test_a_phase_needs_the_longer_of_its_two_times():
    peaks = roofline.Peaks(flops=100.0, bandwidth=10.0, measured=True)
    work = roofline.MinimumWork(flops=200.0, bytes=30.0)
    shares = roofline.roofline_shares(work, peaks, seconds=6.0)
    assert shares["roofline_s"] == 3.0
    assert shares["roofline_share"] == 0.5
    assert shares["mfu"] == pytest.approx(1 / 3)


@pytest.mark.slow
def test_the_prefix_is_counted_once_per_prompt(config):
    """A larger group adds only completions. If prefixes were repeated, the work would double."""
    flops = {}
    for group_size in (4, 8, 12):
        larger = replace(config, grpo=replace(config.grpo, group_size=group_size))
        flops[group_size] = minimum_work(larger, "update", config.grpo.max_new_tokens).flops
    assert flops[4] < flops[8] < 2 * flops[4]
    assert flops[12] - flops[8] == pytest.approx(flops[8] - flops[4])


def test_weights_are_read_once_per_token(config):
    none, four, eight = (minimum_work(config, "rollout", steps) for steps in (0, 4, 8))
    # The second four tokens need more: the completions' own cache grows.
    assert four.bytes - none.bytes < eight.bytes - four.bytes


@pytest.mark.slow
def test_every_phase_of_a_step_is_reported(config, monkeypatch):
    monkeypatch.setattr(roofline, "fastest_run", partial(roofline.fastest_run, repeats=1))
    result = benchmark.bench(replace(config, data=replace(config.data, check_records=0)), steps=2)
    phases = result["phases"]
    assert set(phases) == {"data", "rollout", "score", "update"}
    assert all(phases[name]["roofline_share"] > 0 for name in ("rollout", "score", "update"))
    assert result["step_s"] > 0 and result["tokens_per_s"] > 0 and result["peak_bytes"] > 0
    assert 0 <= result["idle_share"] < 1
    assert result["compile"]["update"]["seconds"] > 0

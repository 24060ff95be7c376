"""What `bench` counts and measures."""

from dataclasses import replace
from pathlib import Path

import jax
import pytest

from pg_ground import cli
from pg_ground.aot import benchmark
from pg_ground.config import Config
from pg_ground.parallel import sharding

TINY = str(Path(__file__).parents[1] / "configs" / "tiny.py")


@pytest.fixture(scope="module")
def config() -> Config:
    return cli.parse([f"--config={TINY}"], {})[0]


def test_a_phase_needs_the_longer_of_its_two_times():
    top = benchmark.Ceilings(flops=100.0, bandwidth=10.0, measured=True)
    shares = benchmark.shares(benchmark.Phase(flops=200.0, bytes=30.0), top, seconds=6.0)
    assert (
        shares["roofline_s"] == 3.0
        and shares["roofline_share"] == 0.5
        and shares["mfu"] == pytest.approx(1 / 3)
    )


def test_the_prefix_is_counted_once_a_prompt(config):
    """Twice the group adds completions; half of what the update then needs would be prefixes, were they repeated."""
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    one, two = (
        benchmark.least(
            replace(config, grpo=replace(config.grpo, group_size=g)),
            mesh,
            "update",
            config.grpo.max_new_tokens,
        )
        for g in (4, 8)
    )
    three = benchmark.least(
        replace(config, grpo=replace(config.grpo, group_size=12)),
        mesh,
        "update",
        config.grpo.max_new_tokens,
    )
    assert one.flops < two.flops < 2 * one.flops
    assert three.flops - two.flops == pytest.approx(two.flops - one.flops)


def test_weights_are_read_once_a_token(config):
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    four, eight = (benchmark.least(config, mesh, "rollout", turns) for turns in (4, 8))
    none = benchmark.least(config, mesh, "rollout", 0)
    assert four.bytes - none.bytes < eight.bytes - four.bytes  # the completions' own cache grows


def test_every_phase_of_a_step_is_reported(config):
    found = benchmark.bench(replace(config, data=replace(config.data, check_records=0)), steps=2)
    assert set(found["phases"]) == {"data", "rollout", "score", "update"}
    assert all(
        found["phases"][phase]["roofline_share"] > 0 for phase in ("rollout", "score", "update")
    )
    assert found["step_s"] > 0 and found["tokens_per_s"] > 0 and found["peak_bytes"] > 0
    assert 0 <= found["idle_share"] < 1
    assert found["compile"]["update"]["seconds"] > 0

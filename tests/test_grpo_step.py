"""The GRPO stage with many options at once.

The run has a user's rewards of token ids and of text, dynamic sampling, minibatches, several
iterations and a KL coefficient that is steered.
"""

import json
import re
from pathlib import Path

import pytest
from commands import (
    assert_same_run,
    killed_and_resumed,
    rows,
    run,
    run_here,
    train_tiny,
    write_recipe,
)

RECIPE = """
import runpy

def get_config():
    c = runpy.run_path("configs/tiny.py")["get_config"]().unlock()
    c.grpo.rewards = {
        "iou": 1.0, "gaussian_point": 1.0, "format": (0.5, 0.1, 4), "FOLDER/mine.py:wide": 0.1,
    }
    c.grpo.text_rewards = {"FOLDER/mine.py:vowels": 0.3, "FOLDER/mine.py:grumpy": 0.0}
    c.grpo.update(
        algorithm="dapo",
        dynamic_sampling=2,
        rollout_parts=2,
        minibatches=2,
        num_iterations=2,
        kl_target=0.01,
        kl_horizon=100,
        kl_coef=0.05,
        kl_in_reward=False,
        entropy_coef=0.01,
        token_selection="top_entropy",
        token_selection_share=0.5,
        importance_sampling_mode="token_truncate",
        mask_truncated_completions=False,
        top_k=500,
        suppress_tokens=(5, 6),
    )
    c.grpo.reward_workers.update(error_share=1.0, count=1)
    return c.lock()
"""

REWARDS = """
import jax.numpy as jnp

def wide(answer, batch, settings):
    sides = answer.boxes.yxyx[..., 0, 3] - answer.boxes.yxyx[..., 0, 1]
    return jnp.where(answer.boxes.valid[..., 0], sides, 0.0)

async def vowels(completion, example):
    return sum(letter in "aeiou" for letter in completion) / max(len(completion), 1)

def grumpy(completion, example):
    if len(completion) % 2:
        raise ValueError("odd")
    return 1.0
"""

TEXT_REWARD_RECIPE = """
import runpy

def get_config():
    c = runpy.run_path("configs/tiny.py")["get_config"]().unlock()
    c.stages = ("grpo",)
    c.grpo.text_rewards = {"REWARD": 1.0}
    return c.lock()
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> str:
    """Returns the flag of the config."""
    return write_recipe(tmp_path_factory.mktemp("recipe"), REWARDS, RECIPE)


@pytest.fixture(scope="module")
def straight(environment, recipe, tmp_path_factory) -> Path:
    """Returns the working directory of an undisturbed run."""
    workdir = tmp_path_factory.mktemp("runs") / "straight"
    done = train_tiny(environment, workdir, recipe)
    assert done.returncode == 0, done.stderr
    warning = r"the reward .*grumpy scores 0 .*counted\): ValueError: odd"
    assert len(re.findall(warning, done.stderr)) == 1, done.stderr
    return workdir


def write_text_reward_recipe(folder: Path, reward: str) -> str:
    """Returns the flag of a config whose only text reward is `reward`."""
    path = folder / "recipe.py"
    path.write_text(TEXT_REWARD_RECIPE.replace("REWARD", reward))
    return f"--config={path}"


@pytest.mark.slow
def test_metrics_of_a_step_name_every_part_of_the_algorithm(straight, recipe):
    file = Path(recipe.partition("=")[2]).with_name("mine.py")
    steps = [row for row in rows(straight) if "reward/total" in row]
    assert len(steps) == 3
    for row in steps:
        names = {"reward/weighted/iou", f"reward/{file}:wide", f"reward/{file}:vowels"}
        names |= {"group/without_spread", "group/resampled", "policy/kl_coef"}
        assert names <= row.keys()
        assert 0 <= row[f"reward/{file}:vowels"] < 0.5
        assert row["policy/logp_diff_max"] < 1e-4
        assert row["policy/correction"] == pytest.approx(1, abs=1e-4)
        # 8 prompts of 4 completions, and the groups that dynamic sampling draws again.
        assert 0 < row[f"reward/errors/{file}:grumpy"] < 4 * 8 * 4
    valid_steps = [row for row in steps if row["reward/format"]]
    shares = [row["reward/weighted/format"] / row["reward/format"] for row in valid_steps]
    assert shares == sorted(shares, reverse=True), "the weight of `format` falls from 0.5 to 0.1"
    assert steps[0]["policy/kl_coef"] != steps[-1]["policy/kl_coef"]


@pytest.mark.slow
def test_a_killed_run_continues_bit_for_bit_with_all_options(
    straight, recipe, environment, tmp_path
):
    killed_and_resumed(environment, tmp_path / "run", 6, 0.0, (recipe,))
    assert_same_run(straight, tmp_path / "run")


@pytest.mark.slow
def test_a_dry_run_shows_every_reward_and_writes_nothing(recipe, environment, tmp_path):
    done = run(environment, "train", recipe, "--dry_run")
    assert done.returncode == 0, done.stderr
    assert "rewards of the whole batch" in done.stdout and "mine.py:vowels (0.3)" in done.stdout
    assert re.search(r"of the groups have totals that differ|nothing to learn", done.stdout)
    assert re.search(r"grumpy failed on \d+ completions", done.stdout)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_reward_that_always_fails_ends_the_run(environment, tmp_path):
    (tmp_path / "mine.py").write_text("def never(completion, example):\n    return 1 / 0\n")
    recipe = write_text_reward_recipe(tmp_path, f"{tmp_path}/mine.py:never")
    done = train_tiny(environment, tmp_path / "run", recipe)
    assert done.returncode == 2 and "ZeroDivisionError" in done.stderr, done.stderr
    line = r"error: the reward .*never failed on \d+ of \d+ completions"
    assert re.search(line, done.stderr), done.stderr


def test_an_unknown_text_reward_is_refused_before_anything_is_written(tmp_path):
    recipe = write_text_reward_recipe(tmp_path, "count_exactly")
    done = run_here("train", recipe, f"--workdir={tmp_path / 'run'}")
    assert done.returncode == 2 and "did you mean count_exact?" in done.stderr, done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_metrics_are_plain_numbers(straight):
    for line in (straight / "metrics.jsonl").read_text().splitlines():
        assert all(isinstance(value, int | float | str) for value in json.loads(line).values())

"""The reinforced stage with all that it can do at once: a user's rewards, text beside ids, fresh groups, several updates."""

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
    c.grpo.rewards = {"iou": 1.0, "gaussian_point": 1.0, "format": (0.5, 0.1, 4), "FOLDER/mine.py:wide": 0.1}
    c.grpo.text_rewards = {"FOLDER/mine.py:vowels": 0.3, "FOLDER/mine.py:grumpy": 0.0}
    c.grpo.update(dynamic_sampling=2, rollout_parts=2, minibatches=2, num_iterations=2, kl_target=0.01, kl_horizon=100, kl_coef=0.05,
                  algorithm="dapo", entropy_coef=0.01, token_selection="top_entropy", token_selection_share=0.5, importance_sampling_mode="token_truncate",
                  mask_truncated_completions=False, top_k=500, suppress_tokens=(5, 6))
    c.grpo.kl_in_reward = False
    c.grpo.reward_workers.update(error_share=1.0, count=1)
    return c.lock()
"""

MINE = """
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


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> str:
    return write_recipe(tmp_path_factory.mktemp("recipe"), MINE, RECIPE)


@pytest.fixture(scope="module")
def straight(environment, recipe, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("runs") / "straight"
    done = train_tiny(environment, workdir, recipe)
    assert done.returncode == 0, done.stderr
    assert (
        len(re.findall(r"the reward .*grumpy scores 0 .*counted\): ValueError: odd", done.stderr))
        == 1
    ), done.stderr
    return workdir


def test_what_a_reinforced_step_says_of_itself(straight, recipe):
    folder = str(Path(recipe.partition("=")[2]).parent)
    learned = [row for row in rows(straight) if "reward/total" in row]
    assert len(learned) == 3
    for row in learned:
        assert {"reward/weighted/iou", f"reward/{folder}/mine.py:wide", f"reward/{folder}/mine.py:vowels",
                "group/without_spread", "group/resampled", "policy/kl_coef"} <= row.keys()  # fmt: skip
        assert (
            0 <= row[f"reward/{folder}/mine.py:vowels"] < 0.5 and row["policy/logp_diff_max"] < 1e-4
        )
        assert row["policy/correction"] == pytest.approx(1, abs=1e-4)
    errors = [row[f"reward/errors/{folder}/mine.py:grumpy"] for row in learned]
    assert all(
        0 < count < 4 * 8 * 4 for count in errors
    )  # a step, of 8 prompts x 4 completions and what was drawn again
    shares = [
        row["reward/weighted/format"] / row["reward/format"]
        for row in learned
        if row["reward/format"]
    ]
    assert shares == sorted(shares, reverse=True)
    assert learned[0]["policy/kl_coef"] != learned[-1]["policy/kl_coef"]


@pytest.mark.slow
def test_a_killed_run_goes_on_bit_for_bit_with_all_of_it(straight, recipe, environment, tmp_path):
    killed_and_resumed(environment, tmp_path / "run", 6, 0.0, (recipe,))
    assert_same_run(straight, tmp_path / "run")


def test_a_dry_run_shows_every_reward_and_writes_nothing(recipe, environment, tmp_path):
    done = run(environment, "train", recipe, "--dry_run")
    assert done.returncode == 0, done.stderr
    assert "rewards of the whole batch" in done.stdout and "mine.py:vowels (0.3)" in done.stdout
    assert re.search(r"of the groups have totals that differ|nothing to learn", done.stdout)
    assert re.search(r"grumpy failed on \d+ completions", done.stdout)
    assert not list(tmp_path.iterdir())


def test_a_reward_that_always_fails_ends_the_run(environment, tmp_path):
    (tmp_path / "mine.py").write_text("def never(completion, example):\n    return 1 / 0\n")
    (tmp_path / "recipe.py").write_text(
        "import runpy\n\ndef get_config():\n"
        '    c = runpy.run_path("configs/tiny.py")["get_config"]().unlock()\n'
        f'    c.grpo.text_rewards = {{"{tmp_path}/mine.py:never": 1.0}}\n'
        "    return c.lock()\n"
    )
    done = train_tiny(environment, tmp_path / "run", f"--config={tmp_path / 'recipe.py'}")
    assert done.returncode == 2 and "ZeroDivisionError" in done.stderr, done.stderr
    assert re.search(r"error: the reward .*never failed on \d+ of \d+ completions", done.stderr), (
        done.stderr
    )


def test_an_unknown_text_reward_is_refused_before_anything_is_written(tmp_path):
    (tmp_path / "recipe.py").write_text(
        "import runpy\n\ndef get_config():\n"
        '    c = runpy.run_path("configs/tiny.py")["get_config"]().unlock()\n'
        '    c.grpo.text_rewards = {"count_exactly": 1.0}\n'
        "    return c.lock()\n"
    )
    done = run_here("train", f"--config={tmp_path / 'recipe.py'}", f"--workdir={tmp_path / 'run'}")
    assert done.returncode == 2 and "did you mean count_exact?" in done.stderr, done.stderr
    assert not (tmp_path / "run").exists()


def test_metrics_are_plain_numbers(straight):
    for line in (straight / "metrics.jsonl").read_text().splitlines():
        assert all(isinstance(value, int | float | str) for value in json.loads(line).values())

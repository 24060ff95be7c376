"""Measures the cost of rewards: all device rewards and an advantage, as a share of a GRPO step.

python benchmarks/rewards.py [--batch=32 --group=8 --tokens=64 --objects=16 --repeats=7]

The phases are the programs of training: rollout, `score` (reads the answers and computes all
rewards of `REWARDS`), `advantages` (without a reference policy) and update. The model is a small
PaliGemma with completions of `--tokens` tokens. Answers are lists of random boxes, so the matching
has `--objects` boxes to match. The script prints medians over `--repeats`; the phases take turns.
"""

import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from pg_ground import cli, tokenizer
from pg_ground.config import Model, RewardSettings, Text, Vision
from pg_ground.models import PaliGemma
from pg_ground.reporting.tables import Table, ascii_table
from pg_ground.rewards import answer_reader, device_rewards
from pg_ground.rl import rollout, scored_rollouts, update
from pg_ground.rl.algorithms import make_algorithm
from pg_ground.rl.scored_rollouts import PolicyBatch, ScoredRollouts
from pg_ground.types import POLICY, Batch, Boxes, Gold, Points, Rollout, TrainState
from pg_ground.vocab import EOS, PAD

SIDE, WIDTH, DEPTH = 224, 256, 4


def random_batch(b: int, objects: int, length: int, rng: np.random.Generator) -> Batch:
    """Returns questions about `objects` boxes each, on noise."""
    corners = (
        np.sort(rng.uniform(size=(b, objects, 2, 2)), axis=2)
        .reshape(b, objects, 4)
        .astype(np.float32)
    )
    used = np.ones((b, objects), bool)
    labels = np.zeros((b, objects), np.int32)
    names = np.full((b, objects, 8), PAD, np.int32)
    gold = Gold(
        boxes=Boxes(corners, labels, used),
        points=Points(corners[..., :2], labels, ~used),
        target=np.zeros(b, np.int32),
        names=names,
        masks=np.zeros((b, objects, 0, 0), bool),
    )
    prompt = rng.integers(200, 800, (b, 16), dtype=np.int32)
    return Batch(
        image=rng.integers(0, 256, (b, SIDE, SIDE, 3), np.uint8),
        prompt=prompt,
        prompt_mask=np.ones(prompt.shape, bool),
        suffix=np.zeros((b, length), np.int32),
        suffix_mask=np.ones((b, length), bool),
        gold=gold,
        size=np.full((b, 2), SIDE, np.int32),
        source=np.zeros(b, np.int32),
        index=np.arange(b, dtype=np.int32),
    )


def random_rollout(b: int, g: int, length: int, vocab: Any, rng: np.random.Generator) -> Rollout:
    """Returns completions that are lists of boxes: four loc tokens and a separator, repeated."""
    tokens = rng.integers(vocab.loc0, vocab.loc0 + 1024, (b, g, length), dtype=np.int32)
    tokens[..., 4::5] = vocab.separators[0]
    tokens[..., -1] = EOS
    mask = np.ones(tokens.shape, bool)
    return Rollout(tokens, mask, np.zeros(tokens.shape, np.float32), loss_mask=mask)


def programs(b: int, g: int, length: int, objects: int) -> dict[str, Callable[[], Any]]:
    """Returns the phases of a step as compiled functions without arguments."""
    rng, vocab = np.random.default_rng(0), tokenizer.load().vocab
    vision = Vision(width=WIDTH, depth=DEPTH, mlp_dim=4 * WIDTH, num_heads=4, patch_size=14)
    text = Text(
        width=WIDTH,
        depth=DEPTH,
        mlp_dim=4 * WIDTH,
        num_heads=4,
        num_kv_heads=1,
        head_dim=64,
        vocab_size=vocab.size,
    )
    model = PaliGemma(Model(image_size=SIDE, vision=vision, text=text))
    batch = jax.device_put(random_batch(b, objects, length, rng))
    sampled = jax.device_put(random_rollout(b, g, length, vocab, rng))
    params = jax.jit(model.init)(jax.random.key(0))
    optimizer = optax.adamw(1e-5)
    algorithm = make_algorithm("dapo", {})
    weights = dict.fromkeys(device_rewards.REWARDS, 1.0)
    trees = {POLICY: params}
    state = TrainState(jnp.int32(0), trees, optimizer.init(trees))

    @jax.jit
    def generate(params: Any, key: Any) -> Any:
        inputs = (batch.image, batch.prompt, batch.prompt_mask)
        return rollout.sample(model, params, *inputs, key, g, length, suppress_tokens=(EOS,))

    @jax.jit
    def score(sampled: Rollout) -> ScoredRollouts:
        gold = batch.gold
        answer = answer_reader.read_answer(
            sampled.tokens, sampled.mask, gold.target, gold.names, vocab
        )
        rewards = device_rewards.score(answer, batch, weights, RewardSettings())
        return ScoredRollouts(batch, sampled, answer, rewards, None)

    @jax.jit
    def advantages(scored: ScoredRollouts) -> PolicyBatch:
        return scored_rollouts.compute_advantages(scored, None, weights, 0.0, algorithm)

    @jax.jit
    def train(state: TrainState, policy_batch: PolicyBatch) -> Any:
        return update.grpo_update(
            state,
            {},
            policy_batch,
            jax.random.key(0),
            model=model,
            optimizer=optimizer,
            algorithm=algorithm,
            temperature=1.0,
            grad_accum_steps=4,
            minibatches=1,
            num_iterations=1,
        )

    scored = score(sampled)
    policy_batch = advantages(scored)
    return {
        "rollout": lambda: generate(params, jax.random.key(1)),
        "score": lambda: score(sampled),
        "advantages": lambda: advantages(scored),
        "update": lambda: train(state, policy_batch),
    }


def main(argv: Sequence[str]) -> None:
    flags = cli.parse_script_flags(
        argv, {"batch": 32, "group": 8, "tokens": 64, "objects": 16, "repeats": 7}
    )
    phases = programs(flags["batch"], flags["group"], flags["tokens"], flags["objects"])
    seconds: dict[str, list[float]] = {name: [] for name in phases}
    for turn in range(flags["repeats"] + 1):
        for name, phase in phases.items():
            start = time.perf_counter()
            jax.block_until_ready(phase())
            if turn:  # the first turn compiles
                seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    step = sum(medians.values())
    rows = [[name, f"{value:.4f}", f"{value / step:.2%}"] for name, value in medians.items()]
    shape = f"B={flags['batch']} G={flags['group']} T={flags['tokens']} K={flags['objects']}"
    note = (
        f"{DEPTH}+{DEPTH} layers of {WIDTH}, {SIDE} px, {jax.devices()[0].device_kind}, "
        f"Python {platform.python_version()}; all of {len(device_rewards.REWARDS)} rewards"
    )
    print(ascii_table(Table(f"phases of a step, {shape}", ["phase", "s", "share"], rows, note)))
    share = (medians["score"] + medians["advantages"]) / step
    print(json.dumps({"seconds": medians, "reward_share": share}))


if __name__ == "__main__":
    cli.run_script(main)

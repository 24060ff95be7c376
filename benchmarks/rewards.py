"""What reward_workers costs: every device reward and an advantage, as a share of a reinforced step.

python benchmarks/rewards.py [--batch=32 --group=8 --tokens=64 --objects=16 --repeats=7]

The programs are those of training: `judge` (reading the answers and all rewards of `REWARDS`), `compare` (advantages, no
reference policy), and a step of a small PaliGemma with completions of `--tokens` tokens. Answers are
lists of random boxes, so that the matching has `--objects` of them to match. Prints medians over `--repeats`, taking turns.
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
from pg_ground.rl import loss, rollout, scored_rollouts, update
from pg_ground.rl.scored_rollouts import PolicyBatch, ScoredRollouts
from pg_ground.types import Batch, Boxes, Gold, Points, Rollout, TrainState
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
    """Returns completions that are lists of boxes: four loc tokens and a separator, as many as there is room for."""
    tokens = rng.integers(vocab.loc0, vocab.loc0 + 1024, (b, g, length), dtype=np.int32)
    tokens[..., 4::5] = vocab.separators[0]
    tokens[..., -1] = EOS
    mask = np.ones(tokens.shape, bool)
    return Rollout(tokens, mask, np.zeros(tokens.shape, np.float32))


def programs(b: int, g: int, length: int, objects: int) -> dict[str, Callable[[], Any]]:
    """Returns the phases of a step as functions without arguments, compiled."""
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
    drawn = jax.device_put(random_rollout(b, g, length, vocab, rng))
    params = jax.jit(model.init)(jax.random.key(0))
    optimizer, row, weights = (
        optax.adamw(1e-5),
        loss.ALGORITHMS["dapo"],
        dict.fromkeys(device_rewards.REWARDS, 1.0),
    )
    state = TrainState(jnp.int32(0), params, optimizer.init(params))

    @jax.jit
    def roll(params: Any, key: Any) -> Any:
        return rollout.sample(
            model,
            params,
            batch.image,
            batch.prompt,
            batch.prompt_mask,
            key,
            g,
            length,
            suppress_tokens=(EOS,),
        )

    @jax.jit
    def judge(drawn: Any) -> Any:
        gold = batch.gold
        answer = answer_reader.read_answer(drawn.tokens, drawn.mask, gold.target, gold.names, vocab)
        return ScoredRollouts(
            batch,
            drawn,
            answer,
            device_rewards.score(answer, batch, weights, RewardSettings()),
            None,
        )

    @jax.jit
    def compare(sampled: Any) -> Any:
        return scored_rollouts.compare(sampled, None, weights, 0.0, row, 1e-4)

    @jax.jit
    def learn(state: Any, experience: PolicyBatch) -> Any:
        return update.grpo_update(
            state, {}, experience, jax.random.key(0), model=model, optimizer=optimizer, algorithm=row, temperature=1.0,
            grad_accum_steps=4, minibatches=1, updates=1,
        )  # fmt: skip

    sampled = judge(drawn)
    learned_from = compare(sampled)
    return {
        "rollout": lambda: roll(params, jax.random.key(1)),
        "judge": lambda: judge(drawn),
        "compare": lambda: compare(sampled),
        "update": lambda: learn(state, learned_from),
    }


def main(argv: Sequence[str]) -> None:
    own = cli.parse_script_flags(
        argv, {"batch": 32, "group": 8, "tokens": 64, "objects": 16, "repeats": 7}
    )
    phases = programs(own["batch"], own["group"], own["tokens"], own["objects"])
    seconds: dict[str, list[float]] = {name: [] for name in phases}
    for turn in range(own["repeats"] + 1):
        for name, phase in phases.items():
            start = time.perf_counter()
            jax.block_until_ready(phase())
            if turn:  # the first compiles
                seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    step = sum(medians.values())
    rows = [[name, f"{value:.4f}", f"{value / step:.2%}"] for name, value in medians.items()]
    what = f"B={own['batch']} G={own['group']} T={own['tokens']} K={own['objects']}"
    size = f"{DEPTH}+{DEPTH} layers of {WIDTH}, {SIDE} px, {jax.devices()[0].device_kind}, Python {platform.python_version()}"
    print(
        ascii_table(
            Table(
                f"phases of a step, {what}",
                ["phase", "s", "share"],
                rows,
                f"{size}; all of {len(device_rewards.REWARDS)} rewards",
            )
        )
    )
    print(
        json.dumps(
            {"seconds": medians, "judging_share": (medians["judge"] + medians["compare"]) / step}
        )
    )


if __name__ == "__main__":
    cli.run_script(main)

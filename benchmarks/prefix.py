"""What sharing the prefix is worth: sampling and a gradient with it once per prompt, against once per completion.

python benchmarks/prefix.py [--repeats=5]

The same functions of the same tiny PaliGemma (96 px, 144 image tokens, 4 + 4 layers of width 128), given 4 prompts x 8
completions or 32 prompts x 1. Needs nothing that pg_ground does not, so CI prints it at each change; it never fails there. A
minute on two CPU cores.
"""

import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from pg_ground import cli, config
from pg_ground.models import PaliGemma
from pg_ground.rl.rollout import sample

sys.path.insert(
    0, str(Path(__file__).parent / "peers")
)  # they are programs, and import one another as such
import ours
from work import Work

PROMPTS, GROUP, TOKENS = 4, 8, 16


def main(argv: Sequence[str]) -> None:
    own = cli.parse_script_flags(argv, {"repeats": 5})
    w = Work("tiny", PROMPTS, GROUP, TOKENS, 16, "float32", True, "cpu", 0, 1, "")
    model = PaliGemma(config.parse(ours.recipe(w)).model)
    params = jax.jit(model.init)(jax.random.key(0))
    image = jax.random.uniform(jax.random.key(1), (PROMPTS, 96, 96, 3), minval=-1)
    prompt = jax.random.randint(jax.random.key(2), (PROMPTS, 16), 109, 900)
    once = (image, prompt, jnp.ones(prompt.shape, bool))
    each = jax.tree.map(lambda leaf: jnp.repeat(leaf, GROUP, axis=0), once)

    def loss(params: Any, given: Any, tokens: jax.Array) -> jax.Array:
        image, prompt, mask = given
        return model.completion_logps(
            params, image, prompt, mask, tokens, jnp.ones(tokens.shape, bool)
        )[0].mean()

    def draw(params: Any, given: Any, key: jax.Array, group: int) -> Any:
        image, prompt, mask = given
        return sample(model, params, image, prompt, mask, key, group, TOKENS)

    gradient, roll = jax.jit(jax.grad(loss)), jax.jit(draw, static_argnums=3)
    times: dict[str, list[float]] = {"once": [], "each": []}
    ways = {"once": (once, GROUP), "each": (each, 1)}
    for turn in range(own["repeats"] + 1):
        for name, (given, group) in ways.items():
            start = time.process_time()
            rollout = roll(params, given, jax.random.key(turn), group)
            jax.block_until_ready(gradient(params, given, rollout.tokens))
            if turn:  # the first compiles
                times[name].append(time.process_time() - start)
    shared, repeated = (statistics.median(times[name]) for name in ways)
    print(
        f"prefix once per prompt {shared:.3f} CPU s, once per completion {repeated:.3f}: {repeated / shared:.1f} times"
    )


if __name__ == "__main__":
    cli.run_script(main)

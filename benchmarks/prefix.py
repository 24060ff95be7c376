"""Measures what the shared prefix saves: sampling and a gradient with and without it.

python benchmarks/prefix.py [--repeats=5]

The same functions of the same tiny PaliGemma (96 px, 144 image tokens, 4 + 4 layers of width 128)
compute 4 prompts x 8 completions, or 32 prompts x 1 completion. The first computes each prefix once
per prompt, the second once per completion. This needs no other package, so CI prints it at each
change, without a limit. It takes a minute on two CPU cores.
"""

import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

from pg_ground import cli, config
from pg_ground.models import PaliGemma
from pg_ground.rl.rollout import sample
from pg_ground.types import Params, Rollout

# The peers are programs, and import one another as top-level modules.
sys.path.insert(0, str(Path(__file__).parent / "peers"))
import ours
from work import Work

PROMPTS = 4
GROUP = 8
TOKENS = 16
PROMPT_TOKENS = 16

Inputs = tuple[jax.Array, jax.Array, jax.Array]
"""Image, prompt and prompt mask."""

WORK = Work(
    size="tiny",
    prompts=PROMPTS,
    group=GROUP,
    tokens=TOKENS,
    prompt_tokens=PROMPT_TOKENS,
    dtype="float32",
    checkpointing=True,
    device="cpu",
    threads=0,
    grad_accum_steps=1,
    variant="",
)


def main(argv: Sequence[str]) -> None:
    flags = cli.parse_script_flags(argv, {"repeats": 5})
    model = PaliGemma(config.parse(ours.recipe(WORK)).model)
    params = jax.jit(model.init)(jax.random.key(0))
    image = jax.random.uniform(jax.random.key(1), (PROMPTS, 96, 96, 3), minval=-1)
    prompt = jax.random.randint(jax.random.key(2), (PROMPTS, PROMPT_TOKENS), 109, 900)
    shared = (image, prompt, jnp.ones(prompt.shape, bool))
    repeated = jax.tree.map(lambda leaf: jnp.repeat(leaf, GROUP, axis=0), shared)

    def loss(params: Params, inputs: Inputs, tokens: jax.Array) -> jax.Array:
        image, prompt, prompt_mask = inputs
        mask = jnp.ones(tokens.shape, bool)
        logps = model.completion_logps(params, image, prompt, prompt_mask, tokens, mask)[0]
        return jnp.mean(logps)

    def generate(params: Params, inputs: Inputs, key: jax.Array, group: int) -> Rollout:
        image, prompt, prompt_mask = inputs
        return sample(model, params, image, prompt, prompt_mask, key, group, TOKENS)

    gradient = jax.jit(jax.grad(loss))
    rollout = jax.jit(generate, static_argnums=3)
    variants = {"shared": (shared, GROUP), "repeated": (repeated, 1)}
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(flags["repeats"] + 1):
        for name, (inputs, group) in variants.items():
            start = time.process_time()
            completions = rollout(params, inputs, jax.random.key(number), group)
            jax.block_until_ready(gradient(params, inputs, completions.tokens))
            if number:  # the first run compiles
                seconds[name].append(time.process_time() - start)
    once, each = (statistics.median(seconds[name]) for name in variants)
    print(
        f"prefix once per prompt {once:.3f} CPU s, once per completion {each:.3f}: "
        f"{each / once:.1f} times"
    )


if __name__ == "__main__":
    cli.run_script(main)

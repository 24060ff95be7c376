"""Prints the memory of training each published variant: everything in float32, or LoRA.

python benchmarks/trained_bytes.py [--rank=16] [--pattern='llm/layers/.*'] [--image_size=224]

LoRA trains adapters on a frozen bfloat16 base. The bytes are counted from shapes, for adamw.
Activations and gradients are not counted. Gradients are as large as the trained parameters.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from pg_ground import cli, config
from pg_ground.config import DECODERS, Lora
from pg_ground.models import PaliGemma
from pg_ground.params import flatten, lr_factors, unflatten
from pg_ground.reporting.tables import Table, ascii_table
from pg_ground.training import optimizers


def row(name: str, model: config.Model, frozen_dtype: str) -> list[str]:
    """Returns the cells of one way to train one variant."""
    shapes = flatten(jax.eval_shape(PaliGemma(model).init, jax.random.key(0)))
    factors = lr_factors(shapes, ())
    trained: dict[str, Any] = {n: leaf for n, leaf in shapes.items() if factors[n]}
    chain = optimizers.make_optimizer(config.Optimizer(), 1)
    optimizer = jax.eval_shape(chain.init, unflatten(trained))
    trained_size = sum(leaf.size for leaf in trained.values())
    frozen = sum(leaf.size for leaf in shapes.values()) - trained_size
    frozen_bytes = frozen * jnp.dtype(frozen_dtype).itemsize
    state = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(optimizer))
    trained_bytes = 4 * trained_size
    total = trained_bytes + state + frozen_bytes
    method = f"LoRA rank {model.lora.rank}" if model.lora.rank else "full"
    return [
        name,
        method,
        *(f"{n:,}" for n in (trained_size, trained_bytes, state, frozen_bytes, total)),
    ]


def main(argv: Sequence[str]) -> None:
    flags = cli.parse_script_flags(
        argv, {"rank": 16, "pattern": "llm/layers/.*", "image_size": 224}
    )
    rows = []
    for name in DECODERS:
        model = config.variant(name, flags["image_size"])
        rows.append(row(name, model, "float32"))
        rows.append(
            row(
                name,
                replace(model, lora=Lora(rank=flags["rank"], pattern=flags["pattern"])),
                "bfloat16",
            )
        )
    heads = [
        "variant",
        "how",
        "trained",
        "trained bytes",
        "optimizer bytes",
        "frozen bytes",
        "all bytes",
    ]
    print(
        ascii_table(
            Table(
                "memory of training, in bytes",
                heads,
                rows,
                "trained in float32, adamw; frozen in bfloat16",
            )
        )
    )


if __name__ == "__main__":
    cli.run_script(main)

"""Writes a checkpoint of a published variant with random weights, to measure loading and memory.

python benchmarks/random_checkpoint.py --variant=pg1_3b --image_size=224 \\
    --out=/data/random_pg1_3b.npz [--dtype=bfloat16]

NAME.npz is big_vision's format, NAME.orbax an orbax directory, another name a Hugging Face
directory. Weights are normal with standard deviation 0.02, and the same every time. One block of
an .npz, or one shard of a Hugging Face directory, is in memory at a time.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np

from pg_ground import cli, config
from pg_ground.checkpoints import export
from pg_ground.checkpoints.tensor_files import BlockIndex, StoredTensor, block_indices
from pg_ground.models import PaliGemma
from pg_ground.params import flatten


def random_tensor(name: str, shape: tuple[int, ...], dtype: str, seed: int) -> StoredTensor:
    """Returns a tensor whose blocks are drawn when they are read."""

    def blocks() -> Iterator[tuple[BlockIndex, np.ndarray]]:
        rng = np.random.default_rng(seed)
        for index, size in block_indices(name, shape, np.dtype(dtype).itemsize):
            yield index, (0.02 * rng.standard_normal(size, np.float32)).astype(dtype)

    return StoredTensor(shape, np.dtype(dtype), blocks)


def main(argv: Sequence[str]) -> None:
    flags = cli.parse_script_flags(
        argv, {"variant": "pg1_3b", "image_size": 224, "dtype": "bfloat16", "out": cli.REQUIRED}
    )
    model = PaliGemma(config.variant(flags["variant"], flags["image_size"]))
    shapes = flatten(jax.eval_shape(model.init, jax.random.key(0)))
    tensors = {
        name: random_tensor(name, leaf.shape, flags["dtype"], i)
        for i, (name, leaf) in enumerate(shapes.items())
    }
    export.write(Path(flags["out"]), tensors, model.config)
    print(flags["out"])


if __name__ == "__main__":
    cli.run_script(main)

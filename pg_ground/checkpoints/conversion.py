"""A checkpoint in another format: big_vision's `.npz`, a Hugging Face directory, or an orbax directory.

python -m pg_ground.convert SRC DST [--dtype=bfloat16]

SRC is any checkpoint that `pg_ground.load` reads: an `.npz`, a Hugging Face directory, a run's working directory or one of its
checkpoints (adapters are merged), or an orbax directory. DST says what is written: NAME.npz, NAME.orbax, or else a Hugging Face
directory, which also gets the tokenizer's files where SRC has any. `--dtype` is float32, bfloat16 or float16; without it every
tensor keeps its own. It is written beside DST and moved there when whole.
"""

from pathlib import Path

import jax

from pg_ground.checkpoints import tensor_files, weights
from pg_ground.types import UserError

DTYPES = ("float32", "bfloat16", "float16")

TOKENIZER_FILES = (
    "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip


def convert(source: Path, target: Path, dtype: str) -> None:
    """Writes the checkpoint at `source` to `target`, in the format that the name of `target` says.

    Raises:
      UserError: `source` cannot be read, `target` exists, or its format cannot express the model.
    """
    if target.exists():
        raise UserError(f"{target} exists already: remove it, or choose another name")
    found = weights.open_checkpoint(source, keep_final_softcap=True)
    tensors = found.tensors
    if not tensors:
        host = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
        like = {
            name: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=host)
            for name, s in found.like.items()
        }
        tensors = {
            name: tensor_files.in_memory(name, array) for name, array in found.read(like).items()
        }
    beside = [source / name for name in TOKENIZER_FILES if (source / name).is_file()]
    weights.write(target, tensors, found.model.config, dtype, beside)

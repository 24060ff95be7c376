"""Converts a checkpoint between big_vision's `.npz`, Hugging Face directories and orbax
directories.
"""

from pathlib import Path

import jax

from pg_ground.checkpoints import export, tensor_files, weights
from pg_ground.types import UserError

DTYPES = ("float32", "bfloat16", "float16")

TOKENIZER_FILES = (
    "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json",
)  # fmt: skip


def convert(source: Path, target: Path, dtype: str) -> None:
    """Writes the checkpoint at `source` to `target`, in the format that the name of `target`
    selects.

    Adapters are merged, and int8 matrices become float32. The final soft-cap of `source` is kept.

    Args:
      dtype: dtype of all tensors; "" keeps their dtypes.

    Raises:
      UserError: `source` cannot be read, `target` exists, or the format cannot express the model.
    """
    if target.exists():
        raise UserError(f"{target} exists already: remove it, or choose another name")
    checkpoint = weights.open_checkpoint(source, keep_final_softcap=True)
    tensors = checkpoint.tensors
    if not tensors:
        host = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
        on_host = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=host)
            for name, leaf in checkpoint.abstract.items()
        }
        arrays = checkpoint.read(on_host)
        tensors = {name: tensor_files.from_array(name, array) for name, array in arrays.items()}
    tokenizer_files = [source / name for name in TOKENIZER_FILES if (source / name).is_file()]
    export.write(target, tensors, checkpoint.model.config, dtype, tokenizer_files)

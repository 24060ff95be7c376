"""Reads the weights of the mask VQ-VAE (`models.vqvae`) from big_vision's `vae-oid.npz`."""

import jax
import jax.numpy as jnp

from pg_ground.checkpoints import tensor_files
from pg_ground.checkpoints.finite_values import with_finite_check
from pg_ground.models.vqvae import CODEBOOK, DECODER, ENCODER, expected_shapes
from pg_ground.storage.paths import FilePath
from pg_ground.types import UserError


def load(path: FilePath, encoder: bool = False) -> dict[str, jax.Array]:
    """Returns the codebook and the decoder weights in float32.

    With `encoder`, also the weights that `encode` needs.

    Raises:
      UserError: the file does not exist, or a weight is missing or has another shape, or a value is
        NaN or infinite.
    """
    tensors = with_finite_check(path, tensor_files.open_npz(path))
    layers = {**DECODER, **(ENCODER if encoder else {})}
    names = [CODEBOOK, *(f"{layer}.{part}" for layer in layers for part in ("weight", "bias"))]
    problem = f"{path} is not the VQ-VAE of masks (vae-oid.npz)"
    missing = [name for name in names if name not in tensors]
    if missing:
        raise UserError(f"{problem}: it lacks {_first_three(missing)}")
    shapes = {name: tensors[name].shape for name in names}
    expected = expected_shapes(shapes)
    wrong = [
        f"{name} is {list(shapes[name])}, not {list(expected[name])}"
        for name in names
        if shapes[name] != expected[name]
    ]
    if wrong:
        raise UserError(f"{problem}: {_first_three(wrong)}")
    return {
        name: jnp.asarray(tensor_files.read_whole(tensors[name]), jnp.float32) for name in names
    }


def _first_three(problems: list[str]) -> str:
    more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
    return ", ".join(problems[:3]) + more

"""Parameters from big_vision's `.npz` files and back, and from our own runs. Names are big_vision's, so nothing is renamed."""

import json
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from pg_ground import checkpoints, config
from pg_ground.config import Config, Model, Text, Vision
from pg_ground.model.paligemma import PaliGemma
from pg_ground.types import UserError

Shapes = Mapping[str, tuple[int, ...]]


def load(path: str | Path, sizes: Model | None = None) -> tuple[PaliGemma, Any]:
    """Returns the model and the float32 parameters of a big_vision `.npz`, or of a run's newest checkpoint.

    A run's working directory tells its sizes. Without `sizes` those of an `.npz` are read from the shapes in it; what shapes
    can't tell is PaliGemma's: attention soft-cap 50 in Gemma 2, no final soft-cap, queries scaled by head_dim**-0.5 (144**-0.5
    in the 27B decoder).

    Raises:
      UserError: nothing there, no PaliGemma in it, or names and shapes that are not those of `sizes` (all, with both shapes).
    """
    if Path(path).is_dir():
        theirs = run_config(Path(path)).model
        model = PaliGemma(sizes or theirs)
        check_fit(path, _shapes(PaliGemma(theirs)), _shapes(model))
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        like = jax.eval_shape(model.init, jax.random.key(0))
        like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), like)
        return model, checkpoints.restore_tree(checkpoints.newest_params(Path(path)), like)
    flat = read_npz(path)
    shapes = {name: value.shape for name, value in flat.items()}
    model = PaliGemma(sizes or config_of_shapes(shapes, str(path)))
    check_fit(path, shapes, _shapes(model))
    return model, unflatten({name: jnp.asarray(value, jnp.float32) for name, value in flat.items()})


def check_fit(path: str | Path, found: Shapes, wanted: Shapes) -> None:
    """Raises UserError listing every name that is missing, unknown or of another shape, with both shapes."""
    wrong = [f"{name}: missing" for name in sorted(wanted.keys() - found.keys())]
    wrong += [f"{name}: not a parameter of this model" for name in sorted(found.keys() - wanted.keys())]
    wrong += [
        f"{name}: {found[name]} in the file, {wanted[name]} in the model"
        for name in sorted(wanted.keys() & found.keys())
        if found[name] != wanted[name]
    ]
    if wrong:
        raise UserError(f"{path} does not fit the model: {'; '.join(wrong)}")


def _shapes(model: PaliGemma) -> Shapes:
    return {name: leaf.shape for name, leaf in flatten(jax.eval_shape(model.init, jax.random.key(0))).items()}


def run_config(workdir: Path) -> Config:
    """Returns the configuration a run was started with.

    Raises:
      UserError: no run in that directory, or a `config.json` that is none.
    """
    file = workdir / "config.json"
    if not file.is_file():
        raise UserError(f"{workdir} is not the working directory of a run: it has no config.json")
    try:
        return config.parse(json.loads(file.read_text(encoding="utf-8")))
    except ValueError as error:
        raise UserError(f"{file} is not JSON: {error}") from None


def save(path: str | Path, params: Any) -> None:
    """Writes `params` as a big_vision `.npz`, names under `params/`."""
    arrays: dict[str, Any] = {f"params/{name}": np.asarray(value) for name, value in flatten(params).items()}
    np.savez(path, **arrays)


def read_npz(path: str | Path) -> dict[str, np.ndarray]:
    """Returns the arrays of a big_vision `.npz` by name, without the `params/` prefix; bfloat16 is stored as 2-byte void."""
    try:
        with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
            arrays = {name.removeprefix("params/"): file[name] for name in file.files}
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; a big_vision .npz checkpoint is wanted") from None
    except (ValueError, OSError, EOFError, TypeError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
        # what numpy raises for files that are empty, cut short, a single array or something else altogether
        raise UserError(f"{path} cannot be read as a big_vision .npz checkpoint: {error}") from None
    strange = [name for name, array in arrays.items() if not isinstance(array, np.ndarray)]
    if strange:
        raise UserError(f"{path} is no big_vision .npz checkpoint: {strange[0]} in it is no array")
    return {name: a.view(ml_dtypes.bfloat16) if a.dtype == np.dtype("V2") else a for name, a in arrays.items()}


def config_of_shapes(shapes: Mapping[str, tuple[int, ...]], path: str) -> Model:
    """Returns the sizes that big_vision's parameter shapes imply."""
    needed = ("img/embedding/kernel", "img/pos_embedding", "img/Transformer/encoderblock/MlpBlock_0/Dense_0/kernel",
              "img/Transformer/encoderblock/MultiHeadDotProductAttention_0/query/kernel", "llm/embedder/input_embedding",
              "llm/layers/attn/q_einsum/w", "llm/layers/attn/kv_einsum/w", "llm/layers/mlp/linear")  # fmt: skip
    missing = [name for name in needed if name not in shapes]
    if missing:
        raise UserError(f"{path} is no PaliGemma checkpoint: it lacks {', '.join(missing)}")
    kernel, posemb, vit_mlp, vit_query, table, q, kv, mlp = (shapes[name] for name in needed)
    side = round(posemb[1] ** 0.5)
    gemma2 = "llm/layers/post_attention_norm/scale" in shapes
    vision = Vision(width=kernel[3], depth=vit_mlp[0], mlp_dim=vit_mlp[2], num_heads=vit_query[2], patch_size=kernel[0])
    text = Text(
        width=table[1],
        depth=q[0],
        mlp_dim=mlp[1],
        num_heads=q[1],
        num_kv_heads=kv[2],
        head_dim=q[3],
        vocab_size=table[0],
        query_scale=q[3] ** -0.5,
        post_norms=gemma2,
        attn_softcap=50.0 if gemma2 else 0.0,
    )
    if (text.width, text.num_heads) == (4608, 32):
        text = replace(text, query_scale=(text.width / text.num_heads) ** -0.5)
    return Model(image_size=side * vision.patch_size, vision=vision, text=text)


def flatten(tree: Any) -> dict[str, Any]:
    """Returns the leaves of a tree of dicts by their slash-joined names."""
    return {"/".join(str(key.key) for key in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the tree of dicts whose leaves have these slash-joined names."""
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *parents, leaf = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree

"""Parameters from published checkpoints and from our own runs, and back. Names are big_vision's everywhere inside.

What can be read: big_vision's `.npz`, Hugging Face directories, working directories of runs (or one of their checkpoints), and
the orbax directories that `convert` writes. Each parameter goes tensor by tensor straight into its shards.
"""

import dataclasses
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from scipy import ndimage

from pg_ground import config
from pg_ground.checkpoints import hugging_face, manager, run_directory, tensor_files
from pg_ground.checkpoints.tensor_files import Stored, Where
from pg_ground.config import DECODERS, Lora, Model, Text, Vision
from pg_ground.models import lora
from pg_ground.models.paligemma import PaliGemma
from pg_ground.parallel import sharding
from pg_ground.params import DOWN, AbstractParams, flatten, is_adapter, unflatten
from pg_ground.types import UserError
from pg_ground.vocab import LOC_TOKENS, SEG_TOKENS

TABLE = "llm/embedder/input_embedding"
POSITIONS = "img/pos_embedding"

GEMMA_ROWS = 256_000
"""Entries of the plain Gemma vocabulary, before PaliGemma's loc and seg tokens."""

GEMMA_TABLE_ROWS = (GEMMA_ROWS, 256_128)
"""Rows that tables of plain Gemma have; what stands beyond its vocabulary is never trained."""

MODEL_FILE = "model.json"
"""Sizes beside the parameters in an orbax directory that `convert` writes."""


class Checkpoint(NamedTuple):
    """A checkpoint whose names and shapes have been checked and whose values are still to be read."""

    model: PaliGemma
    """Without adapters: those of a run are merged when it is read."""
    like: AbstractParams
    """Shapes and dtypes as stored."""
    tensors: Mapping[str, Stored]
    """Empty for orbax checkpoints, which are read whole (and sharded)."""
    read: Callable[[AbstractParams], dict[str, jax.Array]]
    """Returns the parameters by name with the wanted dtypes and shardings."""


def load(
    path: str | Path,
    sizes: Model | None = None,
    *,
    mesh: Mesh | None = None,
    dtype: str = "",
    resample_positions: bool = False,
) -> tuple[PaliGemma, Any]:
    """Returns the model and the parameters of a checkpoint, split over `mesh` (else on the first device).

    `path` is a big_vision `.npz`, a Hugging Face directory, a run (its newest checkpoint, or RUN/best; adapters merged) or
    an orbax directory written by `convert`. Sizes are read from it; what shapes can't tell is in its `config.json`, or else that
    of the published model of these sizes; `sizes` says it for others. `dtype` "" keeps that of the file. The final soft-cap is
    off unless `sizes` has one. Position embeddings of another resolution than `sizes.image_size` are an error, or are
    resampled as big_vision does. A table of plain Gemma gets PaliGemma's 1,152 rows.

    Raises:
      UserError: nothing there, no PaliGemma in it, or names and shapes that are not those of `sizes` (all, with both shapes).
    """
    found = open_checkpoint(path, sizes, resample_positions)
    like = {
        name: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype or leaf.dtype))
        for name, leaf in found.like.items()
    }
    if mesh is not None:
        places = sharding.infer_shardings(mesh, like)
        like = {
            name: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=places[name])
            for name, s in like.items()
        }
    return found.model, unflatten(found.read(like))


def open_checkpoint(
    path: str | Path,
    sizes: Model | None = None,
    resample_positions: bool = False,
    keep_final_softcap: bool = False,
) -> Checkpoint:
    """Returns the checkpoint at `path`, as `load` describes it, with nothing but names and shapes read.

    `keep_final_softcap` leaves it as a Hugging Face `config.json` has it.

    Raises:
      UserError: as `load`.
    """
    path = Path(path)
    if not path.is_dir():
        if path.exists() or path.suffix == ".npz":
            return _open_files(path, tensor_files.open_npz(path), None, sizes, resample_positions)
        raise UserError(
            f"{path}: no such file or directory; an .npz, a Hugging Face directory or a run is wanted"
        )
    if (path / MODEL_FILE).is_file():
        own = config.parse_model(run_directory.read_json(path / MODEL_FILE), str(path / MODEL_FILE))
        return _open_orbax(path, own, [path / "params"], sizes, resample_positions)
    if (path / "config.json").is_file() and not run_directory.is_run(path):
        hub, tensors = hugging_face.open_directory(path)
        hub = hub if keep_final_softcap else hub._replace(final_softcap=0.0)
        return _open_files(path, tensors, hub, sizes, resample_positions)
    workdir, step = run_directory.find_checkpoint(path)
    folders = [step / "params", *([workdir / "frozen"] if (workdir / "frozen").is_dir() else [])]
    model = run_directory.run_config(workdir).model
    return _open_orbax(path, model, folders, sizes, resample_positions)


def _open_files(
    path: Path,
    tensors: dict[str, Stored],
    hub: hugging_face.HubConfig | None,
    sizes: Model | None,
    resample: bool,
) -> Checkpoint:
    tensors = _with_loc_rows(path, tensors, sizes)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    own = config_of_shapes(shapes, str(path))
    if hub is not None:
        caps = {"attn_softcap": hub.attn_softcap, "final_softcap": hub.final_softcap}
        own = replace(own, text=replace(own.text, query_scale=hub.query_scale, **caps))
    wanted = _wanted(path, own, sizes, resample, told=hub is not None)
    if wanted.image_size != own.image_size:
        shapes[POSITIONS] = (1, _positions(wanted), *shapes[POSITIONS][2:])
    check_fit(path, shapes, _shapes(wanted))
    if wanted.image_size != own.image_size:
        tensors = tensors | {POSITIONS: _resampled(tensors[POSITIONS], wanted)}
    tensors = {name: tensors[name] for name in _shapes(wanted)}
    like = {
        name: jax.ShapeDtypeStruct(tensor.shape, tensor.dtype) for name, tensor in tensors.items()
    }
    return Checkpoint(
        PaliGemma(wanted), like, tensors, lambda like: tensor_files.assemble(tensors, like)
    )


def _open_orbax(
    path: Path, own: Model, folders: list[Path], sizes: Model | None, resample: bool
) -> Checkpoint:
    found = [manager.describe(folder) for folder in folders]
    twice = sorted(set.intersection(*(set(part) for part in found))) if len(found) > 1 else []
    if twice:
        raise UserError(
            f"{folders[0]} and {folders[1]} both hold {', '.join(twice)}: one of them belongs to another run"
        )
    every = {name: leaf for part in found for name, leaf in part.items()}
    check_fit(path, {name: leaf.shape for name, leaf in every.items()}, _shapes(own))
    wanted = _wanted(path, own, sizes, resample, told=True)
    like = {}
    for name, leaf in every.items():
        if not is_adapter(name):
            kind = (
                jnp.result_type(leaf.dtype, every[name + DOWN].dtype)
                if name + DOWN in every
                else leaf.dtype
            )
            like[name] = jax.ShapeDtypeStruct(leaf.shape, kind)
    if wanted.image_size != own.image_size:
        like[POSITIONS] = jax.ShapeDtypeStruct(
            (1, _positions(wanted), *like[POSITIONS].shape[2:]), like[POSITIONS].dtype
        )
    check_fit(path, {name: leaf.shape for name, leaf in like.items()}, _shapes(wanted))

    def read(like: AbstractParams) -> dict[str, jax.Array]:
        base = next(iter(like.values())).sharding or jax.sharding.SingleDeviceSharding(
            jax.local_devices()[0]
        )

        def placed(name: str, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            same = name in like and like[name].shape == leaf.shape
            where = (like[name].sharding or base) if same else _unsplit(base)
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

        params: dict[str, jax.Array] = {}
        for folder, part in zip(folders, found, strict=True):
            tree = unflatten({name: placed(name, leaf) for name, leaf in part.items()})
            params |= flatten(manager.restore_tree(folder, tree))
        for (
            name,
            leaf,
        ) in like.items():  # one after the other, so that one is held twice and not all
            if params[name].shape != leaf.shape:
                stored = _resampled(tensor_files.in_memory(name, params[name]), wanted)
                params |= tensor_files.assemble({name: stored}, {name: leaf})
            else:
                params[name] = jnp.asarray(lora.merged(params, name, own.lora, leaf.dtype))
        return {name: params[name] for name in like}

    return Checkpoint(PaliGemma(wanted), like, {}, read)


def _unsplit(base: Any) -> Any:
    """Returns the sharding over the devices of `base` that splits nothing."""
    return NamedSharding(base.mesh, PartitionSpec()) if isinstance(base, NamedSharding) else base


def _wanted(path: Path, own: Model, sizes: Model | None, resample: bool, told: bool) -> Model:
    """Returns the sizes to load a checkpoint of sizes `own` with, without adapters.

    `told` says that the checkpoint itself tells what shapes can't.

    Raises:
      UserError: it was trained at another resolution and is not to be resampled, or its attention is scaled in another way.
    """
    wanted = replace(own if sizes is None else sizes, lora=Lora())
    scales = {
        "query_scale": (own.text.attention_scale, wanted.text.attention_scale),
        "attn_softcap": (own.text.attn_softcap, wanted.text.attn_softcap),
    }
    for name, (theirs, mine) in scales.items() if told else ():
        if abs(theirs - mine) > 1e-6 * abs(theirs):
            raise UserError(f"{path} says {name} {theirs:g}, but model.text.{name} is {mine:g}")
    if wanted.vision.patch_size != own.vision.patch_size:
        return wanted  # that is told with both shapes
    if wanted.image_size != own.image_size and not resample:
        raise UserError(
            f"{path} was trained at {own.image_size} pixels ({POSITIONS} has {_positions(own)} positions), but model.image_size "
            f"is {wanted.image_size} ({_positions(wanted)}): take the checkpoint of that resolution, or set resample_positions"
        )
    return wanted


def _positions(model: Model) -> int:
    return (model.image_size // model.vision.patch_size) ** 2


def _resampled(stored: Stored, model: Model) -> Stored:
    """Returns position embeddings for another number of patches, as big_vision's `resample_posemb`: linear, corners kept."""
    table = tensor_files.whole(stored).astype(np.float32)
    old, new = round(table.shape[1] ** 0.5), model.image_size // model.vision.patch_size
    grid = np.asarray(ndimage.zoom(table.reshape(old, old, -1), (new / old, new / old, 1), order=1))
    return tensor_files.in_memory(POSITIONS, grid.reshape(1, new * new, -1).astype(stored.dtype))


def _with_loc_rows(
    path: Path, tensors: dict[str, Stored], sizes: Model | None
) -> dict[str, Stored]:
    """Returns `tensors` with rows for the loc and seg tokens, if their table is that of a plain Gemma.

    Plain Gemma's has 256,000 or 256,128 rows, or for `sizes` of another vocabulary, just the 1,152 fewer. The new rows are normal
    with standard deviation 0.02, as in big_vision's `extend_rows`, and the same every time.
    """
    table = tensors.get(TABLE)
    added = LOC_TOKENS + SEG_TOKENS
    base = None
    if table is not None and table.shape[0] in GEMMA_TABLE_ROWS:
        base = GEMMA_ROWS
    elif (
        table is not None and sizes is not None and table.shape[0] == sizes.text.vocab_size - added
    ):
        base = table.shape[0]
    if table is None or base is None:
        return tensors

    def blocks() -> Iterator[tuple[Where, np.ndarray]]:
        for where, block in table.blocks():
            part = where[0]
            assert isinstance(part, slice)
            if part.start < base:
                kept = slice(part.start, min(part.stop, base))
                yield (kept,), block[: kept.stop - kept.start]
        rows = np.random.default_rng(0).standard_normal((added, table.shape[1]), np.float32) * 0.02
        yield (slice(base, base + added),), rows.astype(table.dtype)

    print(
        f"{path}: {added} rows appended to the {base} of {TABLE}, for loc and seg tokens",
        file=sys.stderr,
    )
    return tensors | {TABLE: table._replace(shape=(base + added, table.shape[1]), blocks=blocks)}


def save(path: str | Path, params: Any, model: Model | None = None, dtype: str = "") -> None:
    """Writes `params` where `path` says: `NAME.npz` for big_vision, `NAME.orbax` for orbax, else a Hugging Face directory.

    Adapters are merged. `model` says the sizes; an `.npz` of parameters without adapters needs none. `dtype` "" keeps their
    own. Nothing is left at `path` if it fails.

    Raises:
      UserError: something is there already, or the format cannot express the model.
    """
    if model is not None and model.lora.rank:
        params = lora.merge(params, model.lora)
    if any(map(is_adapter, flatten(params))):
        raise UserError(
            f"{path}: adapters are to be merged, and only `model` says how: it is needed, with its lora section"
        )
    tensors = {name: tensor_files.in_memory(name, leaf) for name, leaf in flatten(params).items()}
    write(Path(path), tensors, model, dtype)


def write(
    path: Path,
    tensors: Mapping[str, Stored],
    model: Model | None,
    dtype: str = "",
    beside: Sequence[Path] = (),
) -> None:
    """Writes tensors as `save` does parameters; a Hugging Face directory gets copies of the files `beside`."""
    if path.exists():
        raise UserError(f"{path} exists already: remove it, or choose another name")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f"{path.name}.") as folder:
        part = Path(folder) / path.name
        if path.suffix == ".npz":
            tensor_files.save_npz(part, tensors, dtype)
        elif model is None:
            raise UserError(
                f"{path}: the sizes of the model are needed to write anything but an .npz"
            )
        elif path.suffix == ".orbax":
            _save_orbax(part, replace(model, lora=Lora()), tensors, dtype)
        else:
            hugging_face.save_directory(part, model, tensors, dtype)
            for file in beside:
                shutil.copy(file, part / file.name)
        part.rename(path)


def _save_orbax(folder: Path, model: Model, tensors: Mapping[str, Stored], dtype: str) -> None:
    folder.mkdir()
    tree = unflatten(
        {
            name: tensor_files.whole(tensor).astype(dtype or tensor.dtype)
            for name, tensor in tensors.items()
        }
    )
    manager.save_tree(folder / "params", tree)
    (folder / MODEL_FILE).write_text(
        json.dumps(dataclasses.asdict(model), indent=1) + "\n", encoding="utf-8"
    )


def check_fit(
    path: str | Path, found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]
) -> None:
    """Raises UserError listing every name that is missing, unknown or of another shape, with both shapes."""
    wrong = [
        f"{name}: missing, {wanted[name]} in the model"
        for name in sorted(wanted.keys() - found.keys())
    ]
    wrong += [
        f"{name}: not a parameter of this model, {found[name]} in the file"
        for name in sorted(found.keys() - wanted.keys())
    ]
    wrong += [
        f"{name}: {found[name]} in the file, {wanted[name]} in the model"
        for name in sorted(wanted.keys() & found.keys())
        if found[name] != wanted[name]
    ]
    if wrong:
        raise UserError(f"{path} does not fit the model: {'; '.join(wrong)}")


def _shapes(model: Model) -> dict[str, tuple[int, ...]]:
    return {name: leaf.shape for name, leaf in PaliGemma(model).abstract_params().items()}


def tokenizer_of(path: Path) -> str:
    """Returns the sentencepiece model that a run, or a Hugging Face directory, has; "" where there is none."""
    if not path.is_dir():
        return ""
    if (path / "tokenizer.model").is_file():
        return str(path / "tokenizer.model")
    hugging_face_or_orbax = (path / "config.json").is_file() and not run_directory.is_run(path)
    if hugging_face_or_orbax or (path / MODEL_FILE).is_file():
        return ""
    return run_directory.run_config(run_directory.find_checkpoint(path).workdir).data.tokenizer


def config_of_shapes(shapes: Mapping[str, tuple[int, ...]], path: str) -> Model:
    """Returns the sizes that big_vision's parameter shapes imply.

    What they can't tell is that of the published decoder with these shapes; for others attention is soft-capped at 50 in Gemma 2
    and queries are scaled by head_dim**-0.5.
    """
    needed = ("img/embedding/kernel", POSITIONS, "img/Transformer/encoderblock/MlpBlock_0/Dense_0/kernel",
              "img/Transformer/encoderblock/MultiHeadDotProductAttention_0/query/kernel", TABLE,
              "llm/layers/attn/q_einsum/w", "llm/layers/attn/kv_einsum/w", "llm/layers/mlp/linear")  # fmt: skip
    missing = [name for name in needed if name not in shapes]
    if missing:
        raise UserError(f"{path} is no PaliGemma checkpoint: it lacks {', '.join(missing)}")
    ranks = dict(zip(needed, (4, 3, 3, 4, 2, 4, 5, 3), strict=True))
    odd = [
        f"{name}: {shapes[name]}, where {rank} axes are wanted"
        for name, rank in ranks.items()
        if len(shapes[name]) != rank
    ]
    if odd:
        raise UserError(f"{path} is no PaliGemma checkpoint: {'; '.join(odd)}")
    kernel, posemb, vit_mlp, vit_query, table, q, kv, mlp = (shapes[name] for name in needed)
    side = round(posemb[1] ** 0.5)
    odd = [f"{name}: {shapes[name]}, which is empty" for name in needed if 0 in shapes[name]]
    odd += (
        [f"{POSITIONS}: {posemb}, which is not one square of positions"]
        if posemb[:2] != (1, side**2)
        else []
    )
    odd += (
        [f"{needed[6]}: {kv}, where {q[1]} query heads do not divide evenly"]
        if kv[2] and q[1] % kv[2]
        else []
    )
    if odd:
        raise UserError(f"{path} is no PaliGemma checkpoint: {'; '.join(odd)}")
    gemma2 = "llm/layers/post_attention_norm/scale" in shapes
    vision = Vision(
        width=kernel[3],
        depth=vit_mlp[0],
        mlp_dim=vit_mlp[2],
        num_heads=vit_query[2],
        patch_size=kernel[0],
    )
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
    for published in DECODERS.values():
        if (
            replace(text, query_scale=published.query_scale, attn_softcap=published.attn_softcap)
            == published
        ):
            text = published
    return Model(image_size=side * vision.patch_size, vision=vision, text=text)

"""Reads parameters from published checkpoints and from runs. All names become big_vision's.

Readable: big_vision's `.npz`, Hugging Face directories, adapters of PEFT, working directories of
runs, single checkpoints of runs, and the orbax directories that `convert` writes. Each tensor is
read directly into its shards.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from pg_ground import config
from pg_ground.checkpoints import (
    adaptation,
    finite_values,
    hugging_face,
    manager,
    peft,
    run_directory,
    tensor_files,
)
from pg_ground.checkpoints.hugging_face_config import HubConfig
from pg_ground.checkpoints.model_sizes import (
    POSITIONS,
    check_fit,
    is_published,
    model_from_shapes,
    parameter_shapes,
    patch_count,
    resolve_model,
)
from pg_ground.checkpoints.tensor_files import StoredTensor
from pg_ground.config import Model
from pg_ground.models import lora, quantization
from pg_ground.models.paligemma import PaliGemma
from pg_ground.parallel import sharding
from pg_ground.params import (
    DOWN,
    SCALE,
    AbstractParams,
    flatten,
    is_adapter,
    is_scale,
    unflatten,
)
from pg_ground.storage.downloads import checkpoint_path, download_folder
from pg_ground.storage.paths import FilePath, to_path
from pg_ground.types import JsonObject, Params, UserError

logger = logging.getLogger(__name__)

MODEL_FILE = "model.json"
"""The sizes of the model, beside the parameters in an orbax directory that `convert` writes."""


class Checkpoint(NamedTuple):
    """A checkpoint whose names and shapes are checked and whose values are not read yet."""

    model: PaliGemma
    """Without adapters: reading merges the adapters of a run."""
    abstract: AbstractParams
    """Shapes and dtypes of the merged float parameters. int8 matrices are float32 here."""
    tensors: Mapping[str, StoredTensor]
    """Empty for orbax checkpoints, whose arrays are read whole (and sharded)."""
    read: Callable[[AbstractParams], dict[str, jax.Array]]
    """(abstract parameters) → arrays by name, with these dtypes and shardings. Matrices with scales
    are quantized.
    """
    has_scales: bool = True
    """Whether the checkpoint, or the caller, states the query scale and the soft-caps."""


def load(
    path: str | FilePath,
    sizes: Model | None = None,
    *,
    mesh: Mesh | None = None,
    dtype: str = "",
    resample_positions: bool = False,
) -> tuple[PaliGemma, Params]:
    """Returns the model and the parameters of a checkpoint.

    The sizes of the model are read from the checkpoint. Shapes do not tell soft-caps and the query
    scale: they come from its `config.json`, or from the published model with these shapes. For
    other models without `config.json` and without `sizes`, the guess is logged. The final soft-cap
    is off unless `sizes` has one. A plain Gemma table gets PaliGemma's 1,152 rows.

    Args:
      path: a big_vision `.npz`, a Hugging Face directory, an adapter of PEFT (merged into its
        base), a run (its newest checkpoint, or RUN/best; adapters are merged), or an orbax
        directory that `convert` wrote.
      sizes: the sizes that the model must have; None takes the sizes of the checkpoint.
      mesh: devices over which the parameters are sharded; None means the first device.
      dtype: dtype of all parameters; "" keeps the dtypes of the checkpoint.
      resample_positions: position embeddings of another resolution than `sizes.image_size` are
        resampled as in big_vision. Without it they are an error.

    Raises:
      UserError: the path does not exist, is not a PaliGemma, or its names and shapes differ from
        `sizes`. The error lists all differences. A value is NaN or infinite.
    """
    checkpoint = open_checkpoint(path, sizes, resample_positions)
    abstract = {
        name: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype or leaf.dtype))
        for name, leaf in checkpoint.abstract.items()
    }
    if mesh is not None:
        shardings = sharding.infer_shardings(mesh, abstract)
        abstract = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=shardings[name])
            for name, leaf in abstract.items()
        }
    if not checkpoint.has_scales and not is_published(checkpoint.model.config):
        _log_scales(path, checkpoint.model.config)
    return checkpoint.model, unflatten(checkpoint.read(abstract))


def _log_scales(path: str | FilePath, model: Model) -> None:
    """Logs the settings of a model that its shapes do not tell."""
    scale = f"queries are scaled by {model.text.attention_scale:.4g}"
    if not model.text.post_norms:
        logger.info("%s: no published model has these sizes: %s, as in every Gemma 1", path, scale)
        return
    logger.warning(
        "%s: no published model has these sizes, and an .npz does not state more: %s and attention "
        "is soft-capped at %g; pass other sizes if the model was trained with others",
        path, scale, model.text.attn_softcap,
    )  # fmt: skip


def open_checkpoint(
    path: str | FilePath,
    sizes: Model | None = None,
    resample_positions: bool = False,
    keep_final_softcap: bool = False,
) -> Checkpoint:
    """Returns the checkpoint at `path`. Only names and shapes are read.

    The other arguments mean the same as in `load`.

    Args:
      keep_final_softcap: the final soft-cap of a Hugging Face `config.json` stays on.

    Raises:
      UserError: as `load` does.
    """
    path = checkpoint_path(path, "params")
    if not path.is_dir():
        if path.exists() or path.suffix == ".npz":
            return _open_files(path, tensor_files.open_npz(path), None, sizes, resample_positions)
        raise UserError(
            f"{path}: no such file or directory; "
            "expected an .npz, a Hugging Face directory or a run"
        )
    model_file = path / MODEL_FILE
    if model_file.is_file():
        model = config.parse_model(run_directory.read_json(model_file), str(model_file))
        return _open_orbax(path, model, [path / "params"], sizes, resample_positions)
    is_adapter = peft.is_adapter(path)
    if is_adapter or _is_hugging_face(path):
        adapter = peft.read_adapter(download_folder(path)) if is_adapter else None
        folder = adapter_base(path) if is_adapter else path
        hub, tensors = hugging_face.open_directory(download_folder(folder), adapter)
        hub = hub if keep_final_softcap else hub._replace(final_softcap=0.0)
        return _open_files(path, tensors, hub, sizes, resample_positions)
    workdir, step = run_directory.find_checkpoint(path)
    folders = [step / "params"]
    if (workdir / "frozen").is_dir():
        folders.append(workdir / "frozen")
    model = run_directory.run_config(workdir).model
    return _open_orbax(path, model, folders, sizes, resample_positions)


def _is_hugging_face(folder: FilePath) -> bool:
    return (folder / "config.json").is_file() and not run_directory.is_run(folder)


def adapter_base(path: FilePath) -> FilePath:
    """Returns the Hugging Face directory into which the adapter at `path` is merged.

    It is a path of this machine, a path from the folder of the adapter, or a name on the Hub.

    Raises:
      UserError: the base cannot be found, or it is no Hugging Face directory.
    """
    settings = peft.read_config(path)
    name, revision = settings["base_model_name_or_path"], settings.get("revision")
    beside = path / name
    try:
        # PEFT resolves a path from the working directory.
        base = to_path(name, peft.CONFIG_FILE)
        if not base.exists():
            base = (
                beside
                if beside.exists()
                else checkpoint_path(
                    f"{name}@{revision}" if revision else name, "base_model_name_or_path"
                )
            )
    except UserError as error:
        raise UserError(f"{_needs_base(path, name)} ({error})") from error
    if not base.exists():
        raise UserError(_needs_base(path, name))
    if not _is_hugging_face(base):
        raise UserError(f"{path} is an adapter of {name}, but {base} is no Hugging Face directory")
    return base


def _needs_base(path: FilePath, name: str) -> str:
    return (
        f"{path} is a PEFT adapter of {name}, which is not on this machine: put the base there, or "
        "merge the adapter in PEFT (merge_and_unload), then save_pretrained"
    )


def tokenizer_path(path: FilePath) -> str | None:
    """Returns the sentencepiece model of a run, a Hugging Face directory or an adapter (or of its
    base); None if it has none.

    "" is the tokenizer of this package, with which the run was trained.
    """
    if not path.is_dir():
        return None
    if (path / "tokenizer.model").is_file():
        return str(path / "tokenizer.model")
    if peft.is_adapter(path):
        return tokenizer_path(adapter_base(path))
    if (path / MODEL_FILE).is_file() or _is_hugging_face(path):
        return None
    workdir = run_directory.find_checkpoint(path).workdir
    return run_directory.run_config(workdir).data.tokenizer


def _open_files(
    path: FilePath,
    tensors: dict[str, StoredTensor],
    hub: HubConfig | None,
    sizes: Model | None,
    resample: bool,
) -> Checkpoint:
    """Returns the checkpoint of an `.npz` (`hub` is None) or of a Hugging Face directory."""
    tensors = finite_values.with_finite_check(path, tensors)
    tensors = adaptation.with_loc_rows(path, tensors, sizes)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    stored = model_from_shapes(shapes, str(path))
    if hub is not None:
        caps = {"attn_softcap": hub.attn_softcap, "final_softcap": hub.final_softcap}
        stored = replace(stored, text=replace(stored.text, query_scale=hub.query_scale, **caps))
    model = resolve_model(path, stored, sizes, resample, has_scales=hub is not None)
    other_resolution = model.image_size != stored.image_size
    if other_resolution:
        shapes[POSITIONS] = (1, patch_count(model), *shapes[POSITIONS][2:])
    check_fit(path, shapes, parameter_shapes(model))
    if other_resolution:
        tensors[POSITIONS] = adaptation.resampled_positions(tensors[POSITIONS], model)
    tensors = {name: tensors[name] for name in parameter_shapes(model)}
    abstract = {
        name: jax.ShapeDtypeStruct(tensor.shape, tensor.dtype) for name, tensor in tensors.items()
    }

    def read(abstract: AbstractParams) -> dict[str, jax.Array]:
        return tensor_files.read_sharded(adaptation.quantized_tensors(tensors, abstract), abstract)

    has_scales = hub is not None or sizes is not None
    return Checkpoint(PaliGemma(model), abstract, tensors, read, has_scales)


def _open_orbax(
    path: FilePath, stored: Model, folders: Sequence[FilePath], sizes: Model | None, resample: bool
) -> Checkpoint:
    """Returns the checkpoint of one or two orbax trees: trained and frozen parameters."""
    trees = [manager.describe(folder) for folder in folders]
    repeated = sorted(set.intersection(*map(set, trees))) if len(trees) > 1 else []
    if repeated:
        raise UserError(
            f"{folders[0]} and {folders[1]} both hold {', '.join(repeated)}: "
            "one of them belongs to another run"
        )
    leaves = {name: leaf for tree in trees for name, leaf in tree.items()}
    shapes = {name: leaf.shape for name, leaf in leaves.items() if not is_scale(name)}
    check_fit(path, shapes, parameter_shapes(stored))
    model = resolve_model(path, stored, sizes, resample, has_scales=True)
    abstract = _merged_abstract(leaves)
    if model.image_size != stored.image_size:
        positions = abstract[POSITIONS]
        shape = (1, patch_count(model), *positions.shape[2:])
        abstract[POSITIONS] = jax.ShapeDtypeStruct(shape, positions.dtype)
    shapes = {name: leaf.shape for name, leaf in abstract.items()}
    check_fit(path, shapes, parameter_shapes(model))

    def read(abstract: AbstractParams) -> dict[str, jax.Array]:
        params: dict[str, jax.Array] = {}
        for folder, tree in zip(folders, trees, strict=True):
            placed = _with_shardings(tree, abstract)
            params |= flatten(manager.restore_tree(folder, unflatten(placed)))
        finite_values.check_arrays(path, params)
        return _convert_one_by_one(params, abstract, stored, model)

    return Checkpoint(PaliGemma(model), abstract, {}, read)


def _merged_abstract(leaves: AbstractParams) -> AbstractParams:
    """Returns the abstract parameters after adapters are merged and int8 matrices are made float32.

    A merged parameter has the wider dtype of base and adapter.
    """
    merged: AbstractParams = {}
    for name, leaf in leaves.items():
        if is_adapter(name) or is_scale(name):
            continue
        dtypes = [leaves[name + SCALE].dtype if name + SCALE in leaves else leaf.dtype]
        if name + DOWN in leaves:
            dtypes.append(leaves[name + DOWN].dtype)
        merged[name] = jax.ShapeDtypeStruct(leaf.shape, jnp.result_type(*dtypes))
    return merged


def _with_shardings(tree: AbstractParams, abstract: AbstractParams) -> AbstractParams:
    """Returns the arrays of an orbax tree with the shardings of `abstract`.

    Adapters, scales and arrays of another shape are replicated: they are small.
    """
    first = next(iter(abstract.values())).sharding
    default = first or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def sharding_of(name: str, leaf: jax.ShapeDtypeStruct) -> Sharding:
        if name in abstract and abstract[name].shape == leaf.shape:
            return abstract[name].sharding or default
        if isinstance(default, NamedSharding):
            return NamedSharding(default.mesh, PartitionSpec())
        return default

    return {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding_of(name, leaf))
        for name, leaf in tree.items()
    }


def _convert_one_by_one(
    params: dict[str, jax.Array], abstract: AbstractParams, stored: Model, model: Model
) -> dict[str, jax.Array]:
    """Returns restored parameters with adapters merged, with dtypes and shardings of `abstract`.

    Parameters are converted one after the other: only one of them is in memory twice.
    """
    for name, leaf in abstract.items():
        if is_scale(name):
            continue
        if name + SCALE in abstract:
            merged = {name: lora.merged(params, name, stored.lora, jnp.float32)}
            arrays = {key: abstract[key] for key in (name, name + SCALE)}
            params |= _place(quantization.cast_params(merged, arrays), arrays)
        elif params[name].shape != leaf.shape:
            positions = tensor_files.from_array(name, params[name])
            resampled = adaptation.resampled_positions(positions, model)
            params |= tensor_files.read_sharded({name: resampled}, {name: leaf})
        else:
            params[name] = jnp.asarray(lora.merged(params, name, stored.lora, leaf.dtype))
    return {name: params[name] for name in abstract}


def _place(arrays: JsonObject, abstract: AbstractParams) -> dict[str, jax.Array]:
    """Returns the arrays with the shardings of `abstract`, if it has shardings."""
    return {name: jax.device_put(array, abstract[name].sharding) for name, array in arrays.items()}

"""Writes parameters as a big_vision `.npz`, an orbax directory or a Hugging Face directory."""

import dataclasses
import json
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from pg_ground.checkpoints import hugging_face, manager, tensor_files
from pg_ground.checkpoints.finite_values import with_range_check
from pg_ground.checkpoints.tensor_files import StoredTensor
from pg_ground.checkpoints.weights import MODEL_FILE
from pg_ground.config import Lora, Model
from pg_ground.models import lora
from pg_ground.params import flatten, is_adapter, is_scale, unflatten
from pg_ground.storage.downloads import upload
from pg_ground.storage.paths import FilePath, to_path
from pg_ground.types import Params, UserError


def save(path: str | FilePath, params: Params, model: Model | None = None, dtype: str = "") -> None:
    """Writes parameters in the format that the name of `path` selects.

    `NAME.npz` is big_vision's format, `NAME.orbax` is an orbax directory, and any other name is a
    Hugging Face directory. Adapters are merged, and int8 matrices become float32. If writing fails,
    nothing is left at `path`.

    Args:
      model: sizes of the model. Only an `.npz` of float parameters without adapters does not need
        them.
      dtype: dtype of all tensors; "" keeps their dtypes.

    Raises:
      UserError: `path` exists, the format cannot express the model, or a value is too large for
        `dtype`.
    """
    names = flatten(params)
    has_adapters = any(map(is_adapter, names))
    if has_adapters and (model is None or not model.lora.rank):
        raise UserError(
            f"{path}: the parameters have adapters, "
            "so `model` with its lora section is needed to merge them"
        )
    if has_adapters or any(map(is_scale, names)):
        params = lora.merge(params, Lora() if model is None else model.lora)
    tensors = {name: tensor_files.from_array(name, leaf) for name, leaf in flatten(params).items()}
    write(to_path(path, "path"), tensors, model, dtype)


def write(
    path: FilePath,
    tensors: Mapping[str, StoredTensor],
    model: Model | None,
    dtype: str = "",
    extra_files: Mapping[str, bytes] = MappingProxyType({}),
) -> None:
    """Writes tensors as `save` writes parameters.

    Args:
      extra_files: content of further files of a Hugging Face directory, by name.
    """
    if path.exists():
        raise UserError(f"{path} exists already: remove it, or choose another name")
    if model is None and path.suffix != ".npz":
        raise UserError(f"{path}: only an .npz can be written without the sizes of the model")
    tensors = with_range_check(path, tensors, dtype)
    beside = path.parent if isinstance(path, Path) else None
    if beside is not None:
        beside.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=beside, prefix=f"{path.name}.") as folder:
        partial = Path(folder) / path.name
        if model is None or path.suffix == ".npz":
            tensor_files.save_npz(partial, tensors, dtype)
        elif path.suffix == ".orbax":
            _save_orbax(partial, replace(model, lora=Lora()), tensors, dtype)
        else:
            hugging_face.save_directory(partial, model, tensors, dtype)
            for name, content in extra_files.items():
                (partial / name).write_bytes(content)
        if isinstance(path, Path):
            partial.rename(path)
        else:
            upload(partial, path)


def _save_orbax(
    folder: FilePath, model: Model, tensors: Mapping[str, StoredTensor], dtype: str
) -> None:
    folder.mkdir()
    arrays = {
        name: tensor_files.read_whole(tensor).astype(dtype or tensor.dtype)
        for name, tensor in tensors.items()
    }
    manager.save_tree(folder / "params", unflatten(arrays))
    settings = json.dumps(dataclasses.asdict(model), indent=1)
    (folder / MODEL_FILE).write_text(settings + "\n", encoding="utf-8")

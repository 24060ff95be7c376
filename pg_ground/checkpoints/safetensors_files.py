"""The tensors of a Hugging Face directory: `model.safetensors`, or shards with an index."""

import json
import logging
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from safetensors import SafetensorError, safe_open

from pg_ground.checkpoints.hugging_face_names import EMBED_TOKENS, HEAD, hub_name
from pg_ground.types import UserError, first_problems

DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}
"""Names of dtypes in safetensors → in numpy."""

OTHER_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.msgpack", "*.h5", "*.gguf")
"""Files of weights that a directory can have in place of `model.safetensors`."""

logger = logging.getLogger(__name__)


@runtime_checkable
class HubTensor(Protocol):
    """One tensor of a Hugging Face directory."""

    @property
    def path(self) -> Path:
        """The file of the tensor."""
        ...

    @property
    def key(self) -> str:
        """Its name in the file."""
        ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype: ...

    def read(self, rows: slice | None = None) -> np.ndarray:
        """Returns all values, or some rows."""
        ...


class Tensor(NamedTuple):
    """One tensor of a safetensors file."""

    path: Path
    key: str
    """Its name in the file, in any of the three spellings."""
    shape: tuple[int, ...]
    dtype: np.dtype

    def read(self, rows: slice | None = None) -> np.ndarray:
        """Returns all values, or some rows.

        The file is opened anew each time, so that its memory can be released.
        """
        try:
            with safe_open(self.path, framework="numpy") as file:
                return file.get_tensor(self.key) if rows is None else file.get_slice(self.key)[rows]
        except (SafetensorError, OSError) as error:
            raise UserError(f"{self.path}: {self.key} cannot be read: {error}") from None


def list_tensors(folder: Path) -> dict[str, Tensor]:
    """Returns the tensors of a directory by their names in the hub's spelling.

    Raises:
      UserError: a file is missing or cannot be read, a tensor is not where the index says, or two
        files have it.
    """
    index = folder / "model.safetensors.index.json"
    tensors: dict[str, Tensor] = {}
    for file, names in _list_files(folder, index).items():
        path = folder / file
        if not path.is_file():
            raise UserError(
                f"{path} does not exist, but {index.name} says that it holds {names[0]} "
                f"and {len(names) - 1} more"
            )
        found = tensors_of_file(path)
        twice = sorted(found.keys() & tensors.keys())
        if twice:
            first = tensors[twice[0]].path.name
            raise UserError(f"{path} has {first_problems(twice, ', ', 3)}, and {first} too")
        tensors |= found
        # An index can list both names of the tied tensor. The file then has one of them.
        stored = {*tensors, EMBED_TOKENS, HEAD}
        missing = [name for name in names if hub_name(name) not in stored]
        if missing:
            raise UserError(
                f"{path} lacks {first_problems(missing, ', ')}, which {index.name} says it holds"
            )
    return tensors


def _list_files(folder: Path, index: Path) -> dict[str, list[str]]:
    """Returns the safetensors files of a directory, and the names that the index lists for each."""
    single = folder / "model.safetensors"
    if not index.is_file() and not single.is_file():
        raise UserError(_no_weights(folder, single.name, index.name))
    if single.is_file():
        if index.is_file():
            logger.warning(
                "%s has %s and %s: the first is read, as in transformers",
                folder,
                single.name,
                index.name,
            )
        return {single.name: []}
    try:
        weight_map: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files: dict[str, list[str]] = {str(file): [] for file in sorted(set(weight_map.values()))}
        for name, file in weight_map.items():
            files[file].append(name)
        return files
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{index} is not an index of safetensors files: {type(error).__name__}: {error}"
        ) from None


def _no_weights(folder: Path, single: str, index: str) -> str:
    """Returns the error of a directory without the files of `save_pretrained`."""
    files = sorted(path.name for pattern in OTHER_WEIGHTS for path in folder.glob(pattern))
    if not files:
        return f"{folder} has neither {single} nor {index}; only safetensors are read"
    more = f" and {len(files) - 1} more" if files[1:] else ""
    if files[0].endswith(".safetensors"):
        return f"{folder} has {files[0]}{more}, but neither {single} nor {index}"
    return (
        f"{folder} has {files[0]}{more}, but only safetensors are read: "
        "save_pretrained(…, safe_serialization=True) in transformers writes them"
    )


def tensors_of_file(path: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    try:
        with safe_open(path, framework="numpy") as file:
            for key in file.keys():  # noqa: SIM118 (it is not a dict)
                header = file.get_slice(key)
                dtype = header.get_dtype()
                if dtype not in DTYPES:
                    raise UserError(
                        f"{path}: {key} has dtype {dtype}, not one of {', '.join(DTYPES)}"
                    )
                shape = tuple(header.get_shape())
                tensors[hub_name(key)] = Tensor(path, key, shape, np.dtype(DTYPES[dtype]))
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read as safetensors: {error}") from None
    return tensors

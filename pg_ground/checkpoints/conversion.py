"""Converts a checkpoint between big_vision's `.npz`, Hugging Face directories and orbax
directories.
"""

import json
import logging

import jax

from pg_ground.checkpoints import export, peft, tensor_files, weights
from pg_ground.checkpoints.model_sizes import is_published
from pg_ground.checkpoints.scales import Scales, check_scales, read_scales, with_scales
from pg_ground.config import Model
from pg_ground.storage.downloads import tokenizer_file
from pg_ground.storage.paths import FilePath
from pg_ground.tokenizer import check_vocab_size
from pg_ground.tokenizer import load as load_tokenizer
from pg_ground.types import JsonObject, UserError

logger = logging.getLogger(__name__)

DTYPES = ("float32", "bfloat16", "float16")

TOKENIZER_FILES = (
    "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json",
)  # fmt: skip


TOKENIZER_CONFIG: JsonObject = {
    "tokenizer_class": "GemmaTokenizer",
    "processor_class": "PaliGemmaProcessor",
    "bos_token": "<bos>",
    "eos_token": "<eos>",
    "pad_token": "<pad>",
    "unk_token": "<unk>",
    "add_bos_token": False,
    "add_eos_token": False,
}
"""`tokenizer_config.json` for a sentencepiece model. `PaliGemmaProcessor` writes BOS itself."""


def convert(
    source: FilePath,
    target: FilePath,
    dtype: str,
    tokenizer: str = "",
    model_card: str = "",
    scales: Scales = Scales(),  # noqa: B008 (it cannot be changed)
    sizes: FilePath | None = None,
) -> None:
    """Writes the checkpoint at `source` to `target`, in the format that the name of `target`
    selects.

    Adapters are merged, and int8 matrices become float32. The final soft-cap of `source` is kept.

    Args:
      dtype: dtype of all tensors; "" keeps their dtypes.
      tokenizer: the sentencepiece model for a Hugging Face directory; "" takes the tokenizer of
        `source`.
      model_card: the text of README.md of a Hugging Face directory; "" for none.
      scales: what an `.npz` of unpublished sizes does not state.
      sizes: a configuration that states it. `scales` come first.

    Raises:
      UserError: `source` cannot be read, `target` exists, the format cannot express the model,
        the tokenizer has another number of tokens, or a value is NaN, infinite or too large for
        `dtype`.
    """
    if target.exists():
        raise UserError(f"{target} exists already: remove it, or choose another name")
    checkpoint = weights.open_checkpoint(source, keep_final_softcap=True)
    model = written_model(source, target, checkpoint, scales, sizes)
    tensors = checkpoint.tensors
    if not tensors:
        host = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
        on_host = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=host)
            for name, leaf in checkpoint.abstract.items()
        }
        arrays = checkpoint.read(on_host)
        tensors = {name: tensor_files.from_array(name, array) for name, array in arrays.items()}
    is_hub_directory = target.suffix not in (".npz", ".orbax")
    files = tokenizer_files(source, tokenizer, model.text.vocab_size) if is_hub_directory else {}
    if model_card and is_hub_directory:
        files["README.md"] = model_card.encode("utf-8")
    export.write(target, tensors, model, dtype, files)


def written_model(
    source: FilePath,
    target: FilePath,
    checkpoint: weights.Checkpoint,
    scales: Scales,
    sizes: FilePath | None,
) -> Model:
    """Returns the sizes that `convert` writes beside the tensors. The arguments are those of
    `convert`.
    """
    model = checkpoint.model.config
    is_stated = sizes is not None or scales != Scales()
    if checkpoint.has_scales:
        if is_stated:
            raise UserError(
                f"{source} states its query scale and its soft-caps: --sizes, --query_scale, "
                "--attn_softcap and --final_softcap are for an .npz"
            )
        return model
    if target.suffix == ".npz":
        if is_stated:
            raise UserError(f"{target}: an .npz does not store a query scale and soft-caps")
        return model
    check_scales(scales)
    if sizes is not None:
        in_file = read_scales(sizes, source, model)
        pairs = zip(scales, in_file, strict=True)
        scales = Scales(*(value if flag is None else flag for flag, value in pairs))
    return with_scales(source, model, scales, is_published(model))


def tokenizer_files(source: FilePath, tokenizer: str, vocab_size: int) -> dict[str, bytes]:
    """Returns the files with which transformers loads a tokenizer, by name.

    The files of a Hugging Face directory, or of an adapter or its base, are copied. For a run they
    hold the tokenizer of the run.

    Args:
      source: the checkpoint.
      tokenizer: a sentencepiece model that replaces the tokenizer of `source`; "" for none.
      vocab_size: number of tokens of the model.
    """
    config = {"tokenizer_config.json": (json.dumps(TOKENIZER_CONFIG, indent=1) + "\n").encode()}
    copies = _existing(source)
    if peft.is_adapter(source) and not copies:
        copies = _existing(weights.adapter_base(source))
    if copies and not tokenizer:
        return config | {name: path.read_bytes() for name, path in copies.items()}
    path = tokenizer or weights.tokenizer_path(source)
    if path is None:
        logger.warning(
            "%s has no tokenizer, so none is written: --tokenizer=FILE adds one for transformers",
            source,
        )
        return {}
    loaded = load_tokenizer(tokenizer_file(path, "--tokenizer"))
    check_vocab_size(loaded, vocab_size)
    return config | {"tokenizer.model": loaded.pieces.serialized_model_proto()}


def _existing(folder: FilePath) -> dict[str, FilePath]:
    """Returns the files of a tokenizer in a folder, by name."""
    return {name: folder / name for name in TOKENIZER_FILES if (folder / name).is_file()}

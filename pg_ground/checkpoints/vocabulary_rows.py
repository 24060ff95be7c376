"""Rows of a Hugging Face embedding beyond the vocabulary: `<image>`, filler rows, added tokens.

PaliGemma's vocabulary ends before `<image>`. This package cannot read the rows of tokens that were
added behind it, so it refuses them.
"""

import json
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pg_ground.checkpoints.hugging_face_config import FILLER_ROWS
from pg_ground.checkpoints.safetensors_files import HubTensor
from pg_ground.types import JsonDict, UserError, first_problems
from pg_ground.vocab import LOC_TOKENS, SEG_TOKENS

GEMMA_ROWS = 256_000
"""Entries of the plain Gemma vocabulary, before PaliGemma's loc and seg tokens."""

GEMMA_TABLE_ROWS = (GEMMA_ROWS, 256_128)
"""Numbers of rows that plain Gemma tables have. Rows beyond the vocabulary are never trained."""

SAMPLED_ROWS = 1024
"""Number of rows of the vocabulary to which the rows beyond it are compared."""

logger = logging.getLogger(__name__)


def check_rows(
    folder: Path, embedding: HubTensor, vocab_size: int | None, tokenizers: Sequence[Path]
) -> None:
    """Checks the number of rows of an embedding, and the tokens of the rows that are not read.

    A table without filler rows, or with `<image>` alone behind the vocabulary, is whole.

    Args:
      vocab_size: rows before `<image>`; None if `config.json` does not say it.
      tokenizers: folders that can hold the files of a tokenizer.

    Raises:
      UserError: tokens were added to the model, or rows of the vocabulary are missing.
    """
    rows = embedding.shape[0]
    if vocab_size is None or rows in GEMMA_TABLE_ROWS:
        return
    if rows == vocab_size - LOC_TOKENS - SEG_TOKENS:
        return
    extra = rows - vocab_size
    if extra < 0:
        raise UserError(
            f"{folder}: {embedding.key} has {rows} rows, but image_token_index of config.json is "
            f"{vocab_size}: {-extra} rows of the vocabulary are missing"
        )
    tokens: dict[int, str] = {}
    for tokenizer in tokenizers:
        tokens |= _tokens_of_tokenizer(tokenizer)
    added = {number: text for number, text in tokens.items() if vocab_size < number < rows}
    whole = f"model.resize_token_embeddings({vocab_size + 1}) in transformers leaves them out"
    if added:
        names = [f"{added[number]!r:.40}" for number in sorted(added)]
        raise UserError(
            f"{folder}: {embedding.key} has rows of {len(added)} tokens that were added behind "
            f"<image> ({vocab_size}), which cannot be read: {first_problems(names, ', ', 3)}; "
            f"{whole}, and save the tokenizer of the base model beside it"
        )
    if extra in (0, 1):
        return
    if extra != FILLER_ROWS and not tokens:
        raise UserError(
            f"{folder}: {embedding.key} has {rows} rows, {extra - 1} of them behind <image> "
            f"({vocab_size}): tokens were added, which cannot be read; {whole}"
        )
    _warn_of_trained_rows(folder, embedding, vocab_size)


def _tokens_of_tokenizer(folder: Path) -> dict[int, str]:
    """Returns the added tokens that the files of a tokenizer list, by number.

    PaliGemma's own files list `<image>`, so nothing means that there are no such files.
    """
    tokens = {number: text for text, number in _read(folder / "added_tokens.json").items()}
    listed = _read(folder / "tokenizer_config.json").get("added_tokens_decoder") or {}
    tokens |= {int(number): token["content"] for number, token in listed.items()}
    if not tokens:  # tokenizer.json has 30 MB
        listed = _read(folder / "tokenizer.json").get("added_tokens") or []
        tokens = {token["id"]: token["content"] for token in listed}
    return tokens


def _read(file: Path) -> JsonDict:
    """Returns the JSON object in `file`, which is empty if there is no file."""
    try:
        content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError as error:
        raise UserError(f"{file} is not JSON: {error!s:.100}") from None
    return content if isinstance(content, dict) else {}


def _warn_of_trained_rows(folder: Path, embedding: HubTensor, vocab_size: int) -> None:
    """Warns of rows behind `<image>` that differ from filler rows as tokens do.

    Filler rows are near zero, near the mean of all rows, or near each other. A token lies about as
    far from the mean as other tokens.
    """
    rows = embedding.shape[0]
    middle = max(0, (vocab_size - SAMPLED_ROWS) // 2)
    words = embedding.read(slice(middle, min(middle + SAMPLED_ROWS, vocab_size)))
    words = words.astype(np.float32)
    beyond = embedding.read(slice(vocab_size + 1, rows)).astype(np.float32)
    mean = words.mean(axis=0)
    typical = np.median(np.linalg.norm(words - mean, axis=1))
    centers = (np.zeros_like(mean), mean, np.median(beyond, axis=0))
    distance = np.min([np.linalg.norm(beyond - center, axis=1) for center in centers], axis=0)
    trained = np.flatnonzero(distance > typical / 2) + vocab_size + 1
    if len(trained):
        names = first_problems([str(number) for number in trained], ", ", 3)
        logger.warning(
            "%s: %d rows of %s behind <image> look like rows of tokens (%s): they are left out, "
            "and tokens that were added to the model are lost",
            folder, len(trained), embedding.key, names,
        )  # fmt: skip

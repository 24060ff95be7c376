"""Text ⇄ PaliGemma's token ids, by a sentencepiece model.

A model of plain Gemma gets the loc and seg pieces.
"""

from collections.abc import Sequence
from importlib import resources
from typing import NamedTuple

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from pg_ground.storage.paths import to_path
from pg_ground.types import UserError
from pg_ground.vocab import (
    BOS,
    EOS,
    LOC_TOKENS,
    NEWLINE,
    PAD,
    SEG_TOKENS,
    UNK,
    Vocab,
    vocab_of_size,
)

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
"""How sentencepiece writes a space inside a piece."""


class Tokenizer(NamedTuple):
    """A loaded model and its special ids. It is safe to use from several threads."""

    pieces: sentencepiece.SentencePieceProcessor
    vocab: Vocab

    def text(self, text: str) -> list[int]:
        """Returns the ids of `text` alone: no BOS, no newline, no EOS."""
        return self.pieces.Encode(text)

    def prefix(self, text: str) -> list[int]:
        """Returns BOS, the ids of `text` and the newline that separates prefix from suffix.

        The newline is tokenised separately, as in big_vision, so it never merges with `text`.
        """
        return [BOS, *self.text(text), NEWLINE]

    def suffix(self, text: str) -> list[int]:
        """Returns the ids of `text` and EOS."""
        return [*self.text(text), EOS]

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text up to the first EOS, without PAD, BOS and UNK.

        Loc and seg tokens are written as `<locDDDD>` and `<segDDD>`.
        """
        ids = [int(i) for i in ids]
        end = ids.index(EOS) if EOS in ids else len(ids)
        return self.pieces.Decode([i for i in ids[:end] if i not in (PAD, BOS, UNK)])


def load(path: str = "") -> Tokenizer:
    """Returns the tokenizer of the model file at `path`; "" is the small one of the package.

    A model without loc pieces counts as plain Gemma's. `<loc0000>`..`<loc1023>` and
    `<seg000>`..`<seg127>` are then added after its last piece, as in big_vision.

    Raises:
      UserError: the file does not exist, is not a sentencepiece model, or does not have PaliGemma's
        special ids.
    """
    name = path or "the package's tiny.model"
    model = _bytes_of(path)
    pieces = _read(model, name)
    if pieces.PieceToId("<loc0000>") == UNK:
        pieces = _read(with_loc_pieces(model), name)
    vocab = vocab_of_size(pieces.GetPieceSize())
    _check_layout(pieces, vocab, name)
    return Tokenizer(
        pieces,
        vocab._replace(
            separators=_ids_of(pieces, (";", SPACE + ";")), spaces=_ids_of(pieces, (SPACE,))
        ),
    )


def check_vocab_size(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raises UserError if the tokenizer does not have the `vocab_size` tokens of the model."""
    if tokenizer.vocab.size != vocab_size:
        raise UserError(
            f"the tokenizer (config.data.tokenizer, or --tokenizer of predict) has "
            f"{tokenizer.vocab.size} tokens, but the model (model.text.vocab_size) has "
            f"{vocab_size}: use the tokenizer.model of the model's own checkpoint"
        )


def with_loc_pieces(model: bytes) -> bytes:
    """Returns the sentencepiece model with the 1,152 loc and seg pieces after its pieces.

    The new pieces are user-defined and have score 0.
    """
    # protobuf makes the class at import
    message = sentencepiece_model_pb2.ModelProto  # pyright: ignore[reportAttributeAccessIssue]
    proto = message.FromString(model)
    names = [f"<loc{i:04d}>" for i in range(LOC_TOKENS)] + [
        f"<seg{i:03d}>" for i in range(SEG_TOKENS)
    ]
    for name in names:
        proto.pieces.add(piece=name, score=0.0, type=proto.SentencePiece.USER_DEFINED)
    return proto.SerializeToString()


def _bytes_of(path: str) -> bytes:
    if not path:
        return (resources.files("pg_ground.assets") / "tiny.model").read_bytes()
    try:
        return to_path(path, "config.data.tokenizer").read_bytes()
    except OSError as e:
        raise UserError(
            f"tokenizer {path}: {e.strerror or e}; data.tokenizer names a sentencepiece .model file"
        ) from e


def _read(model: bytes, name: str) -> sentencepiece.SentencePieceProcessor:
    pieces = sentencepiece.SentencePieceProcessor()
    try:
        loaded = pieces.LoadFromSerializedProto(model) if model else False
    except RuntimeError:
        loaded = False
    if not loaded:
        raise UserError(
            f"tokenizer {name}: {len(model)} bytes that are not a sentencepiece model: "
            "use the tokenizer.model of the model's own checkpoint"
        )
    return pieces


def _check_layout(pieces: sentencepiece.SentencePieceProcessor, vocab: Vocab, name: str) -> None:
    special_ids = (
        pieces.pad_id(),
        pieces.eos_id(),
        pieces.bos_id(),
        pieces.unk_id(),
        pieces.PieceToId("\n"),
    )
    if special_ids != (PAD, EOS, BOS, UNK, NEWLINE):
        raise UserError(
            f"tokenizer {name}: pad, eos, bos, unk and newline are ids "
            f"{', '.join(map(str, special_ids))}, "
            f"but PaliGemma has {PAD}, {EOS}, {BOS}, {UNK}, {NEWLINE}"
        )
    for first, count, form in (
        (vocab.loc0, LOC_TOKENS, "<loc{:04d}>"),
        (vocab.seg0, SEG_TOKENS, "<seg{:03d}>"),
    ):
        for i in range(count):
            piece = form.format(i)
            if first < 0 or pieces.Encode(piece) != [first + i]:
                raise UserError(
                    f"tokenizer {name}: {piece} is not piece {first + i} of {vocab.size}; "
                    "the last 1,152 must be <loc0000>..<loc1023>, <seg000>..<seg127> as in "
                    "paligemma_tokenizer.model (or none, as in plain Gemma)"
                )


def _ids_of(pieces: sentencepiece.SentencePieceProcessor, names: Sequence[str]) -> tuple[int, ...]:
    """Returns the ids of the `names` that are pieces of the model."""
    ids = (pieces.PieceToId(name) for name in names)
    return tuple(i for i in ids if i != UNK)

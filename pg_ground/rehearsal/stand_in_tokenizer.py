"""A tokenizer with PaliGemma's number of pieces and its ids, for a rehearsal without the real one.

It reads and writes the text of the package's small tokenizer. The other pieces are never used.
"""

from importlib import resources

from sentencepiece import sentencepiece_model_pb2

from pg_ground.tokenizer import with_loc_pieces
from pg_ground.vocab import LOC_TOKENS, SEG_TOKENS


def stand_in_tokenizer(vocab_size: int) -> bytes:
    """Returns a sentencepiece model of `vocab_size` pieces. The last 1,152 are loc and seg tokens,
    so that every special id is PaliGemma's."""
    # protobuf makes the class at import
    message = sentencepiece_model_pb2.ModelProto  # pyright: ignore[reportAttributeAccessIssue]
    proto = message.FromString((resources.files("pg_ground.assets") / "tiny.model").read_bytes())
    text_pieces = len(proto.pieces) - LOC_TOKENS - SEG_TOKENS
    del proto.pieces[text_pieces:]
    for number in range(vocab_size - LOC_TOKENS - SEG_TOKENS - text_pieces):
        proto.pieces.add(piece=f"<filler{number}>", score=0.0, type=proto.SentencePiece.UNUSED)
    return with_loc_pieces(proto.SerializeToString())

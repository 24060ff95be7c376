"""PaliGemma's token ids: one value that says where every special id lies."""

from typing import NamedTuple

PAD = 0
EOS = 1
BOS = 2
UNK = 3
NEWLINE = 108

LOC_TOKENS = 1024
SEG_TOKENS = 128
LOC_MAX = LOC_TOKENS - 1

CONTROL = (PAD, BOS, UNK)
"""Ids that no completion may contain. EOS is the one control id a completion ends with."""


class Vocab(NamedTuple):
    """Where PaliGemma's special ids lie in a vocabulary of `size` entries.

    The order is big_vision's: the text vocabulary, then `<loc0000>`..`<loc1023>`, then
    `<seg000>`..`<seg127>`. The published models have `size` 257,152, `loc0` 256,000 and `seg0`
    257,024. Hugging Face's 64 filler rows and its `<image>` id come after these and do not exist
    here, so neither can be sampled.
    """

    size: int
    loc0: int
    seg0: int
    separators: tuple[int, ...] = ()
    """Ids that read ";": they stand between two answers, as in `<loc>x4 cat ; <loc>x4 dog`."""
    spaces: tuple[int, ...] = ()
    """Ids of a lone space: sentencepiece leaves one between " ;" and the next `<loc>`."""


def vocab_of_size(size: int) -> Vocab:
    """Returns the layout of a vocabulary with `size` entries whose last 1,152 are loc and seg
    tokens."""
    return Vocab(size=size, loc0=size - LOC_TOKENS - SEG_TOKENS, seg0=size - SEG_TOKENS)

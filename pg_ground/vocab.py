"""PaliGemma's special token ids and the layout of its vocabulary."""

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
"""Ids that a completion must not contain. EOS is a control id too, but it ends a completion."""


class Vocab(NamedTuple):
    """The positions of PaliGemma's special ids in a vocabulary of `size` entries.

    The order is big_vision's: text, then `<loc0000>`..`<loc1023>`, then `<seg000>`..`<seg127>`. The
    published models have `size` 257,152, `loc0` 256,000 and `seg0` 257,024. Hugging Face's filler
    rows and its `<image>` id come after these ids. They do not exist here, so they cannot be
    sampled.
    """

    size: int
    loc0: int
    seg0: int
    separators: tuple[int, ...] = ()
    """Ids of ";", which separates two answers, as in `<loc>x4 cat ; <loc>x4 dog`."""
    spaces: tuple[int, ...] = ()
    """Ids of a single space. sentencepiece writes one between " ;" and the next `<loc>`."""


def vocab_of_size(size: int) -> Vocab:
    """Returns the layout of a vocabulary whose last 1,152 entries are loc and seg tokens."""
    return Vocab(size=size, loc0=size - LOC_TOKENS - SEG_TOKENS, seg0=size - SEG_TOKENS)

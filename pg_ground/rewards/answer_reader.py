"""Reads answers (boxes, points, names, masks) from the token ids of completions, inside `jit`."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from pg_ground import boxes
from pg_ground.types import BOXES, TEXT, Answer, Array, Boxes, Points
from pg_ground.vocab import EOS, LOC_TOKENS, PAD, SEG_TOKENS, Vocab

CODES = 16
"""Codes of a mask, as `<seg>` tokens in the segment of its box."""

DecodeMasks = Callable[[Int[Array, "... 16"]], Float[Array, "... h w"]]
"""Codes to masks inside their boxes; values above 0 are the object. `models.vqvae.decode` with its
parameters is one."""


def read_answer(
    tokens: Int[Array, "B G T"],
    mask: Bool[Array, "B G T"],
    target: Int[Array, " B"],
    names: Int[Array, "B C W"],
    vocab: Vocab,
    decode_masks: DecodeMasks | None = None,
    mask_size: int = 0,
) -> Answer:
    """Returns the boxes, points and masks that completions write as loc and seg tokens.

    Separators (";") cut a completion into segments. A segment with exactly four loc tokens is a
    box (y1 x1 y2 x2), one with exactly two is a point (y x). The loc tokens of any other segment
    are stray. The other tokens of a segment, without seg tokens, are its name, which is looked up
    among `names`. If a question has at most one name, every answer gets that name. A box with at
    least 16 seg tokens has a mask: the first 16 are its codes.

    Args:
      decode_masks: decodes the codes of masks. None reads no masks.
      mask_size: cells along each side of the masks, which cover the whole image like `Gold.masks`.
    """
    length = tokens.shape[-1]
    segments = _cut(tokens, mask, vocab)
    locs = _count(segments, segments.loc)
    yxyx = boxes.decode_loc(_in_order(segments, segments.loc, tokens - vocab.loc0, 4))
    label = _labels(segments, tokens, names)
    is_box, is_point = locs == 4, locs == 2
    box_slots = (length + 1) // 5  # four loc tokens and a separator
    predicted = Boxes(*_to_slots(is_box, box_slots, yxyx, label))
    masks = jnp.zeros((*predicted.valid.shape, 0, 0), bool)
    if decode_masks is not None:
        codes = _in_order(segments, segments.code, tokens - vocab.seg0, CODES)
        has_mask = is_box & (_count(segments, segments.code) >= CODES)
        codes, has_mask, _ = _to_slots(is_box, box_slots, codes, has_mask)
        most = (length + 1) // (4 + CODES + 1)
        masks = _decode(decode_masks, codes, has_mask, predicted.yxyx, max(most, 1), mask_size)
    finished = jnp.any(mask & (tokens == EOS), axis=-1)
    grammatical = _is_list_of_locations(segments, locs, target, names)
    return Answer(
        boxes=predicted,
        points=Points(*_to_slots(is_point, (length + 1) // 3, yxyx[..., :2], label)),
        masks=masks,
        stray=jnp.sum(jnp.where(is_box | is_point, 0, locs), axis=-1),
        finished=finished,
        grammatical=finished & (grammatical | (target == TEXT)[:, None]),
        tokens=tokens,
        mask=mask,
    )


def confidence(
    tokens: Int[Array, "B G T"],
    mask: Bool[Array, "B G T"],
    logps: Float[Array, "B G T"],
    vocab: Vocab,
) -> Float[Array, "B G K"]:
    """Returns the likelihood of the name behind each box, in [0, 1].

    The slots are those of `read_answer`; an unused slot has 0. Detections are ranked by this value
    (pix2seq, arXiv 2109.10852; PaliGemma 2, arXiv 2412.03555, appendix C). The likelihood of the
    box itself is no good rank, because it is shared among neighbouring bins. It is used only for a
    box without a name. The value is the geometric mean over the tokens of the name: the product
    would make long names unlikely, and boxes with the same name would rank alike.

    Args:
      logps: as in `Rollout`. A greedy rollout has the model's own, at temperature 1.
    """
    segments = _cut(tokens, mask, vocab)
    has_name = _count(segments, segments.name) > 0

    def total(values: Array) -> Array:
        of_name, of_loc = (
            jnp.sum(jnp.where(segments.within & flags[..., None], values[..., None], 0), -2)
            for flags in (segments.name, segments.loc)
        )
        return jnp.where(has_name, of_name, of_loc)

    likelihood = jnp.exp(total(logps) / jnp.maximum(total(mask), 1))
    is_box = _count(segments, segments.loc) == 4
    return _to_slots(is_box, (tokens.shape[-1] + 1) // 5, likelihood)[0]


class _Segments(NamedTuple):
    """Completions, cut into segments at their separators."""

    loc: Bool[Array, "B G T"]
    """The token is a loc token."""
    code: Bool[Array, "B G T"]
    """The token is a seg token."""
    name: Bool[Array, "B G T"]
    """The token is any other token of a segment."""
    index: Int[Array, "B G T"]
    """Number of the segment that the token belongs to."""
    within: Bool[Array, "B G T s"]
    """The token belongs to segment s."""


def _cut(tokens: Int[Array, "B G T"], mask: Bool[Array, "B G T"], vocab: Vocab) -> _Segments:
    loc = mask & (tokens >= vocab.loc0) & (tokens < vocab.loc0 + LOC_TOKENS)
    code = mask & (tokens >= vocab.seg0) & (tokens < vocab.seg0 + SEG_TOKENS)
    separator = mask & _is_in(tokens, vocab.separators)
    index = jnp.cumsum(separator, axis=-1)
    within = (index[..., None] == jnp.arange(tokens.shape[-1])) & mask[..., None]
    name = mask & ~loc & ~code & ~separator & (tokens != EOS)
    segments = _Segments(loc, code, name, index, within)
    # sentencepiece leaves a lone space between a separator and the next box: it is no name
    leading_space = _is_in(tokens, vocab.spaces) & (_rank(segments, loc) == 0)
    return segments._replace(name=name & ~leading_space)


def _count(segments: _Segments, flags: Bool[Array, "B G T"]) -> Int[Array, "B G s"]:
    """Returns the number of flagged tokens in each segment."""
    return jnp.sum(segments.within & flags[..., None], axis=-2)


def _rank(segments: _Segments, flags: Bool[Array, "B G T"]) -> Int[Array, "B G T"]:
    """Returns the number of flagged tokens before each token in its segment."""
    totals = _count(segments, flags)
    before_segment = jnp.take_along_axis(
        jnp.cumsum(totals, axis=-1) - totals,
        segments.index.clip(max=flags.shape[-1] - 1),
        axis=-1,
    )
    return jnp.cumsum(flags, axis=-1) - flags - before_segment


def _in_order(
    segments: _Segments, flags: Bool[Array, "B G T"], values: Int[Array, "B G T"], count: int
) -> Int[Array, "B G s n"]:
    """Returns the values of the first `count` flagged tokens of each segment; 0 if it has fewer."""
    values = jnp.where(flags, values, 0)
    rank = _rank(segments, flags)
    flagged = segments.within & flags[..., None]
    columns = [
        jnp.sum(jnp.where(flagged & (rank == i)[..., None], values[..., None], 0), -2)
        for i in range(count)
    ]
    return jnp.stack(columns, -1)


def _labels(
    segments: _Segments, tokens: Int[Array, "B G T"], names: Int[Array, "B C W"]
) -> Int[Array, "B G s"]:
    """Returns the index of each segment's name among `names`, -1 if it is not there.

    The index is 0 for every segment if the question has at most one name.
    """
    word = jnp.clip(_rank(segments, segments.name), 0, names.shape[-1] - 1)
    expected = jnp.take_along_axis(names[:, None, None], word[:, :, :, None, None], axis=-1)
    equal = (expected[..., 0] == tokens[..., None]).astype(jnp.int32)  # [B, G, T, C]
    in_name = (segments.within & segments.name[..., None]).astype(jnp.int32)
    equal_words = jnp.einsum("BGTs,BGTC->BGsC", in_name, equal)
    words = _count(segments, segments.name)[..., None]
    lengths = jnp.sum(names != PAD, axis=-1)[:, None, None]
    matches = (equal_words == words) & (words == lengths) & (lengths > 0)
    label = jnp.where(matches.any(-1), jnp.argmax(matches, axis=-1), -1)
    return jnp.where(_name_count(names)[:, None, None] <= 1, 0, label)


def _name_count(names: Int[Array, "B C W"]) -> Int[Array, " B"]:
    return jnp.any(names != PAD, axis=-1).sum(axis=-1)


def _is_list_of_locations(
    segments: _Segments,
    locs: Int[Array, "B G s"],
    target: Int[Array, " B"],
    names: Int[Array, "B C W"],
) -> Bool[Array, "B G"]:
    """Returns whether each segment is a location of the asked kind.

    Text must follow the location if the question has a name, and only then.
    """
    text = segments.name | segments.code
    expected_locs = jnp.where(target == BOXES, 4, 2)[:, None, None]
    has_text = _count(segments, text) > 0
    complete = (locs == expected_locs) & (has_text == (_name_count(names) > 0)[:, None, None])
    segment_count = segments.index[..., -1:] + 1
    is_used = jnp.arange(locs.shape[-1]) < segment_count
    loc_after_text = jnp.any(segments.loc & (_rank(segments, text) > 0), axis=-1)
    return jnp.all(complete | ~is_used, axis=-1) & ~loc_after_text


def _is_in(tokens: Int[Array, "..."], ids: tuple[int, ...]) -> Bool[Array, "..."]:
    return jnp.isin(tokens, jnp.array(ids, jnp.int32))


def _to_slots(used: Bool[Array, "B G s"], slots: int, *values: Array) -> tuple[Array, ...]:
    """Returns the values `[B, G, s, …]` of used segments in order, and which slots hold one.

    There are at most `slots` slots, and at least one. Values of unused slots are 0.
    """
    order = jnp.argsort(~used, axis=-1, stable=True)[..., : max(slots, 1)]
    taken = jnp.take_along_axis(used, order, axis=-1)
    return *(_take(value, order, taken) for value in values), taken


def _take(value: Array, order: Int[Array, "B G K"], taken: Bool[Array, "B G K"]) -> Array:
    """Returns the entries `order` of `value` along its third axis, 0 if not `taken`."""
    trailing = (1,) * (value.ndim - 3)
    entries = jnp.take_along_axis(value, order.reshape(*order.shape, *trailing), axis=2)
    return jnp.where(taken.reshape(*taken.shape, *trailing), entries, jnp.zeros((), value.dtype))


def _decode(
    decode_masks: DecodeMasks,
    codes: Int[Array, "B G K 16"],
    has_mask: Bool[Array, "B G K"],
    yxyx: Float[Array, "B G K 4"],
    most: int,
    mask_size: int,
) -> Bool[Array, "B G K M M"]:
    """Returns the masks of boxes over the whole image; all False for a box without a mask.

    Args:
      most: largest number of masks that fit into a completion. Only this number of slots is
        decoded. If all boxes have masks, four of five slots for boxes are empty.
    """
    codes, yxyx, _ = _to_slots(has_mask, most, codes, yxyx)
    cells = boxes.paste_masks(decode_masks(codes), yxyx, mask_size)
    rank = jnp.cumsum(has_mask, axis=-1) - 1
    return _take(cells, jnp.clip(rank, 0, cells.shape[2] - 1), has_mask)

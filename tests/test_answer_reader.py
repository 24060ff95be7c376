"""Tests of the reader of token ids: locations, names, confidences and decoded masks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from completions import (
    BOX,
    FAR,
    LENGTH,
    OTHER,
    TOKENS,
    TWO,
    loc,
    make_batch,
    make_rollout,
    name_ids,
    read,
    read_jitted,
)

from pg_ground import boxes
from pg_ground.config import Grpo, RewardSettings
from pg_ground.evals import segmentation
from pg_ground.rewards.answer_reader import CODES, confidence, read_answer
from pg_ground.rewards.device_rewards import REWARDS
from pg_ground.training.rollout_worker import make_score
from pg_ground.types import BOXES, POINTS, Boxes, Points, Rollout
from pg_ground.vocab import LOC_MAX


def bins_of(boxes: Boxes) -> list[list[int]]:
    """Returns the used boxes of the only completion, as bins."""
    return to_bins(boxes.yxyx, boxes.valid)


def points_of(points: Points) -> list[list[int]]:
    return to_bins(points.yx, points.valid)


def to_bins(fractions: jax.Array, valid: jax.Array) -> list[list[int]]:
    used = np.asarray(fractions[0, 0])[np.asarray(valid[0, 0])]
    return np.round(used * LOC_MAX).astype(int).tolist()


def labels_of(slots: Boxes | Points) -> list[int]:
    return np.asarray(slots.label[0, 0])[np.asarray(slots.valid[0, 0])].tolist()


# locations and names


def test_one_box():
    answer = read(loc(*BOX) + " cat")
    assert bins_of(answer.boxes) == [list(BOX)] and labels_of(answer.boxes) == [0]
    np.testing.assert_array_equal(answer.boxes.yxyx[0, 0, 0], jnp.array(BOX, jnp.float32) / LOC_MAX)
    assert (
        not answer.points.valid.any()
        and answer.stray == 0
        and answer.finished
        and answer.grammatical
    )


def test_two_boxes_with_names_in_either_order():
    text = f"{loc(*BOX)} red circle ; {loc(*OTHER)} cat"
    answer = read(text, names=("red circle", "cat"))
    assert bins_of(answer.boxes) == [list(BOX), list(OTHER)] and labels_of(answer.boxes) == [0, 1]
    assert answer.grammatical and answer.stray == 0
    assert labels_of(read(text, names=("cat", "red circle")).boxes) == [1, 0]


def test_separators_with_and_without_spaces():
    for separator in (" ; ", ";", " ;", "; "):
        answer = read(f"{loc(*BOX)} cat{separator}{loc(*OTHER)} cat")
        assert bins_of(answer.boxes) == [list(BOX), list(OTHER)], separator
        assert answer.grammatical, separator


def test_one_point_and_two():
    answer = read(f"{loc(10, 20)} cat", target=POINTS)
    assert points_of(answer.points) == [[10, 20]] and labels_of(answer.points) == [0]
    assert not answer.boxes.valid.any() and answer.stray == 0 and answer.grammatical
    answer = read(f"{loc(10, 20)} cat ; {loc(1023, 0)} dog", target=POINTS, names=("dog", "cat"))
    assert points_of(answer.points) == [[10, 20], [1023, 0]] and labels_of(answer.points) == [1, 0]


def test_answers_without_names_where_the_question_has_none():
    answer = read(f"{loc(*BOX)} ; {loc(*OTHER)}", names=())
    assert (
        bins_of(answer.boxes) == [list(BOX), list(OTHER)]
        and labels_of(answer.boxes) == [0, 0]
        and answer.grammatical
    )
    assert not read(f"{loc(*BOX)} cat", names=()).grammatical
    assert not read(loc(*BOX), names=("cat",)).grammatical


@pytest.mark.parametrize("count", [1, 3, 5, 8])
def test_locs_that_are_neither_box_nor_point_are_stray(count):
    answer = read(f"{loc(*range(count))} cat")
    assert answer.stray == count and not answer.grammatical
    assert not answer.boxes.valid.any() and not answer.points.valid.any()


def test_a_stray_segment_leaves_the_others_alone():
    answer = read(f"{loc(1, 2, 3)} cat ; {loc(*BOX)} cat ; {loc(9)} cat")
    assert bins_of(answer.boxes) == [list(BOX)] and answer.stray == 4 and not answer.grammatical


def test_a_reversed_box_is_read_as_it_stands():
    """It is a prediction, worth 0: see below."""
    answer = read(f"{loc(500, 900, 100, 200)} cat")
    assert bins_of(answer.boxes) == [[500, 900, 100, 200]] and answer.grammatical


def test_an_unfinished_completion_is_read_but_not_grammatical():
    answer = read(f"{loc(*BOX)} cat", unfinished=True)
    assert bins_of(answer.boxes) == [list(BOX)] and not answer.finished and not answer.grammatical


@pytest.mark.parametrize(
    "text",
    [
        f"a cat {loc(*BOX)} cat",
        f"cat{loc(*BOX)}",
        f"{loc(100, 200)} cat {loc(500, 900)}",
        f"{loc(*BOX)} cat ; the {loc(*OTHER)} cat",
    ],
)
def test_text_before_a_loc_is_ungrammatical_but_its_box_is_read(text):
    answer = read(text)
    assert bins_of(answer.boxes)[0] == list(BOX) and answer.stray == 0 and not answer.grammatical


@pytest.mark.parametrize(
    "text",
    [
        f"{loc(*BOX)} cat ;",
        f"; {loc(*BOX)} cat",
        f"{loc(*BOX)} cat ; ; {loc(*BOX)} cat",
        "cat",
        ";",
    ],
)
def test_empty_segments_are_ungrammatical(text):
    assert not read(text).grammatical


def test_an_answer_of_the_other_kind_is_read_but_ungrammatical():
    answer = read(f"{loc(10, 20)} cat", target=BOXES)
    assert (
        points_of(answer.points) == [[10, 20]]
        and not answer.boxes.valid.any()
        and answer.stray == 0
        and not answer.grammatical
    )
    answer = read(f"{loc(*BOX)} cat", target=POINTS)
    assert (
        bins_of(answer.boxes) == [list(BOX)]
        and not answer.points.valid.any()
        and not answer.grammatical
    )


def test_an_unknown_name_among_two_is_nobodys():
    names = ("red circle", "red")
    for name, label in (
        ("red circle", 0),
        ("red", 1),
        ("circle", -1),
        ("red circle red", -1),
        ("blue", -1),
        ("circle red", -1),
    ):
        assert labels_of(read(f"{loc(*BOX)} {name}", names=names).boxes) == [label], name
    assert labels_of(read(loc(*BOX), names=names).boxes) == [-1]


def test_where_there_is_one_name_every_answer_bears_it():
    for name in (" cat", " dog", ""):
        assert labels_of(read(loc(*BOX) + name).boxes) == [0]


def test_an_empty_completion_says_nothing():
    answer = read("")
    assert answer.finished and not answer.grammatical and answer.stray == 0
    assert not answer.boxes.valid.any() and not answer.points.valid.any()


def test_a_completion_without_a_single_token_is_not_finished():
    tokens = jnp.zeros((1, 1, LENGTH), jnp.int32)
    answer = read_jitted(
        tokens, jnp.zeros(tokens.shape, bool), jnp.array([BOXES]), name_ids(("cat",)), TOKENS.vocab
    )
    assert (
        not answer.finished
        and not answer.grammatical
        and not answer.boxes.valid.any()
        and answer.stray == 0
    )


def test_what_lies_behind_the_mask_is_not_read():
    rollout = make_rollout(f"{loc(*BOX)} cat")
    behind = jnp.where(rollout.mask, rollout.tokens, TOKENS.vocab.loc0 + 7)
    plain, full = (
        read_jitted(tokens, rollout.mask, jnp.array([BOXES]), name_ids(("cat",)), TOKENS.vocab)
        for tokens in (rollout.tokens, behind)
    )
    jax.tree.map(np.testing.assert_array_equal, plain._replace(tokens=full.tokens), full)


def test_completions_of_a_group_and_prompts_of_a_batch_are_read_apart():
    texts = [
        f"{loc(*BOX)} cat",
        f"{loc(10, 20)} cat",
        "",
        f"{loc(1, 2, 3)} cat ; {loc(*OTHER)} dog",
    ]
    rollout = make_rollout(*texts)
    two = Rollout(*(jnp.concatenate([x, x[:, ::-1]]) for x in rollout))
    names = jnp.concatenate([name_ids(("cat", "dog")), name_ids(("dog", "cat"))])
    whole = read_jitted(two.tokens, two.mask, jnp.array([BOXES, POINTS]), names, TOKENS.vocab)
    for b, (target, order, named) in enumerate(
        ((BOXES, texts, ("cat", "dog")), (POINTS, texts[::-1], ("dog", "cat")))
    ):
        for g, text in enumerate(order):
            single = read(text, target=target, names=named)
            same = jax.tree.map(lambda a, w: bool((a[0, 0] == w[b, g]).all()), single, whole)  # noqa: B023
            assert all(jax.tree.leaves(same)), same


def test_as_many_boxes_as_fit_are_read():
    """Of 32 tokens the shortest boxes with names need 6 each, EOS one more."""
    text = " ; ".join(f"{loc(*BOX)} cat" for _ in range(4))
    rollout = make_rollout(text)
    assert bins_of(read(text).boxes) == [list(BOX)] * 4 and int(rollout.mask.sum()) > 24
    full = loc(*range(28))
    assert read(full).stray == 28


# confidences

confidence_jitted = jax.jit(confidence, static_argnums=3)


def confidences(rollout: Rollout) -> np.ndarray:
    """Returns the confidences of the only completion, `[K]`."""
    return np.asarray(
        confidence_jitted(rollout.tokens, rollout.mask, rollout.logps, TOKENS.vocab)[0, 0]
    )


def with_random_logps(text: str) -> tuple[Rollout, np.ndarray]:
    """Returns a completion with a different log-probability for each token, and these by token."""
    rollout = make_rollout(text)
    logps = -np.random.default_rng(len(text)).uniform(0.01, 2, LENGTH).astype(np.float32)
    logps = np.where(rollout.mask[0, 0], logps, 0)
    return rollout._replace(logps=jnp.asarray(logps)[None, None]), logps


def test_the_confidence_of_a_box_is_the_likelihood_of_its_name():
    segments = [f"{loc(*BOX)} red circle", " ;", f" {loc(*OTHER)} cat", " ;", f" {loc(*FAR)}"]
    rollout, logps = with_random_logps("".join(segments))
    tokens = np.asarray(rollout.tokens[0, 0])
    is_loc = (tokens >= TOKENS.vocab.loc0) & (tokens < TOKENS.vocab.seg0)
    first, second, third = np.flatnonzero(is_loc).reshape(3, 4)
    ends = np.flatnonzero(np.isin(tokens, TOKENS.vocab.separators))
    names = [np.arange(first[-1] + 1, ends[0]), np.arange(second[-1] + 1, ends[1])]
    assert len(names[0]) > len(names[1]) >= 1
    expected = [np.exp(logps[part].mean()) for part in (*names, third)]
    scores = confidences(rollout)
    np.testing.assert_allclose(scores[:3], expected, rtol=1e-6)
    assert not scores[3:].any()


def test_confidences_are_in_the_slots_of_the_boxes():
    """A point and a broken answer between two boxes have none."""
    rollout, _ = with_random_logps(
        f"{loc(*BOX)} cat ; {loc(1, 2)} cat ; {loc(1, 2, 3)} cat ; {loc(*OTHER)} dog"
    )
    answer = read_jitted(
        rollout.tokens, rollout.mask, jnp.array([BOXES]), name_ids(("cat", "dog")), TOKENS.vocab
    )
    valid = answer.boxes.valid[0, 0]
    assert int(valid.sum()) == 2
    np.testing.assert_array_equal(confidences(rollout) > 0, valid)


def test_the_confidence_moves_with_its_box():
    """The log-probability is a function of the token, and separators are the same in any order."""
    of_token = -np.random.default_rng(0).uniform(0.01, 2, TOKENS.vocab.size).astype(np.float32)
    pieces = [f"{loc(*BOX)} red circle", f"{loc(*OTHER)} cat", f"{loc(*FAR)} dog"]
    by_order = {}
    for order in ([0, 1, 2], [2, 0, 1], [1, 2, 0]):
        rollout = make_rollout(" ; ".join(pieces[i] for i in order))
        logps = jnp.where(rollout.mask, of_token[np.asarray(rollout.tokens)], 0)
        scores = confidences(rollout._replace(logps=logps))
        by_order[tuple(order)] = [scores[order.index(i)] for i in range(3)]
    for scores in by_order.values():
        np.testing.assert_allclose(scores, by_order[0, 1, 2], rtol=1e-6)


CODE_TEXT = "".join(f"<seg{code:03d}>" for code in range(CODES))


def test_the_codes_of_a_mask_are_no_name():
    for name in (" cat", ""):
        rollout, logps = with_random_logps(f"{loc(*BOX)}{CODE_TEXT}{name}")
        part = logps[20 : int(rollout.mask.sum()) - 1] if name else logps[:4]
        np.testing.assert_allclose(confidences(rollout)[0], np.exp(part.mean()), rtol=1e-6)


# masks


def half_masks(codes: jax.Array) -> jax.Array:
    """A fake decoder. The first code chooses the half of the box that is the object: 0 is the upper
    half, 1 the left half, 2 the whole box, any other code nothing."""
    rows, columns = jnp.meshgrid(jnp.arange(64), jnp.arange(64), indexing="ij")
    masks = jnp.stack([rows < 32, columns < 32, rows >= 0, rows < 0])
    return jnp.where(masks[jnp.clip(codes[..., 0], 0, 3)], 1.0, -1.0)


def codes(first: int) -> str:
    return f"<seg{first:03d}>" + "<seg007>" * (CODES - 1)


def read_masks(*texts: str, mask_size: int = 32, decode=half_masks, names=("cat", "dog")):
    """Returns the answer of completions of 96 tokens, with decoded masks."""
    rollout = make_rollout(*texts, length=96)

    @jax.jit
    def run(rollout: Rollout):
        return read_answer(
            rollout.tokens,
            rollout.mask,
            jnp.array([BOXES]),
            name_ids(names),
            TOKENS.vocab,
            decode,
            mask_size,
        )

    return run(rollout)


def cells(yxyx: tuple[float, ...], mask_size: int = 32) -> np.ndarray:
    """Returns the cells whose centres lie in a box (in bins)."""
    y1, x1, y2, x2 = np.array(yxyx) / LOC_MAX
    middle = (np.arange(mask_size) + 0.5) / mask_size
    return ((y1 < middle) & (middle < y2))[:, None] & ((x1 < middle) & (middle < x2))


def test_decoded_masks_lie_in_their_boxes():
    box = (0, 512, 512, 1023)  # the upper right quarter
    answer = read_masks(*(f"{loc(*box)}{codes(first)} cat" for first in range(4)))
    assert answer.masks.shape == (1, 4, *answer.boxes.valid.shape[2:], 32, 32)
    upper, left, whole, nothing = np.asarray(answer.masks[0, :, 0])
    np.testing.assert_array_equal(upper, cells((0, 512, 256, 1023)))
    np.testing.assert_array_equal(left, cells((0, 512, 512, 767)))
    np.testing.assert_array_equal(whole, cells(box))
    assert not nothing.any() and not answer.masks[0, :, 1:].any()


def test_masks_are_in_the_slots_of_their_boxes():
    """Between the masks are boxes without codes or with too few, points and stray tokens."""
    text = (
        f"{loc(*OTHER)} cat ; {loc(*BOX)}{codes(2)} cat ; {loc(1, 2)} cat ; {loc(*FAR)}<seg002> cat"
        f" ; {loc(1, 2, 3)} cat ; {loc(*OTHER)}{codes(2)} dog"
    )
    answer = read_masks(text)
    assert bins_of(answer.boxes) == [list(OTHER), list(BOX), list(FAR), list(OTHER)]
    assert labels_of(answer.boxes) == [0, 0, 0, 1]
    masks = np.asarray(answer.masks[0, 0])
    np.testing.assert_array_equal(masks[1], cells(BOX))
    np.testing.assert_array_equal(masks[3], cells(OTHER))
    assert not masks[[0, 2]].any() and not masks[4:].any()


def test_an_improper_box_has_an_empty_mask():
    reversed_box = (*BOX[2:], *BOX[:2])
    answer = read_masks(f"{loc(*reversed_box)}{codes(2)} cat")
    assert answer.boxes.valid[0, 0, 0] and not answer.masks.any()


def test_as_many_masks_as_fit_are_read():
    """A completion of 96 tokens has room for 4 boxes with masks: 20 tokens each, and separators."""
    shifted = [tuple(b + 20 * i for b in (100, 100, 400, 400)) for i in range(4)]
    answer = read_masks(" ; ".join(f"{loc(*box)}{codes(2)}" for box in shifted), names=())
    for k, box in enumerate(shifted):
        np.testing.assert_array_equal(answer.masks[0, 0, k], cells(box))


def test_the_device_and_the_host_read_the_same_codes():
    """`evals.segmentation.read` reads the first box of a text, and codes directly behind it."""
    rng = np.random.default_rng(0)
    all_codes = rng.integers(0, 128, (5, CODES))
    texts = [loc(*BOX) + "".join(f"<seg{code:03d}>" for code in row) + " cat" for row in all_codes]
    np.testing.assert_array_equal(segmentation.read(texts).codes, all_codes)

    def fake(codes: jax.Array) -> jax.Array:
        """Returns an 8 × 8 mask that shows the numbers of the codes modulo 2, four cells each."""
        return jnp.repeat((codes % 2 * 2 - 1).astype(jnp.float32), 4, axis=-1).reshape(
            *codes.shape[:-1], 8, 8
        )

    whole = [text.replace(loc(*BOX), loc(0, 0, LOC_MAX, LOC_MAX)) for text in texts]
    answer = read_masks(*whole, mask_size=8, decode=fake)
    expected = np.repeat(all_codes % 2 == 1, 4, axis=-1).reshape(5, 8, 8)
    np.testing.assert_array_equal(answer.masks[0, :, 0], expected)


def test_without_a_decoder_there_are_no_masks():
    answer = read(f"{loc(*BOX)} cat")
    assert answer.masks.shape[-2:] == (0, 0)
    assert np.isnan(REWARDS["mask_iou"](answer, TWO, RewardSettings())).all()


MASKS = make_batch([(BOX, 0), (OTHER, 1)], names=("cat", "dog"))


def mask_rewards(*texts: str) -> list[float]:
    """Returns `mask_iou` of answers to a question about two objects whose masks are their boxes."""
    answer = read_masks(*texts)
    return REWARDS["mask_iou"](answer, MASKS, RewardSettings())[0].tolist()


def test_mask_iou_is_1_for_the_right_masks_within_names():
    cat, dog = f"{loc(*BOX)}{codes(2)}", f"{loc(*OTHER)}{codes(2)}"
    right, turned, swapped, one, doubled, silent, boxes_alone = mask_rewards(
        f"{cat} cat ; {dog} dog",
        f"{dog} dog ; {cat} cat",
        f"{cat} dog ; {dog} cat",
        f"{cat} cat",
        f"{cat} cat ; {dog} dog ; {cat} cat",
        "",
        f"{loc(*BOX)} cat ; {loc(*OTHER)} dog",
    )
    assert right == turned == 1 and swapped == silent == boxes_alone == 0
    np.testing.assert_allclose([one, doubled], [2 / 3, 4 / 5], rtol=1e-6)


@pytest.mark.slow
def test_the_score_of_a_step_reads_masks_if_it_has_a_decoder():
    """The rollout worker passes the decoder of `config.eval.vqvae` to this function."""
    rollout = make_rollout(f"{loc(*BOX)}{codes(2)} cat ; {loc(*OTHER)}{codes(2)} dog", length=96)
    weights = {"mask_iou": jnp.float32(1)}
    settings = Grpo(rewards={"mask_iou": 1.0})
    for decoder, expected in ((half_masks, 1.0), (None, np.nan)):
        scored = make_score(settings, TOKENS, False, decoder)(rollout, MASKS, {}, weights)
        np.testing.assert_array_equal(scored.rewards.total, [[expected]])


def test_mask_iou_is_the_share_of_common_cells():
    upper, left = mask_rewards(f"{loc(*BOX)}{codes(0)} cat", f"{loc(*BOX)}{codes(1)} cat")
    y1, x1, y2, x2 = BOX
    halves = cells((y1, x1, (y1 + y2) / 2, x2)), cells((y1, x1, y2, (x1 + x2) / 2))
    expected = [2 * half.sum() / cells(BOX).sum() / 3 for half in halves]
    np.testing.assert_allclose([upper, left], expected, rtol=1e-6)


def test_mask_iou_is_nan_where_gold_has_no_masks():
    answer = read_masks(f"{loc(*BOX)}{codes(2)} cat")
    empty = MASKS.gold.masks.at[0, 1].set(False)
    for masks in (empty, jnp.zeros((1, 3, 0, 0), bool)):
        batch = MASKS._replace(gold=MASKS.gold._replace(masks=masks))
        assert np.isnan(REWARDS["mask_iou"](answer, batch, RewardSettings())).all()
    points = MASKS._replace(gold=MASKS.gold._replace(target=jnp.array([POINTS])))
    assert np.isnan(REWARDS["mask_iou"](answer, points, RewardSettings())).all()


def test_pasting_is_the_inverse_of_cutting_out():
    """A smooth mask that is cut out of its box and pasted has nearly the same cells."""
    y, x = np.meshgrid((np.arange(64) + 0.5) / 64, (np.arange(64) + 0.5) / 64, indexing="ij")
    radius = 1 - ((y - 0.4) / 0.3) ** 2 - ((x - 0.6) / 0.25) ** 2
    yxyx = np.array([0.1, 0.35, 0.7, 0.85])
    inside_y = yxyx[0] + (np.arange(64) + 0.5) / 64 * (yxyx[2] - yxyx[0])
    inside_x = yxyx[1] + (np.arange(64) + 0.5) / 64 * (yxyx[3] - yxyx[1])
    cut = 1 - ((inside_y - 0.4) / 0.3)[:, None] ** 2 - ((inside_x - 0.6) / 0.25) ** 2
    pasted = boxes.paste_masks(jnp.asarray(cut, jnp.float32), jnp.asarray(yxyx, jnp.float32), 64)
    assert float(boxes.pairwise_mask_iou(np.asarray(pasted)[None], radius[None] > 0)[0, 0]) > 0.97

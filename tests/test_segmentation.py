"""Masks in answers: scored as by big_vision's evaluator, to the last digit, and read as written."""

import json
from functools import partial
from typing import Any

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis.extra import numpy as npst

from pg_ground import tokenizer
from pg_ground.checkpoints import vqvae_file
from pg_ground.data import run_lengths
from pg_ground.evals import benchmarks, runner, segmentation
from pg_ground.evals.segmentation import read, write
from pg_ground.models import vqvae
from pg_ground.types import UserError
from pg_ground.vocab import EOS, LOC_MAX, vocab_of_size

VOCAB = vocab_of_size(1664)
CODES = tuple(range(100, 116))

FULL = np.ones((64, 64), np.float32)
"""Decoded masks of which every pixel, or no pixel, belongs to the object."""
EMPTY = -FULL


def to_text(tokens: np.ndarray) -> str:
    """Returns the text of a completion of loc and seg tokens in big_vision's tiny vocabulary."""
    ids = tokens[: tokens.tolist().index(EOS)]
    return "".join(
        f"<loc{i - VOCAB.loc0:04d}>" if i < VOCAB.seg0 else f"<seg{i - VOCAB.seg0:03d}>"
        for i in ids
    )


def rectangle(y1: int, x1: int, y2: int, x2: int, shape: tuple[int, int]) -> np.ndarray:
    mask = np.zeros(shape, bool)
    mask[y1:y2, x1:x2] = True
    return mask


def score_answer(bins, valid, decoded, gold_mask, gold_yxyx) -> dict[str, Any]:
    """Returns the scored row of one answer. The row was written as JSON and read again.

    Args:
      bins: the box of the answer as loc bins.
      valid: the answer has a box and all codes.
      decoded: the decoded mask, 64 x 64.
      gold_mask: the ground-truth mask at the resolution of the image.
      gold_yxyx: the ground-truth box as fractions.
    """
    height, width = gold_mask.shape
    y1, x1, y2, x2 = (np.asarray(gold_yxyx, np.float64) * [height, width, height, width]).tolist()
    gold = {"boxes": [{"xyxy_px": [x1, y1, x2, y2]}], "mask": run_lengths.encode(gold_mask)}
    row = {
        "id": 0,
        "mode": "greedy",
        "benchmark": "segmentation",
        "prediction": segmentation.answer(np.asarray(bins), valid, decoded, (width, height)),
        "gold": gold,
    }
    row = json.loads(json.dumps(row))
    return row | segmentation.score(row)


def test_masks_of_different_sizes_are_refused():
    gold_mask = np.ones((40, 60), bool)
    row = score_answer([0, 0, 500, 500], True, np.ones((64, 64)), gold_mask, [0, 0, 1, 1])
    turned = {**row, "gold": {**row["gold"], "mask": run_lengths.encode(gold_mask.T)}}
    with pytest.raises(UserError, match=r"the masks have sizes \(40, 60\) and \(60, 40\)"):
        segmentation.score(turned)


def scores(row: dict[str, Any]) -> tuple[float, Any, int]:
    """Returns the IoU of the masks, the IoU of the boxes (approximately), and validity."""
    return row["mask_iou"], pytest.approx(row["iou"], rel=1e-12), row["valid"]


def test_scores_equal_big_visions_evaluator(golden):
    """The masks and weights are big_vision's. The rows alone give its numbers."""
    folder = golden / "preprocessing"
    arrays = np.load(folder / "seg.npz")
    expected = json.loads((folder / "seg.json").read_text())
    texts = [to_text(tokens) for tokens in arrays["decoded_tokens"]]
    assert texts == expected["eval_suffix"]
    bins, codes, valid = read(texts)
    decoded = np.asarray(jax.jit(vqvae.decode)(vqvae_file.load(folder / "tiny_vae.npz"), codes))
    gold_masks = arrays["mask"][..., 0] > 0
    answers = zip(bins, valid, decoded, gold_masks, arrays["gt_box_eval"], strict=True)
    rows = [score_answer(*answer) for answer in answers]
    values, evaluator = benchmarks.compute_metrics(rows).values, expected["evaluator"]
    assert values["miou"] == pytest.approx(evaluator["miou"], rel=1e-12)
    assert values["boxacc50"] == evaluator["boxacc/0.5"]
    assert values["boxacc75"] == evaluator["boxacc/0.75"]
    assert (values["invalid"], len(rows)) == (evaluator["invalid"], evaluator["total"])


def test_each_text_of_a_group_gets_its_own_mask(golden):
    """All texts are decoded in one call. The images of the two questions have two sizes."""
    params = vqvae_file.load(golden / "preprocessing" / "tiny_vae.npz")
    texts = [[WHOLE, "no mask"], [LOCS + "<seg001>" * 16, WHOLE]]
    decode = jax.jit(partial(vqvae.decode, params))
    sizes = {0: (90, 80), 1: (70, 60)}
    masks = runner.mask_predictions(decode, texts, sizes)
    assert masks[0, 1]["mask"] is None
    assert masks[0, 1]["boxes"] == []
    for slot, rollout in ((0, 0), (1, 0), (1, 1)):
        decoded = np.asarray(vqvae.decode(params, read([texts[slot][rollout]]).codes))
        expected = segmentation.answer(np.array(BOX), True, decoded[0], sizes[slot])
        assert masks[slot, rollout] == expected
    assert masks[1, 0] != masks[1, 1] != masks[0, 0]
    same_size = runner.mask_predictions(decode, texts, {0: (90, 80), 1: (90, 80)})
    assert same_size[0, 0] == same_size[1, 1] != same_size[1, 0]


@hypothesis.given(npst.arrays(bool, npst.array_shapes(min_dims=2, max_dims=2, max_side=7)))
def test_run_lengths_give_the_mask_back(mask):
    np.testing.assert_array_equal(run_lengths.decode(run_lengths.encode(mask)), mask)


def test_written_answers_equal_big_visions_training_answers(golden):
    folder = golden / "preprocessing"
    arrays = np.load(folder / "seg.npz")
    expected = json.loads((folder / "seg.json").read_text())
    params = vqvae_file.load(folder / "tiny_vae.npz", encoder=True)
    crops = [
        segmentation.crop(mask[..., 0] > 0, box)
        for mask, box in zip(arrays["mask"], arrays["box"], strict=True)
    ]
    codes = np.asarray(jax.jit(vqvae.encode)(params, np.stack(crops)))
    np.testing.assert_array_equal(codes, arrays["seg_idx"])
    texts = [write(box, row) for box, row in zip(arrays["box"], codes, strict=True)]
    assert texts == expected["suffix"]


def test_a_written_answer_is_read_back():
    rng = np.random.default_rng(0)
    for _ in range(50):
        bins = np.sort(rng.choice(LOC_MAX + 1, (2, 2), replace=False), axis=0).ravel()
        codes = rng.integers(0, 128, 16)
        segments = read([write((bins / LOC_MAX).astype(np.float32), codes) + " a name"])
        assert segments.valid.all()
        np.testing.assert_array_equal(segments.bins[0], bins)
        np.testing.assert_array_equal(segments.codes[0], codes)


BOX = (100, 200, 500, 900)
WHOLE = write(np.array(BOX) / LOC_MAX, np.array(CODES))
LOCS, SEGS = WHOLE[:36], WHOLE[36:]


@pytest.mark.parametrize(
    "text",
    [
        "",
        LOCS,
        LOCS + SEGS[:-8],
        LOCS[9:] + SEGS,
        "a" + WHOLE,
        LOCS + " cat" + SEGS,
        "<loc0500><loc0200><loc0100><loc0900>" + SEGS,
        "<loc0100><loc0200><loc0500><loc0200>" + SEGS,
        "<loc0100><loc0200><loc0500><loc1024>" + SEGS,
        LOCS + SEGS[:-8] + "<seg128>",
        SEGS[:32] + SEGS,
    ],
)
def test_a_text_without_a_mask_is_all_zeros(text):
    segments = read([text, WHOLE + " cat"])
    message = "no text may precede or interrupt the codes, but a name may follow them"
    assert segments.valid.tolist() == [False, True], message
    assert not segments.bins[0].any()
    assert not segments.codes[0].any()
    assert tuple(segments.bins[1]) == BOX
    assert tuple(segments.codes[1]) == CODES


def test_a_full_mask_is_its_box():
    """In an image of 1023 pixels bins are pixels."""
    gold = rectangle(*BOX, (LOC_MAX, LOC_MAX))
    fractions = np.array(BOX) / LOC_MAX
    assert scores(score_answer(BOX, True, FULL, gold, fractions)) == (1, 1, 1)
    half = rectangle(100, 200, 300, 900, (LOC_MAX, LOC_MAX))
    assert score_answer(BOX, True, FULL, half, fractions)["mask_iou"] == 0.5
    assert scores(score_answer(BOX, True, EMPTY, gold, fractions)) == (0, 1, 1)
    zero = np.zeros((64, 64), np.float32)
    row = score_answer(BOX, True, zero, gold, fractions)
    assert row["mask_iou"] == 0, "only values above 0 belong to the object"


def test_ground_truth_outside_the_box_costs():
    gold = rectangle(100, 200, 500, 1000, (LOC_MAX, LOC_MAX))
    row = score_answer(BOX, True, FULL, gold, np.array([100, 200, 500, 1000]) / LOC_MAX)
    assert row["mask_iou"] == 700 / 800


def test_corners_are_truncated_to_pixels_and_not_rounded():
    """1023 bins on 10 pixels: bin 1022 is pixel 9.99, and 9 of the 10 columns are covered."""
    gold = np.ones((10, 10), bool)
    row = score_answer([0, 0, 1023, 1022], True, FULL, gold, np.array([0.0, 0, 1, 1]))
    assert row["mask_iou"] == 0.9
    assert row["iou"] == pytest.approx(1022 / 1023)


def test_a_box_without_a_pixel_is_invalid_but_is_a_box():
    """big_vision's evaluator compares boxes before it looks for pixels.

    Without all codes there is no box.
    """
    bins = [10, 10, 50, 50]
    fractions = np.array(bins) / LOC_MAX
    row = score_answer(bins, True, FULL, np.ones((10, 10), bool), fractions)
    assert scores(row) == (0, 1, 0)
    row = score_answer(bins, False, FULL, np.ones((99, 99), bool), fractions)
    assert scores(row) == (0, 0, 0)


def test_a_cropped_mask_is_pasted_back():
    """Only the rim is lost.

    One cell of 64 around an ellipse is 1 - (31/32)² = 6 % of it. One pixel of 30 x 40 on two sides
    is about as much.
    """
    ys, xs = np.mgrid[:480, :640] + 0.5
    for y1, x1, y2, x2 in ((40, 100, 360, 500), (200, 300, 230, 340), (0, 0, 480, 640)):
        box = np.array([y1 / 480, x1 / 640, y2 / 480, x2 / 640])
        y = (ys - (y1 + y2) / 2) / (y2 - y1)
        x = (xs - (x1 + x2) / 2) / (x2 - x1)
        ellipse = y**2 + x**2 <= 0.25
        bins = np.round(box * LOC_MAX).astype(int)
        decoded = 2 * segmentation.crop(ellipse, box) - 1
        row = score_answer(bins, True, decoded, ellipse, box)
        assert row["mask_iou"] > 0.88
        assert row["iou"] > 0.95


def test_a_box_within_a_pixel_is_cropped_to_that_pixel():
    mask = rectangle(3, 5, 4, 6, (10, 10))
    for box in ((0.31, 0.51, 0.32, 0.52), (0.3, 0.5, 0.3, 0.5), (0.999, 0.999, 1, 1)):
        crop = segmentation.crop(mask, np.array(box))
        assert crop.shape == (64, 64)
        assert (crop == crop[0, 0]).all()


def test_means_are_over_all_answers():
    row = {"mode": "greedy", "benchmark": "segmentation"}
    answers = [(0.5, 0.5, 1), (0.7, 0.75, 1), (0.0, 0.9, 0), (0.0, 0.0, 0)]
    rows = [
        {**row, "id": i, "mask_iou": mask_iou, "iou": box_iou, "valid": valid}
        for i, (mask_iou, box_iou, valid) in enumerate(answers)
    ]
    assert benchmarks.compute_metrics(rows).values == {
        "miou": 0.3,
        "boxacc50": 0.75,
        "boxacc75": 0.5,
        "invalid": 2,
        "invalid_fraction": 0.5,
    }


def test_a_mask_is_twenty_tokens_and_their_text_is_read():
    tokens = tokenizer.load()
    ids = tokens.text(WHOLE)
    assert len(ids) == 20
    assert read([tokens.decode([*ids, EOS])]).valid.all()

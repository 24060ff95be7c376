"""Answers with masks judged as big_vision's evaluator judges them, to the last digit, and the laws of cutting out and pasting."""

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
from pg_ground.vocab import EOS, LOC_MAX, vocab_of_size

VOCAB = vocab_of_size(1664)
CODES = tuple(range(100, 116))

FULL = np.ones((64, 64), np.float32)
EMPTY = -FULL


def text_of(tokens: np.ndarray) -> str:
    """Returns the text of a completion of loc and seg tokens in big_vision's tiny vocabulary."""
    ids = tokens[: tokens.tolist().index(EOS)]
    return "".join(
        f"<loc{i - VOCAB.loc0:04d}>" if i < VOCAB.seg0 else f"<seg{i - VOCAB.seg0:03d}>"
        for i in ids
    )


def block(y1: int, x1: int, y2: int, x2: int, shape: tuple[int, int]) -> np.ndarray:
    mask = np.zeros(shape, bool)
    mask[y1:y2, x1:x2] = True
    return mask


def judge(bins, valid, decoded, gold, gold_yxyx) -> dict[str, Any]:
    """Returns the row of one answer against a mask and its box (fractions), scored after a way through a file."""
    height, width = gold.shape
    y1, x1, y2, x2 = (np.asarray(gold_yxyx, np.float64) * [height, width, height, width]).tolist()
    row = {
        "id": 0,
        "mode": "greedy",
        "benchmark": "segmentation",
        "prediction": segmentation.answer(np.asarray(bins), valid, decoded, (width, height)),
        "gold": {"boxes": [{"xyxy_px": [x1, y1, x2, y2]}], "mask": run_lengths.encode(gold)},
    }
    row = json.loads(json.dumps(row))
    return row | segmentation.score(row)


def test_the_evaluators_numbers(golden):
    """On big_vision's own masks and weights, from rows, which need neither."""
    folder = golden / "preprocessing"
    given, said = np.load(folder / "seg.npz"), json.loads((folder / "seg.json").read_text())
    texts = [text_of(row) for row in given["decoded_tokens"]]
    assert texts == said["eval_suffix"]
    bins, codes, valid = read(texts)
    decoded = np.asarray(jax.jit(vqvae.decode)(vqvae_file.load(folder / "tiny_vae.npz"), codes))
    gold = given["mask"][..., 0] > 0
    rows = [
        judge(*one) for one in zip(bins, valid, decoded, gold, given["gt_box_eval"], strict=True)
    ]
    found, theirs = benchmarks.compute_metrics(rows).values, said["evaluator"]
    assert found["miou"] == pytest.approx(theirs["miou"], rel=1e-12)
    assert (found["boxacc50"], found["boxacc75"]) == (theirs["boxacc/0.5"], theirs["boxacc/0.75"])
    assert (found["invalid"], len(rows)) == (theirs["invalid"], theirs["total"])


def test_masks_of_a_group_are_those_of_their_texts(golden):
    """Two answers a prompt, in images of two sizes; what is decoded at once stands where its text does."""
    folder = golden / "preprocessing"
    params = vqvae_file.load(folder / "tiny_vae.npz")
    texts = [[WHOLE, "no mask"], [LOCS + "<seg001>" * 16, WHOLE]]
    decode = jax.jit(partial(vqvae.decode, params))
    masks = runner.mask_predictions(decode, texts, {0: (90, 80), 1: (90, 80)})
    assert masks[0, 1]["mask"] is None and masks[0, 1]["boxes"] == []
    alone = np.asarray(vqvae.decode(params, read([texts[1][0]]).codes))
    assert masks[1, 0] == segmentation.answer(np.array(BOX), True, alone[0], (90, 80))
    assert masks[0, 0] == masks[1, 1] != masks[1, 0]


@hypothesis.given(npst.arrays(bool, npst.array_shapes(min_dims=2, max_dims=2, max_side=7)))
def test_run_lengths_give_the_mask_back(mask):
    np.testing.assert_array_equal(run_lengths.decode(run_lengths.encode(mask)), mask)


def test_the_answers_that_big_vision_learns_from(golden):
    folder = golden / "preprocessing"
    given, said = np.load(folder / "seg.npz"), json.loads((folder / "seg.json").read_text())
    params = vqvae_file.load(folder / "tiny_vae.npz", encoder=True)
    cut = np.stack(
        [
            segmentation.crop(m[..., 0] > 0, box)
            for m, box in zip(given["mask"], given["box"], strict=True)
        ]
    )
    codes = np.asarray(jax.jit(vqvae.encode)(params, cut))
    np.testing.assert_array_equal(codes, given["seg_idx"])
    assert [write(box, row) for box, row in zip(given["box"], codes, strict=True)] == said["suffix"]


def test_what_is_written_is_read():
    rng = np.random.default_rng(0)
    for _ in range(50):
        bins = np.sort(rng.choice(LOC_MAX + 1, (2, 2), replace=False), axis=0).ravel()
        codes = rng.integers(0, 128, 16)
        found = read([write((bins / LOC_MAX).astype(np.float32), codes) + " a name"])
        assert found.valid.all()
        np.testing.assert_array_equal(found.bins[0], bins)
        np.testing.assert_array_equal(found.codes[0], codes)


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
def test_what_is_no_mask_is_all_zeros(text):
    found = read([text, WHOLE + " cat"])
    assert found.valid.tolist() == [False, True], (
        "nothing stands before the codes or between them; a name may stand behind"
    )
    assert not found.bins[0].any() and not found.codes[0].any()
    assert tuple(found.bins[1]) == BOX and tuple(found.codes[1]) == CODES


def test_a_full_mask_is_its_box():
    """In an image of 1023 pixels bins are pixels."""
    gold = block(*BOX, (LOC_MAX, LOC_MAX))
    fractions = np.array(BOX) / LOC_MAX
    assert scores(judge(BOX, True, FULL, gold, fractions)) == (1, 1, 1)
    half = block(100, 200, 300, 900, (LOC_MAX, LOC_MAX))
    assert judge(BOX, True, FULL, half, fractions)["mask_iou"] == 0.5
    assert scores(judge(BOX, True, EMPTY, gold, fractions)) == (0, 1, 1)
    zero = np.zeros((64, 64), np.float32)
    assert judge(BOX, True, zero, gold, fractions)["mask_iou"] == 0, "the object is what is above 0"


def scores(row: dict[str, Any]) -> tuple[float, float, int]:
    return row["mask_iou"], pytest.approx(row["iou"], rel=1e-12), row["valid"]


def test_pixels_outside_the_box_count_against_it():
    gold = block(100, 200, 500, 1000, (LOC_MAX, LOC_MAX))
    assert (
        judge(BOX, True, FULL, gold, np.array([100, 200, 500, 1000]) / LOC_MAX)["mask_iou"]
        == 700 / 800
    )


def test_corners_are_cut_off_to_pixels_and_not_rounded():
    """1023 bins on 10 pixels: bin 1022 is pixel 9.99, and 9 of the 10 columns are covered."""
    gold = np.ones((10, 10), bool)
    found = judge([0, 0, 1023, 1022], True, FULL, gold, np.array([0.0, 0, 1, 1]))
    assert found["mask_iou"] == 0.9 and found["iou"] == pytest.approx(1022 / 1023)


def test_a_box_without_a_pixel_is_invalid_but_is_a_box():
    """As in the evaluator, which compares boxes before it looks for pixels; but there is no box without all codes."""
    fractions = np.array([10, 10, 50, 50]) / LOC_MAX
    assert scores(judge([10, 10, 50, 50], True, FULL, np.ones((10, 10), bool), fractions)) == (
        0,
        1,
        0,
    )
    assert scores(judge([10, 10, 50, 50], False, FULL, np.ones((99, 99), bool), fractions)) == (
        0,
        0,
        0,
    )


def test_what_is_cut_out_is_pasted_back():
    """All but a rim: one cell of 64 around an ellipse is 1 - (31/32)² = 6 % of it, a pixel of 30 x 40 on two sides as much."""
    ys, xs = np.mgrid[:480, :640] + 0.5
    for y1, x1, y2, x2 in ((40, 100, 360, 500), (200, 300, 230, 340), (0, 0, 480, 640)):
        box = np.array([y1 / 480, x1 / 640, y2 / 480, x2 / 640])
        gold = ((ys - (y1 + y2) / 2) / (y2 - y1)) ** 2 + (
            (xs - (x1 + x2) / 2) / (x2 - x1)
        ) ** 2 <= 0.25
        bins = np.round(box * LOC_MAX).astype(int)
        found = judge(bins, True, 2 * segmentation.crop(gold, box) - 1, gold, box)
        assert found["mask_iou"] > 0.88 and found["iou"] > 0.95


def test_a_box_within_a_pixel_is_cut_out_as_that_pixel():
    mask = block(3, 5, 4, 6, (10, 10))
    for box in ((0.31, 0.51, 0.32, 0.52), (0.3, 0.5, 0.3, 0.5), (0.999, 0.999, 1, 1)):
        cut = segmentation.crop(mask, np.array(box))
        assert cut.shape == (64, 64) and (cut == cut[0, 0]).all()


def test_means_are_over_all_answers():
    rows = [
        {
            "id": i,
            "mode": "greedy",
            "benchmark": "segmentation",
            "mask_iou": mask,
            "iou": box,
            "valid": valid,
        }
        for i, (mask, box, valid) in enumerate(
            [(0.5, 0.5, 1), (0.7, 0.75, 1), (0.0, 0.9, 0), (0.0, 0.0, 0)]
        )
    ]
    wanted = {"miou": 0.3, "boxacc50": 0.75, "boxacc75": 0.5, "invalid": 2, "invalid_fraction": 0.5}
    assert benchmarks.compute_metrics(rows).values == wanted


def test_a_mask_is_twenty_tokens_and_their_text_is_read():
    tokens = tokenizer.load()
    ids = tokens.text(WHOLE)
    assert len(ids) == 20 and read([tokens.decode([*ids, EOS])]).valid.all()

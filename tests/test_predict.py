"""The predict command reads completions by the same grammar as the rewards do."""

import jax.numpy as jnp
import numpy as np

from pg_ground import tokenizer
from pg_ground.predict import answers
from pg_ground.rl.rewards import read_answer
from pg_ground.types import BOXES
from pg_ground.vocab import EOS, PAD


def test_predict_and_rewards_read_the_same_answers():
    words = tokenizer.load()
    vocab = words.vocab
    rng = np.random.default_rng(0)
    pool = [vocab.loc0 + 7, vocab.loc0 + 1023, vocab.loc0, *vocab.separators, *vocab.spaces, *words.text(" red circle")]
    rows = rng.choice(pool, (400, 24), p=np.array([6, 6, 6, *[2] * (len(pool) - 3)]) / (18 + 2 * (len(pool) - 3)))
    lengths = rng.integers(1, 25, 400)
    mask = np.arange(24) < lengths[:, None]
    rows[np.arange(400), lengths - 1] = EOS
    tokens = np.where(mask, rows, PAD)
    names = jnp.full((400, 1, 1), PAD)
    read = read_answer(jnp.asarray(tokens[:, None]), jnp.asarray(mask[:, None]), jnp.full(400, BOXES), names, vocab)
    seen = 0
    for row in range(400):
        found = answers(tokens[row][mask[row]].tolist(), words, (1000, 500))
        boxes = np.asarray(read.boxes.yxyx[row, 0][np.asarray(read.boxes.valid[row, 0])])
        points = np.asarray(read.points.yx[row, 0][np.asarray(read.points.valid[row, 0])])
        pixels = np.array([500, 1000, 500, 1000])
        mine = np.array([[b["xyxy_px"][i] for i in (1, 0, 3, 2)] for b in found["boxes"]]).reshape(-1, 4)
        np.testing.assert_allclose(mine, boxes * pixels, atol=1e-3)  # answers are rounded to 1e-3 pixels
        mine = np.array([p["xy_px"][::-1] for p in found["points"]]).reshape(-1, 2)
        np.testing.assert_allclose(mine, points * pixels[:2], atol=1e-3)
        seen += len(boxes) + len(points)
    assert seen > 100


def test_labels_are_the_text_behind_the_loc_tokens():
    words = tokenizer.load()
    tokens = words.suffix("<loc0000><loc0512><loc1023><loc1023> red circle ; <loc0100><loc0200> cat")
    found = answers(tokens, words, (1023, 1023))
    assert [b["label"] for b in found["boxes"]] == ["red circle"] and [p["label"] for p in found["points"]] == ["cat"]
    np.testing.assert_allclose(found["boxes"][0]["xyxy_px"], [512, 0, 1023, 1023], atol=1e-2)
    np.testing.assert_allclose(found["points"][0]["xy_px"], [200, 100], atol=1e-2)

"""The embedded task: the properties of drawn scenes."""

import numpy as np
import pytest

from pg_ground.data.synthetic import COLOURS, FORMS, PAINTS, Scenes, open_scenes
from pg_ground.types import UserError


def test_a_scene_depends_on_split_seed_and_index_alone():
    first, same = Scenes(side=32), Scenes(side=32)
    np.testing.assert_array_equal(first[5]["image"], same[5]["image"])
    assert first[5]["box"] == same[5]["box"]
    for other in (Scenes(side=32, split="heldout"), Scenes(side=32, seed=1)):
        assert (other[5]["image"] != first[5]["image"]).mean() > 0.9
    assert (first[6]["image"] != first[5]["image"]).mean() > 0.9


def test_loose_boxes_contain_the_exact_ones_and_change_nothing_else():
    exact, loose = Scenes(side=64), Scenes(side=64, loose=0.5)
    shares = []
    for index in range(200):
        tight, wide = exact[index], loose[index]
        np.testing.assert_array_equal(tight["image"], wide["image"])
        assert (tight["phrase"], tight["point"]) == (wide["phrase"], wide["point"])
        (x1, y1, x2, y2), (u1, v1, u2, v2) = tight["box"], wide["box"]
        assert 0 <= u1 <= x1 and 0 <= v1 <= y1 and x2 <= u2 <= 64 and y2 <= v2 <= 64
        assert x1 - u1 <= 0.5 * (x2 - x1) + 1e-9 and u2 - x2 <= 0.5 * (x2 - x1) + 1e-9
        if u1 > 0:
            shares.append((x1 - u1) / (x2 - x1))
    assert 0.2 < np.mean(shares) < 0.3


def test_the_box_contains_exactly_the_shape_that_the_phrase_names():
    scenes = Scenes(side=64)
    for index in range(100):
        record = scenes[index]
        colour, form = record["phrase"].split()
        assert colour in COLOURS and form in FORMS
        x1, y1, x2, y2 = (round(v) for v in record["box"])
        x, y = (int(v) for v in record["point"])
        paint = PAINTS[list(COLOURS).index(colour)]
        assert np.abs(record["image"][y, x].astype(float) - paint).max() <= 26
        inside = record["image"][y1:y2, x1:x2].astype(float)
        same_paint = np.abs(inside - record["image"][y, x]).max(axis=-1) < 2
        share = {"circle": np.pi / 4, "square": 1.0, "triangle": 0.5, "cross": 5 / 9}[form]
        assert (
            abs(same_paint.mean() - share) < 0.25
        )  # edge pixels are mixed: up to a quarter of the pixels at 15 pixels across


def test_every_shape_is_an_object_with_its_name_and_box():
    scenes = Scenes(side=64, loose=0.5, shapes=4)
    for index in range(30):
        record = scenes[index]
        assert (
            len({item["name"] for item in record["objects"]}) == 4
            and record["objects"][0]["name"] == record["phrase"]
        )
        for item in record["objects"]:
            x1, y1, x2, y2 = item["box"]
            colour = PAINTS[list(COLOURS).index(item["name"].split()[0])]
            assert (
                np.abs(
                    record["image"][int(y1 + y2) // 2, int(x1 + x2) // 2].astype(float) - colour
                ).max()
                <= 26
            )


def test_a_phrase_fits_one_shape_and_a_distractor_shares_its_colour_or_form():
    from pg_ground.data.synthetic import _draw_kinds

    for seed in range(300):
        kinds = _draw_kinds(np.random.default_rng(seed), 3, 4, 3)
        assert len(set(kinds)) == 3
        assert any(a == kinds[0][0] or b == kinds[0][1] for a, b in kinds[1:])


@pytest.mark.parametrize(
    ("split", "options", "message"),
    [
        ("trian", {}, "did you mean train"),
        ("train", {"sied": "48"}, "did you mean side"),
        ("train", {"side": "big"}, "the value must be a number"),
        ("train", {"shapes": "1"}, "it must be from 2 to 6"),
    ],
)
def test_a_wrong_uri_says_what_would_be_right(split, options, message):
    with pytest.raises(UserError, match=message):
        open_scenes(split, options)

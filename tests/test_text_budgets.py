"""Checks of a source before training: the lengths of its texts, and the unit of its coordinates."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from test_batches import DATA, SIDE, write_lines

from pg_ground import tokenizer
from pg_ground.config import Source
from pg_ground.data.datasets import open_examples
from pg_ground.data.text_budgets import check_budgets, measure_budget
from pg_ground.types import UserError


@pytest.fixture(scope="module")
def tokens() -> tokenizer.Tokenizer:
    return tokenizer.load()


def test_budgets_name_the_question_that_needs_most(tmp_path, tokens):
    boxes = [[[0, 0, i + 1, 4] for i in range(n)] for n in (1, 4, 2)]
    uri = write_lines(
        tmp_path, [{"phrase": "cat " * (3 - i), "box": b} for i, b in enumerate(boxes)]
    )
    opened = open_examples(
        "a", Source(uri=uri, boxes="box"), replace(DATA, max_boxes=9, suffix_length=99), SIDE
    )
    budget = measure_budget(opened, tokens, DATA)
    rows = [opened[i] for i in range(3)]
    assert budget.prompt_tokens == max(len(tokens.prefix(row.prompt)) for row in rows)
    assert budget.suffix_tokens == max(len(tokens.suffix(row.suffix)) for row in rows)
    assert (budget.objects, budget.worst) == (
        4,
        {"prompt_length": 0, "suffix_length": 1, "max_boxes": 1},
    )
    for lengths, message in (
        (
            {"prompt_length": 4, "suffix_length": 99, "max_boxes": 9},
            r"question 0 needs data\.prompt_length=\d+, but it is 4: raise it$",
        ),
        (
            {"suffix_length": 9, "max_boxes": 9, "prompt_length": 32},
            r"question 1 needs data\.suffix_length=\d+, but it is 9.*max_objects",
        ),
        (
            {"suffix_length": 99, "max_boxes": 3, "prompt_length": 32},
            r"source a: question 1 needs data\.max_boxes=4, but it is 3",
        ),
    ):
        with pytest.raises(UserError, match=message):
            check_budgets([budget], replace(DATA, **lengths))
    check_budgets([budget], replace(DATA, max_boxes=4, suffix_length=99, prompt_length=32))


def test_a_wrong_path_is_refused_with_the_fields_that_exist(tmp_path, tokens):
    uri = write_lines(tmp_path, [{"phrase": "cat", "bbox": [0, 0, 4, 4]}] * 30)
    with pytest.raises(
        UserError,
        match="none of 16 questions can be used; "
        ".*there is no box: the fields are image, phrase, bbox",
    ):
        measure_budget(open_examples("a", Source(uri=uri, boxes="box"), DATA, SIDE), tokens, DATA)


def test_a_folder_without_the_images_is_refused(tmp_path, tokens):
    uri = write_lines(tmp_path, [{"phrase": "cat", "box": [0, 0, 4, 4]}] * 30)
    lost = open_examples("a", Source(uri=uri, boxes="box", image_root="nowhere"), DATA, SIDE)
    with pytest.raises(
        UserError,
        match=r"^source a: none of 16 questions can be used; "
        r"question 0: there is no file .*nowhere/i.jpg",
    ):
        measure_budget(lost, tokens, DATA)
    uri = write_lines(
        tmp_path,
        [{"phrase": "cat", "box": [0, 0, 4, 4], "image": "no.jpg"}] * 29
        + [{"phrase": "cat", "box": [0, 0, 4, 4]}],
    )
    measure_budget(
        open_examples("a", Source(uri=uri, boxes="box"), DATA, SIDE), tokens, DATA
    )  # one image exists, and bad_record_share is for the others


@pytest.mark.parametrize("size", [(640, 480), (340, 500), (1000, 1000)])
def test_a_wrong_unit_that_puts_everything_in_one_corner_is_refused(tmp_path, tokens, size):
    Image.fromarray(np.zeros((size[1], size[0], 3), np.uint8)).save(tmp_path / "big.png")
    Image.new("RGB", (200, 150)).save(
        tmp_path / "small.png"
    )  # one small image does not hide the others
    names = ["big.png"] * 19 + ["small.png"]
    records = [
        {"image": name, "phrase": "cat", "box": [i, i, 81 + i, 100], "points": [[i, 99]]}
        for i, name in enumerate(names)
    ]
    uri = write_lines(tmp_path, records)
    right = {"boxes": "box", "box_format": "xyxy_percent"}
    measure_budget(open_examples("a", Source(uri=uri, **right), DATA, SIDE), tokens, DATA)
    for wrong in ({"boxes": "box"}, {"target": "points", "points": "points"}):
        with pytest.raises(
            UserError,
            match=r"first 30% of both axes and no coordinate is above (100|99), "
            r"so (box|point)_format = 'x.*_px' has",
        ):
            measure_budget(open_examples("a", Source(uri=uri, **wrong), DATA, SIDE), tokens, DATA)


def test_small_objects_in_a_corner_are_no_wrong_unit(tmp_path, tokens):
    """None of these is mistaken for a wrong unit.

    A menu in the first quarter of a large screen but beyond 100 pixels, nine points in one picture,
    and pictures of 56 pixels.
    """
    for name, side in (("screen.png", 1600), ("small.png", 56)):
        Image.fromarray(np.zeros((side, side, 3), np.uint8)).save(tmp_path / name)
    menu = [
        {"image": "screen.png", "phrase": "item", "box": [20, 20 * i, 380, 20 * i + 18]}
        for i in range(16)
    ]
    flock = [{"image": "screen.png", "phrase": "bird", "points": [[i, i + 3] for i in range(9)]}]
    scenes = [{"image": "small.png", "phrase": "dot", "box": [i, i, 30 + i, 40]} for i in range(16)]
    for records, target in ((menu, "boxes"), (flock, "points"), (scenes, "boxes")):
        source = Source(
            uri=write_lines(tmp_path, records),
            target=target,
            **{target: target if target == "points" else "box"},
        )
        measure_budget(open_examples("a", source, replace(DATA, max_boxes=9), SIDE), tokens, DATA)

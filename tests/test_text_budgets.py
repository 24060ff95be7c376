"""Checks of a source before training: the lengths of its texts, and the unit of its coordinates."""

import ast
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from test_batches import DATA, SIDE, write_lines

from pg_ground import tokenizer
from pg_ground.config import Fetch, Source
from pg_ground.data.bad_records import BadRecords
from pg_ground.data.batches import training_batches
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
            r"question 0 needs data\.prompt_length=(\d+), but it is 4: "
            r"set --config\.data\.prompt_length=\1$",
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
        ".*there is no box .boxes of the source.: the fields are image, phrase, bbox",
    ):
        measure_budget(open_examples("a", Source(uri=uri, boxes="box"), DATA, SIDE), tokens, DATA)


@pytest.mark.parametrize(
    "prompt", ["detect { phrase }", "detect {{ phrase }}", "detect {{phrase}}"]
)
def test_a_field_that_stays_text_is_doubted(prompt, tmp_path, tokens):
    names = [{"phrase": name, "box": [0, 0, 4, 4]} for name in ("cat", "dog")]
    source = Source(uri=write_lines(tmp_path, names), boxes="box", prompt=prompt)
    budget = measure_budget(open_examples("a", source, DATA, SIDE), tokens, DATA)
    text = prompt.removeprefix("detect ").replace("{{", "{").replace("}}", "}")
    expected = f"prompt has {text} as text, the same for all questions: {{phrase}} is the field"
    assert budget.doubts == [expected]


def test_braces_that_name_no_field_are_not_doubted(tmp_path, tokens):
    uri = write_lines(tmp_path, [{"phrase": "cat", "box": [0, 0, 4, 4]}])
    prompt = r"{phrase}: \boxed{{{phrase}}} {{answer}} {{\"bbox_2d\": [x1]}}"
    source = Source(uri=uri, boxes="box", prompt=prompt)
    data = replace(DATA, prompt_length=99)
    assert not measure_budget(open_examples("a", source, data, SIDE), tokens, data).doubts


def test_texts_of_missing_values_are_doubted_with_the_filter_that_drops_them(tmp_path, tokens):
    names = ["cat", "nan", "NULL", "nancy", "None", "dog"]
    uri = write_lines(tmp_path, [{"phrase": name, "box": [0, 0, 4, 4]} for name in names])
    source = Source(uri=uri, boxes="box")
    (doubt,) = measure_budget(open_examples("a", source, DATA, SIDE), tokens, DATA).doubts
    counts, _, mend = doubt.partition("; where = ")
    assert counts == (
        "3 of 6 questions have 'NULL', 'None', 'nan' in phrase, as a missing value is written"
    )
    where = ast.literal_eval(mend.removesuffix(" leaves them out"))
    examples = open_examples("a", replace(source, where=where), DATA, SIDE)
    assert [example.prompt for example in examples] == ["detect cat", "detect nancy", "detect dog"]
    assert not measure_budget(examples, tokens, DATA).doubts


def test_none_is_an_answer(tmp_path, tokens):
    answers = ["none", "n/a", "two", "nan"]
    uri = write_lines(tmp_path, [{"question": "how many?", "answer": text} for text in answers])
    source = Source(uri=uri, target="text", prompt="answer {question}", suffix="{answer}")
    (doubt,) = measure_budget(open_examples("a", source, DATA, SIDE), tokens, DATA).doubts
    assert doubt.startswith("1 of 4 questions have 'nan' in answer, as a missing value is written")


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


def open_rows(folder, boxes, size=(1280, 800), settings=None):
    Image.new("RGB", size).save(folder / "big.png")
    records = [{"image": "big.png", "phrase": "cat", "box": box} for box in boxes]
    source = Source(uri=write_lines(folder, records), **({"boxes": "box"} | (settings or {})))
    return open_examples("a", source, DATA, SIDE)


def random_boxes(count, width, height, seed=0):
    """Returns x1, y1, x2, y2 of boxes over the whole of a canvas."""
    rng = np.random.default_rng(seed)
    low = rng.uniform(0, 0.8, (count, 2))
    high = low + rng.uniform(0.05, 0.2, (count, 2))
    return np.concatenate([low, high], 1) * [width, height, width, height]


@pytest.mark.parametrize(
    ("count", "canvas", "box_format"),
    [
        (2, (1, 1), "xyxy_px"),
        (8, (1, 1), "xyxy_percent"),
        (8, (1, 1), "xyxy_permille"),
        (8, (1, 1), "xyxy_bin"),
        (16, (100, 100), "xyxy_px"),
        (300, (1000, 1000), "xyxy_px"),
        (16, (1280, 800), "xywh_px"),
    ],
)
def test_boxes_of_another_unit_or_order_are_refused(tmp_path, tokens, count, canvas, box_format):
    boxes = random_boxes(count, *canvas)
    boxes[0, 2:] = canvas
    size = (1600, 1400) if count == 300 else (1280, 800)
    wrong = open_rows(tmp_path, boxes.tolist(), size, {"box_format": box_format})
    with pytest.raises(UserError, match=f"source a: .*box_format = '{box_format}' has probably"):
        measure_budget(wrong, tokens, DATA)


def test_thousandths_that_fit_pixels_are_doubted_and_not_refused(tmp_path, tokens):
    boxes = random_boxes(12, 1000, 780)
    boxes[0, 2:] = (1000, 780)
    budget = measure_budget(open_rows(tmp_path, boxes.tolist()), tokens, DATA)
    (doubt,) = budget.doubts
    assert "no coordinate is above 1000 and the images have up to 1280 pixels" in doubt
    assert "box_format = 'xyxy_permille'" in doubt
    permille = open_rows(tmp_path, boxes.tolist(), settings={"box_format": "xyxy_permille"})
    assert not measure_budget(permille, tokens, DATA).doubts


def test_percent_on_small_images_is_refused(tmp_path, tokens):
    boxes = (random_boxes(20, 95, 95) + 3).tolist()
    with pytest.raises(UserError, match="reach beyond the image as xyxy_px, none as xyxy_percent"):
        measure_budget(open_rows(tmp_path, boxes, (80, 60)), tokens, DATA)


def test_many_boxes_beyond_the_image_are_doubted(tmp_path, tokens):
    boxes = random_boxes(16, 1000, 1000).tolist()
    (doubt,) = measure_budget(open_rows(tmp_path, boxes), tokens, DATA).doubts
    assert "of 16 objects reach beyond the image as xyxy_px" in doubt


@pytest.mark.parametrize("order", ["xyxy", "xywh"])
def test_right_units_are_not_doubted(tmp_path, tokens, order):
    boxes = random_boxes(40, 1280, 800)
    boxes[0, 2:] = (1280, 800)
    if order == "xywh":
        boxes[:, 2:] -= boxes[:, :2]
        boxes[1, 2:] += 3  # a careless annotator
    opened = open_rows(tmp_path, boxes.tolist(), settings={"box_format": f"{order}_px"})
    assert not measure_budget(opened, tokens, DATA).doubts
    tiny = random_boxes(12, 28, 28).tolist()
    assert not measure_budget(open_rows(tmp_path, tiny, size=(28, 28)), tokens, DATA).doubts


def test_the_notes_say_how_box_2d_was_read_and_pixels_in_it_are_refused(tmp_path, tokens):
    """Gemini's boxes are y1, x1, y2, x2 in thousandths."""
    boxes = [[{"box_2d": [50 * i, 0, 50 * i + 40, 1000]}] for i in range(12)]
    budget = measure_budget(open_rows(tmp_path, boxes), tokens, DATA)
    assert budget.notes == {"box_2d: lists read as yxyx_permille": "12 of 12"}
    some = [*boxes[:11], [{"box_2d": [0, 0, 700, 1200]}]]
    assert list(measure_budget(open_rows(tmp_path, some), tokens, DATA).notes.values()) == [
        "11 of 11"
    ]
    pixels = [[{"box_2d": [0, 0, 1200, 700]}]] * 12
    with pytest.raises(UserError, match="none of 12 .*coordinate is above 1000: set box_format"):
        measure_budget(open_rows(tmp_path, pixels), tokens, DATA)
    stated = open_rows(tmp_path, pixels, settings={"box_format": "xywh_px"})
    assert measure_budget(stated, tokens, DATA).notes == {
        "box_2d: lists read as xywh_px": "12 of 12"
    }


def test_a_source_that_begins_with_background_images_is_no_error(tmp_path, tokens):
    rows = [[]] * 40 + [[[0, 0, 900, 700]]] * 2
    budget = measure_budget(open_rows(tmp_path, rows), tokens, DATA)
    assert budget.notes == {"no boxes: the record is left out (empty)": "40 of 42"}
    with pytest.raises(UserError, match="none of 20 questions can be used; question 0: there are"):
        measure_budget(open_rows(tmp_path, [[]] * 20), tokens, DATA)


def test_records_without_objects_are_counted_and_a_wrong_path_is_an_error(tmp_path, tokens):
    rows = [[[0, 0, 40, 40]], [], None, [[0, 0, 900, 700]]]
    budget = measure_budget(open_rows(tmp_path, rows, settings={"empty": "keep"}), tokens, DATA)
    assert budget.notes == {"no boxes: the answer is empty": "2 of 4"}
    dropped = measure_budget(open_rows(tmp_path, rows), tokens, DATA)
    assert dropped.notes == {"no boxes: the record is left out (empty)": "2 of 4"}
    nothing = open_rows(tmp_path, [[], None], settings={"empty": "keep"})
    measure_budget(nothing, tokens, DATA)  # a source of background images
    typo = open_rows(tmp_path, rows, settings={"empty": "keep", "boxes": "bx"})
    with pytest.raises(UserError, match="there are no boxes: there is no bx.*did you mean box?"):
        measure_budget(typo, tokens, DATA)


@pytest.mark.parametrize(
    "token",
    [
        *("<image>", "<|im_start|>", "</s>", "<bos>", "<eos>", "<pad>", "<unused42>", "[INST]"),
        *("<mask>", "<unk>", "<start_of_turn>", "<image_soft_token>", "<|vision_start|>"),
    ],
)
def test_tokens_of_other_models_in_prompts_are_reported(tmp_path, tokens, token):
    records = [
        {"phrase": f"{token} cat", "box": [0, 0, 4, 4]},
        {"phrase": "cat", "box": [0, 0, 4, 4]},
    ]
    source = Source(uri=write_lines(tmp_path, records), boxes="box", name="")
    (doubt,) = measure_budget(open_examples("a", source, DATA, SIDE), tokens, DATA).doubts
    assert doubt.startswith(f"1 of 2 prompts have {token}, which is no text that PaliGemma knows")
    remove = ast.literal_eval(doubt.partition("remove = ")[2].partition(" leaves")[0])
    cleaned = open_examples("a", replace(source, remove=remove), DATA, SIDE)
    assert not measure_budget(cleaned, tokens, DATA).doubts
    assert cleaned[0].prompt == "detect cat"


@pytest.mark.parametrize("sign", ["\u200b", "\u202e", "\x00", "\x9b", "\xad", "\ufeff", "\u3164"])
def test_invisible_characters_in_prompts_are_reported(tmp_path, tokens, sign):
    records = [{"phrase": f"ca{sign}t", "box": [0, 0, 4, 4]}, {"phrase": "m", "box": [0, 0, 4, 4]}]
    source = Source(uri=write_lines(tmp_path, records), boxes="box", name="")
    (doubt,) = measure_budget(open_examples("a", source, DATA, SIDE), tokens, DATA).doubts
    assert f"1 of 2 prompts have invisible characters, such as U+{ord(sign):04X}: " in doubt
    cleaned = open_examples("a", replace(source, unsafe_names="replace"), DATA, SIDE)
    assert not measure_budget(cleaned, tokens, DATA).doubts
    assert cleaned[0].prompt == "detect cat"


def test_counting_needs_no_room_for_boxes(tmp_path, tokens):
    opened = open_rows(
        tmp_path, [random_boxes(50, 1280, 800).tolist()], settings={"suffix": "count"}
    )
    budget = measure_budget(opened, tokens, replace(DATA, max_boxes=2))
    check_budgets([budget], replace(DATA, max_boxes=2))
    assert (budget.objects, opened[0].suffix) == (0, "50")


@pytest.mark.parametrize(
    ("suffix", "settings", "expected"),
    [
        ("{count}", {}, "50"),
        ("There are {count}.", {"target": "boxes"}, "There are 50."),
        ("{meta.count}", {}, "49"),
        ("{truth}", {"target": "text"}, "48"),
        ("count", {"target": "points", "points": "points"}, "50"),
    ],
)
def test_a_template_of_the_count_needs_no_room_for_boxes(
    tmp_path, tokens, suffix, settings, expected
):
    boxes = random_boxes(50, 8, 8).tolist()
    record = {"box": boxes, "points": np.array(boxes)[:, :2].tolist()}
    record |= {"phrase": "cat", "count": 50, "meta": {"count": 49}, "truth": "48"}
    source = Source(
        uri=write_lines(tmp_path, [record]), suffix=suffix, **({"boxes": "box"} | settings)
    )
    data = replace(DATA, max_boxes=2, suffix_length=32)
    opened = open_examples("a", source, data, SIDE)
    check_budgets([measure_budget(opened, tokens, data)], data)
    assert (opened[0].suffix, len(opened[0].boxes.yxyx)) == (expected, 0)
    roomy = open_examples("a", source, replace(data, max_boxes=50), SIDE)
    assert len(roomy[0].boxes.yxyx) == 50 and roomy[0].suffix == expected


@pytest.mark.parametrize("suffix", ["{count} {phrase}", "{phrase}", "json", "loc"])
def test_other_answers_need_room_for_their_boxes(tmp_path, tokens, suffix):
    record = {"box": random_boxes(5, 8, 8).tolist(), "phrase": "cat", "count": 5}
    source = Source(uri=write_lines(tmp_path, [record]), boxes="box", suffix=suffix)
    data = replace(DATA, max_boxes=2, suffix_length=256)
    budget = measure_budget(open_examples("a", source, data, SIDE), tokens, data)
    with pytest.raises(UserError, match="data.max_boxes=5"):
        check_budgets([budget], data)


ADDRESSES = ["http://a.b/c.jpg", "https://a.b/c.jpg", {"path": "http://a.b/c"}, ["HTTPS://a.b/c"]]


def open_with_addresses(folder, count, addresses, cache_dir):
    rows = [{"image": value} for value in addresses] + [{}] * (count - len(addresses))
    uri = write_lines(folder, [{"phrase": "cat", "box": [0, 0, 4, 4]} | row for row in rows])
    data = replace(DATA, fetch=Fetch(cache_dir=cache_dir), suffix_length=16)
    return Source(uri=uri, boxes="box"), data


@pytest.mark.parametrize("address", ADDRESSES, ids=str)
def test_one_address_without_a_folder_for_it_is_one_bad_record(tmp_path, tokens, address):
    source, data = open_with_addresses(tmp_path, 20, [address], "")
    (doubt,) = measure_budget(open_examples("a", source, data, SIDE), tokens, data).doubts
    assert doubt.startswith("1 of 20 images are at addresses")
    assert "of question 0, but config.data.fetch.cache_dir is ''" in doubt
    bad_records = BadRecords()
    batches = training_batches(
        {"a": source}, data, tokens, image_size=SIDE, batch_size=4, seed=0, bad_records=bad_records
    )
    indices = {int(index) for _ in range(8) for index in next(batches).index}
    assert indices == set(range(1, 20))
    (entry,) = bad_records.entries()
    assert (entry["index"], entry["kind"]) == (0, "not_fetched")
    assert entry["message"].startswith("config.data.fetch.cache_dir is ''")


@pytest.mark.parametrize("cache_dir", ["", "gs://bucket/images"])
@pytest.mark.parametrize("share", [0.2, 1.0])
def test_addresses_without_a_folder_for_them_end_a_run_before_its_first_step(
    tmp_path, tokens, share, cache_dir
):
    addresses = ADDRESSES * 5
    source, data = open_with_addresses(tmp_path, int(20 / share), addresses, cache_dir)
    message = "source a: 20 of (20|100) images are at addresses.*config.data.fetch.cache_dir"
    with pytest.raises(UserError, match=message) as error:
        measure_budget(open_examples("a", source, data, SIDE), tokens, data)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300

"""Rewards and benchmarks read 200 texts alike, but for the listed differences of `strict`."""

import json
import random
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest

from pg_ground import boxes, tokenizer
from pg_ground.config import RewardSettings
from pg_ground.evals import counting, grounding
from pg_ground.evals.answers import loc_answers
from pg_ground.readers import locations, parsers
from pg_ground.readers.locations import Location
from pg_ground.rewards import device_rewards
from pg_ground.rewards.answer_reader import read_answer
from pg_ground.rewards.text_rewards import TEXT_REWARDS, TextExample
from pg_ground.types import BOXES, Batch, Boxes, Gold, Points
from pg_ground.vocab import LOC_MAX, PAD

CHOICES = ("left", "right", "above", "below")


def rewarded_option(text: str) -> str | None:
    """Returns the option letter that `spatial_answer` reads."""
    choice = parsers.choice(parsers.conclusion(text)[1])
    return choice.value if choice.kind == "option" else None


def comparable(readings: list[Location] | tuple[Location, ...]) -> list[tuple]:
    return [(r.numbers, r.label, 1.0 if r.score is None else r.score) for r in readings]


def grammar(name: str, width: int) -> tuple[Callable[[str], Any], Callable[[str], Any]]:
    """Returns the reader of a reward's grammar and the reader of the benchmarks."""
    read = getattr(locations, name)
    return (
        lambda text: comparable(read(text).locations),
        lambda text: comparable(locations.read_any(text, width)),
    )


READERS: dict[str, tuple[Callable[[str], Any], Callable[[str], Any]]] = {
    "number": (
        lambda text: parsers.number(text, strict=True),
        lambda text: parsers.number(text, strict=False),
    ),
    "option": (rewarded_option, lambda text: parsers.option(text, CHOICES, strict=False)),
    "json_points": grammar("json_points", 2),
    "json_boxes": grammar("json_boxes", 4),
    "ovd": grammar("ovd", 4),
    "dict_boxes": grammar("dict_boxes", 4),
    "list_boxes": grammar("list_boxes", 4),
    "box_tokens": grammar("box_tokens", 4),
}
"""The reward's and the benchmark's reader of each kind of answer."""


def random_box(rng: random.Random) -> list[float]:
    x, y = rng.randint(0, 500), rng.randint(0, 400)
    return [x, y, x + rng.randint(1, 100), y + rng.choice([10, 20.5, 30.25])]


def random_objects(rng: random.Random, key: str, width: int) -> list[dict[str, Any]]:
    return [
        {key: random_box(rng)[:width], "label": rng.choice(["cat", "red car"])}
        for _ in range(rng.randint(1, 3))
    ]


def random_answer(rng: random.Random, reader: str) -> str:
    """Returns an answer in the form that the reward of the reader asks for."""
    x1, y1, x2, y2 = random_box(rng)
    detections = [
        {"Position": random_box(rng), "Confidence": rng.choice([0, 0.25, 1])} for _ in range(2)
    ]
    named = {str(key): [random_box(rng) for _ in range(rng.randint(0, 2))] for key in range(3)}
    return {
        "number": rng.choice(["0", "12", "seven", "Twenty", "1,024", "3.5", "-2"]),
        "option": rng.choice(["(A)", "(b)", "(C)", "(D) below"]),
        "json_points": json.dumps(random_objects(rng, "point_2d", 2)),
        "json_boxes": json.dumps(random_objects(rng, "bbox_2d", 4)),
        "ovd": str(detections),
        "dict_boxes": json.dumps(named),
        "list_boxes": rng.choice([str(random_box(rng)), f"({x1}, {y1}), ({x2}, {y2})"]),
        "box_tokens": f"<|box_start|>({x1},{int(y1)}),({x2},{int(y2)})<|box_end|>",
    }[reader]


FORMS: dict[str, str] = {
    "plain": "{answer}",
    "answer tags": "<answer>{answer}</answer>",
    "thoughts and answer tags": "<think>I see 3 (A).</think> <answer>\n{answer}\n</answer>",
    "thoughts without answer tags": "<think>I see 3 (A).</think>{answer}",
    "text around the tags": "So <answer>{answer}</answer> it is",
    "a code fence": "```json\n{answer}\n```",
    "prose": "I think: {answer}.",
    "an open answer tag": "<answer>{answer}",
    "several answers": "<answer>{other}</answer><answer>{answer}</answer>",
}

DIFFERENCES: dict[str, tuple[tuple[str, ...], str]] = {
    "a code fence": (("number", "option"), "a reward pays for the bare answer"),
    "prose": (("number",), "a reward pays for the bare answer"),
    "an open answer tag": (tuple(READERS), "a reward pays for an answer that ends"),
    "several answers": (tuple(READERS), "a reward pays for one answer; a benchmark takes the last"),
}
"""Forms that a benchmark reads and a reward does not, on purpose: the readers concerned, and why.
"""


class Odd(NamedTuple):
    """A text, and the readings of the reward and of the benchmark."""

    reader: str
    text: str
    reward: Any
    benchmark: Any
    reason: str = ""
    """Why the readings differ; "" if they must be equal."""


BOX = ((1.0, 2.0, 30.0, 40.0), "", 1.0)
CAT = ((1.0, 2.0, 30.0, 40.0), "cat", 1.0)
UNREADABLE = (None, "", 1.0)
CAT_TEXT = '{"bbox_2d": [1, 2, 30, 40], "label": "cat"}'

BARE = "a reward pays for the bare answer"
OWN_GRAMMAR = "a reward reads its own grammar alone"
ODD = [
    Odd("number", "8 cows", None, 8, BARE),
    Odd("number", "There are eight of them.", None, 8, BARE),
    Odd("number", "five (5)", None, 5, BARE),
    Odd("number", "4 or 5", None, None),
    Odd("number", "3rd", None, None),
    Odd("number", "twenty-one", None, None),
    Odd("number", "one hundred", None, None),
    Odd("number", "10/2", None, None),
    Odd("number", "٥", None, None),
    Odd("number", "1234,567", None, None),
    Odd("number", "9" * 400, None, None),
    Odd("number", "\0 \ud800 junk", None, None),
    Odd("option", "the answer is B", "B", "B"),
    Odd("option", "I see.\nAnswer: (C)", "C", "C"),
    Odd("option", "(A) or (B)", None, None),
    Odd("option", "A dog", None, None),
    Odd("option", "(E)", "E", None, "a benchmark knows how many options there are"),
    Odd("option", "b", None, "B", "a reward takes no lower-case letter: it may be an article"),
    Odd("option", "[C]", None, "C", BARE),
    Odd("option", "**B**", None, "B", BARE),
    Odd("option", r"\boxed{B}", None, "B", BARE),
    Odd("option", "above", None, "C", "a reward compares relations as words"),
    Odd(
        "option",
        "(A) is not right.\nThe answer is: (B)",
        "B",
        "B",
    ),
    Odd("json_boxes", f'[{CAT_TEXT}, {{"bbox_2d": [5', [CAT], [CAT]),
    Odd("json_boxes", CAT_TEXT.replace('"', "'"), [CAT], [CAT]),
    Odd("json_boxes", '{"bbox_2d": [1, 2, 30], "label": ""}', [UNREADABLE], [UNREADABLE]),
    Odd(
        "json_boxes",
        CAT_TEXT.replace("40", '"40"'),
        [(None, "cat", 1.0)],
        [CAT],
        "a reward pays for numbers that are JSON numbers",
    ),
    Odd("json_boxes", "[1, 2, 30, 40]", [UNREADABLE] * 4, [BOX], OWN_GRAMMAR),
    Odd("list_boxes", "[1e0, 2, 30, 40]", [], [BOX], OWN_GRAMMAR),
    Odd("list_boxes", "1, 2, 30, 40", [], [BOX], OWN_GRAMMAR),
    Odd("json_points", '<point x="1" y="2">cat</point>', [], [((1.0, 2.0), "", 1.0)], OWN_GRAMMAR),
    Odd(
        "ovd",
        '[{"Position": [1, 2, 30, 40], "Confidence": 7}]',
        [(None, "", 0.0)],
        [(BOX[0], "", 7.0)],
        "a box with a confidence outside [0, 1] earns nothing",
    ),
    Odd("box_tokens", "<box>(1,2),(30,40)</box> in thousandths", [BOX], [BOX]),
]
"""Hand-written texts with both readings."""

LOC_TEXTS = [
    "<loc0100><loc0200><loc0500><loc0900> cat",
    "<loc0100><loc0200><loc0500><loc0900> cat ; <loc0001><loc0002><loc0003><loc0004> dog",
    "<loc0100><loc0200> cat;<loc0300><loc0400> dog",
    "<loc0500><loc0900><loc0100><loc0200> cat",
    "detect cat ; dog\n<loc0100><loc0200><loc0500><loc0900> cat",
    "<loc0100><loc0200><loc0500> cat ; <loc0001> ; <loc0005><loc0006><loc0007><loc0008>",
    "<loc0000><loc0000><loc1023><loc1023>" + "<seg001>" * 16 + " cat",
    "a cat at <loc0100><loc0200><loc0500><loc0900>, I think",
    "; ;",
    "no location",
]
GENERATED_LOC_TEXTS = 13


def random_loc_text(rng: random.Random) -> str:
    segments = [
        "".join(f"<loc{rng.randint(0, LOC_MAX):04d}>" for _ in range(rng.choice([4, 4, 2, 3, 5])))
        + rng.choice([" cat", " dog", ""])
        for _ in range(rng.randint(1, 4))
    ]
    return " ; ".join(segments)


def generate() -> list[tuple[str, str, str]]:
    """Returns (reader, form, text): two random answers for each reader and form."""
    rng = random.Random(0)
    return [
        (
            reader,
            form,
            template.format(answer=random_answer(rng, reader), other=random_answer(rng, reader)),
        )
        for reader in READERS
        for form, template in FORMS.items()
        for _ in range(2)
    ]


GENERATED = generate()


def loc_texts() -> list[str]:
    rng = random.Random(1)
    return LOC_TEXTS + [random_loc_text(rng) for _ in range(GENERATED_LOC_TEXTS)]


def test_there_are_200_texts():
    assert len(GENERATED) + len(ODD) + len(loc_texts()) == 200


def test_generated_texts_are_read_alike_but_for_the_listed_forms():
    differing = set()
    for reader, form, text in GENERATED:
        reward, benchmark = (read(text) for read in READERS[reader])
        assert benchmark not in (None, []) or reader == "dict_boxes", text
        if reward != benchmark:
            assert reward in (None, []), "a reward that reads something else reads nothing"
            differing.add((form, reader))
    listed = {(form, reader) for form, (readers, _) in DIFFERENCES.items() for reader in readers}
    assert differing == listed


@pytest.mark.parametrize("odd", ODD, ids=lambda odd: f"{odd.reader}: {odd.text[:30]!a}")
def test_odd_texts_are_read_as_listed(odd):
    read_reward, read_benchmark = READERS[odd.reader]
    assert read_reward(odd.text) == odd.reward
    assert read_benchmark(odd.text) == odd.benchmark
    assert (odd.reward == odd.benchmark) == (odd.reason == "")


def test_the_device_and_the_host_read_loc_tokens_alike():
    """There is no strict reading of loc tokens: the reward on token ids reads what the benchmark
    reads, from ids or text.
    """
    words = tokenizer.load()
    texts = loc_texts()
    ids = [words.suffix(text) for text in texts]
    length = max(map(len, ids))
    tokens = np.array([row + [PAD] * (length - len(row)) for row in ids])[:, None]
    names = np.full((len(texts), 2, 4), PAD)
    for column, name in enumerate(("cat", "dog")):
        name_ids = words.text(" " + name)
        names[:, column, : len(name_ids)] = name_ids
    answer = read_answer(
        jnp.asarray(tokens),
        jnp.asarray(tokens != PAD),
        jnp.full(len(texts), BOXES),
        jnp.asarray(names),
        words.vocab,
    )
    total = 0
    for row, text in enumerate(texts):
        rows = loc_answers(ids[row], words, (LOC_MAX, LOC_MAX))
        for slots, width, key, field in (
            (answer.boxes, 4, "xyxy_px", "boxes"),
            (answer.points, 2, "xy_px", "points"),
        ):
            used = np.asarray(slots.valid[row, 0])
            bins = np.round(np.asarray(slots[0][row, 0])[used] * LOC_MAX).astype(int)
            labels = np.asarray(slots.label[row, 0])[used].tolist()
            device = list(zip(map(tuple, bins.tolist()), labels, strict=True))
            assert [
                (numbers, ["cat", "dog"].index(label) if label in ("cat", "dog") else -1)
                for numbers, label in host_locations(rows[field], key)
            ] == device
            from_text = locations.read_any(text, width)
            assert host_locations(rows[field], key) == [(r.numbers, r.label) for r in from_text]
            total += len(device)
    assert total >= 20


def host_locations(entries: list[dict[str, Any]], key: str) -> list[tuple]:
    """Returns (bins, y first; label) of a row's locations in an image of 1023 × 1023 pixels."""
    swapped = [np.round(np.reshape(entry[key], (-1, 2))[:, ::-1].ravel()) for entry in entries]
    return [(tuple(n.tolist()), entry["label"]) for n, entry in zip(swapped, entries, strict=True)]


# one implementation


GOLD_BOX = (1.0, 2.0, 30.0, 40.0)


def text_example(**fields: Any) -> TextExample:
    blank = TextExample("", "", (), (), (), (100, 100), "text", "0", 0, 9)
    return blank._replace(**fields)


def device_iou() -> float:
    """Returns the device reward `iou` of one completion with one box."""
    slots = Boxes(jnp.array([[GOLD_BOX]]) / 100, jnp.zeros((1, 1), int), jnp.ones((1, 1), bool))
    no_points = Points(jnp.zeros((1, 1, 2)), jnp.zeros((1, 1), int), jnp.zeros((1, 1), bool))
    names, masks = jnp.zeros((1, 1, 1), int), jnp.zeros((1, 1, 0, 0), bool)
    gold = Gold(slots, no_points, jnp.array([BOXES]), names, masks)
    blank = [jnp.zeros((1, 1))] * len(Batch._fields)
    batch = Batch(*blank)._replace(gold=gold)
    answer = read_answer(
        jnp.array([[[1]]]), jnp.ones((1, 1, 1), bool), gold.target, names, tokenizer.load().vocab
    )
    answer = answer._replace(boxes=Boxes(*(leaf[:, None] for leaf in slots)))
    return float(device_rewards.REWARDS["iou"](answer, batch, RewardSettings())[0, 0])


def text_iou() -> float:
    example = text_example(target="boxes", boxes=(GOLD_BOX,), labels=("",))
    return TEXT_REWARDS["list_iou"](str(list(GOLD_BOX)), example)


def benchmark_row() -> dict[str, Any]:
    boxes_field = {"boxes": [{"label": "", "xyxy_px": list(GOLD_BOX)}]}
    return {"id": 0, "benchmark": "rec", "gold": boxes_field, "prediction": boxes_field}


def test_iou_has_one_implementation(monkeypatch):
    """The device reward, the text reward and both box benchmarks use the areas of `boxes`."""
    measures = (
        device_iou,
        text_iou,
        lambda: grounding.score_one(benchmark_row())["iou"],
        lambda: grounding.score_set(benchmark_row())["iou"],
    )
    assert [measure() for measure in measures] == [1.0] * 4

    def areas(a: Any, b: Any) -> tuple[Any, Any]:
        ones = 0 * (a + b).sum(axis=-1) + 1
        return ones, 4 * ones

    monkeypatch.setattr(boxes, "_overlap_and_union", areas)
    assert [measure() for measure in measures] == [0.25] * 4


def test_matching_has_one_implementation(monkeypatch):
    """Two boxes each: without a match, the text reward and the benchmark of sets are 0."""
    other = [50.0, 60.0, 70.0, 80.0]
    example = text_example(target="boxes", boxes=(GOLD_BOX, tuple(other)), labels=("", ""))
    row = benchmark_row()
    row["gold"]["boxes"].append({"label": "", "xyxy_px": other})
    measures = (
        lambda: TEXT_REWARDS["list_iou"](f"{list(GOLD_BOX)} {other}", example),
        lambda: grounding.score_set(row)["iou"],
    )
    assert [measure() for measure in measures] == [1.0] * 2
    nothing = np.zeros(0, int)
    monkeypatch.setattr(boxes, "match", lambda similarity: (nothing, nothing))
    monkeypatch.setattr(grounding, "match", boxes.match)
    assert [measure() for measure in measures] == [0.0] * 2


def test_numbers_have_one_reader(monkeypatch):
    """A new number word is a number for the reward and for the benchmark."""
    row = {"gold": {"number": 6.0}}

    def scores() -> list[float]:
        reading = parsers.number("vi", strict=False)
        benchmark = counting.score_count(row | {"prediction": {"number": reading}})["correct"]
        return [TEXT_REWARDS["count_exact"]("vi", text_example(gold="6")), benchmark]

    assert scores() == [0.0, 0.0]
    pattern = parsers._NUMBER.pattern.replace("six|", "vi|six|")
    monkeypatch.setattr(parsers, "_NUMBER", re.compile(pattern))
    words = list(parsers._NUMBER_WORDS)
    words[6] = "vi"
    monkeypatch.setattr(parsers, "_NUMBER_WORDS", tuple(words))
    assert scores() == [1.0, 1.0]

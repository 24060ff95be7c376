"""What `read_answer` makes of token ids, and the laws of every reward. Answers are text, through the package's tokenizer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pg_ground import tokenizer
from pg_ground.config import RewardSettings
from pg_ground.rewards.device_rewards import (
    REWARDS,
    by_name,
    confidence,
    measures,
    read_answer,
    score,
)
from pg_ground.types import (
    BOXES,
    POINTS,
    Answer,
    Batch,
    Boxes,
    Gold,
    Points,
    Rewards,
    Rollout,
    UserError,
)
from pg_ground.vocab import EOS, LOC_MAX, PAD

TOKENS = tokenizer.load()
LENGTH = 32
GROUP = 8
SETTINGS = RewardSettings()

read_jitted = jax.jit(read_answer, static_argnums=4)


@jax.jit
def judge_jitted(r: Rollout, batch: Batch) -> dict[str, jax.Array]:
    """Returns every reward at once: they are compiled together, for groups of `GROUP`."""
    answer = read_answer(r.tokens, r.mask, batch.gold.target, batch.gold.names, TOKENS.vocab)
    return {name: reward(answer, batch, SETTINGS) for name, reward in REWARDS.items()}


SHAPING = ("length", "repetition", "overlong")
"""They judge a completion whatever was asked."""

FOR_BOTH = ("gaussian_point", "label", "format", "count", "count_graded")
FOR_BOXES = ("iou", "iou_squared", "giou", "gaussian_coverage", "detection", *FOR_BOTH)
FOR_POINTS = ("distance_gaussian", "point_in_box", "point_in_mask", *FOR_BOTH)

BOX = (100, 200, 500, 900)
OTHER = (600, 50, 1000, 300)
FAR = (0, 920, 90, 1020)


def loc(*bins: int) -> str:
    return "".join(f"<loc{b:04d}>" for b in bins)


def rollout(*texts: str, unfinished: bool = False) -> Rollout:
    """Returns one prompt's completions, each ending in EOS unless `unfinished`."""
    tokens, mask = (
        np.full((1, len(texts), LENGTH), PAD, np.int32),
        np.zeros((1, len(texts), LENGTH), bool),
    )
    for row, text in enumerate(texts):
        ids = TOKENS.text(text) + [EOS] * (not unfinished)
        tokens[0, row, : len(ids)], mask[0, row, : len(ids)] = ids, True
    return Rollout(
        jnp.asarray(tokens), jnp.asarray(mask), jnp.zeros(tokens.shape), jnp.asarray(mask)
    )


def name_ids(names: tuple[str, ...]) -> jax.Array:
    out = np.full((1, 2, 6), PAD, np.int32)
    for row, name in enumerate(names):
        ids = TOKENS.text(" " + name)
        out[0, row, : len(ids)] = ids
    return jnp.asarray(out)


def read(
    *texts: str, target: int = BOXES, names: tuple[str, ...] = ("cat",), unfinished: bool = False
) -> Answer:
    r = rollout(*texts, unfinished=unfinished)
    return read_jitted(r.tokens, r.mask, jnp.array([target]), name_ids(names), TOKENS.vocab)


def bins_of(boxes: Boxes) -> list[list[int]]:
    """Returns the used boxes of the only completion, as bins."""
    return (
        np.round(np.asarray(boxes.yxyx[0, 0])[np.asarray(boxes.valid[0, 0])] * LOC_MAX)
        .astype(int)
        .tolist()
    )


def points_of(points: Points) -> list[list[int]]:
    return (
        np.round(np.asarray(points.yx[0, 0])[np.asarray(points.valid[0, 0])] * LOC_MAX)
        .astype(int)
        .tolist()
    )


def labels_of(slots: Boxes | Points) -> list[int]:
    return np.asarray(slots.label[0, 0])[np.asarray(slots.valid[0, 0])].tolist()


# reading


def test_one_box():
    found = read(loc(*BOX) + " cat")
    assert bins_of(found.boxes) == [list(BOX)] and labels_of(found.boxes) == [0]
    np.testing.assert_array_equal(found.boxes.yxyx[0, 0, 0], jnp.array(BOX, jnp.float32) / LOC_MAX)
    assert (
        not found.points.valid.any() and found.stray == 0 and found.finished and found.grammatical
    )


def test_two_boxes_with_names_in_either_order():
    text = f"{loc(*BOX)} red circle ; {loc(*OTHER)} cat"
    found = read(text, names=("red circle", "cat"))
    assert bins_of(found.boxes) == [list(BOX), list(OTHER)] and labels_of(found.boxes) == [0, 1]
    assert found.grammatical and found.stray == 0
    assert labels_of(read(text, names=("cat", "red circle")).boxes) == [1, 0]


def test_separators_with_and_without_spaces():
    for separator in (" ; ", ";", " ;", "; "):
        found = read(f"{loc(*BOX)} cat{separator}{loc(*OTHER)} cat")
        assert bins_of(found.boxes) == [list(BOX), list(OTHER)], separator
        assert found.grammatical, separator


def test_one_point_and_two():
    found = read(f"{loc(10, 20)} cat", target=POINTS)
    assert points_of(found.points) == [[10, 20]] and labels_of(found.points) == [0]
    assert not found.boxes.valid.any() and found.stray == 0 and found.grammatical
    found = read(f"{loc(10, 20)} cat ; {loc(1023, 0)} dog", target=POINTS, names=("dog", "cat"))
    assert points_of(found.points) == [[10, 20], [1023, 0]] and labels_of(found.points) == [1, 0]


def test_answers_without_names_where_the_question_has_none():
    found = read(f"{loc(*BOX)} ; {loc(*OTHER)}", names=())
    assert (
        bins_of(found.boxes) == [list(BOX), list(OTHER)]
        and labels_of(found.boxes) == [0, 0]
        and found.grammatical
    )
    assert not read(f"{loc(*BOX)} cat", names=()).grammatical
    assert not read(loc(*BOX), names=("cat",)).grammatical


@pytest.mark.parametrize("count", [1, 3, 5, 8])
def test_locs_that_are_neither_box_nor_point_are_stray(count):
    found = read(f"{loc(*range(count))} cat")
    assert found.stray == count and not found.grammatical
    assert not found.boxes.valid.any() and not found.points.valid.any()


def test_a_stray_segment_leaves_the_others_alone():
    found = read(f"{loc(1, 2, 3)} cat ; {loc(*BOX)} cat ; {loc(9)} cat")
    assert bins_of(found.boxes) == [list(BOX)] and found.stray == 4 and not found.grammatical


def test_a_reversed_box_is_read_as_it_stands():
    """It is a prediction, worth 0: see below."""
    found = read(f"{loc(500, 900, 100, 200)} cat")
    assert bins_of(found.boxes) == [[500, 900, 100, 200]] and found.grammatical


def test_an_unfinished_completion_is_read_but_not_grammatical():
    found = read(f"{loc(*BOX)} cat", unfinished=True)
    assert bins_of(found.boxes) == [list(BOX)] and not found.finished and not found.grammatical


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
    found = read(text)
    assert bins_of(found.boxes)[0] == list(BOX) and found.stray == 0 and not found.grammatical


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
    found = read(f"{loc(10, 20)} cat", target=BOXES)
    assert (
        points_of(found.points) == [[10, 20]]
        and not found.boxes.valid.any()
        and found.stray == 0
        and not found.grammatical
    )
    found = read(f"{loc(*BOX)} cat", target=POINTS)
    assert (
        bins_of(found.boxes) == [list(BOX)]
        and not found.points.valid.any()
        and not found.grammatical
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
    found = read("")
    assert found.finished and not found.grammatical and found.stray == 0
    assert not found.boxes.valid.any() and not found.points.valid.any()


def test_a_completion_without_a_single_token_is_not_finished():
    tokens = jnp.zeros((1, 1, LENGTH), jnp.int32)
    found = read_jitted(
        tokens, jnp.zeros(tokens.shape, bool), jnp.array([BOXES]), name_ids(("cat",)), TOKENS.vocab
    )
    assert (
        not found.finished
        and not found.grammatical
        and not found.boxes.valid.any()
        and found.stray == 0
    )


def test_what_lies_behind_the_mask_is_not_read():
    r = rollout(f"{loc(*BOX)} cat")
    behind = jnp.where(r.mask, r.tokens, TOKENS.vocab.loc0 + 7)
    plain, full = (
        read_jitted(tokens, r.mask, jnp.array([BOXES]), name_ids(("cat",)), TOKENS.vocab)
        for tokens in (r.tokens, behind)
    )
    jax.tree.map(np.testing.assert_array_equal, plain._replace(tokens=full.tokens), full)


def test_completions_of_a_group_and_prompts_of_a_batch_are_read_apart():
    texts = [
        f"{loc(*BOX)} cat",
        f"{loc(10, 20)} cat",
        "",
        f"{loc(1, 2, 3)} cat ; {loc(*OTHER)} dog",
    ]
    r = rollout(*texts)
    two = Rollout(*(jnp.concatenate([x, x[:, ::-1]]) for x in r))
    names = jnp.concatenate([name_ids(("cat", "dog")), name_ids(("dog", "cat"))])
    whole = read_jitted(two.tokens, two.mask, jnp.array([BOXES, POINTS]), names, TOKENS.vocab)
    for b, (target, order, named) in enumerate(
        ((BOXES, texts, ("cat", "dog")), (POINTS, texts[::-1], ("dog", "cat")))
    ):
        for g, text in enumerate(order):
            alone = read(text, target=target, names=named)
            jax.tree.map(lambda a, w: np.testing.assert_array_equal(a[0, 0], w[b, g]), alone, whole)  # noqa: B023


def test_as_many_boxes_as_fit_are_read():
    """Of 32 tokens the shortest boxes with names need 6 each, EOS one more."""
    text = " ; ".join(f"{loc(*BOX)} cat" for _ in range(4))
    r = rollout(text)
    assert bins_of(read(text).boxes) == [list(BOX)] * 4 and int(r.mask.sum()) > 24
    full = loc(*range(28))
    assert read(full).stray == 28


# how sure

sure = jax.jit(confidence, static_argnums=3)


def likelihoods(text: str) -> tuple[Rollout, np.ndarray]:
    """Returns the completion with a log-probability of its own for each token, and those by token."""
    r = rollout(text)
    logps = -np.random.default_rng(len(text)).uniform(0.01, 2, LENGTH).astype(np.float32)
    return r._replace(logps=jnp.where(r.mask, logps, 0)), np.where(r.mask[0, 0], logps, 0)


def test_a_box_is_as_sure_as_its_name_is_likely():
    segments = [f"{loc(*BOX)} red circle", " ;", f" {loc(*OTHER)} cat", " ;", f" {loc(*FAR)}"]
    r, logps = likelihoods("".join(segments))
    tokens = np.asarray(r.tokens[0, 0])
    is_loc = (tokens >= TOKENS.vocab.loc0) & (tokens < TOKENS.vocab.seg0)
    first, second, third = np.flatnonzero(is_loc).reshape(3, 4)
    ends = np.flatnonzero(np.isin(tokens, TOKENS.vocab.separators))
    names = [np.arange(first[-1] + 1, ends[0]), np.arange(second[-1] + 1, ends[1])]
    assert len(names[0]) > len(names[1]) >= 1
    wanted = [logps[names[0]], logps[names[1]], logps[third]]
    found = np.asarray(sure(r.tokens, r.mask, r.logps, TOKENS.vocab)[0, 0])
    np.testing.assert_allclose(found[:3], [np.exp(np.mean(one)) for one in wanted], rtol=1e-6)
    assert not found[3:].any()


def test_certainty_stands_in_the_slots_of_the_boxes():
    """A point and a broken answer between two boxes have none."""
    r, _ = likelihoods(
        f"{loc(*BOX)} cat ; {loc(1, 2)} cat ; {loc(1, 2, 3)} cat ; {loc(*OTHER)} dog"
    )
    found = sure(r.tokens, r.mask, r.logps, TOKENS.vocab)
    answer = read_jitted(
        r.tokens, r.mask, jnp.array([BOXES]), name_ids(("cat", "dog")), TOKENS.vocab
    )
    assert found.shape == answer.boxes.valid.shape and int(answer.boxes.valid.sum()) == 2
    np.testing.assert_array_equal(found > 0, answer.boxes.valid)


def test_certainty_moves_with_its_box():
    """Each token's log-probability is a function of the token, and the separators are the same in any order."""
    of_token = -np.random.default_rng(0).uniform(0.01, 2, TOKENS.vocab.size).astype(np.float32)
    pieces = [f"{loc(*BOX)} red circle", f"{loc(*OTHER)} cat", f"{loc(*FAR)} dog"]
    found = {}
    for order in ([0, 1, 2], [2, 0, 1], [1, 2, 0]):
        r = rollout(" ; ".join(pieces[i] for i in order))
        scores = np.asarray(
            sure(
                r.tokens, r.mask, jnp.where(r.mask, of_token[np.asarray(r.tokens)], 0), TOKENS.vocab
            )[0, 0]
        )
        found[tuple(order)] = [scores[order.index(i)] for i in range(3)]
    for other in found.values():
        np.testing.assert_allclose(other, found[0, 1, 2], rtol=1e-6)


def test_the_codes_of_a_mask_are_no_name():
    codes = "".join(f"<seg{code:03d}>" for code in range(16))
    for name in (" cat", ""):
        r, logps = likelihoods(f"{loc(*BOX)}{codes}{name}")
        part = logps[20 : int(r.mask.sum()) - 1] if name else logps[:4]
        np.testing.assert_allclose(
            sure(r.tokens, r.mask, r.logps, TOKENS.vocab)[0, 0, 0], np.exp(part.mean()), rtol=1e-6
        )


# reward_workers


def gold_batch(
    boxes: list[tuple[tuple[int, ...], int]],
    points: list[tuple[tuple[int, int], int]] = (),
    target: int = BOXES,
    names=("cat",),
) -> Batch:
    """Returns one question whose gold is given in bins, with labels; 3 slots each. Masks are the boxes, in 32 × 32 cells."""

    def slots(rows: list, width: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        place, label, valid = (
            np.zeros((1, 3, width), np.float32),
            np.zeros((1, 3), np.int32),
            np.zeros((1, 3), bool),
        )
        for k, (bins, name) in enumerate(rows):
            place[0, k], label[0, k], valid[0, k] = np.array(bins) / LOC_MAX, name, True
        return jnp.asarray(place), jnp.asarray(label), jnp.asarray(valid)

    middle = (jnp.arange(32) + 0.5) / 32
    y1, x1, y2, x2 = (side[..., None] for side in jnp.moveaxis(slots(boxes, 4)[0], -1, 0))
    masks = ((y1 < middle) & (middle < y2))[..., :, None] & ((x1 < middle) & (middle < x2))[
        ..., None, :
    ]
    gold = Gold(
        Boxes(*slots(boxes, 4)),
        Points(*slots(list(points), 2)),
        jnp.array([target]),
        name_ids(names),
        masks,
    )
    text, one = jnp.zeros((1, 1), jnp.int32), jnp.zeros(1, jnp.int32)
    size = jnp.array([[640, 480]])
    return Batch(jnp.zeros((1, 2, 2, 3)), text, text > 0, text, text > 0, gold, size, one, one)


def judge(reward: str, batch: Batch, *texts: str, unfinished: bool = False) -> list[float]:
    """Returns the reward of each completion of one question."""
    found: list[float] = []
    for start in range(0, len(texts), GROUP):
        some = texts[start : start + GROUP]
        r = rollout(*some, *[""] * (GROUP - len(some)), unfinished=unfinished)
        found += judge_jitted(r, batch)[reward][0, : len(some)].tolist()
    return found


ONE_BOX = gold_batch([(BOX, 0)])
ONE_POINT = gold_batch([(BOX, 0)], [((300, 550), 0)], POINTS)
"""The point is the box's centre."""

CASES = [(name, ONE_BOX) for name in FOR_BOXES] + [(name, ONE_POINT) for name in FOR_POINTS]
IDS = [f"{name}-{'boxes' if batch is ONE_BOX else 'points'}" for name, batch in CASES]
EVERY = pytest.mark.parametrize(("reward", "batch"), CASES, ids=IDS)


def right(batch: Batch) -> str:
    return f"{loc(*BOX)} cat" if batch is ONE_BOX else f"{loc(300, 550)} cat"


def wrong(batch: Batch) -> str:
    return f"{loc(*FAR)} cat" if batch is ONE_BOX else f"{loc(1023, 0)} cat"


def test_the_cases_cover_every_reward():
    assert {name for name, _ in CASES} | set(SHAPING) == set(REWARDS)


@EVERY
def test_the_right_answer_is_worth_1(reward, batch):
    # gold lies on the grid here, so nothing is lost to it; the rest is float32, in coverage four roundings of a logarithm near 5
    np.testing.assert_allclose(judge(reward, batch, right(batch)), 1, rtol=0, atol=4e-6)


@pytest.mark.parametrize("reward", ["iou", "giou", "gaussian_point", "gaussian_coverage"])
def test_the_grid_costs_the_right_answer_little(reward):
    """A side moves by half a bin at most: the worst IoU of h × w bins is (h − 1)(w − 1) / ((h + 1)(w + 1)), others lose less."""
    rng = np.random.default_rng(0)
    for _ in range(10):
        y, x = rng.uniform(0, 700, 2)
        h, w = rng.uniform(50, 300, 2)
        exact = (y, x, y + h, x + w)
        bins = np.round(exact).astype(int)
        found = judge(reward, gold_batch([(exact, 0)]), f"{loc(*bins)} cat")
        assert (h - 1) * (w - 1) / ((h + 1) * (w + 1)) <= found[0] <= 1


@EVERY
def test_rewards_lie_in_0_to_1_whatever_is_written(reward, batch):
    rng = np.random.default_rng(0)
    texts = [right(batch), wrong(batch), "", "cat", ";"]
    for _ in range(20):
        counts = rng.choice([1, 2, 4, 4, 4, 5], rng.integers(1, 4))
        texts.append(
            " ; ".join(
                loc(*rng.integers(0, 1024, count)) + " cat" * rng.integers(2) for count in counts
            )
        )
    found = np.array(judge(reward, batch, *texts))
    assert (found >= 0).all() and (found <= 1).all() and len(set(found.round(6))) > 1


@EVERY
def test_nothing_and_the_wrong_kind_are_worth_0(reward, batch):
    other = right(ONE_POINT if batch is ONE_BOX else ONE_BOX)
    none = 0.5 if reward == "count_graded" else 0.0  # one too few
    assert judge(reward, batch, "", "cat", other, f"{loc(1, 2, 3)} cat") == [none] * 4


@EVERY
def test_spam_lowers_every_reward_but_the_grammar(reward, batch):
    answers = [right(batch)] + [
        " ; ".join([right(batch)] + [wrong(batch)] * more) for more in (1, 2)
    ]
    copies = [right(batch)] + [" ; ".join([right(batch)] * (1 + more)) for more in (1, 2)]
    for texts in (answers, copies):
        found = judge(reward, batch, *texts)
        if reward == "format":
            assert found == [1.0, 1.0, 1.0]
        elif reward == "count":
            assert found == [1.0, 0.0, 0.0]
        else:  # Σ is 1 (2·Σ / (n + 1)), or 1 and at most as much again from nearness, which `giou` gives to any box
            assert found[0] > found[1] > found[2]


def test_iou_of_spam_is_2_over_n_plus_1():
    texts = [" ; ".join([f"{loc(*BOX)} cat"] * n) for n in (1, 2, 3)]
    np.testing.assert_allclose(judge("iou", ONE_BOX, *texts), [1, 2 / 3, 1 / 2], rtol=1e-6)


@pytest.mark.parametrize(
    "reward", ["iou", "iou_squared", "giou", "gaussian_point", "gaussian_coverage", "label"]
)
def test_a_reversed_box_counts_as_a_prediction_worth_0(reward):
    flipped = f"{loc(BOX[2], BOX[3], BOX[0], BOX[1])} cat"
    alone, beside = judge(reward, ONE_BOX, flipped, f"{loc(*BOX)} cat ; {flipped}")
    assert alone == 0
    np.testing.assert_allclose(beside, 2 / 3, rtol=1e-5)


@pytest.mark.parametrize(
    "reward", ["iou", "iou_squared", "giou", "gaussian_point", "gaussian_coverage"]
)
def test_nearer_boxes_are_worth_more(reward):
    texts = [f"{loc(*(b + d for b in BOX))} cat" for d in (0, 10, 20, 40, 80)]
    assert (np.diff(judge(reward, ONE_BOX, *texts)) < 0).all()


def test_boxes_that_miss_are_ranked_by_all_but_iou():
    texts = [f"{loc(600 + d, 200, 700 + d, 900)} cat" for d in (0, 100, 200)]
    assert judge("iou", ONE_BOX, *texts) == [0.0, 0.0, 0.0]
    for reward in ("giou", "gaussian_point", "gaussian_coverage"):
        assert (np.diff(judge(reward, ONE_BOX, *texts)) < 0).all(), reward


@pytest.mark.parametrize("reward", ["gaussian_point", "distance_gaussian"])
def test_nearer_points_are_worth_more(reward):
    texts = [f"{loc(300 + d, 550)} cat" for d in (0, 10, 20, 40, 80)]
    assert (np.diff(judge(reward, ONE_POINT, *texts)) < 0).all()


def test_distance_gaussian_is_in_pixels_of_640():
    found = judge(
        "distance_gaussian", ONE_POINT, f"{loc(300 + 100, 550)} cat", f"{loc(300, 550 + 100)} cat"
    )
    d = np.array([480, 640]) * 100 / LOC_MAX
    np.testing.assert_allclose(found, np.exp(-((d / 100) ** 2) / 2), rtol=1e-5)


@pytest.mark.parametrize("reward", REWARDS)
def test_a_reward_is_nan_exactly_where_it_does_not_apply(reward):
    for batch, applies in ((ONE_BOX, FOR_BOXES), (ONE_POINT, FOR_POINTS)):
        found = np.isnan(judge(reward, batch, right(batch), wrong(batch), ""))
        assert found.tolist() == [reward not in applies + SHAPING] * 3


@pytest.mark.parametrize("reward", ["gaussian_point", "point_in_box", "point_in_mask"])
def test_what_needs_the_objects_is_nan_for_points_without_them(reward):
    assert np.isnan(
        judge(reward, gold_batch([], [((300, 550), 0)], POINTS), f"{loc(300, 550)} cat")
    ).all()


TWO = gold_batch([(BOX, 0), (OTHER, 1)], names=("cat", "dog"))


@pytest.mark.parametrize(
    "reward", ["iou", "iou_squared", "gaussian_point", "gaussian_coverage", "detection", "label"]
)
def test_boxes_match_only_within_their_name(reward):
    exact = f"{loc(*BOX)} cat ; {loc(*OTHER)} dog"
    turned = f"{loc(*OTHER)} dog ; {loc(*BOX)} cat"
    swapped = f"{loc(*BOX)} dog ; {loc(*OTHER)} cat"
    half = f"{loc(*BOX)} cat ; {loc(*OTHER)} fox"
    found = judge(reward, TWO, exact, turned, swapped, half, f"{loc(*BOX)} cat")
    np.testing.assert_allclose(found[:2], 1, atol=4e-6)
    assert found[2] < 0.3 or reward == "label"
    np.testing.assert_allclose(found[3], 1 / 2, atol=4e-6)
    np.testing.assert_allclose(found[4], 1 / 2 if reward == "detection" else 2 / 3, atol=4e-6)


def test_where_nothing_is_eos_alone_is_right():
    nothing = gold_batch([])
    for reward in FOR_BOXES:
        silent, boxed, unfinished = (
            *judge(reward, nothing, "", f"{loc(*BOX)} cat"),
            *judge(reward, nothing, f"{loc(1, 2, 3)} cat", unfinished=True),
        )
        assert silent == 1 and boxed == (0.5 if reward == "count_graded" else 0), reward
        assert unfinished == (0 if reward == "format" else 1), reward


def test_format_wants_the_end():
    assert judge("format", ONE_BOX, right(ONE_BOX)) == [1.0]
    assert judge("format", ONE_BOX, right(ONE_BOX), unfinished=True) == [0.0]


def test_count_counts_answers_of_the_asked_kind():
    box, point = f"{loc(*BOX)} cat", f"{loc(1, 2)} cat"
    found = judge(
        "count", ONE_BOX, box, wrong(ONE_BOX), f"{box} ; {point}", point, f"{box} ; {box}"
    )
    assert found == [1.0, 1.0, 1.0, 0.0, 0.0]


def test_count_graded_falls_with_each_answer_too_many_or_too_few():
    answers = [" ; ".join([f"{loc(*BOX)} cat"] * n) for n in range(5)]
    np.testing.assert_allclose(
        judge("count_graded", TWO, *answers), [1 / 3, 1 / 2, 1, 1 / 2, 1 / 3], rtol=1e-6
    )


def test_label_judges_names_alone():
    far, near = loc(*FAR), loc(*BOX)
    texts = (
        f"{far} dog ; {near} cat",
        f"{far} cat ; {near} cat",
        f"{far} cat",
        f"{far} cow ; {near} dog",
        "",
    )
    np.testing.assert_allclose(judge("label", TWO, *texts), [1, 1 / 2, 2 / 3, 1 / 2, 0], rtol=1e-6)


def test_iou_squared_is_the_square_of_iou_for_one_box():
    texts = [f"{loc(*(b + d for b in BOX))} cat" for d in (0, 10, 20, 40, 80)]
    np.testing.assert_allclose(
        judge("iou_squared", ONE_BOX, *texts), np.square(judge("iou", ONE_BOX, *texts)), rtol=1e-6
    )


def test_a_point_on_the_edge_is_in_its_box_and_one_bin_further_is_not():
    y1, x1, y2, x2 = BOX
    inside = [(y1, x1), (y2, x2), (y1, x2), (300, 550)]
    outside = [(y1 - 1, x1), (y2 + 1, x2), (300, x2 + 1), (300, x1 - 1)]
    found = judge("point_in_box", ONE_POINT, *(f"{loc(*at)} cat" for at in inside + outside))
    assert found == [1.0] * 4 + [0.0] * 4


def test_points_lie_in_the_box_and_the_mask_of_their_name():
    batch = gold_batch(
        [(BOX, 0), (OTHER, 1)], [((300, 550), 0), ((800, 175), 1)], POINTS, ("cat", "dog")
    )
    right, swapped = (
        f"{loc(300, 550)} {a} ; {loc(800, 175)} {b}" for a, b in (("cat", "dog"), ("dog", "cat"))
    )
    for reward in ("point_in_box", "point_in_mask"):
        found = judge(
            reward,
            batch,
            right,
            swapped,
            f"{loc(310, 600)} cat",
            f"{right} ; {loc(300, 550)} cat",
            "",
        )
        np.testing.assert_allclose(found, [1, 0, 2 / 3, 4 / 5, 0], rtol=1e-6, err_msg=reward)


def test_a_mask_is_read_cell_by_cell():
    cells = np.random.default_rng(0).random((3, 4, 4)) < 0.5
    batch = ONE_POINT._replace(gold=ONE_POINT.gold._replace(masks=jnp.asarray(cells)[None]))
    at = [(y, x) for y in range(4) for x in range(4)]
    texts = [f"{loc(128 + 256 * y, 128 + 256 * x)} cat" for y, x in at]
    assert judge("point_in_mask", batch, *texts) == [float(cells[0, y, x]) for y, x in at]
    corners = [f"{loc(y, x)} cat" for y in (0, LOC_MAX) for x in (0, LOC_MAX)]
    assert (
        judge("point_in_mask", batch, *corners)
        == cells[0][[0, 0, -1, -1], [0, -1, 0, -1]].astype(float).tolist()
    )


def test_where_no_masks_are_carried_point_in_mask_does_not_apply():
    without = ONE_POINT._replace(gold=ONE_POINT.gold._replace(masks=jnp.zeros((1, 3, 0, 0), bool)))
    assert np.isnan(judge("point_in_mask", without, right(ONE_POINT), "")).all()


def alone(reward: str, batch: Batch, *texts: str, **settings) -> list[float]:
    """Returns one reward under other settings."""
    r = rollout(*texts)
    answer = read_jitted(r.tokens, r.mask, batch.gold.target, batch.gold.names, TOKENS.vocab)
    return jax.jit(lambda a, b: REWARDS[reward](a, b, RewardSettings(**settings)))(answer, batch)[
        0
    ].tolist()


def test_distance_in_shares_of_the_diagonal_is_that_of_the_image():
    texts = [f"{loc(300 + dy, 550 + dx)} cat" for dy, dx in ((0, 0), (100, 0), (0, 100), (60, -80))]
    px, share = (alone("distance_gaussian", ONE_POINT, *texts, **of) for of in (
        {"distance_sigma_px": 80.0}, {"distance_unit": "diagonal", "distance_sigma_share": 0.1},
    ))  # fmt: skip
    np.testing.assert_allclose(share, px, rtol=1e-5)  # the diagonal of 640 × 480 is 800
    larger = ONE_POINT._replace(size=ONE_POINT.size * 7)
    np.testing.assert_allclose(alone("distance_gaussian", larger, *texts, distance_unit="diagonal"), alone(
        "distance_gaussian", ONE_POINT, *texts, distance_unit="diagonal"), rtol=1e-5)  # fmt: skip


def test_distance_in_shares_of_the_gold_box_is_that_of_the_object():
    height, width = (BOX[2] - BOX[0]) / LOC_MAX * 480, (BOX[3] - BOX[1]) / LOC_MAX * 640
    at, unit = f"{loc(300 + 50, 550)} cat", {"distance_unit": "box", "distance_sigma_share": 0.25}
    sigma = 0.25 * np.hypot(height, width)
    expected = np.exp(-0.5 * (50 / LOC_MAX * 480 / sigma) ** 2)
    np.testing.assert_allclose(
        alone("distance_gaussian", ONE_POINT, at, **unit), expected, rtol=1e-5
    )
    smaller = gold_batch([((200, 375, 400, 725), 0)], [((300, 550), 0)], POINTS)
    half = alone("distance_gaussian", smaller, f"{loc(300 + 25, 550)} cat", **unit)
    np.testing.assert_allclose(half, expected, rtol=1e-5)
    assert np.isnan(
        alone("distance_gaussian", gold_batch([], [((300, 550), 0)], POINTS), at, **unit)
    ).all()


def test_length_is_the_share_of_the_room_that_is_left():
    r = rollout(right(ONE_BOX), "")
    used = r.mask.sum(axis=-1)[0].tolist()
    np.testing.assert_allclose(
        judge("length", ONE_BOX, right(ONE_BOX), ""), [1 - n / LENGTH for n in used], rtol=1e-6
    )


def test_overlong_is_daposs_of_the_paper():
    """arXiv 2503.14476, equation 13; TRL's docstring has 90 tokens of 100 with a cache of 20: -0.5."""
    lengths = np.array([1, 80, 81, 90, 99, 100])
    mask = jnp.arange(120) < lengths[:, None]
    r = rollout("")
    answer = read_jitted(r.tokens, r.mask, ONE_BOX.gold.target, ONE_BOX.gold.names, TOKENS.vocab)
    answer = answer._replace(tokens=jnp.ones((1, *mask.shape), jnp.int32), mask=mask[None])
    found = REWARDS["overlong"](
        answer, ONE_BOX, RewardSettings(overlong_max_tokens=100, overlong_cache_tokens=20)
    )
    np.testing.assert_allclose(found[0], [0, 0, -0.05, -0.5, -0.95, -1], rtol=1e-6)
    room = REWARDS["overlong"](answer, ONE_BOX, RewardSettings(overlong_cache_tokens=20))
    np.testing.assert_array_equal(room, 0)
    beyond = answer._replace(mask=jnp.ones((1, 1, 120), bool), tokens=answer.tokens[:, :1])
    assert REWARDS["overlong"](
        beyond, ONE_BOX, RewardSettings(overlong_max_tokens=100)
    ).tolist() == [[-1.0]]


def brute_repetition(ids: list[int], n: int) -> float:
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return -sum(gram in grams[:i] for i, gram in enumerate(grams)) / max(len(grams), 1)


@pytest.mark.parametrize("n", [1, 2, 4, 8])
def test_repetition_equals_counting(n):
    rng = np.random.default_rng(n)
    lengths = rng.integers(0, 21, 30)
    tokens = rng.integers(5, 8, (1, 30, 20))
    mask = np.arange(20) < lengths[None, :, None]
    r = rollout("")
    answer = read_jitted(r.tokens, r.mask, ONE_BOX.gold.target, ONE_BOX.gold.names, TOKENS.vocab)
    answer = answer._replace(tokens=jnp.asarray(tokens), mask=jnp.asarray(mask))
    found = REWARDS["repetition"](answer, ONE_BOX, RewardSettings(repetition_ngram=n))
    expected = [
        brute_repetition(row[:length].tolist(), n)
        for row, length in zip(tokens[0], lengths, strict=True)
    ]
    np.testing.assert_allclose(found[0], expected, rtol=1e-6)


def test_repetition_sees_a_loop_and_no_right_answer():
    loop = " ".join(["cat"] * 12)
    tokens, mask = (x[0, 0] for x in rollout(loop)[:2])
    expected = brute_repetition(tokens[mask].tolist(), SETTINGS.repetition_ngram)
    np.testing.assert_allclose(
        judge("repetition", ONE_BOX, loop, right(ONE_BOX), ""), [expected, 0, 0], rtol=1e-6
    )
    assert expected < -0.4
    assert alone("repetition", ONE_BOX, loop, repetition_ngram=LENGTH + 1) == [0.0]


def test_a_list_of_different_boxes_repeats_nothing():
    names = ("cat", "red circle")
    rows = [
        " ; ".join(f"{loc(100, 10 + 100 * k, 200, 90 + 100 * k)} {name}" for k in range(3))
        for name in names
    ]
    assert judge("repetition", ONE_BOX, *rows) == [
        0.0,
        0.0,
    ]  # in one row of the image, so that y1 is alike


# the sum


def scored(answer: Answer, batch: Batch, weights: dict[str, float]) -> Rewards:
    return jax.jit(lambda a, b: score(a, b, weights, SETTINGS))(answer, batch)


def both_kinds() -> tuple[Answer, Batch]:
    """Returns a question about a box and one about a point, with a right and an empty answer each."""
    batch = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), ONE_BOX, ONE_POINT)
    parts = rollout(right(ONE_BOX), ""), rollout(right(ONE_POINT), "")
    r = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), *parts)
    return read_jitted(r.tokens, r.mask, batch.gold.target, batch.gold.names, TOKENS.vocab), batch


def test_total_is_the_weighted_sum_of_what_applies():
    found = scored(*both_kinds(), {"iou": 2.0, "distance_gaussian": 3.0, "format": 0.5})
    np.testing.assert_allclose(found.total, [[2.5, 0], [3.5, 0]], rtol=1e-6)
    assert found.parts.keys() == {"iou", "distance_gaussian", "format"}
    np.testing.assert_array_equal(np.isnan(found.parts["iou"]), [[False, False], [True, True]])
    np.testing.assert_array_equal(
        np.isnan(found.parts["distance_gaussian"]), [[True, True], [False, False]]
    )


def test_total_is_nan_where_no_weighted_reward_applies():
    found = scored(*both_kinds(), {"iou": 1.0, "format": 0.0})
    np.testing.assert_allclose(found.total, [[1, 0], [np.nan, np.nan]])
    np.testing.assert_array_equal(found.parts["format"], [[1, 0], [1, 0]])


def test_weight_0_measures_and_does_not_count():
    plain = scored(*both_kinds(), {"format": 1.0})
    beside = scored(*both_kinds(), {"format": 1.0, "iou": 0.0, "count": 0.0})
    np.testing.assert_array_equal(plain.total, beside.total)
    assert beside.parts.keys() == {"format", "iou", "count"}


def test_measures_are_means_over_what_was_judged():
    answer, batch = both_kinds()
    judged = scored(answer, batch, {"iou": 1.0, "format": 0.0})
    r = jax.tree.map(
        lambda a, b: jnp.concatenate([a, b]),
        rollout(right(ONE_BOX), ""),
        rollout(right(ONE_POINT), ""),
    )
    found = {
        name: float(value)
        for name, value in measures(r, answer, judged, {"iou": 2.0, "format": 0.0}).items()
    }
    assert found["reward/iou"] == found["reward/total"] == 0.5 and found["reward/format"] == 0.5
    assert found["reward/weighted/iou"] == 1 and found["reward/weighted/format"] == 0
    np.testing.assert_allclose(found["reward/std"], (2**-0.5 + 0) / 2, rtol=1e-6)
    assert found["group/zero_std_fraction"] == 0.5
    assert found["completion/length"] == float(r.mask.sum()) / 4
    assert (
        found["completion/unfinished_fraction"] == 0
        and found["completion/malformed_fraction"] == 0.5
    )


def test_an_unknown_reward_is_refused_with_the_nearest():
    with pytest.raises(
        UserError,
        match=r"config\.grpo\.rewards\.gaussian_points does not exist: did you mean gaussian_point\?",
    ):
        by_name("gaussian_points")
    with pytest.raises(
        UserError, match=r"config\.grpo\.rewards\.zzz does not exist: there are count, .*iou"
    ):
        by_name("zzz")

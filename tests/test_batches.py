import hashlib
import io
import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from pg_ground import tokenizer
from pg_ground.config import Data, Source
from pg_ground.data.bad_records import BadRecords
from pg_ground.data.batches import PrefetchIterator, ordered_batches, training_batches
from pg_ground.data.datasets import open_examples
from pg_ground.data.mixture import mixing_pattern
from pg_ground.data.records import BadRecord
from pg_ground.types import Batch, UserError

SIDE = 8
DATA = Data(prompt_length=8, suffix_length=8)


@pytest.fixture(scope="module")
def tokens() -> tokenizer.Tokenizer:
    return tokenizer.load()


def jpeg(value: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.full((SIDE, SIDE, 3), value, np.uint8)).save(out, "JPEG")
    return out.getvalue()


def make_source(
    folder: Path, name: str, count: int, broken: tuple[int, ...] = (), weight: float = 1.0
) -> Source:
    """Writes `count` records with a JPEG each. The JPEGs of `broken` are cut off."""
    lines = []
    for i in range(count):
        data = jpeg(i % 256)
        (folder / f"{name}{i}.jpg").write_bytes(data[: len(data) // 2] if i in broken else data)
        lines.append(json.dumps({"image": f"{name}{i}.jpg", "phrase": "cat", "box": [0, 0, 4, 4]}))
    (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return Source(uri=f"jsonl:{folder}/{name}.jsonl", boxes="box", weight=weight)


def rows_of(batch_size: int, process: tuple[int, int]) -> np.ndarray:
    """Returns the rows of a batch that process p of n reads."""
    return np.split(np.arange(batch_size), process[1])[process[0]]


def train(sources, tokens, *, batch_size=4, seed=0, data=DATA, bad_records=None, process=(0, 1)):
    return training_batches(
        sources, data, tokens, image_size=SIDE, batch_size=batch_size, seed=seed,
        bad_records=bad_records or BadRecords(), rows=rows_of(batch_size, process),
    )  # fmt: skip


def ordered(
    sources, tokens, *, examples, batch_size=4, data=DATA, bad_records=None, process=(0, 1)
):
    parts = [open_examples(name, source, data, SIDE) for name, source in sources.items()]
    return ordered_batches(
        parts, data, tokens, batch_size=batch_size, examples=examples,
        bad_records=bad_records or BadRecords(), rows=rows_of(batch_size, process),
    )  # fmt: skip


def seen(batches: list[Batch]) -> list[tuple[int, int]]:
    return [(int(s), int(i)) for b in batches for s, i in zip(b.source, b.index, strict=True)]


def assert_same(left: list[Batch], right: list[Batch]) -> None:
    jax.tree.map(np.testing.assert_array_equal, left, right)


def test_batch_has_leading_b_on_every_leaf(tmp_path, tokens):
    batch = next(train({"a": make_source(tmp_path, "a", 6)}, tokens))
    assert {leaf.shape[0] for leaf in jax.tree.leaves(batch)} == {4}
    assert batch.image.shape == (4, SIDE, SIDE, 3) and batch.gold.boxes.yxyx.shape == (4, 1, 4)


def test_every_epoch_shows_every_record_once_in_another_order(tmp_path, tokens):
    indices = [
        i for _, i in seen(list(islice(train({"a": make_source(tmp_path, "a", 12)}, tokens), 9)))
    ]
    epochs = [indices[:12], indices[12:24], indices[24:]]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_order_is_a_function_of_the_seed(tmp_path, tokens):
    source = {"a": make_source(tmp_path, "a", 30)}
    first, again, other = (seen(list(islice(train(source, tokens, seed=s), 5))) for s in (1, 1, 2))
    assert first == again != other


def test_sources_of_one_length_are_shuffled_apart(tmp_path, tokens):
    both = {"a": make_source(tmp_path, "a", 30), "b": make_source(tmp_path, "b", 30)}
    order = seen(list(islice(train(both, tokens), 10)))
    assert [i for s, i in order if s == 0] != [i for s, i in order if s == 1]


def test_mixture_follows_the_weights_exactly(tmp_path, tokens):
    weights = {"a": 1.0, "b": 2.5, "c": 0.5}
    sources = {
        name: make_source(tmp_path, name, 5, weight=weight) for name, weight in weights.items()
    }
    order = seen(list(islice(train(sources, tokens, batch_size=8), 10)))
    assert Counter(s for s, _ in order) == {0: 20, 1: 50, 2: 10}
    for start in range(0, 80, 8):
        assert Counter(s for s, _ in order[start : start + 8]) == {0: 2, 1: 5, 2: 1}


@pytest.mark.parametrize("threads", [1, 3])
def test_restored_iterator_continues_the_same_batches(tmp_path, tokens, threads):
    data = Data(prompt_length=8, suffix_length=8, read_threads=threads)
    sources = {
        "a": make_source(tmp_path, "a", 25, broken=(3, 9)),
        "b": make_source(tmp_path, "b", 7, weight=2.0),
    }
    running = train(sources, tokens, data=data, bad_records=BadRecords())
    for _ in range(5):
        next(running)
    state = json.loads(json.dumps(running.get_state()))
    expected = list(islice(running, 12))
    fresh = train(sources, tokens, data=data)
    fresh.set_state(state)
    assert_same(list(islice(fresh, 12)), expected)
    running.set_state(state)
    assert_same(list(islice(running, 12)), expected)


def test_batches_do_not_depend_on_the_number_of_read_threads(tmp_path, tokens):
    sources = {"a": make_source(tmp_path, "a", 25, broken=(4,))}
    none, single, four = (
        list(
            islice(
                train(sources, tokens, data=Data(prompt_length=8, suffix_length=8, read_threads=n)),
                10,
            )
        )
        for n in (0, 1, 4)
    )
    assert_same(none, single)
    assert_same(none, four)


def test_processes_share_the_global_batch_without_overlap(tmp_path, tokens):
    sources = {"a": make_source(tmp_path, "a", 40), "b": make_source(tmp_path, "b", 40)}
    whole = list(islice(train(sources, tokens, batch_size=8), 5))
    parts = [list(islice(train(sources, tokens, batch_size=8, process=(p, 2)), 5)) for p in (0, 1)]
    for step in range(5):
        assert parts[0][step].image.shape[0] == 4
        assert seen([parts[0][step], parts[1][step]]) == seen([whole[step]])


def test_corrupt_image_is_counted_once_and_skipped_deterministically(tmp_path, tokens):
    source = {"a": make_source(tmp_path, "a", 30, broken=(7, 20))}
    runs = []
    for _ in range(2):
        bad = BadRecords()
        runs.append(list(islice(train(source, tokens, bad_records=bad), 14)))
        assert bad.counts() == {"corrupt_image": 2}
        assert [(e["source"], e["index"], e["kind"]) for e in bad.entries()] == [
            ("a", 7, "corrupt_image"),
            ("a", 20, "corrupt_image"),
        ]
        assert "a7.jpg" in bad.entries()[0]["message"]
    assert_same(runs[0], runs[1])
    assert sorted(i for _, i in seen(runs[0])[:28]) == sorted(set(range(30)) - {7, 20})


@pytest.mark.parametrize("threads", [1, 4])
def test_too_many_bad_records_end_the_run_in_one_line(tmp_path, tokens, threads):
    source = {"a": make_source(tmp_path, "a", 5, broken=(1, 2, 4))}
    data = Data(prompt_length=8, suffix_length=8, read_threads=threads)
    with pytest.raises(UserError) as refused:
        list(islice(train(source, tokens, data=data), 50))
    text = str(refused.value)
    assert "source a" in text and "corrupt_image" in text and "record " in text and "\n" not in text


def test_share_is_taken_source_by_source():
    bad = BadRecords()
    bad.read("good", 5000, n=1000)
    bad.read("poor", 5000, n=200)
    for i in range(20):
        bad.add("poor", i, "bad_box", "flat")
    bad.check(0.1)
    bad.add("poor", 20, "missing_image", "gone")
    with pytest.raises(
        UserError, match="source poor: 21 of 200 .*20 bad_box, 1 missing_image.*record 0: flat"
    ):
        bad.check(0.1)
    bad.check(0.11)


def test_first_bad_record_is_fatal_at_share_zero_and_none_is_at_one(tmp_path, tokens):
    source = {"a": make_source(tmp_path, "a", 30, broken=(0,))}
    strict = Data(prompt_length=8, suffix_length=8, bad_record_share=0.0)
    with pytest.raises(UserError, match="1 of"):
        list(islice(train(source, tokens, data=strict), 9))
    bad = BadRecords()
    bad.read("a", 4, n=3)
    for i in range(3):
        bad.add("a", i, "bad_box", "flat")
    bad.check(1.0)


def test_source_without_one_usable_record_is_fatal_at_any_share(tmp_path, tokens):
    source = {"a": make_source(tmp_path, "a", 3, broken=(0, 1, 2))}
    data = Data(prompt_length=8, suffix_length=8, bad_record_share=1.0)
    with pytest.raises(UserError, match="3 of 3"):
        next(train(source, tokens, data=data))
    with pytest.raises(UserError, match="3 of 3"):
        next(ordered(source, tokens, examples=2, data=data))


def test_epochs_and_order_do_not_change_the_share(tmp_path, tokens):
    """2 of 25 is 8 %, also while the second epoch happens to begin with the bad ones."""
    source = {"a": make_source(tmp_path, "a", 25, broken=(3, 9))}
    for seed in range(5):
        list(islice(train(source, tokens, seed=seed, data=DATA), 20))
    tight = Data(prompt_length=8, suffix_length=8, bad_record_share=0.07)
    with pytest.raises(UserError, match="2 of"):
        list(islice(train(source, tokens, data=tight), 20))


def test_ordered_batches_show_each_source_once_in_order_and_mask_the_padding(tmp_path, tokens):
    sources = {"a": make_source(tmp_path, "a", 9), "b": make_source(tmp_path, "b", 3)}
    batches = list(ordered(sources, tokens, examples=6))
    assert [mask.tolist() for _, mask in batches] == [
        [True] * 4,
        [True, True, False, False],
        [True, True, True, False],
    ]
    counted = [pair for b, mask in batches for pair, ok in zip(seen([b]), mask, strict=True) if ok]
    assert counted == [(0, i) for i in range(6)] + [(1, i) for i in range(3)]
    assert seen([batches[1][0]])[2:] == [(0, 5), (0, 5)]


def test_ordered_batches_skip_bad_records_and_read_no_more_than_needed(tmp_path, tokens):
    source = {"a": make_source(tmp_path, "a", 20, broken=(1, 2, 15))}
    bad = BadRecords()
    data = Data(prompt_length=8, suffix_length=8, bad_record_share=0.5)
    batches = list(ordered(source, tokens, examples=5, bad_records=bad, data=data))
    assert [i for b, mask in batches for (_, i), ok in zip(seen([b]), mask, strict=True) if ok] == [
        0,
        3,
        4,
        5,
        6,
    ]
    assert [entry["index"] for entry in bad.entries()] == [1, 2]


def test_processes_divide_ordered_batches_row_by_row(tmp_path, tokens):
    source = {"a": make_source(tmp_path, "a", 7, broken=(2,))}
    data = Data(prompt_length=8, suffix_length=8, bad_record_share=0.5)
    whole = list(ordered(source, tokens, examples=6, data=data))
    parts = [list(ordered(source, tokens, examples=6, data=data, process=(p, 2))) for p in (0, 1)]
    assert len(whole) == len(parts[0]) == len(parts[1])
    for (batch, mask), left, right in zip(whole, *parts, strict=True):
        assert_same([batch], [jax.tree.map(lambda a, b: np.concatenate([a, b]), left[0], right[0])])
        np.testing.assert_array_equal(mask, np.concatenate([left[1], right[1]]))


def test_small_source_with_too_many_bad_records_ends_a_measurement(tmp_path, tokens):
    source = {"a": make_source(tmp_path, "a", 4, broken=(0,))}
    with pytest.raises(UserError, match="1 of . records"):
        list(ordered(source, tokens, examples=4))


def test_examples_by_index_raise_what_is_wrong_with_a_record(tmp_path):
    source = make_source(tmp_path, "a", 3, broken=(1,))
    opened = open_examples("a", source, DATA, SIDE)
    assert len(opened) == 3 and opened[2].index == 2 and opened[2].image.shape == (SIDE, SIDE, 3)
    with pytest.raises(BadRecord) as bad:
        opened[1]
    assert bad.value.kind == "corrupt_image"


def test_source_that_cannot_be_opened_is_refused_at_once(tmp_path, tokens):
    with pytest.raises(
        UserError, match=r"^config\.grpo\.sources\.a\.uri \(jsonl:.*none\.jsonl\): No such file"
    ):
        train({"grpo/a": Source(uri=f"jsonl:{tmp_path}/none.jsonl", boxes="box")}, tokens)
    good = make_source(tmp_path, "a", 3)
    with pytest.raises(UserError, match="box_format"):
        train({"a": Source(uri=good.uri, boxes="box", box_format="xyyx_px")}, tokens)


# mixtures and workers


def digests(batches) -> list[str]:
    return [
        hashlib.sha256(
            b"".join(np.ascontiguousarray(leaf).tobytes() for leaf in jax.tree.leaves(b))
        ).hexdigest()
        for b in batches
    ]


@pytest.mark.parametrize(
    ("weights", "shares"),
    [
        ([2.0, 1.0, 1.0], [2, 1, 1]),
        ([0.7, 0.3], [7, 3]),
        ([1.5, 0.5], [3, 1]),
        ([1e-3, 1.0], [1, 1000]),
        ([1.0], [1]),
        ([1 / 3, 2 / 3], None),
    ],
)
def test_a_mixture_is_exact_over_its_period_and_nearly_so_before(weights, shares):
    pattern, ranks, counts = mixing_pattern(weights)
    if shares:
        assert counts.tolist() == shares and len(pattern) == sum(shares)
    total = np.array(weights) / sum(weights)
    seen = np.stack([np.cumsum(pattern == s) for s in range(len(weights))])
    positions = np.arange(1, len(pattern) + 1)
    assert (np.abs(seen - total[:, None] * positions) < 1.01).all()
    assert np.abs(seen[:, -1] / len(pattern) - total).max() < 1e-5
    for s in range(len(weights)):
        assert ranks[pattern == s].tolist() == list(range(counts[s]))


def three_sources(folder: Path) -> dict[str, Source]:
    synthetic = Source(uri=f"synthetic:train?side={2 * SIDE}", boxes="box")
    return {
        "a": make_source(folder, "a", 50, weight=2.0),
        "b": make_source(folder, "b", 7),
        "c": synthetic,
    }


@pytest.mark.slow
def test_five_hundred_batches_have_their_shares_and_no_example_twice_in_an_epoch(tmp_path, tokens):
    rows = seen(list(islice(train(three_sources(tmp_path), tokens), 500)))
    shares = Counter(source for source, _ in rows)
    assert [shares[s] / len(rows) for s in range(3)] == pytest.approx([0.5, 0.25, 0.25], abs=1e-3)
    for source, size in ((0, 50), (1, 7)):
        indices = [index for s, index in rows if s == source]
        for start in range(0, len(indices) - size + 1, size):
            assert sorted(indices[start : start + size]) == list(range(size))
    drawn = [index for s, index in rows if s == 2]
    assert len(set(drawn)) == len(drawn) == 500


@pytest.mark.parametrize(
    ("compared", "first_workers", "later_workers"),
    [((), 2, (0,)), pytest.param((1, 4), 2, (0, 3), marks=pytest.mark.slow)],
)
def test_batches_are_the_same_with_workers_and_after_resuming(
    tmp_path, tokens, compared, first_workers, later_workers
):
    sources = three_sources(tmp_path)
    straight = digests(islice(train(sources, tokens), 60))
    assert digests(islice(train(sources, tokens), 60)) == straight
    assert len(set(straight)) == 60
    for workers in compared:
        data = replace(DATA, workers=workers)
        assert digests(islice(train(sources, tokens, data=data), 12)) == straight[:12]
    stop = 23  # in the middle of epochs of every source
    first = train(sources, tokens, data=replace(DATA, workers=first_workers))
    before = digests(islice(first, stop))
    for workers in later_workers:
        second = train(sources, tokens, data=replace(DATA, workers=workers))
        second.set_state(json.loads(json.dumps(first.get_state())))
        assert before + digests(islice(second, 60 - stop)) == straight


def test_prefetched_batches_and_their_state_are_the_same(tmp_path, tokens):
    sources = three_sources(tmp_path)
    straight = digests(islice(train(sources, tokens), 8))
    with PrefetchIterator(train(sources, tokens), lambda batch: batch) as prefetched:
        assert digests([next(prefetched) for _ in range(3)]) == straight[:3]
        state = prefetched.get_state()
    again = train(sources, tokens)
    again.set_state(state)
    with PrefetchIterator(again, lambda batch: batch) as prefetched:
        assert prefetched.get_state() == state
        assert digests([next(prefetched) for _ in range(5)]) == straight[3:]


def test_two_processes_see_disjoint_halves_whose_union_is_the_whole(tmp_path, tokens):
    sources = three_sources(tmp_path)
    whole = seen(list(islice(train(sources, tokens, batch_size=8), 20)))
    halves = [
        seen(list(islice(train(sources, tokens, batch_size=8, process=(p, 2)), 20))) for p in (0, 1)
    ]
    assert all(len(half) == 80 for half in halves)
    assert Counter(whole) == Counter(halves[0] + halves[1])
    assert [
        row for step in range(20) for half in halves for row in half[4 * step : 4 * step + 4]
    ] == whole


def test_records_of_a_list_become_one_question_each_or_one_at_random(tmp_path, tokens):
    (tmp_path / "i.jpg").write_bytes(jpeg(0))
    lines = [
        {
            "image": "i.jpg",
            "box": [0, 0, 4, 4],
            "sentences": [{"raw": f"{word}{i}"} for i in range(n)],
        }
        for word, n in (("a", 3), ("b", 1), ("c", 0), ("d", 2))
    ]
    (tmp_path / "s.jsonl").write_text("\n".join(map(json.dumps, lines)))
    source = Source(uri=f"jsonl:{tmp_path}/s.jsonl", boxes="box", phrase="sentences[].raw")
    every = open_examples("s", source, DATA, SIDE)
    assert [every[i].prompt for i in range(len(every))] == [
        f"detect {name}" for name in ("a0", "a1", "a2", "b0", "d0", "d1")
    ]
    assert [every.locate(i) for i in range(6)] == [(0, 0), (0, 1), (0, 2), (1, 0), (3, 0), (3, 1)]
    some = open_examples("s", replace(source, element="random"), DATA, SIDE)
    assert len(some) == 4
    drawn = {some.example(0, reading).prompt for reading in range(30)}
    assert drawn == {"detect a0", "detect a1", "detect a2"}
    with pytest.raises(BadRecord, match="sentences is empty") as bad:
        some[2]
    assert bad.value.kind == "empty"


def test_a_source_is_sampled_before_anything_else(tmp_path, tokens):
    source = make_source(tmp_path, "a", 20)
    for sampling, expected in (("first:3", [0, 1, 2]), ("end:10%", [18, 19])):
        opened = open_examples("a", replace(source, sampling=sampling), DATA, SIDE)
        assert [opened.locate(i)[0] for i in range(len(opened))] == expected
    some = open_examples("a", replace(source, sampling="random:25%"), DATA, SIDE, seed=3)
    assert len(some) == 5
    with pytest.raises(UserError, match="source a: sampling 'first:0' keeps none of 20 records"):
        open_examples("a", replace(source, sampling="first:0"), DATA, SIDE)
    with pytest.raises(UserError, match="sampling 'some:3'"):
        open_examples("a", replace(source, sampling="some:3"), DATA, SIDE)


def write_lines(folder: Path, records: list[dict]) -> str:
    (folder / "i.jpg").write_bytes(jpeg(0))
    (folder / "x.jsonl").write_text(
        "\n".join(json.dumps({"image": "i.jpg"} | record) for record in records)
    )
    return f"jsonl:{folder}/x.jsonl"


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_without_any_question_ends(tmp_path, tokens, workers):
    for name, count in (("e", 20), ("f", 3)):
        (tmp_path / name).mkdir()
        write_lines(tmp_path / name, [{"phrase": "cat", "box": []}] * count)
    empty = {name: Source(uri=f"jsonl:{tmp_path}/{name}/x.jsonl", boxes="box") for name in "ef"}
    empty["f"] = replace(empty["f"], weight=0.01)
    with pytest.raises(
        UserError,
        match=r"^sources e, f: none of 23 questions can be used; "
        r"question \d+ of .: there are no boxes$",
    ):
        next(train(empty, tokens, data=replace(DATA, workers=workers)))
    rare = empty | {
        "f": replace(make_source(tmp_path, "g", 3), weight=0.01)
    }  # comes after 100 empty questions
    assert seen([next(train(rare, tokens, batch_size=1))])[0][0] == 1


WORKERS = pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
"""A worker process imports the package, which takes 3 s."""

CLOSES_ITS_WORKERS = """
import sys
from pg_ground import tokenizer
from pg_ground.config import Data, Source
from pg_ground.data.bad_records import BadRecords
from pg_ground.data.batches import PrefetchIterator, training_batches

if __name__ == "__main__":
    data = Data(prompt_length=8, suffix_length=8, workers=int(sys.argv[2]))
    batches = training_batches({"a": Source(uri=sys.argv[1], boxes="box")}, data, tokenizer.load(),
                               image_size=8, batch_size=4, seed=0, bad_records=BadRecords())
    with PrefetchIterator(batches, lambda batch: batch) as prefetched:
        for _ in range(5):
            next(prefetched)
"""


@pytest.mark.slow
@WORKERS
def test_closed_workers_leave_no_shared_memory(tmp_path, workers):
    uri = make_source(tmp_path, "a", 50).uri
    (tmp_path / "run.py").write_text(CLOSES_ITS_WORKERS)
    done = subprocess.run(
        [sys.executable, tmp_path / "run.py", uri, str(workers)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0 and "leaked" not in done.stderr, done.stderr


@pytest.mark.slow
@WORKERS
def test_a_closed_stream_continues_where_it_was(tmp_path, tokens, workers):
    sources = three_sources(tmp_path)
    batches = train(sources, tokens, data=replace(DATA, workers=workers))
    batches.close()
    first = digests(islice(batches, 3))
    batches.close()
    assert first + digests(islice(batches, 3)) == digests(islice(train(sources, tokens), 6))
    batches.close()


@pytest.mark.slow
@pytest.mark.parametrize("count", [1_000, 10_000])
def test_one_record_in_ten_mutated(tmp_path, tokens, count):
    """Exactly the unusable records are listed by number, and the others are unchanged."""
    (tmp_path / "i.jpg").write_bytes(jpeg(7))
    rng = np.random.default_rng(0)
    good = {"image": "i.jpg", "phrase": "cat", "box": [0, 0, 4, 4]}
    odd = [
        None,
        "x",
        [],
        [[]],
        {},
        -1,
        1e400,
        float("nan"),
        [1, 2, 3],
        [4, 4, 0, 0],
        [0, 0, 0, 0],
        [9, 9, 99, 99],
        ["a"] * 4,
        "../no.jpg",
    ]
    lines, mutated, empty = [], set(), set()
    for i in range(count):
        record = dict(good)
        if rng.random() < 0.09:
            field = str(rng.choice(list(good)))
            value = odd[rng.integers(len(odd))]
            mutated.add(i)
            is_absent = rng.random() < 0.2
            if is_absent:
                del record[field]
            else:
                record[field] = value
            is_nan = isinstance(value, float) and np.isnan(value)
            if field == "box" and (is_absent or is_nan or value in (None, [], {})):
                empty.add(i)
        lines.append(b"\xff\xfe not text" if i % 997 == 0 else json.dumps(record).encode())
    (tmp_path / "f.jsonl").write_bytes(b"\n".join(lines))
    source, bad = Source(uri=f"jsonl:{tmp_path}/f.jsonl", boxes="box"), BadRecords()
    data = replace(DATA, suffix_length=32, prompt_length=16, bad_record_share=0.3)
    batches = list(
        ordered({"f": source}, tokens, examples=count, batch_size=100, data=data, bad_records=bad)
    )
    used = [int(i) for batch, counts in batches for i in batch.index[counts]]
    listed = {entry["index"] for entry in bad.entries()}
    broken = set(range(0, count, 997))
    assert broken <= listed <= broken | mutated and not listed & set(used)
    assert len(set(used)) == len(used) and set(range(count)) - mutated - broken <= set(used)
    assert (
        set(range(count)) - set(used) - listed == empty - broken
    )  # no objects: dropped, and not counted as bad
    assert empty and len(bad.counts()) >= 5 and bad.counts()["bad_json"] == len(broken)
    right = open_examples("f", source, data, SIDE)[1 if 1 not in mutated else 2]
    for batch, counts in batches:
        for row in np.flatnonzero(counts):
            if int(batch.index[row]) not in mutated:
                np.testing.assert_array_equal(batch.image[row], right.image)
                np.testing.assert_array_equal(batch.gold.boxes.yxyx[row], right.boxes.yxyx)

"""The data of the flagship recipes on files of the true layout: counts, scores, web, packed files.

Every source comes from the recipe. Only the images of the model are smaller.
"""

import hashlib
import io
import json
import pickle
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import ROOT, run_here
from PIL import Image
from test_eval_runner import copying_programs
from test_fetch import Answers, Server, in_turn, send, serving, status

from pg_ground import config as settings
from pg_ground import tokenizer
from pg_ground.cli import run_recipe
from pg_ground.config import Config, Data, Fetch, Source, parse
from pg_ground.data import fetch as fetching
from pg_ground.data.bad_records import BadRecords
from pg_ground.data.batches import training_batches
from pg_ground.data.datasets import open_examples
from pg_ground.data.images import resize
from pg_ground.data.mixture import UnusableRow, prepare_row
from pg_ground.data.packing import pack
from pg_ground.data.prefetching import image_urls
from pg_ground.data.records import BadRecord
from pg_ground.data.sources import with_dir
from pg_ground.evals import benchmarks, runner, scoring
from pg_ground.evals.runner import EvalContext, Evaluation
from pg_ground.parallel import sharding
from pg_ground.rehearsal import data as rehearsal
from pg_ground.rehearsal.miniatures import write_miniatures
from pg_ground.types import Batch, UserError

SIDE = 28
BATCH = 4


def recipe(name: str) -> Config:
    return parse(run_recipe(ROOT / "configs" / f"{name}.py").get_config())


def in_folder(config: Config, folder: Path, **changes: Any) -> Config:
    return replace(config, data=replace(config.data, dir=str(folder), **changes))


def batches(
    name: str, source: Source, data: Data, count: int, bad_records: BadRecords | None = None
) -> list[Batch]:
    """Returns the first batches of one source, as a stage reads them."""
    stream = training_batches(
        {name: source},
        data,
        tokenizer.load(),
        image_size=SIDE,
        batch_size=BATCH,
        seed=5,
        bad_records=bad_records or BadRecords(),
    )
    result = list(islice(stream, count))
    stream.close()
    return result


def assert_same(left: Sequence[Batch], right: Sequence[Batch]) -> None:
    assert len(left) == len(right) > 0
    jax.tree.map(np.testing.assert_array_equal, list(left), list(right))


# RefCOCO


SPLITS = {
    "refcoco": ("unc", ("val", "testA", "testB")),
    "refcoco+": ("unc", ("val", "testA", "testB")),
    "refcocog": ("umd", ("val", "test")),
}
HELD_OUT = [(dataset, split) for dataset, (_, splits) in SPLITS.items() for split in splits]

PUBLISHED = dict(zip(HELD_OUT, (10834, 5657, 5095, 10758, 5726, 4889, 4896, 9602), strict=True))


def read_refs(folder: Path, dataset: str) -> list[dict[str, Any]]:
    return pickle.loads((folder / dataset / f"refs({SPLITS[dataset][0]}).p").read_bytes())


def write_refs(folder: Path, dataset: str, refs: Sequence[Mapping[str, Any]]) -> None:
    file = folder / dataset / f"refs({SPLITS[dataset][0]}).p"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(pickle.dumps(list(refs), protocol=2))


def instances(folder: Path, dataset: str) -> dict[str, Any]:
    return json.loads((folder / dataset / "instances.json").read_text())


def add_train_refs_about_held_out_images(folder: Path) -> int:
    """Adds train refs about images that another dataset holds out, as the real files have them.

    Returns their number.
    """
    before = {
        dataset: (read_refs(folder, dataset), instances(folder, dataset)) for dataset in SPLITS
    }
    added = 0
    for dataset, (refs, coco) in before.items():
        refs, number = list(refs), 900_000
        images, annotations = list(coco["images"]), list(coco["annotations"])
        for other, split in HELD_OUT:
            if other == dataset:
                continue
            other_refs, other_coco = before[other]
            ref = next(ref for ref in other_refs if ref["split"] == split)
            image = next(i for i in other_coco["images"] if i["id"] == ref["image_id"])
            box = next(a for a in other_coco["annotations"] if a["id"] == ref["ann_id"])
            number += 1
            added += 1
            images.append(image)
            annotations.append({**box, "id": number, "category_id": 1})
            ids = {"ref_id": number, "ann_id": number, "category_id": 1}
            refs.append({**ref, **ids, "split": "train"})
        write_refs(folder, dataset, refs)
        text = json.dumps({**coco, "images": images, "annotations": annotations})
        (folder / dataset / "instances.json").write_text(text)
    return added


@pytest.fixture(scope="module")
def refcoco(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("refcoco")
    write_miniatures(recipe("refcoco"), folder)
    assert add_train_refs_about_held_out_images(folder) == 16
    return folder


def sentence_count(refs: Sequence[Mapping[str, Any]], split: str) -> int:
    return sum(len(ref["sentences"]) for ref in refs if ref["split"] == split)


def test_every_held_out_split_has_the_questions_of_its_annotation_file(refcoco):
    config = in_folder(recipe("refcoco"), refcoco)
    sources = runner.open_eval_sources(config.eval, config.data, SIDE)
    assert sources.keys() == {f"{dataset}_{split}" for dataset, split in HELD_OUT}
    for dataset, split in HELD_OUT:
        examples = sources[f"{dataset}_{split}"]
        refs = read_refs(refcoco, dataset)
        texts = [s["raw"] for r in refs if r["split"] == split for s in r["sentences"]]
        assert len(examples) == len(texts) == sentence_count(refs, split) > 0
        assert [examples[i].prompt for i in range(len(texts))] == [f"detect {t}" for t in texts]


def test_the_combined_train_set_has_no_image_of_a_held_out_split(refcoco):
    config = in_folder(recipe("refcoco"), refcoco)
    all_refs = {dataset: read_refs(refcoco, dataset) for dataset in SPLITS}
    held_out = {r["image_id"] for refs in all_refs.values() for r in refs if r["split"] != "train"}
    train = [r for refs in all_refs.values() for r in refs if r["split"] == "train"]
    expected = [ref for ref in train if ref["image_id"] not in held_out]
    assert 0 < len(expected) == len(train) - 16
    for stage in ("sft", "grpo"):
        source = config.stage_settings(stage).sources["combined"]
        examples = open_examples("combined", source, config.data, SIDE)
        assert len(examples) == sum(len(ref["sentences"]) for ref in expected)
        used = {examples.record(i)[0]["image_id"] for i in range(len(examples))}
        assert used == {ref["image_id"] for ref in expected} and not used & held_out


def loc_text(box: Sequence[float], image: Mapping[str, Any]) -> str:
    """Returns x, y, width, height in pixels as PaliGemma writes the box."""
    x, y, w, h = box
    fractions = (y / image["height"], x / image["width"])
    ends = ((y + h) / image["height"], (x + w) / image["width"])
    return "".join(f"<loc{round(1023 * value):04d}>" for value in (*fractions, *ends))


def predictions_of(folder: Path, dataset: str, split: str) -> list[dict[str, Any]]:
    """Returns the rows of another program: every third answer is a corner of the image."""
    coco = instances(folder, dataset)
    boxes = {entry["id"]: entry["bbox"] for entry in coco["annotations"]}
    images = {entry["id"]: entry for entry in coco["images"]}
    rows: list[dict[str, Any]] = []
    for ref in read_refs(folder, dataset):
        for sentence in ref["sentences"] if ref["split"] == split else ():
            image = images[ref["image_id"]]
            x, y, w, h = boxes[ref["ann_id"]]
            box = [0, 0, 2, 2] if len(rows) % 3 == 0 else [x, y, w, h]
            rows.append({
                "question_id": len(rows),
                "image": image["file_name"],
                "width": image["width"],
                "height": image["height"],
                "expression": sentence["raw"],
                "answer": f"{loc_text(box, image)} {sentence['raw']}",
                "bbox": [x, y, x + w, y + h],
            })  # fmt: skip
    return rows


@pytest.mark.parametrize(("dataset", "split"), HELD_OUT)
def test_a_file_of_predictions_is_scored_in_every_split(refcoco, tmp_path, dataset, split):
    rows = predictions_of(refcoco, dataset, split)
    wrong = len(rows[::3])
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    name = f"{dataset}_{split}"
    flags = (f"--predictions={tmp_path}/p.jsonl", "--fields=pred=answer,gold=bbox")
    result = run_here(
        "evaluate", *flags, f"--benchmark={name}@{len(rows)}", f"--out={tmp_path}/out"
    )
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "out/eval.json").read_text())
    assert (report["n"], report["images"]) == (len(rows), len({row["image"] for row in rows}))
    assert report["acc50"] == (len(rows) - wrong) / len(rows)
    # under the published name, the number of questions must be the published one
    refused = run_here("evaluate", *flags, f"--benchmark={name}")
    text = f"{name} has {PUBLISHED[dataset, split]} questions, but there are {len(rows)}"
    assert refused.returncode == 2 and text in refused.stderr
    assert len(refused.stderr.splitlines()) == 1


def every_third_wrong(config: Config) -> Evaluation:
    """Returns the evaluation of a policy whose answers 0, 3, 6, … are a corner of the image."""
    words = tokenizer.load()
    programs = copying_programs(words, config.eval)
    corner = words.suffix("<loc1020><loc1020><loc1023><loc1023>")
    width = config.data.suffix_length
    tokens = jnp.array(corner + [0] * (width - len(corner)), jnp.int32)

    def answer(params: Any, batch: Batch, *others: Any, group_size: int) -> Any:
        is_wrong = batch.index[:, None] % 3 == 0
        changed = batch._replace(
            suffix=jnp.where(is_wrong, tokens, batch.suffix),
            suffix_mask=jnp.where(is_wrong, jnp.arange(width) < len(corner), batch.suffix_mask),
        )
        return programs.answer(params, changed, *others, group_size=group_size)

    mesh = sharding.make_mesh(settings.Mesh(data=1))
    context = EvalContext(config.eval, config.data, 0, words, mesh, BadRecords(), config.grpo)
    sources = runner.open_eval_sources(config.eval, config.data, SIDE)
    changed = programs._replace(answer=jax.jit(answer, static_argnames="group_size"))
    return runner.evaluate_sources(changed, {}, sources, context)


def test_an_evaluation_scores_all_eight_splits_and_its_file_scores_the_same(refcoco, tmp_path):
    config = in_folder(recipe("refcoco"), refcoco)
    config = replace(config, eval=replace(config.eval, batch_size=8))
    evaluation = every_third_wrong(config)
    report = benchmarks.make_report(evaluation.predictions)
    scoring.write_results(tmp_path, report, evaluation.predictions)
    file = tmp_path / "predictions.jsonl"
    result = run_here("evaluate", f"--predictions={file}", f"--out={tmp_path}/again")
    assert result.returncode == 0, result.stderr
    again = json.loads((tmp_path / "again/eval.json").read_text())
    for dataset, split in HELD_OUT:
        count = sentence_count(read_refs(refcoco, dataset), split)
        name = f"{dataset}_{split}"
        for metrics in (evaluation.metrics, report, again):
            assert metrics[f"eval/{name}/questions"] == count
            assert metrics[f"eval/{name}/acc50"] == (count - len(range(0, count, 3))) / count
        # A miniature has no right to the name of the published split.
        assert again["sources"][name]["benchmark"] == f"{name}@{count}"
    assert len(again["sources"]) == 8


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    """Files with the published numbers of questions, in few refs with many sentences each."""
    folder = tmp_path_factory.mktemp("published")
    (folder / "train2014").mkdir()
    Image.new("RGB", (64, 48)).save(folder / "train2014/a.jpg")
    for dataset, (_, splits) in SPLITS.items():
        refs = []
        for number, split in enumerate(("train", *splits)):
            count = PUBLISHED.get((dataset, split), 30)
            for start in range(0, count, 1000):
                texts = [f"thing {i}" for i in range(start, min(start + 1000, count))]
                ids = {"ref_id": len(refs), "ann_id": len(refs), "image_id": number}
                refs.append({**ids, "split": split, "sentences": [{"raw": t} for t in texts]})
        size = {"file_name": "a.jpg", "width": 64, "height": 48}
        coco = {
            "images": [{"id": number, **size} for number in range(len(splits) + 1)],
            "annotations": [
                {"id": r["ann_id"], "image_id": r["image_id"], "bbox": [8, 8, 16, 16]} for r in refs
            ],
            "categories": [],
        }
        write_refs(folder, dataset, refs)
        (folder / dataset / "instances.json").write_text(json.dumps(coco))
    return folder


def small_images(folder: Path) -> Config:
    config = in_folder(recipe("refcoco"), folder)
    return replace(config, model=replace(config.model, image_size=SIDE))


def test_the_published_numbers_of_questions_are_right(published):
    counts = rehearsal.check_sources(small_images(published), is_miniature=False)
    assert counts == {f"{dataset}_{split}": n for (dataset, split), n in PUBLISHED.items()}


@pytest.mark.parametrize(
    ("dataset", "split"),
    [
        ("refcoco+", "testB"),
        *(
            pytest.param(*pair, marks=pytest.mark.slow)
            for pair in HELD_OUT
            if pair != ("refcoco+", "testB")
        ),
    ],
)
def test_a_file_with_another_number_of_questions_is_one_line(published, tmp_path, dataset, split):
    (tmp_path / "train2014").symlink_to(published / "train2014")
    for other in SPLITS:
        (tmp_path / other).mkdir()
        for file in (published / other).iterdir():
            (tmp_path / other / file.name).write_bytes(file.read_bytes())
    refs = read_refs(tmp_path, dataset)
    next(ref for ref in refs if ref["split"] == split)["sentences"].pop()
    write_refs(tmp_path, dataset, refs)
    count, name = PUBLISHED[dataset, split], f"{dataset}_{split}"
    with pytest.raises(UserError) as error:
        rehearsal.check_sources(small_images(tmp_path), is_miniature=False)
    assert str(error.value) == (
        f"config.eval.sources.{name}: {name} has {count} questions, but there are {count - 1}: "
        "files are missing; if these are all questions that you have, give each of these sources "
        f"--config.eval.benchmarks.{name}=rec"
    )


# PixMo-Points by URL


def picture(number: int) -> bytes:
    """Returns a PNG file of 40 x 30 random pixels."""
    pixels = np.random.default_rng(number).integers(0, 255, (30, 40, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


PAGE = b"<!DOCTYPE html><html><body>This image has moved.</body></html>"

Answer = Callable[[Answers, int], None]


def delayed(seconds: float, answer: Answer) -> Answer:
    def wait(handler: Answers, count: int) -> None:
        time.sleep(seconds)
        answer(handler, count)

    return wait


def cut(handler: Answers, _: int) -> None:
    """Sends less than the answer announces."""
    handler.send_response(200)
    handler.send_header("Content-Length", "5000")
    handler.end_headers()
    handler.wfile.write(picture(0)[:100])


def huge(handler: Answers, _: int) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", str(10**9))
    handler.end_headers()


LEFT = threading.Event()
"""Is set when the server ends, and ends the answers that never come."""


def hang(handler: Answers, _: int) -> None:
    LEFT.wait(60)


def drip(handler: Answers, _: int) -> None:
    """Sends a byte now and then, so that no read times out."""
    handler.send_response(200)
    handler.end_headers()
    while not LEFT.wait(0.05):
        handler.wfile.write(b"a")


class Page(NamedTuple):
    """An address of the server, and the row that names it."""

    path: str
    answer: Answer | None
    """None is an address at which this server is not asked."""
    kind: str = ""
    """The kind of the bad record; "" is a good one."""
    sha256: str | None = "picture"
    """"picture" is the hash of the row's picture."""
    lasts: bool = True
    """Whether the answer is final. Another pass asks again for a temporary failure."""
    quick: Answer | None = None
    """The answer without delay, if `answer` has one."""


def good_pages() -> list[Page]:
    """Returns addresses whose pictures come, some of them late, at the second try or elsewhere."""
    plain = [Page(f"/good/{i}.png", None) for i in range(44)]
    others = (
        "/busy",
        "/too-many",
        "/cut-once",
        "/moved",
        "/a%20b.png",
        "/%C3%A9.png",
        "/?id=3&w=9",
    )
    pages = [*plain, *(Page(path, None) for path in others)]
    result = []
    for number, page in enumerate(pages):
        answer = send(picture(number))
        once = {"/busy": status(500), "/too-many": status(429), "/cut-once": cut}.get(page.path)
        routes = in_turn(once, answer) if once else answer
        if page.path == "/moved":
            routes = status(302, "/elsewhere")
        late = delayed(0.04 * (number % 3), routes)
        result.append(page._replace(answer=late, quick=routes))
    return result


def bad_pages() -> list[Page]:
    page_hash = hashlib.sha256(PAGE).hexdigest()
    temporary = {"kind": "fetch_failed", "lasts": False}
    return [
        Page("/gone", status(404), "fetch_failed"),
        Page("/forbidden", status(403), "fetch_failed"),
        Page("/loop", status(301, "/loop"), "fetch_failed"),
        Page("/other", send(picture(999)), "wrong_sha256"),
        Page("/page", send(PAGE, Content_Type="text/html"), "wrong_sha256"),
        Page("/no-hash", send(picture(998)), "wrong_sha256", sha256="unknown"),
        Page("/page-null", send(PAGE + b"\n"), "corrupt_image", sha256=None),
        Page("/page-hash", send(PAGE), "corrupt_image", sha256=page_hash),
        Page("/half", send(picture(1)[:1500]), "corrupt_image", sha256=None),
        Page("/empty", send(b""), "corrupt_image", sha256=None),
        Page("/huge", huge, "too_large"),
        Page("ftp://127.0.0.1/a.png", None, "refused_url", lasts=False),
        Page("", None, "missing_image"),
        Page("/cut", cut, **temporary),
        Page("/down", status(503), **temporary),
        Page("/hangs", hang, quick=status(404), **temporary),
        Page("/drips", drip, quick=status(404), **temporary),
    ]


def shuffled_pages() -> list[Page]:
    pages = [*good_pages(), *bad_pages()]
    order = np.random.default_rng(0).permutation(len(pages))
    return [pages[i] for i in order] + [Page("/last.png", send(picture(997)))]


class Web(NamedTuple):
    """A server and the rows of PixMo-Points whose images it has."""

    server: Server
    folder: Path
    """Takes the place of `{dir}` in the recipe."""
    pages: list[Page]
    rows: list[dict[str, Any]]

    @property
    def good(self) -> list[int]:
        """The rows of the training source that can be used. It leaves the last row out."""
        return [i for i, page in enumerate(self.pages[:-1]) if not page.kind]

    def data(self, cache: Path, **changes: Any) -> Data:
        """Returns the recipe's settings with a cache, and a fetch that gives up early."""
        fetch = Fetch(
            str(cache),
            retries=1,
            backoff_s=0.0,
            timeout_s=1.0,
            max_bytes=100_000,
            allow_private=True,
        )
        config = in_folder(recipe("pixmo_points"), self.folder, fetch=replace(fetch, **changes))
        return replace(config.data, read_threads=4)


def row_of(server: Server, page: Page, number: int, content: bytes) -> dict[str, Any]:
    """Returns a row with the fields of the published dataset. Every fourth has no points."""
    rng = np.random.default_rng(number)
    count = 20 if number % 10 == 6 else number % 4
    points = [{"x": float(x), "y": float(y)} for x, y in rng.uniform(0, 100, (count, 2)).round(1)]
    url = server.url(unquote(page.path)) if page.path.startswith("/") else page.path or None
    hashes = {"picture": hashlib.sha256(content).hexdigest()}
    sha256 = page.sha256 and hashes.get(page.sha256, page.sha256)
    return {
        "image_url": url,
        "image_sha256": sha256,
        "count": count,
        "points": points,
        "label": f"thing {number}",
        "collection_method": "pointing",
    }


@pytest.fixture(scope="module")
def web(tmp_path_factory) -> Iterator[Web]:
    folder = tmp_path_factory.mktemp("pixmo")
    pages = shuffled_pages()
    with serving() as server:
        rows = []
        for number, page in enumerate(pages):
            # A content that another address has would come from the cache.
            content = PICTURES.get(page.path) or picture(2000 + number)
            rows.append(row_of(server, page, number, content))
            if page.answer is not None:
                server.routes[page.path] = page.answer
        server.routes["/elsewhere"] = delayed(0.05, send(PICTURES["/moved"]))
        file = folder / "pixmo-points/data/train-00000-of-00001.parquet"
        file.parent.mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=10)
        LEFT.clear()
        yield Web(server, folder, pages, rows)
        LEFT.set()


PICTURES = {page.path: picture(i) for i, page in enumerate(good_pages())} | {
    "/last.png": picture(997)
}
"""The picture at each good address."""

POINTS = recipe("pixmo_points").grpo.sources["points"]


class Pass(NamedTuple):
    """A pass over the rows in the order of training."""

    cache: Path
    batches: list[Batch]
    bad: dict[int, str]
    """The kind of each bad record, by its number."""


def read_all(web: Web, data: Data) -> Pass:
    """Reads the training source for more than one epoch."""
    bad = BadRecords()
    result = batches("points", POINTS, data, len(web.good) // BATCH + 1, bad)
    kinds = {entry["index"]: entry["kind"] for entry in bad.entries()}
    return Pass(Path(data.fetch.cache_dir), result, kinds)


@pytest.fixture(scope="module")
def first_pass(web, tmp_path_factory) -> Pass:
    return read_all(web, web.data(tmp_path_factory.mktemp("cache")))


def expected_kinds(web: Web) -> dict[int, str]:
    return {i: page.kind for i, page in enumerate(web.pages[:-1]) if page.kind}


def test_every_bad_address_is_one_bad_record_of_its_kind(web, first_pass):
    assert first_pass.bad == expected_kinds(web)
    assert Counter(first_pass.bad.values()) == {
        "fetch_failed": 7,
        "wrong_sha256": 3,
        "corrupt_image": 4,
        "too_large": 1,
        "refused_url": 1,
        "missing_image": 1,
    }
    indices = np.concatenate([batch.index for batch in first_pass.batches]).tolist()
    assert sorted(indices[: len(web.good)]) == web.good  # an epoch has every good row once


def test_a_bad_record_names_its_address(web, first_pass):
    data = web.data(first_pass.cache)
    examples = open_examples("points", POINTS, data, SIDE)
    for number, kind in expected_kinds(web).items():
        path = web.pages[number].path
        if kind in ("corrupt_image", "too_large") or path == "/gone":
            with pytest.raises(BadRecord) as bad:
                examples[number]
            text = str(bad.value)
            assert text.startswith(f"'{web.rows[number]['image_url']}': "), text
            assert text.endswith("an HTML page") == path.startswith("/page-")


def test_good_rows_have_the_right_image_and_points(web, first_pass):
    data = web.data(first_pass.cache, offline=True)
    examples = open_examples("points", POINTS, data, SIDE)
    assert len(examples) == len(web.pages) - 1
    for number in web.good:
        example, row = examples[number], web.rows[number]
        file = Image.open(io.BytesIO(PICTURES[web.pages[number].path]))
        np.testing.assert_array_equal(example.image, resize(file, SIDE))
        assert (example.prompt, example.size) == (f"point to {row['label']}", (40, 30))
        texts = [
            f"<loc{round(p['y'] * 10.23):04d}><loc{round(p['x'] * 10.23):04d}>"
            for p in row["points"]
        ]
        answer = example.suffix.split(" ; ") if example.suffix else []
        if len(texts) > 16:
            assert len(set(answer)) == 16 and set(answer) < set(texts)
        else:
            assert answer == texts
    counts = [len(web.rows[number]["points"]) for number in web.good]
    assert {0, 1, 2, 3, 20} == set(counts)


@pytest.mark.slow
def test_another_pass_asks_only_for_what_failed_for_a_time(web, first_pass):
    asked = Counter(web.server.asked)
    again = read_all(web, web.data(first_pass.cache))
    assert again.bad == first_pass.bad
    assert_same(again.batches, first_pass.batches)
    failing = [page for page in web.pages if page.kind == "fetch_failed"]
    temporary = {page.path for page in failing if not page.lasts}
    assert (Counter(web.server.asked) - asked).keys() == temporary


def test_offline_nothing_is_asked_and_the_batches_are_the_same(web, first_pass, monkeypatch):
    ask = fetching._download_with_retries

    def ask_online(url: str, fetch: Fetch) -> bytes:
        assert not fetch.offline
        return ask(url, fetch)

    monkeypatch.setattr(fetching, "_download_with_retries", ask_online)
    offline = read_all(web, web.data(first_pass.cache, offline=True))
    assert_same(offline.batches, first_pass.batches)
    lasting = {i: kind for i, kind in first_pass.bad.items() if web.pages[i].lasts}
    others = first_pass.bad.keys() - lasting.keys()
    assert offline.bad == lasting | dict.fromkeys(others, "not_fetched")


@pytest.mark.parametrize("threads", [0, 4])
def test_batches_do_not_depend_on_delays(web, first_pass, tmp_path, threads):
    quick = {page.path: page.quick for page in web.pages if page.quick}
    before = dict(web.server.routes)
    web.server.routes |= quick | {"/elsewhere": send(PICTURES["/moved"])}
    try:
        data = replace(web.data(tmp_path), read_threads=threads)
        result = read_all(web, data)
    finally:
        web.server.routes |= before
    assert result.bad == first_pass.bad
    assert_same(result.batches, first_pass.batches)


@pytest.mark.slow
def test_prefetch_counts_the_same_addresses(web, tmp_path):
    data = web.data(tmp_path)
    urls = list(image_urls([{"points": POINTS}], data, 5))
    assert len(urls) == len(web.rows) - 2  # one is not in the sample, one has no address
    outcomes = fetching.prefetch(urls, data.fetch, lambda _: None)
    kinds = Counter(expected_kinds(web).values())
    decoded = kinds.pop("corrupt_image")  # what arrives is stored, be it an image or not
    del kinds["missing_image"]
    assert sum(outcomes.values()) == len(urls)
    assert outcomes == {**kinds, "fetched": len(web.good) + decoded}


def test_too_many_bad_addresses_end_the_run_in_one_line(web, first_pass):
    data = replace(web.data(first_pass.cache, offline=True), bad_record_share=0.1)
    with pytest.raises(UserError) as error:
        read_all(web, data)
    text = str(error.value)
    assert "\n" not in text and "source points: " in text
    assert "but data.bad_record_share allows 0.1; record " in text


# evaluations of crowded images


CROWD = 63
"""Objects of the most crowded image of COCO's val2017. Their answer has more than 256 tokens."""


def add_crowded_image(folder: Path) -> None:
    """Adds an image with `CROWD` objects to the miniature of val2017."""
    file = folder / "annotations/instances_val2017.json"
    coco = json.loads(file.read_text())
    Image.new("RGB", (160, 120)).save(folder / "val2017/crowd.jpg")
    size = {"width": 160, "height": 120}
    coco["images"].append({"id": 900, "file_name": "crowd.jpg", **size})
    coco["annotations"] += [
        {
            "id": 9000 + i,
            "image_id": 900,
            "category_id": coco["categories"][i % 3]["id"],
            "bbox": [2 + 15 * (i % 9), 2 + 15 * (i // 9), 12, 12],
            "area": 144,
            "iscrowd": 0,
        }
        for i in range(CROWD)
    ]
    file.write_text(json.dumps(coco))


def write_crowded_points(folder: Path, counts: Sequence[int]) -> None:
    rng = np.random.default_rng(0)
    rows = [
        {
            "image_url": {"bytes": picture(number), "path": f"{number}.png"},
            "image_sha256": None,
            "label": f"thing {number}",
            "points": [{"x": float(x), "y": float(y)} for x, y in rng.uniform(0, 100, (count, 2))],
        }
        for number, count in enumerate(counts)
    ]
    file = folder / "pixmo-points-eval/data/test-00000-of-00001.parquet"
    pq.write_table(pa.Table.from_pylist(rows), file)


def copied(config: Config, name: str) -> Sequence[Mapping[str, Any]]:
    """Returns the rows of a source for a policy that copies as much as an answer has room for."""
    source = {name: config.eval.sources[name]}
    benchmark = {name: config.eval.benchmarks[name]}
    eval_settings = replace(config.eval, sources=source, benchmarks=benchmark, batch_size=2)
    words, mesh = tokenizer.load(), sharding.make_mesh(settings.Mesh(data=1))
    context = EvalContext(eval_settings, config.data, 0, words, mesh, BadRecords(), config.grpo)
    sources = runner.open_eval_sources(eval_settings, config.data, SIDE)
    programs = copying_programs(words, eval_settings)
    evaluation = runner.evaluate_sources(programs, {}, sources, context)
    assert not evaluation.bad_records
    assert evaluation.metrics[f"eval/{name}/questions"] == len(sources[name])
    return evaluation.predictions


def check_every_record(name: str, config: Config) -> None:
    fetch = config.data.fetch
    result = run_here(
        "rehearse",
        "--data_only",
        f"--config=configs/{name}.py",
        f"--config.data.dir={config.data.dir}",
        f"--config.data.fetch.cache_dir={fetch.cache_dir}",
        "--config.data.fetch.allow_private=True",
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "training can start with these records"


@pytest.mark.slow
def test_all_objects_of_a_crowded_image_count_in_the_evaluation(tmp_path):
    """An answer that is longer than the limit of training is no bad record of an evaluation."""
    config = written("detection", tmp_path)
    add_crowded_image(tmp_path)
    check_every_record("detection", config)
    rows = copied(config, "val")
    assert [len(row["gold"]["boxes"]) for row in rows][-1] == CROWD
    assert 30 < len(rows[-1]["prediction"]["boxes"]) < CROWD  # as many as 256 tokens name


@pytest.mark.slow
def test_all_points_of_a_crowded_image_count_in_the_evaluation(tmp_path):
    config = written("pixmo_points", tmp_path)
    counts = [0, 3, 16, 21, 40, 60]
    write_crowded_points(tmp_path, counts)
    check_every_record("pixmo_points", config)
    rows = copied(config, "points_eval")
    assert [len(row["gold"]["points"]) for row in rows] == [min(40, count) for count in counts]


def test_a_long_answer_is_bad_in_training_and_in_an_environment(tmp_path):
    """The loss of SFT and the text rewards read the whole answer."""
    config = written("detection", tmp_path)
    add_crowded_image(tmp_path)
    source = config.eval.sources["val"]
    bad = BadRecords()
    batches("val", source, config.data, 3, bad)
    assert bad.counts() == {"too_long": 1}
    environment = replace(config.eval, benchmarks={"val": "environment"})
    (examples,) = runner.open_eval_sources(environment, config.data, SIDE).values()
    row = prepare_row(examples, len(examples) - 1, tokenizer.load(), config.data, 0, 0)
    assert isinstance(row, UnusableRow) and row.kind == "too_long"


# packed files


def written(name: str, folder: Path) -> Config:
    """Returns a recipe on its miniature in a folder."""
    config = recipe(name)
    write_miniatures(config, folder, rehearsal.serve(folder))
    if name == "refcoco":
        add_train_refs_about_held_out_images(folder)
        (folder / "train2014/COCO_train2014_000000100001.jpg").unlink()
        (folder / "train2014/COCO_train2014_000000100009.jpg").write_bytes(b"no image")
    fetch = Fetch(str(folder / "fetched"), allow_private=True, retries=0)
    return in_folder(config, folder, fetch=fetch, bad_record_share=0.5)


def assert_same_in_two_epochs(name: str, source: Source, uri: str, data: Data) -> dict[str, int]:
    """Fails if the source at `uri` has other batches or bad records. Returns the bad records."""
    count = 2 * len(open_examples(name, source, data, SIDE)) // BATCH + 1
    bad, packed_bad = BadRecords(), BadRecords()
    expected = batches(name, source, data, count, bad)
    # Without a folder and a cache: packed files need neither.
    bare = replace(data, fetch=Fetch(), dir="")
    assert_same(batches(name, replace(source, uri=uri), bare, count, packed_bad), expected)
    kinds, packed_kinds = (
        [(entry["index"], entry["kind"]) for entry in records.entries()]
        for records in (bad, packed_bad)
    )
    assert kinds == packed_kinds
    return bad.counts()


@pytest.mark.parametrize(
    ("name", "shards"), [("refcoco", 3), ("pixmo_points", 16), ("detection", 1), ("gui", 4)]
)
def test_packed_sources_give_the_same_batches(name, shards, tmp_path):
    """Sources of the recipe, as the command packs them. Some images of RefCOCO are bad."""
    config = written(name, tmp_path / "data")
    fetch = config.data.fetch
    result = run_here(
        "pack",
        f"--config=configs/{name}.py",
        f"--config.data.dir={config.data.dir}",
        f"--config.data.fetch.cache_dir={fetch.cache_dir}",
        "--config.data.fetch.allow_private=True",
        f"--out={tmp_path}/packed",
        f"--num_shards={shards}",
    )
    assert result.returncode == 0, result.stderr
    packed = json.loads(result.stdout)
    sources = {k: v for section in config.sources_by_section.values() for k, v in section.items()}
    assert packed.keys() == sources.keys()
    bad: Counter[str] = Counter()
    splits = {f"{dataset}_{split}" for dataset, split in HELD_OUT[1:]}  # the first is enough
    for source_name in sources.keys() - splits:
        source, uri = sources[source_name], packed[source_name]["uri"]
        bad.update(assert_same_in_two_epochs(source_name, source, uri, config.data))
    assert bad.keys() == ({"missing_image", "corrupt_image"} if name == "refcoco" else set())


@pytest.mark.parametrize(
    "shards", [5, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 100))]
)
def test_packed_addresses_give_the_same_batches(web, first_pass, tmp_path, shards):
    """With several points, with none, and with every kind of bad address."""
    fetching.cached(web.server.url("/last.png"), None, web.data(first_pass.cache).fetch)
    data = web.data(first_pass.cache, offline=True)
    source = with_dir(POINTS, data.dir)
    packed = pack([{"points": source}], data.fetch, tmp_path, shards)["points"]
    assert packed["records"] == len(web.good) + 1  # all rows, also the held-out one
    faults = {kind: n for kind, n in packed.items() if kind not in ("uri", "records")}
    assert packed["records"] + sum(faults.values()) == len(web.rows)
    counts = assert_same_in_two_epochs("points", source, packed["uri"], data)
    assert counts == faults
    bare = replace(data, fetch=Fetch())
    again = batches("points", replace(source, uri=packed["uri"]), bare, len(first_pass.batches))
    assert_same(again, first_pass.batches)


def test_sources_that_read_the_same_rows_share_their_files(tmp_path):
    config = written("pixmo_points", tmp_path / "data")
    sections = [
        {name: with_dir(source, config.data.dir) for name, source in sources.items()}
        for sources in config.sources_by_section.values()
    ]
    packed = pack(sections, config.data.fetch, tmp_path / "packed", 2)
    assert packed["held_out"] == packed["points"]
    names = {file.name.partition("-0")[0] for file in (tmp_path / "packed").iterdir()}
    assert names == {"points", "counts", "points_eval", "counts_eval"}

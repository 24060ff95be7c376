"""Examples per second from JPEG photographs to batches, beside a torch DataLoader doing the same; and what a run waits for data.

python benchmarks/data.py [--photos=FOLDER --records=FILE.jsonl --images=images --phrase=expression --boxes=bbox_xyxy]
python benchmarks/data.py --workdir=RUN

The photographs are those that FOLDER/FILE.jsonl names, in FOLDER/images; without --photos, images of 640x480 made of noise at
all scales (1/f, as photographs have it) in a temporary folder. Both sides read them in one order with batches of one size, and
their first batches are compared: decoded, upright by EXIF, RGB, bilinear (antialiased) to a square, boxes as loc tokens, prompt
and suffix tokenised and padded, stacked. The DataLoader makes torch tensors, which its workers hand over in shared memory.

The contestants take turns (--repeats of --batches), in reverse every other time, each after a pause and `WARM_UP` batches that
empty what it had read ahead; a figure is the median over the turns, a ratio the median over the pairs of one round. CPU time
counts this process and its children. Prints a table and one JSON object. With --workdir, the share of a step that is
`time/data_s`, in the median of the lines of a run's metrics.jsonl. Needs torch (`pip install pg_ground[test]`).
"""

import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grain
import numpy as np
import PIL
import torch
from PIL import Image, ImageOps, features
from torch.utils.data import DataLoader, Dataset

from pg_ground import cli, tokenizer
from pg_ground.config import Data, Source
from pg_ground.data.bad_records import BadRecords
from pg_ground.data.batches import training_batches
from pg_ground.data.datasets import open_examples
from pg_ground.data.mixture import Mixture
from pg_ground.reporting.metric_writers import read_metrics
from pg_ground.reporting.tables import Table, ascii_table
from pg_ground.types import UserError
from pg_ground.vocab import BOS, EOS, LOC_MAX, NEWLINE, PAD

SIZES = (224, 448)
BATCH = 32
WARM_UP = 6
"""Batches: more than any contestant reads ahead (2 of a DataLoader's worker, of which there are 2)."""
MADE = 100
"""Photographs that are made where none are given."""


class Photos(NamedTuple):
    """The source of a measurement."""

    what: str
    source: Source
    folder: Path
    """Of the images."""


class Place(NamedTuple):
    """A contestant: its name, the cores it can fill, and the DataLoader it is compared with (None for a DataLoader)."""

    name: str
    cores: int
    rival: str | None
    threads: int
    workers: int


TORCH_0, TORCH_2 = "torch DataLoader, num_workers=0", "torch DataLoader, num_workers=2"
PLACES = (
    Place("pg_ground, read_threads=0", 1, TORCH_0, 0, 0),
    Place("pg_ground, read_threads=1", 1, TORCH_0, 1, 0),
    Place(TORCH_0, 1, None, 0, 0),
    Place("pg_ground, read_threads=2", 2, TORCH_2, 2, 0),
    Place(TORCH_2, 2, None, 0, 2),
    Place("pg_ground, workers=2", 2, TORCH_2, 1, 2),
)


class TorchPhotos(Dataset):
    """The same examples for a DataLoader, at the places of an order: (image, prompt, its mask, suffix, its mask, box)."""

    def __init__(self, photos: Photos, order: Sequence[int], data: Data, side: int):
        lines = (
            Path(photos.source.uri.removeprefix("jsonl:")).read_text(encoding="utf-8").splitlines()
        )
        self._lines, self._photos, self._order, self._data, self._side = (
            lines,
            photos,
            order,
            data,
            side,
        )
        self._pieces = tokenizer.load(data.tokenizer).pieces

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> tuple[np.ndarray, ...]:
        record, source = json.loads(self._lines[self._order[index]]), self._photos.source
        with Image.open(self._photos.folder / record[source.image]) as file:
            image = ImageOps.exif_transpose(file).convert("RGB")
        x1, y1, x2, y2 = record[source.boxes]
        box = np.clip(np.array([y1, x1, y2, x2]) / ([image.height, image.width] * 2), 0, 1).astype(
            np.float32
        )
        phrase = " ".join(record[source.phrase].split())
        locs = "".join(
            f"<loc{int(code):04d}>" for code in np.clip(np.rint(box * LOC_MAX), 0, LOC_MAX)
        )
        prompt = [BOS, *self._pieces.Encode(f"detect {phrase}"), NEWLINE]
        suffix = [*self._pieces.Encode(f"{locs} {phrase}"), EOS]
        pixels = np.asarray(image.resize((self._side, self._side), Image.Resampling.BILINEAR))
        return (
            pixels,
            *_padded(prompt, self._data.prompt_length),
            *_padded(suffix, self._data.suffix_length),
            box,
        )


def torch_stack(rows: Sequence[tuple[np.ndarray, ...]]) -> tuple[torch.Tensor, ...]:
    """Returns rows as one batch of tensors."""
    return tuple(torch.from_numpy(np.stack(column)) for column in zip(*rows, strict=True))


def _padded(ids: list[int], length: int) -> tuple[np.ndarray, np.ndarray]:
    row = np.full(length, PAD, np.int32)
    row[: len(ids)] = ids
    return row, np.arange(length) < len(ids)


def given_photos(folder: Path, records: str, images: str, phrase: str, boxes: str) -> Photos:
    """Returns a source over the photographs of a folder, from a file with a record on each line."""
    source = Source(uri=f"jsonl:{folder / records}", image_root=images, phrase=phrase, boxes=boxes)
    rows = [
        json.loads(line) for line in (folder / records).read_text(encoding="utf-8").splitlines()
    ]
    files = {row[source.image] for row in rows}
    kilobytes = statistics.mean((folder / images / file).stat().st_size for file in files) / 1000
    return Photos(
        f"{len(files)} photographs ({len(rows)} questions), {kilobytes:.0f} kB each",
        source,
        folder / images,
    )


def made_photos(folder: Path) -> Photos:
    """Returns a source over images made here, 640x480, of noise whose amplitude falls as its frequency rises."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(MADE):
        image = np.full((480, 640, 3), 128.0)
        for cells in (4, 8, 16, 32, 64, 128, 256, 480):
            coarse = Image.fromarray(rng.integers(0, 256, (cells, cells * 4 // 3, 3), np.uint8))
            image += (
                (np.asarray(coarse.resize((640, 480), Image.Resampling.BICUBIC), np.float64) - 128)
                * 2
                / cells**0.5
            )
        Image.fromarray(np.clip(image, 0, 255).astype(np.uint8)).save(
            folder / f"{i}.jpg", quality=90
        )
        x1, y1 = rng.uniform(0, 300, 2)
        rows.append(
            {
                "image": f"{i}.jpg",
                "phrase": f"a red cup on table {i}",
                "box": [x1, y1, x1 + 200, y1 + 150],
            }
        )
    (folder / "photos.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    made = given_photos(folder, "photos.jsonl", "", "phrase", "box")
    return made._replace(what=f"made here of 1/f noise, 640x480: {made.what}")


def measure(photos: Photos, side: int, repeats: int, batches: int) -> dict[str, Any]:
    """Returns for every contestant the examples per second and the CPU milliseconds per example of every turn.

    Raises:
      UserError: the two sides do not make the same first batch.
    """
    data = Data(prompt_length=128, suffix_length=128)
    tokens, seed = tokenizer.load(data.tokenizer), 0
    parts = [open_examples("photos", photos.source, data, side, seed)]
    mixture = Mixture(parts, tokens, data, seed)
    order = [
        int(mixture.locate(place)[1])
        for place in range((repeats * (WARM_UP + batches) + 1) * BATCH)
    ]

    def ours(place: Place) -> Iterator[Any]:
        own = Data(
            prompt_length=128, suffix_length=128, read_threads=place.threads, workers=place.workers
        )
        return training_batches(
            {"photos": photos.source},
            own,
            tokens,
            image_size=side,
            batch_size=BATCH,
            seed=seed,
            bad_records=BadRecords(),
        )

    def theirs(place: Place) -> Iterator[Any]:
        dataset = TorchPhotos(photos, order, data, side)
        context = (
            "spawn" if place.workers else None
        )  # as grain does; a fork of this process would have its threads' locks
        loader = DataLoader(
            dataset,
            BATCH,
            num_workers=place.workers,
            collate_fn=torch_stack,
            multiprocessing_context=context,
        )
        return ([column.numpy() for column in batch] for batch in loader)

    streams = {place.name: (ours if place.rival else theirs)(place) for place in PLACES}
    first = {name: next(stream) for name, stream in streams.items()}
    for place in PLACES:
        if place.rival:
            _check_equal(first[place.name], first[place.rival])
    turns: dict[str, Any] = {
        place.name: {"examples_per_s": [], "cpu_ms_per_example": []} for place in PLACES
    }
    for turn in range(repeats):
        for place in PLACES[:: -1 if turn % 2 else 1]:
            time.sleep(1)  # the one before reads ahead until its buffers are full
            wall, cpu = _timed(streams[place.name].__next__, batches)
            turns[place.name]["examples_per_s"].append(batches * BATCH / wall)
            turns[place.name]["cpu_ms_per_example"].append(1000 * cpu / batches / BATCH)
    return turns


def _check_equal(batch: Any, rival: Sequence[np.ndarray]) -> None:
    own = (
        batch.image,
        batch.prompt,
        batch.prompt_mask,
        batch.suffix,
        batch.suffix_mask,
        batch.gold.boxes.yxyx[:, 0],
    )
    if not all(np.array_equal(a, b) for a, b in zip(own, rival, strict=True)):
        raise UserError("the two sides do not make the same batch of the same records")


def _timed(step: Callable[[], Any], batches: int) -> tuple[float, float]:
    """Returns wall and CPU seconds of `batches` calls, after some that are not measured."""
    for _ in range(WARM_UP):
        step()
    wall, cpu = time.perf_counter(), _cpu_seconds(os.getpid())
    for _ in range(batches):
        step()
    return time.perf_counter() - wall, _cpu_seconds(os.getpid()) - cpu


def _cpu_seconds(process: int) -> float:
    """Returns what a process and those it started have used of processors so far (Linux; to a hundredth of a second)."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    own = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    children = [
        child
        for file in Path(f"/proc/{process}/task").glob("*/children")
        for child in file.read_text().split()
    ]
    return own + sum(_cpu_seconds(int(child)) for child in children)


def summary(turns: dict[int, Any]) -> list[dict[str, Any]]:
    """Returns one row for each size and contestant: medians, and the ratio to its rival in wall and in CPU time."""
    rows = []
    for side, of_side in turns.items():
        for place in PLACES:
            own = of_side[place.name]
            row = {"pixels": side, "contestant": place.name, "cores": place.cores}
            row |= {key: statistics.median(values) for key, values in own.items()}
            if place.rival:
                other = of_side[place.rival]
                row |= {
                    "faster": _ratio(own, other, "examples_per_s"),
                    "cpu": _ratio(own, other, "cpu_ms_per_example"),
                }
            rows.append(row)
    return rows


def _ratio(own: Any, other: Any, key: str) -> float:
    return statistics.median(a / b for a, b in zip(own[key], other[key], strict=True))


def table(rows: Sequence[dict[str, Any]], note: str) -> Table:
    """Returns the rows as text."""
    cells = [
        [
            str(row["pixels"]), row["contestant"], f"{row['examples_per_s']:.0f}", f"{row['examples_per_s'] / row['cores']:.0f}",
            f"{row['cpu_ms_per_example']:.2f}", *(f"{row[key]:.2f}" if key in row else "–" for key in ("faster", "cpu")),
        ]
        for row in rows
    ]  # fmt: skip
    heads = [
        "pixels",
        "who",
        "examples/s",
        "per core",
        "CPU ms/example",
        "speed / torch",
        "CPU / torch",
    ]
    return Table("JPEG photographs to batches", heads, cells, note)


def waiting(workdir: Path) -> dict[str, Any]:
    """Returns for each stage of a run the median seconds of a logged step and of waiting for data in it, and the median share."""
    lines = [
        line for line in read_metrics(workdir) if "time/step_s" in line and "time/data_s" in line
    ]
    found = {}
    for stage in dict.fromkeys(line["stage"] for line in lines):
        own = [
            (line["time/data_s"], line["time/step_s"]) for line in lines if line["stage"] == stage
        ]
        found[stage] = {
            "windows": len(own),
            "data_s": statistics.median(data for data, _ in own),
            "step_s": statistics.median(step for _, step in own),
            "share": statistics.median(data / step for data, step in own),
        }
    return found


def main(argv: Sequence[str]) -> None:
    defaults = {
        "photos": "",
        "records": "photos.jsonl",
        "images": "",
        "phrase": "phrase",
        "boxes": "box",
    }
    own = cli.parse_script_flags(argv, defaults | {"repeats": 7, "batches": 12, "workdir": ""})
    if own["workdir"]:
        print(json.dumps(waiting(Path(own["workdir"])), indent=1))
        return
    with tempfile.TemporaryDirectory() as temporary:
        given = (own["records"], own["images"], own["phrase"], own["boxes"])
        photos = (
            given_photos(Path(own["photos"]), *given)
            if own["photos"]
            else made_photos(Path(temporary))
        )
        turns = {side: measure(photos, side, own["repeats"], own["batches"]) for side in SIZES}
    versions = {
        "python": platform.python_version(), "pillow": PIL.__version__, "libjpeg_turbo": features.version("libjpeg_turbo"),
        "grain": grain.__version__, "torch": torch.__version__,
    }  # fmt: skip
    cores = len(os.sched_getaffinity(0))
    made_with = ", ".join(f"{name} {version}" for name, version in versions.items())
    note = f"{photos.what}; {cores} cores; medians of {own['repeats']} turns of {own['batches']} batches of {BATCH}; {made_with}"
    rows = summary(turns)
    print(ascii_table(table(rows, note)))
    print(
        json.dumps(
            {
                "photos": photos.what,
                "cores": cores,
                "batch": BATCH,
                "versions": versions,
                "rows": rows,
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    cli.run_script(main)

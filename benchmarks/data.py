"""Measures the data pipeline beside a torch DataLoader, or how long a run waits for data.

python benchmarks/data.py [--photos=FOLDER --records=FILE.jsonl --images=images \\
    --phrase=expression --boxes=bbox_xyxy]
python benchmarks/data.py --workdir=RUN

The first form measures examples per second from JPEG photographs to batches. FOLDER/FILE.jsonl
names the photographs, and FOLDER/images contains them. Without --photos, the script draws images of
640x480 in a temporary folder. They are noise at all scales (1/f, as in photographs).

Both pipelines read the photographs in the same order, in batches of the same size. They do the same
work: decode, turn upright by EXIF, convert to RGB, resize to a square (bilinear, antialiased),
write boxes as loc tokens, tokenize and pad prompt and suffix, stack. The script checks that their
first batches are equal. The DataLoader makes torch tensors. Its workers hand them over in shared
memory.

The contestants take turns: --repeats turns of --batches batches. Every second turn goes in reverse
order. Before a turn there is a pause, and then `WARM_UP` batches empty the contestant's read-ahead
buffers. A speed is the median over the turns. A ratio is the median over the pairs of one turn. CPU
time counts this process and its children. The script prints a table and one JSON object.

The second form reads metrics.jsonl of a run. It prints the median share of a step that is
`time/data_s`, over the lines of each stage. Needs torch
(`pip install -e '.[interop]'`).
"""

import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from pg_ground.types import Batch, UserError
from pg_ground.vocab import BOS, EOS, LOC_MAX, NEWLINE, PAD

SIZES = (224, 448)
BATCH = 32

WARM_UP = 6
"""Batches before each timed turn.

More than any contestant reads ahead. The largest is a DataLoader with 2 workers of 2 batches each.
"""

DRAWN_PHOTOS = 100
"""Number of photographs that the script draws without --photos."""

TIMINGS = ("examples_per_s", "cpu_ms_per_example")

Timings = dict[str, list[float]]
"""For each name of `TIMINGS`, the values of all turns of one contestant."""


class Photos(NamedTuple):
    """Photographs with their questions."""

    description: str
    source: Source
    folder: Path
    """Contains the images."""


class Contestant(NamedTuple):
    """One pipeline with its settings."""

    name: str
    cores: int
    """The number of cores that it can fill."""
    rival: str | None
    """The DataLoader that it is compared with. None for a DataLoader."""
    threads: int
    workers: int


TORCH_0 = "torch DataLoader, num_workers=0"
TORCH_2 = "torch DataLoader, num_workers=2"
CONTESTANTS = (
    Contestant("pg_ground, read_threads=0", 1, TORCH_0, 0, 0),
    Contestant("pg_ground, read_threads=1", 1, TORCH_0, 1, 0),
    Contestant(TORCH_0, 1, None, 0, 0),
    Contestant("pg_ground, read_threads=2", 2, TORCH_2, 2, 0),
    Contestant(TORCH_2, 2, None, 0, 2),
    Contestant("pg_ground, workers=2", 2, TORCH_2, 1, 2),
)


class TorchPhotos(Dataset):
    """The same examples for a DataLoader, in a given order of questions.

    An example is (image, prompt, prompt mask, suffix, suffix mask, box).
    """

    def __init__(self, photos: Photos, order: Sequence[int], data: Data, side: int):
        path = Path(photos.source.uri.removeprefix("jsonl:"))
        self._lines = path.read_text(encoding="utf-8").splitlines()
        self._photos = photos
        self._order = order
        self._data = data
        self._side = side
        self._pieces = tokenizer.load(data.tokenizer).pieces

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> tuple[np.ndarray, ...]:
        source = self._photos.source
        record = json.loads(self._lines[self._order[index]])
        with Image.open(self._photos.folder / record[source.image]) as file:
            image = ImageOps.exif_transpose(file).convert("RGB")
        x1, y1, x2, y2 = record[source.boxes]
        fractions = np.array([y1, x1, y2, x2]) / ([image.height, image.width] * 2)
        box = np.clip(fractions, 0, 1).astype(np.float32)
        codes = np.clip(np.rint(box * LOC_MAX), 0, LOC_MAX)
        locs = "".join(f"<loc{int(code):04d}>" for code in codes)
        phrase = " ".join(record[source.phrase].split())
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
    """Returns the ids, padded to `length`, and the mask of the ids."""
    row = np.full(length, PAD, np.int32)
    row[: len(ids)] = ids
    return row, np.arange(length) < len(ids)


def open_photos(folder: Path, records: str, images: str, phrase: str, boxes: str) -> Photos:
    """Returns the photographs of a folder. The file `records` has one record on each line."""
    source = Source(uri=f"jsonl:{folder / records}", image_root=images, phrase=phrase, boxes=boxes)
    lines = (folder / records).read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    files = {row[source.image] for row in rows}
    kilobytes = statistics.mean((folder / images / file).stat().st_size for file in files) / 1000
    description = f"{len(files)} photographs ({len(rows)} questions), {kilobytes:.0f} kB each"
    return Photos(description, source, folder / images)


def draw_photos(folder: Path) -> Photos:
    """Draws images of 640x480 into `folder`, with one question each, and returns them."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(DRAWN_PHOTOS):
        Image.fromarray(_noise(rng)).save(folder / f"{i}.jpg", quality=90)
        x1, y1 = rng.uniform(0, 300, 2)
        box = [x1, y1, x1 + 200, y1 + 150]
        rows.append({"image": f"{i}.jpg", "phrase": f"a red cup on table {i}", "box": box})
    (folder / "photos.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    photos = open_photos(folder, "photos.jsonl", "", "phrase", "box")
    return photos._replace(description=f"made here of 1/f noise, 640x480: {photos.description}")


def _noise(rng: np.random.Generator) -> np.ndarray:
    """Returns u8[480, 640, 3]: noise whose amplitude falls as its frequency rises."""
    image = np.full((480, 640, 3), 128.0)
    for cells in (4, 8, 16, 32, 64, 128, 256, 480):
        coarse = Image.fromarray(rng.integers(0, 256, (cells, cells * 4 // 3, 3), np.uint8))
        fine = np.asarray(coarse.resize((640, 480), Image.Resampling.BICUBIC), np.float64)
        image += (fine - 128) * 2 / cells**0.5
    return np.clip(image, 0, 255).astype(np.uint8)


def measure(photos: Photos, side: int, repeats: int, batches: int) -> dict[str, Timings]:
    """Returns the timings of every contestant: one value for each turn.

    Args:
      photos: the photographs that all contestants read.
      side: side of the square images in pixels.
      repeats: number of turns.
      batches: timed batches of a turn.

    Raises:
      UserError: the two pipelines do not make the same first batch.
    """
    streams = _open_streams(photos, side, repeats, batches)
    first = {name: next(stream) for name, stream in streams.items()}
    for contestant in CONTESTANTS:
        if contestant.rival:
            _check_equal(first[contestant.name], first[contestant.rival])
    timings: dict[str, Timings] = {
        contestant.name: {name: [] for name in TIMINGS} for contestant in CONTESTANTS
    }
    for turn in range(repeats):
        for contestant in CONTESTANTS[:: -1 if turn % 2 else 1]:
            time.sleep(1)  # the contestant before reads ahead until its buffers are full
            wall_s, cpu_s = _timed(streams[contestant.name].__next__, batches)
            values = timings[contestant.name]
            values["examples_per_s"].append(batches * BATCH / wall_s)
            values["cpu_ms_per_example"].append(1000 * cpu_s / batches / BATCH)
    return timings


def _open_streams(
    photos: Photos, side: int, repeats: int, batches: int
) -> dict[str, Iterator[Any]]:
    """Returns an iterator of batches for every contestant, by name."""
    data = Data(prompt_length=128, suffix_length=128)
    tokens = tokenizer.load(data.tokenizer)
    seed = 0
    mixture = Mixture(
        [open_examples("photos", photos.source, data, side, seed)], tokens, data, seed
    )
    positions = range((repeats * (WARM_UP + batches) + 1) * BATCH)
    order = [int(mixture.locate(position)[1]) for position in positions]

    def open_pg_ground(contestant: Contestant) -> Iterator[Batch]:
        contestant_data = Data(
            prompt_length=128,
            suffix_length=128,
            read_threads=contestant.threads,
            workers=contestant.workers,
        )
        return training_batches(
            {"photos": photos.source},
            contestant_data,
            tokens,
            image_size=side,
            batch_size=BATCH,
            seed=seed,
            bad_records=BadRecords(),
        )

    def open_torch(contestant: Contestant) -> Iterator[list[np.ndarray]]:
        # Grain spawns its workers too. A fork would copy the locks of this process's threads.
        context = "spawn" if contestant.workers else None
        loader = DataLoader(
            TorchPhotos(photos, order, data, side),
            BATCH,
            num_workers=contestant.workers,
            collate_fn=torch_stack,
            multiprocessing_context=context,
        )
        return ([column.numpy() for column in batch] for batch in loader)

    return {
        contestant.name: (open_pg_ground if contestant.rival else open_torch)(contestant)
        for contestant in CONTESTANTS
    }


def _check_equal(batch: Batch, torch_batch: Sequence[np.ndarray]) -> None:
    """Raises UserError if the batch differs from the batch of the DataLoader."""
    columns = (
        batch.image,
        batch.prompt,
        batch.prompt_mask,
        batch.suffix,
        batch.suffix_mask,
        batch.gold.boxes.yxyx[:, 0],
    )
    if not all(np.array_equal(a, b) for a, b in zip(columns, torch_batch, strict=True)):
        raise UserError("pg_ground and torch do not make the same batch of the same records")


def _timed(step: Callable[[], Any], batches: int) -> tuple[float, float]:
    """Returns wall and CPU seconds of `batches` calls. `WARM_UP` calls before are not measured."""
    for _ in range(WARM_UP):
        step()
    wall_s = time.perf_counter()
    cpu_s = _cpu_seconds(os.getpid())
    for _ in range(batches):
        step()
    return time.perf_counter() - wall_s, _cpu_seconds(os.getpid()) - cpu_s


def _cpu_seconds(process: int) -> float:
    """Returns the CPU seconds of a process and its children so far.

    Linux only. The resolution is a hundredth of a second.
    """
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    seconds = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    children = [
        child
        for file in Path(f"/proc/{process}/task").glob("*/children")
        for child in file.read_text().split()
    ]
    return seconds + sum(_cpu_seconds(int(child)) for child in children)


def summary(timings_by_size: Mapping[int, Mapping[str, Timings]]) -> list[dict[str, Any]]:
    """Returns one row for each size and contestant.

    A row has the medians over the turns. It also has the ratios to the contestant's rival: `faster`
    in examples per second, and `cpu` in CPU time.
    """
    rows = []
    for side, timings in timings_by_size.items():
        for contestant in CONTESTANTS:
            values = timings[contestant.name]
            row = {"pixels": side, "contestant": contestant.name, "cores": contestant.cores}
            row |= {name: statistics.median(values[name]) for name in TIMINGS}
            if contestant.rival:
                rival_values = timings[contestant.rival]
                row |= {
                    "faster": _ratio(values, rival_values, "examples_per_s"),
                    "cpu": _ratio(values, rival_values, "cpu_ms_per_example"),
                }
            rows.append(row)
    return rows


def _ratio(values: Timings, rival_values: Timings, name: str) -> float:
    """Returns the median over the turns of the ratio of a contestant to its rival."""
    pairs = zip(values[name], rival_values[name], strict=True)
    return statistics.median(a / b for a, b in pairs)


def table(rows: Sequence[dict[str, Any]], note: str) -> Table:
    """Returns the rows as text."""
    cells = [
        [
            str(row["pixels"]),
            row["contestant"],
            f"{row['examples_per_s']:.0f}",
            f"{row['examples_per_s'] / row['cores']:.0f}",
            f"{row['cpu_ms_per_example']:.2f}",
            *(f"{row[name]:.2f}" if name in row else "–" for name in ("faster", "cpu")),
        ]
        for row in rows
    ]
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
    """Returns how long a run waited for data, for each stage.

    Returns:
      By stage: `windows`, the number of logged lines; the median seconds of waiting for data
      (`data_s`) and of a whole step (`step_s`); and the median share of waiting in a step.
    """
    lines = [
        line for line in read_metrics(workdir) if "time/step_s" in line and "time/data_s" in line
    ]
    stages = {}
    for stage in dict.fromkeys(line["stage"] for line in lines):
        seconds = [
            (line["time/data_s"], line["time/step_s"]) for line in lines if line["stage"] == stage
        ]
        stages[stage] = {
            "windows": len(seconds),
            "data_s": statistics.median(data_s for data_s, _ in seconds),
            "step_s": statistics.median(step_s for _, step_s in seconds),
            "share": statistics.median(data_s / step_s for data_s, step_s in seconds),
        }
    return stages


def library_versions() -> dict[str, str | None]:
    """Returns the versions of Python and of the libraries that the timings depend on."""
    return {
        "python": platform.python_version(),
        "pillow": PIL.__version__,
        "libjpeg_turbo": features.version("libjpeg_turbo"),
        "grain": grain.__version__,
        "torch": torch.__version__,
    }


FLAGS = {
    "photos": "",
    "records": "photos.jsonl",
    "images": "",
    "phrase": "phrase",
    "boxes": "box",
    "repeats": 7,
    "batches": 12,
    "workdir": "",
}
"""The flags and their defaults."""


def main(argv: Sequence[str]) -> None:
    flags = cli.parse_script_flags(argv, FLAGS)
    repeats = flags["repeats"]
    batches = flags["batches"]
    if flags["workdir"]:
        print(json.dumps(waiting(Path(flags["workdir"])), indent=1))
        return
    with tempfile.TemporaryDirectory() as temporary:
        if flags["photos"]:
            fields = (flags[name] for name in ("records", "images", "phrase", "boxes"))
            photos = open_photos(Path(flags["photos"]), *fields)
        else:
            photos = draw_photos(Path(temporary))
        rows = summary({side: measure(photos, side, repeats, batches) for side in SIZES})
    versions = library_versions()
    cores = len(os.sched_getaffinity(0))
    libraries = ", ".join(f"{name} {version}" for name, version in versions.items())
    note = (
        f"{photos.description}; {cores} cores; medians of {repeats} turns of {batches} batches of "
        f"{BATCH}; {libraries}"
    )
    print(ascii_table(table(rows, note)))
    report = {
        "photos": photos.description,
        "cores": cores,
        "batch": BATCH,
        "versions": versions,
        "rows": rows,
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    cli.run_script(main)

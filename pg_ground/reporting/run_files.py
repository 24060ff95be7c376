"""The files of a run that a report reads: settings, metrics, rollouts, hardware, timeline."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pg_ground.reporting import provenance
from pg_ground.reporting.metric_writers import read_metrics
from pg_ground.reporting.timeline import Session, read_sessions
from pg_ground.storage.paths import FilePath, absolute, children, file_size
from pg_ground.types import JsonObject, UserError

SAMPLES_BYTES = 3 * 2**20
"""Largest size of the rollouts on one page, in bytes."""


class Run(NamedTuple):
    """The content of the files of a run."""

    name: str
    config: JsonObject
    """The content of `config.json`."""
    metrics: Sequence[JsonObject]
    """The lines of `metrics.jsonl`."""
    samples: Sequence[JsonObject]
    """The steps that the gallery shows. Each is the content of one `samples/*.json`."""
    omitted_samples: int
    """The number of steps that the gallery does not show, because the page would be too large."""
    machines: Sequence[JsonObject]
    """The content of `hardware.json`."""
    sessions: Sequence[Session] = ()
    """The starts of the run in `timeline.jsonl`; none for a run of an earlier version."""

    @property
    def stages(self) -> list[tuple[str, int]]:
        """The name and the number of steps of each stage."""
        return [(stage, self.config[stage]["steps"]) for stage in self.config["stages"]]


def read_run(workdir: FilePath, name: str = "", samples_bytes: int = SAMPLES_BYTES) -> Run:
    """Returns the content of the files of a run.

    Args:
      name: the name of the run on the page. If it is "", the name of the directory is used.
      samples_bytes: largest size of the rollouts in bytes; 0 reads none.

    Raises:
      UserError: the directory holds no run, or a file of the run is broken.
    """
    if not (workdir / "config.json").is_file():
        raise UserError(f"{workdir} holds no run: there is no config.json in it")
    folder = children(workdir / "samples") if samples_bytes else []
    files = sorted((path for path in folder if path.suffix == ".json"), key=_step_text)
    chosen = evenly_chosen(files, [file_size(path) for path in files], samples_bytes)
    hardware = workdir / provenance.FILE
    return Run(
        name=name or absolute(workdir).name,
        config=_read_json(workdir / "config.json"),
        metrics=read_metrics(workdir),
        samples=[_read_json(path) for path in chosen],
        omitted_samples=len(files) - len(chosen),
        machines=_read_json(hardware) if hardware.is_file() else [],
        sessions=read_sessions(workdir),
    )


def _read_json(path: FilePath) -> Any:
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None


def evenly_chosen(items: Sequence[Any], sizes: Sequence[int], budget: int) -> list[Any]:
    """Returns as many evenly spaced items as fit into a budget.

    The first and the last item are always among them, whatever their size.
    """
    for count in range(len(items), 2, -1):
        indices = sorted({round(i * (len(items) - 1) / (count - 1)) for i in range(count)})
        if sum(sizes[i] for i in indices) <= budget:
            return [items[i] for i in indices]
    return list(items) if len(items) < 3 else [items[0], items[-1]]


def samples_name(stage: str, step: int) -> str:
    """Returns the path of the rollouts of a step in the working directory, without its suffix.

    The suffix is .png for the picture and .json for the numbers.
    """
    return f"samples/{stage}_{step:08d}"


def delete_samples_after(workdir: Path, step: int | None) -> None:
    """Deletes the rollouts of steps after `step`, or all rollouts if `step` is None.

    A run that continues from a checkpoint writes them again.
    """
    for path in (workdir / "samples").glob("*_*.*"):
        number = _step_text(path)
        if number.isdigit() and (step is None or int(number) > step):
            path.unlink()


def _step_text(path: FilePath) -> str:
    """Returns the digits of the step in a name that `samples_name` has made."""
    return path.stem.rpartition("_")[2]


def distinct_names(workdirs: Sequence[FilePath]) -> list[str]:
    """Returns a name for each directory: the shortest ends of the paths that differ.

    Raises:
      UserError: two directories are the same.
    """
    parts = [absolute(path).parts for path in workdirs]
    for depth in range(1, max(map(len, parts))):
        names = ["/".join(path_parts[-depth:]) for path_parts in parts]
        if len(set(names)) == len(names):
            return names
    raise UserError(f"--workdir names {workdirs[0]} twice")

"""The steps of a rehearsal, in order. Each one adds a line to the checklist."""

import json
import shutil
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from pg_ground.aot import compilation, tpu_specs
from pg_ground.aot.tpu_specs import CHIPS, GIB
from pg_ground.checkpoints import run_directory
from pg_ground.config import Config
from pg_ground.data.datasets import open_examples
from pg_ground.parallel import sharding
from pg_ground.rehearsal import costs, data
from pg_ground.rehearsal.checklist import Checklist
from pg_ground.rehearsal.processes import Processes, write_config
from pg_ground.rehearsal.shrinking import DEPTH, STEPS, shrink
from pg_ground.rehearsal.stand_in_tokenizer import stand_in_tokenizer
from pg_ground.reporting.tables import ascii_table
from pg_ground.storage.downloads import checkpoint_path, tokenizer_file
from pg_ground.tokenizer import check_vocab_size
from pg_ground.tokenizer import load as load_tokenizer
from pg_ground.types import JsonDict, UserError

PROCESSES = 2
DEVICES = 2
"""Virtual devices of each process."""

NEEDS_BYTES = 6e9
"""Free bytes that a rehearsal needs: checkpoints with an embedding of 257,152 rows."""


GPU = "gpu"
"""The topology of one GPU."""


class Limits(NamedTuple):
    """What the user has for the real run; 0 is no limit."""

    hours: float = 0.0
    disk_gb: float = 0.0


class Rehearsal:
    """One rehearsal in a folder that holds its data, its run and its logs."""

    def __init__(self, config: Config, topology: str, folder: Path, checklist: Checklist):
        self.config = config
        self.topology = topology
        self.folder = folder
        self.checklist = checklist
        self.questions: dict[str, int] = {}
        self.data_config = config
        self.tokenizer = ""
        self.is_miniature = not data.has_data(config)
        self.document: JsonDict = {}

    def check_inputs(self) -> None:
        """Checks what the run reads: data, tokenizer, weights, and the slice's batches."""
        run = self.checklist.run
        run("slice", self._check_slice)
        run("data", self._check_data)
        run("tokenizer", self._check_tokenizer)
        if self.config.init and self._has_weights():
            run("weights", self._check_weights)
        else:
            missing = f"{self.config.init} is not on this machine"
            self.checklist.skip("weights", missing if self.config.init else "config.init is empty")

    def run_small(self) -> None:
        """Runs every stage in small, kills and resumes it, evaluates and exports it."""
        run = self.checklist.run
        free = shutil.disk_usage(self.folder).free
        if free < NEEDS_BYTES:
            raise UserError(
                f"{self.folder} has {free / 1e9:.1f} GB free, and a rehearsal needs "
                f"{NEEDS_BYTES / 1e9:.0f} GB: choose another --out"
            )
        devices = PROCESSES * DEVICES
        axes = self.config.mesh.replica * self.config.mesh.model
        small = shrink(self.data_config, devices // axes, self.tokenizer, str(self.folder))
        file = write_config(small, self.folder)
        processes = Processes(self.folder, PROCESSES, DEVICES)
        workdir = self.folder / "run"
        arguments = (f"--config={file}", f"--workdir={workdir}")
        last = small.stages[-1]
        steps = {stage: STEPS[stage] for stage in small.stages}
        kill_at = sum(steps.values()) - steps[last] + 1

        def train() -> str:
            step = processes.train_until_killed(workdir, kill_at, *arguments)
            return (
                f"{' → '.join(steps)} on {PROCESSES} processes of {DEVICES} devices, {DEPTH} "
                f"layers, {small.model.text.vocab_size} tokens; killed after checkpoint {step}"
            )

        def resume() -> str:
            processes.train(*arguments)
            newest = max(run_directory.steps(workdir))
            if newest != sum(steps.values()):
                raise UserError(f"the run ended at step {newest} of {sum(steps.values())}")
            return f"continued to step {newest}"

        def evaluate() -> str:
            processes.run("evaluate", *arguments, f"--out={self.folder / 'scores'}")
            metrics = json.loads((self.folder / "scores" / "eval.json").read_text())
            missing = [
                name
                for name in small.eval.sources
                if not any(key.startswith((f"eval/{name}/", f"eval/{name}@")) for key in metrics)
            ]
            if missing:
                raise UserError(f"evaluate gave no metric of {', '.join(missing)}")
            return f"{len(small.eval.sources)} held-out sources"

        def export() -> str:
            processes.run("convert", str(workdir), str(self.folder / "export.npz"))
            processes.run(
                *("convert", str(workdir), str(self.folder / "export")),
                f"--tokenizer={self.tokenizer}",
            )
            picture = self.folder / "question.png"
            _first_image(self.data_config).save(picture)
            processes.run(
                "predict",
                f"--params={self.folder / 'export'}",
                f"--image={picture}",
                "--prompt=detect red circle",
                "--max_new_tokens=8",
            )
            return "big_vision .npz and a Hugging Face directory, which predict reads"

        run("train", train)
        run("resume", resume)
        if small.eval.sources:
            run("evaluate", evaluate)
        run("export", export)

    def estimate(self, limits: Limits) -> None:
        """Compiles the real programs for the slice, and adds the costs.

        Raises:
          UserError: the programs do not fit, or the run needs more than `limits`.
        """
        if self.topology == GPU:
            self.checklist.skip("compile", "only TPUs are compiled for: memory and hours")
        else:
            self.checklist.run("compile", self._compile)
        if self.document:
            self.checklist.run("hours", lambda: self._check_hours(limits.hours))
        elif self.topology != GPU:
            self.checklist.skip("hours", "libtpu is not installed: pip install -e '.[tpu]'")
        self.checklist.run("disk", lambda: self._check_disk(limits.disk_gb))

    def _check_slice(self) -> str:
        count = self._device_count
        mesh = sharding.abstract_mesh(self.config.mesh, count)
        for stage in self.config.stages:
            settings = self.config.stage_settings(stage)
            part = settings.batch_size // settings.parts_per_step
            divisor = f" / {settings.parts_per_step} parts" if settings.parts_per_step > 1 else ""
            sharding.check_batch_size(mesh, part, f"{stage}.batch_size{divisor}")
        if self.config.eval.sources:
            sharding.check_batch_size(mesh, self.config.eval.batch_size, "eval.batch_size")
        return f"every batch divides over {count} device{'s' if count > 1 else ''}"

    @property
    def _device_count(self) -> int:
        return 1 if self.topology == GPU else tpu_specs.device_count(self.topology)

    def _check_data(self) -> str:
        self.data_config, kind = data.prepare(self.config, self.folder / "data")
        self.questions = data.check_sources(self.data_config, self.is_miniature)
        count = len(list(data.used_sources(self.config)))
        return f"{count} sources: {kind}"

    def _check_tokenizer(self) -> str:
        path = self.config.data.tokenizer
        size = self.config.model.text.vocab_size
        if not path:
            file = self.folder / "tokenizer.model"
            file.write_bytes(stand_in_tokenizer(size))
            self.tokenizer = str(file)
            return f"a stand-in of {size} pieces, because config.data.tokenizer is empty"
        self.tokenizer = str(tokenizer_file(path))
        check_vocab_size(load_tokenizer(self.tokenizer), size)
        return f"yours: {size} pieces, loc and seg tokens are the last 1,152"

    def _has_weights(self) -> bool:
        try:
            return checkpoint_path(self.config.init, "config.init").exists()
        except UserError:
            return False

    def _check_weights(self) -> str:
        return f"{self.config.init} exists (its arrays were not read)"

    def _compile(self) -> str:
        result = compilation.compile_run(self.config, self.topology)
        (self.folder / "compile.txt").write_text(result.text + "\n")
        self.document = result.document
        if not result.fits:
            raise UserError(f"the programs do not fit {self.topology}:\n{result.text}")
        if not result.document:
            return f"{self.topology}: fits by arithmetic"
        largest = max(program["hbm_bytes"] for program in result.document["programs"].values())
        chip = CHIPS[tpu_specs.parse_topology(self.topology)[0]]
        return (
            f"{self.topology}: {largest / GIB:.1f} of {chip.hbm_bytes / GIB:.1f} GiB a chip; "
            + ", ".join(
                f"{name} {program['step_s']:.2f} s"
                for name, program in result.document["programs"].items()
            )
        )

    def _check_hours(self, limit: float) -> str:
        cost = costs.run_costs(self.config, self.topology, self.document, self.questions)
        (self.folder / "costs.txt").write_text(ascii_table(cost.table()) + "\n")
        parts = ", ".join(f"{name} {hours:.2f} h" for name, hours in cost.hours.items())
        text = (
            f"{cost.total_hours:.1f} h at best, {cost.total_hours * cost.chips:.0f} chip-hours: "
            f"{parts}"
        )
        if limit and cost.total_hours > limit:
            raise UserError(f"--hours={limit:g}: the run needs {text}")
        return text

    def _check_disk(self, limit_gb: float) -> str:
        size = costs.checkpoint_bytes(self.config, self._device_count)
        text = f"{size / 1e9:.0f} GB of checkpoints in the working directory"
        if limit_gb and size > limit_gb * 1e9:
            raise UserError(
                f"--disk_gb={limit_gb:g}: the run needs {text}; "
                f"config.checkpoint.keep={self.config.checkpoint.keep} can be less"
            )
        return text

    def list_unchecked(self) -> None:
        """Adds what no rehearsal can check."""
        skip = self.checklist.skip
        if self.is_miniature:
            skip("your data", f"nothing is in {self.config.data.dir}")
        skip("speed", "no chip ran: hours are at best, and data or links can be slower")
        skip("account", "quota, permissions of buckets and the network of the slice")


def _first_image(config: Config) -> Image.Image:
    """Returns the image of the first question of the last stage."""
    name, source = next(iter(config.stage_settings(config.stages[-1]).sources.items()))
    examples = open_examples(name, source, config.data, config.model.image_size)
    return Image.fromarray(examples[0].image)

"""The steps of a rehearsal, in order. Each one adds a line to the checklist."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from pg_ground.aot import compilation, estimates, tpu_specs
from pg_ground.aot.tpu_specs import CHIPS, GIB, H100
from pg_ground.checkpoints import run_directory
from pg_ground.checkpoints.weights import open_checkpoint
from pg_ground.config import Config
from pg_ground.parallel import sharding
from pg_ground.rehearsal import costs, data
from pg_ground.rehearsal.checklist import Checklist
from pg_ground.rehearsal.processes import Processes, write_config
from pg_ground.rehearsal.shrinking import DEPTH, STEPS, shrink
from pg_ground.rehearsal.stand_in_tokenizer import stand_in_tokenizer
from pg_ground.rehearsal.typed_paths import existing_path
from pg_ground.reporting.tables import ascii_table
from pg_ground.storage.downloads import checkpoint_path, tokenizer_file
from pg_ground.storage.paths import absolute, to_path
from pg_ground.tokenizer import check_vocab_size
from pg_ground.tokenizer import load as load_tokenizer
from pg_ground.training.data_check import small_tokenizer_fits, with_room
from pg_ground.types import JsonDict, UserError

PROCESSES = 2
DEVICES = 2
"""Virtual devices of each process."""

NEEDS_BYTES = 6e9
"""Free bytes that a rehearsal needs: checkpoints with an embedding of 257,152 rows."""

SPARE = 2
"""Suffix tokens of the small run for each token of the longest suffix that was seen."""

GPU = "gpu"
"""The topology of one GPU, an H100."""


class Limits(NamedTuple):
    """What the user has for the real run; 0 is no limit."""

    hours: float = 0.0
    disk_gb: float = 0.0


class Rehearsal:
    """One rehearsal in a folder that holds its data, its run and its logs."""

    def __init__(
        self,
        config: Config,
        defaults: Config,
        topology: str,
        folder: Path,
        checklist: Checklist,
    ):
        """Args:
        defaults: the settings of the recipe without the user's flags.
        """
        self.config = config
        self.defaults = defaults
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
        vqvae = self.config.eval.vqvae
        if vqvae and vqvae != self.defaults.eval.vqvae:
            run("vqvae", lambda: f"{existing_path(vqvae, 'config.eval.vqvae')} exists")
        init = self.config.init
        if not init:
            self.checklist.skip("weights", "config.init is empty")
        elif init != self.defaults.init or self._has_weights():
            run("weights", self._check_weights)
        else:
            reason = f"there is no {init} here: --config.init=FOLDER names yours"
            self.checklist.skip("weights", reason)

    def run_small(self) -> None:
        """Runs every stage in small, kills and resumes it, evaluates and exports it."""
        run = self.checklist.run
        free = shutil.disk_usage(self.folder).free
        if free < NEEDS_BYTES:
            raise UserError(
                f"{self.folder} has {free / 1e9:.1f} GB free, and a rehearsal needs "
                f"{NEEDS_BYTES / 1e9:.0f} GB: choose another --out"
            )
        small = self._with_short_suffixes(self.small_config())
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
                f"layers, {small.model.text.vocab_size} tokens; killed on purpose after "
                f"checkpoint {step}"
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
            absent = [
                name
                for name in small.eval.sources
                if not any(key.startswith((f"eval/{name}/", f"eval/{name}@")) for key in metrics)
            ]
            if absent:
                raise UserError(f"evaluate gave no metric of {', '.join(absent)}")
            return f"{len(small.eval.sources)} held-out sources"

        def export() -> str:
            processes.run("convert", str(workdir), str(self.folder / "export.npz"))
            processes.run(
                *("convert", str(workdir), str(self.folder / "export")),
                f"--tokenizer={self.tokenizer}",
            )
            picture = self.folder / "question.png"
            data.first_image(self.data_config).save(picture)
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

    def small_config(self) -> Config:
        """Returns the config of the small run. The stand-in of the tokenizer needs more tokens for
        the user's texts than the real one, so they have more room."""
        axes = self.config.mesh.replica * self.config.mesh.model
        devices = PROCESSES * DEVICES // axes
        small = shrink(self.data_config, devices, self.tokenizer, str(self.folder))
        counts_alike = self.config.data.tokenizer or small_tokenizer_fits(self.config)
        if self.is_miniature or counts_alike:
            return small
        return replace(small, data=with_room(small.data))

    def _with_short_suffixes(self, small: Config) -> Config:
        """Returns the small run with room for twice the longest suffix of a sample, at most.

        Each suffix token costs a row of logits of the whole vocabulary. With 256 tokens, as for
        detection, a step of SFT took 80 s on two busy cores, and most of them were padding.
        """
        longest = data.longest_suffix(small, load_tokenizer(self.tokenizer))
        length = min(small.data.suffix_length, SPARE * longest)
        return replace(small, data=replace(small.data, suffix_length=length))

    def estimate(self, limits: Limits) -> None:
        """Compiles the real programs for the slice, and adds the costs.

        For a GPU, arithmetic takes the place of the compiler.

        Raises:
          UserError: the programs do not fit, or the run needs more than `limits`.
        """
        if self.topology == GPU:
            self.checklist.run("memory", self._estimate_gpu)
        else:
            self.checklist.run("compile", self._compile)
        if self.document:
            self.checklist.run("hours", lambda: self._check_hours(limits.hours))
        else:
            self._without_hours(limits.hours, "libtpu is not installed: pip install -e '.[tpu]'")
        self.checklist.run("disk", lambda: self._check_disk(limits.disk_gb))

    def skip_compile(self, limits: Limits) -> None:
        """Records that nothing is compiled.

        Raises:
          UserError: there is a limit of hours, or the run needs more disk than `limits`.
        """
        self.checklist.skip("compile", "--nocompile")
        if limits.hours:
            self._without_hours(limits.hours, "leave --nocompile out")
        if limits.disk_gb:
            self.checklist.run("disk", lambda: self._check_disk(limits.disk_gb))

    def _without_hours(self, limit: float, reason: str) -> None:
        """Records that hours are not known. Raises UserError if the user has a limit of hours."""

        def fail() -> str:
            raise UserError(f"--hours={limit:g} cannot be checked: {reason}")

        if limit:
            self.checklist.run("hours", fail)
        else:
            self.checklist.skip("hours", reason)

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
        if self.is_miniature and self.config.data.dir != self.defaults.data.dir:
            raise UserError(data.missing(self.config, self.defaults))
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
        existing_path(path, "config.data.tokenizer")
        self.tokenizer = str(tokenizer_file(path))
        check_vocab_size(load_tokenizer(self.tokenizer), size)
        return f"yours: {size} pieces, loc and seg tokens are the last 1,152"

    def _has_weights(self) -> bool:
        try:
            return checkpoint_path(self.config.init, "config.init").exists()
        except UserError:
            return False

    def _check_weights(self) -> str:
        """Opens the checkpoint as the run does: names and shapes of its arrays.

        A checkpoint in a bucket is not opened, because the run downloads it then.
        """
        init = self.config.init
        path = existing_path(init, "config.init")
        if not isinstance(path, Path):
            return f"{init} exists (it was not opened)"
        try:
            open_checkpoint(path, self.config.model, self.config.resample_positions)
        except UserError as error:
            raise UserError(f"config.init: {error}") from None
        return f"{init} has the model's arrays (their values were not read)"

    def _compile(self) -> str:
        result = compilation.compile_run(self.config, self.topology)
        (self.folder / "compile.txt").write_text(result.text + "\n")
        self.document = result.document
        if not result.fits:
            print(result.text)
            raise UserError(_does_not_fit(self.topology, result.text))
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

    def _estimate_gpu(self) -> str:
        self.document = estimates.estimate_run(self.config, H100)
        programs = self.document["programs"]
        largest = max(programs, key=lambda name: programs[name]["hbm_bytes"])
        needs = programs[largest]["hbm_bytes"] / tpu_specs.GB
        limit = f"{H100.hbm_bytes / tpu_specs.GB:.0f} GB"
        if programs[largest]["hbm_bytes"] > H100.hbm_bytes:
            raise UserError(
                f"{largest} needs about {needs:.1f} GB by arithmetic, and one H100 has {limit}: "
                "choose a smaller batch_size, or config.model.lora.rank=16"
            )
        seconds = ", ".join(
            f"{name} {program['step_s']:.2f} s" for name, program in programs.items()
        )
        return f"one H100: {needs:.1f} of {limit} by arithmetic, not compiled; {seconds}"

    def _check_hours(self, limit: float) -> str:
        cost = costs.run_costs(self.config, self._device_count, self.document, self.questions)
        (self.folder / "costs.txt").write_text(ascii_table(cost.table()) + "\n")
        parts = ", ".join(f"{name} {hours:.2f} h" for name, hours in cost.hours.items())
        source = " by arithmetic" if self.topology == GPU else ""
        text = (
            f"{cost.total_hours:.1f} h at best{source}, "
            f"{cost.total_hours * cost.chips:.0f} chip-hours: {parts}"
        )
        if limit and cost.total_hours > limit:
            raise UserError(f"--hours={limit:g}: the run needs {text}; {self._fewer_hours()}")
        return text

    def _fewer_hours(self) -> str:
        steps = ", ".join(f"config.{stage}.steps" for stage in self.config.stages)
        larger = "" if self.topology == GPU else "a larger slice (--topology) or "
        return f"{larger}fewer steps ({steps}) need fewer hours"

    def _check_disk(self, limit_gb: float) -> str:
        size = costs.checkpoint_bytes(self.config, self._device_count)
        text = f"{size / 1e9:.0f} GB of checkpoints in its --workdir at most"
        if limit_gb and size > limit_gb * 1e9:
            keep = self.config.checkpoint.keep
            fewer = f"; --config.checkpoint.keep=1 writes less (now {keep})" if keep > 1 else ""
            raise UserError(f"--disk_gb={limit_gb:g}: the run writes {text}{fewer}")
        return text

    def list_unchecked(self) -> None:
        """Adds what no rehearsal can check."""
        skip = self.checklist.skip
        if self.is_miniature:
            folder = absolute(to_path(self.config.data.dir, "config.data.dir"))
            skip("your data", f"nothing is in {folder}")
        skip("speed", "no chip ran: hours are at best, and data or links can be slower")
        skip("account", "quota, permissions of buckets and the network of the slice")


ADVICE = "What would help: "
"""The beginning of the last line of `aot.compilation.compile_run` if a program does not fit."""


def _does_not_fit(topology: str, text: str) -> str:
    """Returns the result of `compile_run` in one sentence."""
    lines = text.splitlines()
    size = lines[0].removeprefix(f"{topology}: ").removesuffix(", does not fit")
    advice = "".join(
        f": {line.removeprefix(ADVICE)}" for line in lines[-1:] if line.startswith(ADVICE)
    )
    return f"the programs do not fit {topology} ({size}){advice}"

"""The data of a rehearsal: a sample of the user's questions, or a miniature."""

import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from PIL import Image

from pg_ground.config import Config, Source
from pg_ground.data.bad_records import numbered
from pg_ground.data.datasets import Examples, open_examples
from pg_ground.data.records import BadRecord, clip_text
from pg_ground.data.text_budgets import measure_budget, spread
from pg_ground.evals.benchmarks import find_benchmark, source_count_faults
from pg_ground.evals.runner import cuts_answers
from pg_ground.rehearsal import typed_paths
from pg_ground.rehearsal.miniatures import has_addresses, write_miniatures
from pg_ground.storage.paths import to_path
from pg_ground.tokenizer import Tokenizer
from pg_ground.types import UserError

SAMPLE = 64
"""Questions of each source that are read."""


def has_data(config: Config) -> bool:
    """Returns whether the folder of the data has files, or no source needs one."""
    return not _absence(config)


def _absence(config: Config) -> str:
    """Returns why the folder of the data cannot be read; "" if it can, or if no source needs it."""
    uses_dir = any("{dir}" in source.uri for _, _, source in used_sources(config))
    return typed_paths.absence(to_path(config.data.dir, "config.data.dir")) if uses_dir else ""


def missing(config: Config, defaults: Config, advice: str = "") -> str:
    """Returns the error of a folder of data without files.

    Args:
      defaults: the settings of the recipe without the user's flags.
      advice: what helps, if the user did not type another folder.
    """
    if config.data.dir != defaults.data.dir:
        return typed_paths.missing("config.data.dir", to_path(config.data.dir, "config.data.dir"))
    fault = f"config.data.dir ({config.data.dir}) {_absence(config)}"
    return f"{fault}: {advice}" if advice else fault


def used_sources(config: Config) -> Iterator[tuple[str, str, Source]]:
    """Yields (section, name, source) of every source of the run's stages and of its evaluation."""
    for section, sources in config.sources_by_section.items():
        if section in (*config.stages, "eval"):
            for name, source in sources.items():
                yield section, name, source


def prepare(config: Config, folder: Path) -> tuple[Config, str]:
    """Returns the config with the folder of the data, and what the data is, in words.

    If the folder `data.dir` does not exist or is empty, a miniature is written into `folder`. If
    its images are on the web, this process serves them until it ends.

    Raises:
      UserError: a source has no miniature.
    """
    if has_data(config):
        return config, f"yours, in {config.data.dir}" if config.data.dir else "yours"
    folder.mkdir(parents=True, exist_ok=True)
    address = serve(folder) if has_addresses(config) else ""
    write_miniatures(config, folder, address)
    fetch = replace(
        config.data.fetch, cache_dir=str(folder / "fetched"), allow_private=True, retries=1
    )
    data = replace(config.data, dir=str(folder), fetch=fetch)
    return replace(config, data=data), f"a miniature, because {config.data.dir} {_absence(config)}"


def serve(folder: Path) -> str:
    """Serves the files of a folder on this machine, and returns the address."""

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_address[1]}"


def check_sources(config: Config, is_miniature: bool) -> dict[str, int]:
    """Reads a sample of every source. Returns the number of questions of each held-out source.

    Raises:
      UserError: a source cannot be opened, too many of its questions are bad, or a published
        benchmark has another number of questions.
    """
    counts = {}
    for section, name, source in used_sources(config):
        setting = f"config.{section}.sources.{name}"
        examples = open_examples(
            f"{section}/{name}", source, config.data, config.model.image_size, config.seed
        )
        _check_sample(examples, config.data.bad_record_share, setting)
        if section == "eval":
            counts[name] = len(examples)
            benchmark = config.eval.benchmarks.get(name, "")
            expected = benchmark and find_benchmark(benchmark, setting).question_count
            if expected and is_miniature:
                counts[name] = expected
    faults = "" if is_miniature else source_count_faults(counts, config.eval.benchmarks)
    if faults:
        raise UserError(faults)
    return counts


def _check_sample(examples: Examples, share: float, setting: str) -> None:
    bad: Counter[str] = Counter()
    first = ""
    indices = spread(len(examples), SAMPLE)
    for index in indices:
        try:
            examples[index]
        except BadRecord as error:
            bad[error.kind] += 1
            first = first or numbered(index, str(error), "question")
    if not indices or sum(bad.values()) > share * len(indices):
        kinds = ", ".join(f"{count} {kind}" for kind, count in bad.most_common())
        raise UserError(
            f"{setting}: {sum(bad.values())} of {len(indices)} questions cannot be used ({kinds}); "
            f"{clip_text(first, 300)}"
        )


def longest_suffix(config: Config, tokenizer: Tokenizer) -> int:
    """Returns the largest number of suffix tokens in a sample of each source.

    Answers that an evaluation may cut do not count.
    """
    settings = replace(config.data, check_records=SAMPLE)
    budgets = []
    for section, name, source in used_sources(config):
        examples = open_examples(
            f"{section}/{name}",
            source,
            settings,
            config.model.image_size,
            config.seed,
            section == "eval" and cuts_answers(config.eval, name),
        )
        budgets.append(measure_budget(examples, tokenizer, settings))
    return max(budget.suffix_tokens for budget in budgets if not budget.cut_answers)


def first_image(config: Config) -> Image.Image:
    """Returns the image of the first usable question of the last stage.

    Raises:
      UserError: no question of its first source can be used.
    """
    stage = config.stages[-1]
    name, source = next(iter(config.stage_settings(stage).sources.items()))
    examples = open_examples(f"{stage}/{name}", source, config.data, config.model.image_size)
    reason = ""
    for index in range(len(examples)):
        try:
            return Image.fromarray(examples[index].image)
        except BadRecord as bad:
            reason = reason or numbered(index, str(bad), "question")
    raise UserError(f"config.{stage}.sources.{name}: no question can be used; {reason}")

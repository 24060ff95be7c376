"""Checks the data of a run without training: every record of every source, and the rewards."""

import sys
from collections.abc import Collection

from tqdm import tqdm

from pg_ground.config import Config
from pg_ground.data.datasets import open_examples
from pg_ground.data.source_check import SourceId, check_source
from pg_ground.parallel import multiprocess
from pg_ground.reporting import data_report
from pg_ground.reporting.tables import ascii_table
from pg_ground.storage.downloads import tokenizer_file
from pg_ground.tokenizer import load as load_tokenizer
from pg_ground.training import reward_coverage
from pg_ground.types import UserError


def check_data(config: Config, workers: int) -> None:
    """Reads every record once and prints tables of what training would meet.

    Args:
      workers: processes that read; 0 is one for each core.

    Raises:
      UserError: training would stop; the text says why.
    """
    checks = []
    stages = config.stages
    for section, sources in config.sources_by_section.items():
        if section not in (*stages, "eval"):
            continue
        for name, source in sources.items():
            source_id = SourceId(
                f"{section}/{name}", source, config.data, config.model.image_size, config.seed
            )
            with tqdm(unit=" questions", desc=source_id.name, file=sys.stderr, disable=None) as bar:
                checks.append(check_source(source_id, workers, bar.update))
    for table in data_report.tables(checks):
        multiprocess.print_once(ascii_table(table))
    for note in data_report.notes(checks):
        multiprocess.print_once(note)
    problems = [problem for check in checks for problem in check.problems]
    usable = {check.name for check in checks if check.budget is not None}
    if "grpo" in stages:
        problems += _reward_problems(config, usable)
    if problems:
        raise UserError("training would stop: " + "; ".join(problems))
    multiprocess.print_once("training can start with these records")


def _reward_problems(config: Config, usable: Collection[str]) -> list[str]:
    """Prints which rewards apply to the sources of GRPO. Returns why training would stop.

    Args:
      usable: the names of sources, as grpo/photos, that have questions.
    """
    try:
        parts = [
            open_examples(f"grpo/{name}", source, config.data, config.model.image_size, config.seed)
            for name, source in config.grpo.sources.items()
            if f"grpo/{name}" in usable
        ]
        if not parts:
            return []
        tokenizer = load_tokenizer(tokenizer_file(config.data.tokenizer))
        coverages = reward_coverage.measure(
            parts, config.grpo, tokenizer, config.data, bool(config.eval.vqvae)
        )
        multiprocess.print_once(ascii_table(reward_coverage.table(coverages, config.grpo)))
        reward_coverage.check(coverages, config.grpo)
    except UserError as error:
        return [str(error)]
    return []

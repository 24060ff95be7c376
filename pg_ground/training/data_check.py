"""Checks the data of a run without training: every record of every source, and the rewards."""

import sys

from tqdm import tqdm

from pg_ground.config import Config
from pg_ground.data.source_check import SourceId, check_source
from pg_ground.parallel import multiprocess
from pg_ground.reporting import data_report
from pg_ground.reporting.tables import ascii_table
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
    if problems:
        raise UserError("training would stop: " + "; ".join(problems))
    multiprocess.print_once("training can start with these records")

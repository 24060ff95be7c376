"""Checks the data of a run without training: every record of every source, and the rewards."""

import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace

from tqdm import tqdm

from pg_ground.config import Config, Data
from pg_ground.data.datasets import open_examples
from pg_ground.data.source_check import Check, SourceId, check_source
from pg_ground.evals.benchmarks import source_count_faults
from pg_ground.evals.runner import cuts_answers
from pg_ground.parallel import multiprocess
from pg_ground.reporting import data_report
from pg_ground.reporting.tables import ascii_table
from pg_ground.storage.downloads import tokenizer_file
from pg_ground.tokenizer import load as load_tokenizer
from pg_ground.training import reward_coverage
from pg_ground.types import UserError, first_problems

ROOM = 8
"""Factor of the lengths if the small tokenizer counts the tokens of PaliGemma's texts."""

SHOWN = 3
"""Reasons to stop that the error names. If there are more, all are printed before."""

SMALL_TOKENIZER = (
    "tokens are counted with the small tokenizer of the package; --config.data.tokenizer=… counts "
    "as the run does"
)


def check_data(config: Config, workers: int) -> None:
    """Reads every record once and prints tables of what training would meet.

    Args:
      workers: processes that read; 0 is one for each core.

    Raises:
      UserError: training would stop, or a published benchmark has another number of questions; the
        text says why.
    """
    has_tokenizer = bool(config.data.tokenizer) or small_tokenizer_fits(config)
    data = config.data if has_tokenizer else with_room(config.data)
    checks, copies = _read_sources(config, data, workers)
    for table in data_report.tables(checks):
        multiprocess.print_once(ascii_table(table))
    for name, first_name in copies.items():
        multiprocess.print_once(f"{name}: the same records as {first_name}")
    for note in data_report.notes(checks):
        multiprocess.print_once(note)
    if not has_tokenizer:
        for note in (SMALL_TOKENIZER, *_long_texts(config.data, checks)):
            multiprocess.print_once(note)
    problems = _distinct_problems(checks)
    if "grpo" in config.stages:
        usable = {check.name for check in checks if check.budget is not None}
        usable |= {name for name, first_name in copies.items() if first_name in usable}
        problems += _reward_problems(config, data, usable)
    if len(problems) > SHOWN:
        for problem in problems:
            multiprocess.print_once(problem)
    stop = f"training would stop: {first_problems(problems, limit=SHOWN)}"
    texts = [stop] if problems else []
    texts += _count_problems(config, checks, copies)
    if texts:
        raise UserError("; ".join(texts))
    bad = sum(check.findings.bad.total() for check in checks)
    without = f", without the {bad} that cannot be used" if bad else ""
    multiprocess.print_once(f"training can start with these records{without}")


def _distinct_problems(checks: Sequence[Check]) -> list[str]:
    """Returns the reasons for which training would stop. Sources with the same cause share one."""
    problems: dict[str, str] = {}
    others: dict[str, list[str]] = {}
    for check in checks:
        for problem in check.problems:
            form = data_report.fault_form(problem)
            if form in problems:
                others[form].append(check.name)
            else:
                problems[form], others[form] = problem, []
    return [
        problem + (f" (also {first_problems(others[form], ', ', SHOWN)})" if others[form] else "")
        for form, problem in problems.items()
    ]


def small_tokenizer_fits(config: Config) -> bool:
    """Returns whether the model has the vocabulary of the package's small tokenizer."""
    return load_tokenizer().vocab.size == config.model.text.vocab_size


def with_room(data: Data) -> Data:
    """Returns the settings with room for texts in tokens of the small tokenizer, which needs more
    tokens than PaliGemma's."""
    return replace(
        data, prompt_length=ROOM * data.prompt_length, suffix_length=ROOM * data.suffix_length
    )


def _read_sources(config: Config, data: Data, workers: int) -> tuple[list[Check], dict[str, str]]:
    """Returns the findings about every source, and name → first name of sources that are equal.

    Equal sources are read once, under the first name.
    """
    checks: list[Check] = []
    names: dict[SourceId, str] = {}
    copies: dict[str, str] = {}
    for section, sources in config.sources_by_section.items():
        if section not in (*config.stages, "eval"):
            continue
        for name, source in sources.items():
            source_id = SourceId(
                f"{section}/{name}",
                source,
                data,
                config.model.image_size,
                config.seed,
                section == "eval" and cuts_answers(config.eval, name),
            )
            content = source_id._replace(name="", source=replace(source, weight=1.0))
            if content in names:
                copies[source_id.name] = names[content]
                continue
            names[content] = source_id.name
            with tqdm(unit=" questions", desc=source_id.name, file=sys.stderr, disable=None) as bar:
                checks.append(check_source(source_id, workers, bar.update))
    return checks, copies


def _long_texts(data: Data, checks: Sequence[Check]) -> Iterator[str]:
    """Yields which texts may be too long: PaliGemma's tokenizer may need fewer tokens."""
    for check in checks:
        for text in ("prompt", "suffix"):
            need, index = check.findings.longest.get(text, (0, 0))
            is_cut = text == "suffix" and check.budget is not None and check.budget.cut_answers
            limit = getattr(data, f"{text}_length")
            if need > limit and not is_cut:
                yield (
                    f"source {check.name}: question {index} has {need} {text} tokens, but "
                    f"data.{text}_length is {limit}: the run's tokenizer may need fewer"
                )


def _count_problems(
    config: Config, checks: Sequence[Check], copies: Mapping[str, str]
) -> list[str]:
    """Returns which held-out sources have another number of questions than published."""
    questions = {check.name: check.questions for check in checks}
    questions |= {name: questions[first_name] for name, first_name in copies.items()}
    counts = {
        name.removeprefix("eval/"): count
        for name, count in questions.items()
        if name.startswith("eval/") and count
    }
    faults = source_count_faults(counts, config.eval.benchmarks)
    return [faults] if faults else []


def _reward_problems(config: Config, data: Data, usable: Collection[str]) -> list[str]:
    """Prints which rewards apply to the sources of GRPO. Returns why training would stop.

    Args:
      data: `config.data`, or with room for the small tokenizer.
      usable: the names of sources, as grpo/photos, that have questions.
    """
    try:
        parts = [
            open_examples(f"grpo/{name}", source, data, config.model.image_size, config.seed)
            for name, source in config.grpo.sources.items()
            if f"grpo/{name}" in usable
        ]
        if not parts:
            return []
        tokenizer = load_tokenizer(tokenizer_file(config.data.tokenizer))
        coverages = reward_coverage.measure(
            parts, config.grpo, tokenizer, data, bool(config.eval.vqvae)
        )
        multiprocess.print_once(ascii_table(reward_coverage.table(coverages, config.grpo)))
        reward_coverage.check(coverages, config.grpo)
    except UserError as error:
        return [str(error)]
    return []

"""Fetches every image of a config that is a url into the cache, so that a run needs no network: a count by outcome, as JSON.

Run `python -m pg_ground.prefetch --config=configs/quickstart.py`. Stopped, it goes on where it was when it is run again.
`--retry_failed=1` asks again for what failed finally before: a missing image, another content, one too large.
"""

from collections.abc import Iterator

from pg_ground.config import Config
from pg_ground.data import fetch, pipeline
from pg_ground.data.examples import field_at
from pg_ground.data.records import BadRecord


def urls_of(config: Config) -> Iterator[tuple[str, str | None]]:
    """Yields the url and, where the source has it, the sha256 of every image that is a url, each source once.

    What is no url is passed over, and so is a record that cannot be read: training counts it.

    Raises:
      UserError: a source cannot be opened.
    """
    sections = (config.sft.sources, config.grpo.sources, config.eval.sources)
    named = {source: name for section in sections for name, source in section.items()}
    for source, name in named.items():
        questions = pipeline.open_examples(
            name, source, config.data, config.model.image_size, config.seed
        )
        for index in range(len(questions)):
            try:
                record, element = questions.record(index)
                url = field_at(record, source.image, element)
                sha256 = (
                    field_at(record, source.image_sha256, element) if source.image_sha256 else None
                )
            except BadRecord:
                continue
            if fetch.is_url(url):
                yield url, None if sha256 is None else str(sha256)

"""Fetches every image of a config that is a url into the cache, so that a run needs no network: a count by outcome, as JSON.

Run `python -m pg_ground.prefetch --config=configs/quickstart.py`. Stopped, it goes on where it was when it is run again.
`--retry_failed=1` asks again for what failed finally before: a missing image, another content, one too large.
"""

import json
import sys
from collections.abc import Sequence

from tqdm import tqdm

from pg_ground import cli
from pg_ground.data import fetch
from pg_ground.data.prefetching import image_urls
from pg_ground.types import UserError


def main(argv: Sequence[str]) -> None:
    """Fetches, and prints the count. Urls that fail are counted and no error: training skips their records."""
    config, flags = cli.parse(argv, {"retry_failed": 0})
    if flags["retry_failed"] not in (0, 1):
        raise UserError(f"--retry_failed is {flags['retry_failed']}: it must be 0 or 1")
    sections = (config.sft.sources, config.grpo.sources, config.eval.sources)
    urls = image_urls(sections, config.data, config.seed)
    with tqdm(unit=" images", file=sys.stderr) as bar:
        outcomes = fetch.prefetch(
            urls,
            config.data.fetch,
            lambda _: bar.update(),
            bool(flags["retry_failed"]),
        )
    print(json.dumps(dict(sorted(outcomes.items()))))


if __name__ == "__main__":
    cli.run(main)

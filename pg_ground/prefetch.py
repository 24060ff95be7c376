"""Downloads the images of a config into the cache, so that a run needs no network.

An image is downloaded if its record names it by a URL. The command prints the number of URLs by
outcome as JSON. The same command continues after an interruption. A URL that fails is counted and
is no error, because training skips its records.
"""

import json
import sys

from absl import flags
from tqdm import tqdm

from pg_ground import cli
from pg_ground.data import fetch
from pg_ground.data.prefetching import image_urls


def define_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_boolean(
        "retry_failed",
        False,
        "Also retry URLs that failed for good before: a missing image, other content, too large.",
        flag_values=values,
    )


COMMAND = cli.Command(
    name="prefetch",
    description=__doc__,
    needs="--config=FILE",
    example="--config=configs/photos.py",
    define_flags=define_flags,
    required=("config",),
)


def main(args: cli.Arguments) -> None:
    config = args.config
    sections = tuple(config.sources_by_section.values())
    urls = image_urls(sections, config.data, config.seed)
    with tqdm(unit=" images", file=sys.stderr) as bar:
        outcomes = fetch.prefetch(
            urls, config.data.fetch, lambda _: bar.update(), args.flags.retry_failed
        )
    print(json.dumps(dict(sorted(outcomes.items()))))


if __name__ == "__main__":
    cli.run(COMMAND, main)

"""Lists the images of sources that are urls, so that they can be fetched before a run."""

from collections.abc import Iterator, Mapping, Sequence

from pg_ground.config import Data, Source
from pg_ground.data import fetch
from pg_ground.data.datasets import open_examples
from pg_ground.data.examples import image_sha256
from pg_ground.data.image_values import image_name, unwrap
from pg_ground.data.record_fields import field_at
from pg_ground.data.records import BadRecord


def image_urls(
    sections: Sequence[Mapping[str, Source]], data: Data, seed: int
) -> Iterator[tuple[str, str | None]]:
    """Yields the url of every image that is a url, and its sha256 if the source has it.

    Equal sources in several sections are read once. A record that cannot be read is skipped:
    training counts it.

    Args:
      sections: sources by name.
      data: settings that all sources share.
      seed: the run's seed, which decides the records that `sampling` chooses.

    Raises:
      UserError: a source cannot be opened.
    """
    names = {source: name for section in sections for name, source in section.items()}
    for source, name in names.items():
        # Drawn scenes have no urls, and there are millions of them.
        if source.uri.startswith(("synthetic:", "relations:synthetic:")):
            continue
        # No image is opened here, so the image size does not matter.
        dataset = open_examples(name, source, data, image_size=1, seed=seed)
        for index in range(len(dataset)):
            try:
                record, element = dataset.record(index)
                url = image_name(unwrap(field_at(record, source.image, element)))
                sha256 = image_sha256(record, source, element)
            except BadRecord:
                continue
            if fetch.is_url(url):
                yield url, sha256

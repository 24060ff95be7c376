"""What every reader of a source has in common: records by index, bad records, and paths."""

from typing import Protocol, runtime_checkable

from pg_ground.config import Source
from pg_ground.storage.paths import FilePath, join
from pg_ground.types import JsonDict


class BadRecord(Exception):
    """A record that cannot be used.

    `kind` is the name under which the record is counted. The text says what is wrong with it.
    """

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


@runtime_checkable
class Records(Protocol):
    """Random access to the records of one source. Indexing is safe from several threads."""

    @property
    def root(self) -> FilePath | None:
        """The folder that file names in the records are relative to; None if there are no files."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> JsonDict:
        """Returns record `index`, or raises `BadRecord`."""
        ...


def image_folder(records: Records, source: Source) -> FilePath | None:
    """Returns the folder of the image files, or None if the records have no files."""
    return join(records.root, source.image_root) if records.root else None

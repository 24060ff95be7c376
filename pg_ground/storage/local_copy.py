"""A local copy of the small files of a run in a bucket.

Metrics and TensorBoard append to their files, the report is made from all files, and a profiler
writes local files only. A bucket has no append, and each read takes a round trip. So these files
are written to a local folder, which is uploaded.
"""

import contextlib
import logging
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from pg_ground.storage.paths import FilePath

logger = logging.getLogger(__name__)

UPLOAD_SECONDS = 30.0
"""A bucket takes about one write of the same object per second. Metrics can come faster."""


class LocalCopy:
    """The folder `path` on this machine, whose files `upload` copies to `folder` in a bucket.

    If `folder` is on this machine, `path` is the same folder, and nothing is copied.
    """

    def __init__(self, path: Path, folder: FilePath | None = None):
        self.path = path
        self.folder: FilePath = path if folder is None else folder
        self._remote = folder
        self._uploaded: dict[str, tuple[int, int]] = {}
        """Time of change and size of each file that is the same in both folders."""
        self._next_upload = 0.0

    def download(self, patterns: Sequence[str]) -> None:
        """Copies the files of `folder` that match a pattern to `path`."""
        if self._remote is None:
            return
        for pattern in patterns:
            for source in self._remote.glob(pattern):
                name = str(source)[len(str(self._remote)) :].lstrip("/")
                target = self.path / name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(source.read_bytes())
                self._uploaded[name] = _state(target)

    def upload(self) -> None:
        """Copies every file that changed since the last upload, and deletes files that are gone."""
        if self._remote is None:
            return
        files = {
            path.relative_to(self.path).as_posix(): _state(path)
            for path in sorted(self.path.rglob("*"))
            if path.is_file()
        }
        for name, state in files.items():
            if self._uploaded.get(name) != state:
                (self._remote / name).write_bytes((self.path / name).read_bytes())
                self._uploaded[name] = state
        for name in self._uploaded.keys() - files.keys():
            (self._remote / name).unlink(missing_ok=True)
            del self._uploaded[name]
        self._next_upload = time.monotonic() + UPLOAD_SECONDS

    def upload_sometimes(self) -> None:
        """Uploads if the last upload is `UPLOAD_SECONDS` ago."""
        if time.monotonic() >= self._next_upload:
            self.upload_now_or_warn()

    def upload_now_or_warn(self) -> None:
        """Uploads. A failure is logged: the next upload can succeed."""
        try:
            self.upload()
        # The client of the bucket, its transport and its login have exceptions of their own.
        except Exception as error:
            words = " ".join(str(error).split())[:200]
            logger.warning("%s: files were not uploaded: %s", self._remote, words)
            self._next_upload = time.monotonic() + UPLOAD_SECONDS


@contextlib.contextmanager
def open_copy(folder: FilePath, patterns: Sequence[str] = ()) -> Iterator[LocalCopy]:
    """Yields a local copy of a folder in a bucket, or the folder itself if it is on this machine.

    At the end of the `with` block the files are uploaded and the copy is removed.

    Args:
      patterns: names of the files that are downloaded at the start.
    """
    if isinstance(folder, Path):
        yield LocalCopy(folder)
        return
    with tempfile.TemporaryDirectory(prefix="pg_ground_") as temporary:
        path = Path(temporary) / folder.name
        path.mkdir()
        copy = LocalCopy(path, folder)
        copy.download(patterns)
        try:
            yield copy
        except BaseException:
            copy.upload_now_or_warn()  # the error of the run is worth more than that of an upload
            raise
        copy.upload()


def _state(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_mtime_ns, status.st_size

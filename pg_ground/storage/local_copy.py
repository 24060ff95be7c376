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

from pg_ground.storage.files import copy_file
from pg_ground.storage.paths import FilePath, children

logger = logging.getLogger(__name__)

UPLOAD_SECONDS = 30.0
"""A bucket takes about one write of the same object per second. Metrics can come faster."""

DELETED = ("samples/", "tb/")
"""A run that resumes deletes what it will write again."""


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

    def download(self, files: Sequence[str], folders: Sequence[str]) -> None:
        """Copies files and folders from `folder` to `path`, as far as they exist."""
        if self._remote is None:
            return
        names = list(files)
        for folder in folders:
            names += [f"{folder}/{child.name}" for child in children(self._remote / folder)]
        for name in names:
            if (self._remote / name).is_file():
                target = self.path / name
                target.parent.mkdir(parents=True, exist_ok=True)
                copy_file(self._remote / name, target)
                self._uploaded[name] = _state(target)

    def upload(self, with_tensorboard: bool = True) -> None:
        """Copies every file that changed since the last upload.

        Pictures and TensorBoard files that the run has deleted are deleted in the bucket too.

        Args:
          with_tensorboard: whether files below tb/ are copied. They hold pictures and grow.
        """
        if self._remote is None:
            return
        states = dict(self._states())
        for name, state in states.items():
            is_due = with_tensorboard or not name.startswith("tb/")
            if is_due and self._uploaded.get(name) != state:
                copy_file(self.path / name, self._remote / name)
                self._uploaded[name] = state
        for name in self._uploaded.keys() - states.keys():
            if name.startswith(DELETED):
                (self._remote / name).unlink(missing_ok=True)
                del self._uploaded[name]
        self._next_upload = time.monotonic() + UPLOAD_SECONDS

    def _states(self) -> Iterator[tuple[str, tuple[int, int]]]:
        """Yields name and state of each file. wandb keeps its own files, which come and go."""
        for path in sorted(self.path.rglob("*")):
            name = path.relative_to(self.path).as_posix()
            if path.is_file() and not name.startswith("wandb/"):
                yield name, _state(path)

    def upload_sometimes(self) -> None:
        """Uploads all but TensorBoard files if the last upload is `UPLOAD_SECONDS` ago."""
        if time.monotonic() >= self._next_upload:
            self.upload_or_warn(with_tensorboard=False)

    def upload_or_warn(self, with_tensorboard: bool = True) -> None:
        """Uploads. A failure is logged: the next upload can succeed."""
        try:
            self.upload(with_tensorboard)
        # The client of the bucket, its transport and its login have exceptions of their own.
        except Exception as error:
            words = " ".join(str(error).split())[:200]
            logger.warning("%s: files were not uploaded: %s", self._remote, words)
            self._next_upload = time.monotonic() + UPLOAD_SECONDS


@contextlib.contextmanager
def open_copy(
    folder: FilePath, files: Sequence[str] = (), folders: Sequence[str] = ()
) -> Iterator[LocalCopy]:
    """Yields a local copy of a folder in a bucket, or the folder itself if it is on this machine.

    At the end of the `with` block the files are uploaded and the copy is removed.

    Args:
      files: names of the files that are downloaded at the start.
      folders: names of the folders whose files are downloaded at the start.
    """
    if isinstance(folder, Path):
        yield LocalCopy(folder)
        return
    with tempfile.TemporaryDirectory(prefix="pg_ground_") as temporary:
        path = Path(temporary) / folder.name
        path.mkdir()
        copy = LocalCopy(path, folder)
        copy.download(files, folders)
        try:
            yield copy
        except BaseException:
            copy.upload_or_warn()  # the error of the run is worth more than that of an upload
            raise
        copy.upload()


def _state(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_mtime_ns, status.st_size

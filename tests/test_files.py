"""`pg_ground.storage`: a path is local or an address, and a file is written in one step."""

import errno
from pathlib import Path

import pytest

from pg_ground.storage import files, paths
from pg_ground.types import UserError


def test_a_file_is_written_in_one_step_and_leaves_no_temporary_file(tmp_path):
    path = tmp_path / "deep" / "a.txt"
    for content in ("é", b"b"):
        files.write_atomically(path, content)
        assert path.read_bytes() == (content if isinstance(content, bytes) else content.encode())
    assert [file.name for file in path.parent.iterdir()] == ["a.txt"]


def test_every_path_is_local_or_an_address_that_can_be_used(monkeypatch):
    monkeypatch.setenv("HOME", "/home/a")
    assert paths.to_path("~/run", "--x") == Path("/home/a/run")
    assert paths.to_path("C/gs:x", "--x") == Path("C/gs:x")
    assert str(paths.to_path("hf://datasets/a/b", "--x")) == "hf://datasets/a/b"
    monkeypatch.setattr(paths.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"--x: gs://b/a needs gcsfs: pip .*\[gcs\]"):
        paths.to_path("gs://b/a", "--x")
    for address in ("gs:/bucket/a", "GS://bucket/a", "http://host/a", "file:///a"):
        with pytest.raises(UserError, match=f"--x: {address} is an address, but only gs://"):
            paths.to_path(address, "--x")


def test_only_errors_of_a_buckets_client_are_errors_of_a_bucket():
    def raised(error: Exception, module: str) -> Exception:
        """Returns the error after code of a module has raised it."""
        try:
            exec("raise error", {"__name__": module, "error": error})
        except Exception as caught:
            return caught
        raise AssertionError

    assert paths.is_bucket_error(raised(OSError("Forbidden: a"), "gcsfs.retry"))
    assert not paths.is_bucket_error(raised(OSError("image is cut off"), "PIL.ImageFile"))
    full = OSError(errno.ENOSPC, "No space left on device")
    assert not paths.is_bucket_error(raised(full, "gcsfs.core"))


def test_an_error_without_a_file_name_gets_one(tmp_path):
    path = tmp_path / "a.txt"
    match = r"No space left on device: '.*a\.txt'"
    with pytest.raises(OSError, match=match) as caught, files.naming(path):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.filename == str(path)


def test_an_error_with_a_file_name_keeps_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"other\.txt"), files.naming(tmp_path / "a.txt"):
        (tmp_path / "other.txt").read_bytes()

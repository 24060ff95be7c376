"""`pg_ground.reporting.files` writes a file in one step, and its errors name the file."""

import errno

import pytest

from pg_ground.reporting import files


def test_a_file_is_written_in_one_step_and_leaves_no_temporary_file(tmp_path):
    path = tmp_path / "deep" / "a.txt"
    for content in ("é", b"b"):
        files.write_atomically(path, content)
        assert path.read_bytes() == (content if isinstance(content, bytes) else content.encode())
    assert [file.name for file in path.parent.iterdir()] == ["a.txt"]


def test_an_error_without_a_file_name_gets_one(tmp_path):
    path = tmp_path / "a.txt"
    match = r"No space left on device: '.*a\.txt'"
    with pytest.raises(OSError, match=match) as caught, files.naming(path):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.filename == str(path)


def test_an_error_with_a_file_name_keeps_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"other\.txt"), files.naming(tmp_path / "a.txt"):
        (tmp_path / "other.txt").read_bytes()

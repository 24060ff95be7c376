"""The local copy of the small files of a run in a bucket. Here a folder stands for the bucket."""

from pathlib import Path

import pytest

from pg_ground.storage.local_copy import LocalCopy, open_copy


@pytest.fixture
def copy(tmp_path) -> LocalCopy:
    """A copy in the folder `here` of the run in the folder `bucket`."""
    write(tmp_path / "bucket" / "metrics.jsonl", "1\n")
    write(tmp_path / "bucket" / "samples" / "a.json", "a")
    write(tmp_path / "bucket" / "predictions.jsonl", "long")
    (tmp_path / "bucket" / "tb").mkdir()
    (tmp_path / "here").mkdir()
    copy = LocalCopy(tmp_path / "here", tmp_path / "bucket")
    copy.download(["metrics.jsonl", "wandb.json"], ["samples", "tb"])
    return copy


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def files(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): path.read_text()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_only_the_files_that_are_needed_are_downloaded(copy):
    assert files(copy.path) == {"metrics.jsonl": "1\n", "samples/a.json": "a"}


def test_new_and_changed_files_are_uploaded_and_deleted_pictures_are_deleted(copy, tmp_path):
    write(copy.path / "metrics.jsonl", "1\n2\n")
    write(copy.path / "tb" / "events", "e")
    write(copy.path / "wandb" / "log", "w")
    (copy.path / "samples" / "a.json").unlink()
    copy.upload(with_tensorboard=False)
    assert files(tmp_path / "bucket") == {"metrics.jsonl": "1\n2\n", "predictions.jsonl": "long"}
    copy.upload()
    assert files(tmp_path / "bucket")["tb/events"] == "e"


def test_a_file_that_somebody_deletes_here_stays_in_the_bucket(copy, tmp_path):
    (copy.path / "metrics.jsonl").unlink()
    copy.upload()
    assert "metrics.jsonl" in files(tmp_path / "bucket")


def test_a_failed_upload_is_said_and_tried_again(copy, tmp_path, monkeypatch, caplog):
    write(copy.path / "metrics.jsonl", "1\n2\n")
    with monkeypatch.context() as patched:
        patched.setattr("pg_ground.storage.local_copy.copy_file", fail)
        copy.upload_sometimes()
        assert "files were not uploaded: no connection" in caplog.text
        with pytest.raises(OSError, match="no connection"):
            copy.upload()
    copy.upload()
    assert files(tmp_path / "bucket")["metrics.jsonl"] == "1\n2\n"


def fail(*_: object) -> None:
    raise OSError("no connection")


def test_a_folder_of_this_machine_is_its_own_copy(tmp_path):
    with open_copy(tmp_path) as copy:
        assert copy.path == copy.folder == tmp_path
        copy.upload()

"""`pg_ground.reporting.provenance` records each machine of a run once, with its first step."""

import json
import re
import subprocess

from pg_ground.reporting import provenance


def read_machines(workdir):
    return json.loads((workdir / "hardware.json").read_text())


def test_a_machine_is_recorded_once_and_again_after_another_machine(tmp_path, monkeypatch):
    for host, resumed_step, machines in (
        ("a", None, [("a", 0)]),
        ("a", 40, [("a", 0)]),
        ("b", 40, [("a", 0), ("b", 40)]),
        ("a", 90, [("a", 0), ("b", 40), ("a", 90)]),
        # The run resumes from an earlier checkpoint. A machine that joined later is removed.
        ("c", 60, [("a", 0), ("b", 40), ("c", 60)]),
        ("b", None, [("b", 0)]),
    ):
        monkeypatch.setattr(provenance, "describe_machine", lambda host=host: {"host": host})
        provenance.record_machine(tmp_path, resumed_step)
        assert [(m["host"], m["from_step"]) for m in read_machines(tmp_path)] == machines


def test_a_machine_has_devices_host_versions_and_commit(tmp_path):
    provenance.record_machine(tmp_path, None)
    (machine,) = read_machines(tmp_path)
    assert machine["devices"] == "8 × cpu"
    assert machine["processes"] == 1
    assert machine.keys() == {
        "from_step",
        "devices",
        "processes",
        "host",
        "processor",
        "jax",
        "python",
        "commit",
    }


def test_the_commit_is_the_commit_of_the_package_and_not_of_a_folder_around_it(tmp_path):
    def git(*arguments):
        settings = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        subprocess.run(
            ["git", *settings, *arguments], cwd=tmp_path, check=True, capture_output=True
        )

    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").touch()
    assert provenance.commit(package) is None, "the package is in no repository"
    git("init", "-q")
    (tmp_path / "other.txt").touch()
    git("add", "other.txt")
    git("commit", "-qm", "other")
    assert provenance.commit(package) is None, "the repository has no file of the package"
    git("add", ".")
    git("commit", "-qm", "package")
    clean_commit = provenance.commit(package)
    assert clean_commit
    assert re.fullmatch(r"[0-9a-f]{12}", clean_commit)
    (package / "__init__.py").write_text("changed")
    assert provenance.commit(package) == f"{clean_commit}-dirty"

"""Laws of `pg_ground.reporting.provenance`: each machine of a run is noted once, with the step that it went on from."""

import json
import re
import subprocess

from pg_ground.reporting import provenance


def noted(workdir):
    return json.loads((workdir / "hardware.json").read_text())


def test_a_machine_is_noted_once_and_again_after_another(tmp_path, monkeypatch):
    for host, resumed, expected in (
        ("a", None, [("a", 0)]),
        ("a", 40, [("a", 0)]),
        ("b", 40, [("a", 0), ("b", 40)]),
        ("a", 90, [("a", 0), ("b", 40), ("a", 90)]),
        (
            "c",
            60,
            [("a", 0), ("b", 40), ("c", 60)],
        ),  # from an earlier checkpoint: what came after it has not been
        ("b", None, [("b", 0)]),
    ):
        monkeypatch.setattr(provenance, "describe", lambda host=host: {"host": host})
        provenance.note(tmp_path, resumed)
        assert [(one["host"], one["from_step"]) for one in noted(tmp_path)] == expected


def test_it_says_what_the_run_runs_on(tmp_path):
    provenance.note(tmp_path, None)
    (one,) = noted(tmp_path)
    assert one["devices"] == "8 × cpu" and one["processes"] == 1
    assert one.keys() == {
        "from_step",
        "devices",
        "processes",
        "host",
        "processor",
        "jax",
        "python",
        "commit",
    }


def test_commit_is_of_the_package_and_not_of_whose_files_it_lies_among(tmp_path):
    def git(*words):
        own = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", *own, *words], cwd=tmp_path, check=True, capture_output=True)

    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").touch()
    assert provenance.commit(package) is None, "no checkout"
    git("init", "-q")
    (tmp_path / "theirs.txt").touch()
    git("add", "theirs.txt")
    git("commit", "-qm", "theirs")
    assert provenance.commit(package) is None, "of other files"
    git("add", ".")
    git("commit", "-qm", "ours")
    clean = provenance.commit(package)
    assert clean and re.fullmatch(r"[0-9a-f]{12}", clean)
    (package / "__init__.py").write_text("changed")
    assert provenance.commit(package) == f"{clean}-dirty"

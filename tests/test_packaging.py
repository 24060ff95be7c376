"""The wheel and the sdist hold what a user needs. An installed wheel trains outside a checkout."""

import os
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
from commands import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))

SDIST_ONLY = ("tests/conftest.py", "docs/design.md", "benchmarks/quickstart.py", ".ci/run")
"""The sdist also has the tests, the documents and the benchmarks. The wheel has none of them."""

SDIST_TOO = ("LICENSE", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "configs/tiny.py")


def tracked_files() -> list[str]:
    """Returns the files of the repository, without build outputs."""
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("this is no git checkout")
    return [name for name in done.stdout.splitlines() if (ROOT / name).exists()]


def package_name(file: str) -> str:
    """Returns the package of a file in the wheel: `pg_ground.configs` for `configs/tiny.py`."""
    folder = str(Path(file).parent).replace("/", ".")
    return "pg_ground.configs" if folder == "configs" else folder


def wheel_files() -> set[str]:
    """Returns the paths that a wheel of this tree must hold."""
    package_data = [name for name in tracked_files() if name.startswith("pg_ground/")]
    recipes = [name for name in tracked_files() if name.startswith("configs/")]
    return {*package_data, *(f"pg_ground/{name}" for name in recipes)}


def test_the_list_of_packages_is_the_tree():
    listed = PROJECT["tool"]["setuptools"]["packages"]
    modules = [name for name in tracked_files() if name.endswith(".py")]
    packages = {package_name(name) for name in modules if name.startswith(("pg_ground", "configs"))}
    assert listed == sorted(packages)
    for package in packages - {"pg_ground.configs"}:
        assert (ROOT / package.replace(".", "/") / "__init__.py").exists(), package


def test_the_license_is_named_and_included():
    assert PROJECT["project"]["license"] == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")


def test_the_console_script_exists():
    module, _, function = PROJECT["project"]["scripts"]["pg-ground"].partition(":")
    assert f"def {function}(" in (ROOT / f"{module.replace('.', '/')}.py").read_text("utf-8")


@pytest.fixture(scope="module")
def archives(tmp_path_factory) -> tuple[Path, Path]:
    """Returns the wheel, which is built from the sdist, and the sdist."""
    pytest.importorskip("build")
    out = tmp_path_factory.mktemp("archives")
    source = out / "source"
    for name in tracked_files():  # a copy: setuptools leaves folders beside the sources
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "build", "--outdir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return wheel, sdist


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_the_recipes(archives):
    names = zipfile.ZipFile(archives[0]).namelist()
    assert {name for name in names if ".dist-info/" not in name} == wheel_files()
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


@pytest.mark.slow
def test_the_sdist_holds_the_repository(archives):
    with tarfile.open(archives[1]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert names >= {*SDIST_ONLY, *SDIST_TOO, "pg_ground/py.typed", "pg_ground/assets/tiny.model"}
    assert not [name for name in names if "__pycache__" in name]


@pytest.mark.slow
def test_an_installed_wheel_trains_outside_the_checkout(archives, tmp_path):
    """The environment is empty before, and everything comes from the wheel's requirements."""
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    pip = [str(python), "-m", "pip", "install", "-q"]
    installed = subprocess.run([*pip, str(archives[0])], capture_output=True, text=True)
    assert installed.returncode == 0, installed.stdout + installed.stderr

    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "XLA_FLAGS")}
    environment["JAX_PLATFORMS"] = "cpu"

    def run(*command: str) -> str:
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    script = str(python.with_name("pg-ground"))
    run(script, "train", "--config=configs/tiny.py", "--workdir=run")
    assert (tmp_path / "run" / "report.html").stat().st_size > 1000
    source = "from pg_ground.configs import algorithms; print(algorithms.__file__)"
    assert str(tmp_path / "venv") in run(str(python), "-c", source)

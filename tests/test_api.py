"""The public names of `pg_ground`: what they are, what their import costs, and what they accept."""

import dataclasses
import importlib
import inspect
import logging
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import pytest
from commands import ROOT

import pg_ground
from configs import tiny
from pg_ground import api
from pg_ground.training import loop
from pg_ground.types import UserError

COMMANDS_WITH_A_FUNCTION = ("train", "evaluate", "predict")


def run_python(source: str) -> str:
    """Returns what a fresh interpreter prints."""
    done = subprocess.run(
        [sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return done.stdout


def test_importing_the_package_imports_no_jax():
    """A worker process for text rewards imports modules of the package and must stay small."""
    loaded = run_python("import sys, pg_ground; print(*sys.modules)").split()
    heavy = {"jax", "numpy", "flax", "ml_collections", "pg_ground.types"}
    assert not heavy & set(loaded)


@pytest.mark.parametrize("name", pg_ground.__all__)
def test_every_public_name_has_a_docstring(name):
    assert inspect.getdoc(getattr(pg_ground, name))
    assert name in dir(pg_ground) and f"    {name} " in pg_ground.__doc__


def test_the_reference_has_every_public_name_and_no_name_that_does_not_exist():
    names = re.findall(r"^::: (\S+)$", (ROOT / "docs" / "api.md").read_text("utf-8"), re.M)
    objects = []
    for name in names:
        module, _, attribute = name.rpartition(".")
        objects.append(getattr(importlib.import_module(module), attribute))
    assert all(getattr(pg_ground, name) in objects for name in pg_ground.__all__)


def test_dir_is_the_api():
    assert dir(pg_ground) == sorted([*pg_ground.__all__, "__doc__", "__version__"])
    assert re.fullmatch(r"\d+\.\d+\.\d+", pg_ground.__version__)


@pytest.mark.parametrize("name", [name for name in pg_ground.__all__ if name != "Config"])
def test_every_public_function_is_annotated(name):
    signature = inspect.signature(getattr(pg_ground, name))
    assert signature.return_annotation is not inspect.Signature.empty
    for parameter in signature.parameters.values():
        assert parameter.annotation is not inspect.Parameter.empty, parameter.name


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        _ = pg_ground.trian


@pytest.mark.slow
@pytest.mark.parametrize("first", ["function", "module"])
def test_a_command_module_does_not_hide_the_function_of_its_name(first):
    """In both orders of import, with every form of the import statement."""
    lines = ["import importlib, inspect"]
    for name in COMMANDS_WITH_A_FUNCTION:
        uses = {
            "function": [f"from pg_ground import {name}", f"assert inspect.isfunction({name})"],
            "module": [
                f"import pg_ground.{name}",
                f"from pg_ground.{name} import __name__ as imported",
                f"assert imported == 'pg_ground.{name}'",
            ],
        }
        second = "module" if first == "function" else "function"
        lines += [
            *uses[first],
            *uses[second],
            "import pg_ground",
            f"assert inspect.isfunction(pg_ground.{name}), pg_ground.{name}",
            f"module = importlib.import_module('pg_ground.{name}')",
            "assert inspect.ismodule(module) and module.__doc__",
            f"print('{name}')",
        ]
    assert run_python("\n".join(lines)).split() == list(COMMANDS_WITH_A_FUNCTION)


def test_other_submodules_are_attributes_as_usual():
    module = importlib.import_module("pg_ground.boxes")
    assert pg_ground.boxes is module


def test_a_recipe_and_a_config_are_accepted():
    config = api.parse(tiny.get_config())
    assert isinstance(config, pg_ground.Config) and api.parse(config) is config


def test_a_config_is_checked():
    recipe = tiny.get_config().unlock()
    recipe.grpo.group_size = 1
    with pytest.raises(UserError, match="group_size"):
        api.parse(recipe)


def test_evaluate_needs_a_run_or_a_checkpoint():
    with pytest.raises(UserError, match="workdir"):
        pg_ground.evaluate(tiny.get_config())


def test_train_shows_its_log_if_nothing_else_does(tmp_path, monkeypatch, capsys):
    """A script that has set up no logging still sees the progress."""

    def report(config: Any, workdir: Path, accept: Any) -> Path:
        logging.getLogger("pg_ground.training").info("step 1 of 2")
        return workdir / "report.html"

    monkeypatch.setattr(loop, "train", report)
    monkeypatch.setattr(logging.getLogger("pg_ground"), "propagate", False)  # pytest has a handler
    assert pg_ground.train(tiny.get_config(), tmp_path) == tmp_path / "report.html"
    assert "step 1 of 2" in capsys.readouterr().err


def test_devices_that_exist_are_used_if_jax_has_started(caplog):
    config = api.parse(tiny.get_config())
    devices = jax.devices()
    mesh = dataclasses.replace(config.mesh, cpu_devices=3)
    api.prepare_devices(dataclasses.replace(config, mesh=mesh))
    assert jax.devices() == devices
    assert "config.mesh.cpu_devices=3 has no effect" in caplog.text

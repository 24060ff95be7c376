"""`convert` writes no query scale and no soft-cap that nothing states."""

import dataclasses
import json
from dataclasses import replace
from pathlib import Path

import pytest
from commands import run_here
from conftest import PG1, PG2, random_params

from pg_ground import config
from pg_ground.checkpoints import export, weights
from pg_ground.checkpoints.model_sizes import is_published, model_from_shapes, parameter_shapes
from pg_ground.config import Config, Model, Sft, Source
from pg_ground.models import PaliGemma

SCALED = replace(PG2, text=replace(PG2.text, query_scale=0.25, attn_softcap=30.0))
"""A Gemma 2 whose queries are scaled by another number than head_dim**-0.5."""


@pytest.fixture(scope="module")
def npz(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("npz") / "a.npz"
    export.save(path, random_params(PaliGemma(SCALED)))
    return path


def scales_of(path: Path) -> tuple[float, float, float]:
    """Returns query scale, soft-cap of attention and final soft-cap that a checkpoint states."""
    text = weights.open_checkpoint(path, keep_final_softcap=True).model.config.text
    return text.attention_scale, text.attn_softcap, text.final_softcap


def write_sizes(folder: Path, kind: str, model: Model) -> Path:
    """Writes a configuration that states the scales of `model`."""
    if kind == "hub":
        export.save(folder / "hub", random_params(PaliGemma(model)), model)
        return folder / "hub" / "config.json"
    if kind == "orbax":
        export.save(folder / "b.orbax", random_params(PaliGemma(model)), model)
        return folder / "b.orbax"
    sources = {"a": Source(uri="synthetic:train", boxes="box")}
    settings = Config(model=model, stages=("sft",), sft=Sft(sources=sources))
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(settings)))
    return folder if kind == "folder of a run" else folder / "config.json"


@pytest.mark.parametrize("target", ["b", "b.orbax"])
def test_an_npz_of_unpublished_sizes_is_refused_without_its_scales(npz, tmp_path, target):
    finished = run_here("convert", str(npz), str(tmp_path / target))
    assert finished.returncode == 2 and finished.stderr.count("\n") == 1
    assert f"{npz}: no published Gemma 2 has these sizes" in finished.stderr
    assert "--sizes=CONFIG.json, or --query_scale=NUMBER" in finished.stderr
    assert not (tmp_path / target).exists()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--query_scale=.5",), (0.5, 50.0, 0.0)),
        (("--query_scale=0.25", "--attn_softcap=30"), (0.25, 30.0, 0.0)),
        (("--query_scale=0.25", "--attn_softcap=0", "--final_softcap=20"), (0.25, 0.0, 20.0)),
    ],
)
@pytest.mark.parametrize("target", ["b", "b.orbax"])
def test_flags_state_the_scales(npz, tmp_path, target, flags, expected):
    finished = run_here("convert", str(npz), str(tmp_path / target), *flags)
    assert finished.returncode == 0, finished.stderr
    assert scales_of(tmp_path / target) == expected
    says = "attention is soft-capped at 50, as in every published Gemma 2" in finished.stderr
    assert says == (len(flags) == 1)


def test_the_config_of_transformers_has_the_scale(npz, tmp_path):
    finished = run_here("convert", str(npz), str(tmp_path / "b"), "--query_scale=.5")
    assert finished.returncode == 0, finished.stderr
    settings = json.loads((tmp_path / "b" / "config.json").read_text())["text_config"]
    assert settings["query_pre_attn_scalar"] == 4


@pytest.mark.parametrize("kind", ["hub", "orbax", "run", "folder of a run"])
def test_a_configuration_states_the_scales(npz, tmp_path, kind):
    model = replace(SCALED, text=replace(SCALED.text, final_softcap=25.0))
    sizes = write_sizes(tmp_path, kind, model)
    finished = run_here("convert", str(npz), str(tmp_path / "c"), f"--sizes={sizes}")
    assert finished.returncode == 0, finished.stderr
    assert scales_of(tmp_path / "c") == (0.25, 30.0, 25.0)
    flags = (f"--sizes={sizes}", "--attn_softcap=7")
    assert run_here("convert", str(npz), str(tmp_path / "d"), *flags).returncode == 0
    assert scales_of(tmp_path / "d") == (0.25, 7.0, 25.0)


@pytest.mark.parametrize("kind", ["hub", "orbax", "run"])
@pytest.mark.parametrize(
    "other",
    [
        replace(SCALED, text=replace(SCALED.text, num_kv_heads=1)),
        replace(SCALED, text=replace(SCALED.text, width=32)),
        PG1,
    ],
    ids=["heads", "width", "gemma1"],
)
def test_a_configuration_of_other_sizes_is_refused(npz, tmp_path, kind, other):
    sizes = write_sizes(tmp_path, kind, other)
    finished = run_here("convert", str(npz), str(tmp_path / "c"), f"--sizes={sizes}")
    assert finished.returncode == 2, finished.stderr
    assert "does not fit" in finished.stderr
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (("--query_scale=0",), "--query_scale=0: it must be above 0"),
        (("--query_scale=-1",), "--query_scale=-1: it must be above 0"),
        (("--query_scale=1", "--attn_softcap=-5"), "--attn_softcap=-5: it must be above 0"),
        (("--query_scale=high",), "query_scale"),
        (("--sizes=nowhere.json",), "--sizes=nowhere.json: No such file"),
    ],
)
def test_values_that_are_impossible_are_refused(npz, tmp_path, flags, text):
    finished = run_here("convert", str(npz), str(tmp_path / "b"), *flags)
    assert finished.returncode == 2 and finished.stderr.count("\n") == 1
    assert text in finished.stderr


def test_flags_are_refused_where_the_scales_are_stated_or_not_stored(npz, tmp_path):
    export.save(tmp_path / "hub", random_params(PaliGemma(SCALED)), SCALED)
    finished = run_here("convert", str(tmp_path / "hub"), str(tmp_path / "a"), "--query_scale=.5")
    assert finished.returncode == 2 and "states its query scale" in finished.stderr
    finished = run_here("convert", str(npz), str(tmp_path / "a.npz"), "--query_scale=.5")
    assert finished.returncode == 2 and "an .npz does not store a query scale" in finished.stderr
    finished = run_here("convert", str(npz), str(tmp_path / "a.npz"))
    assert finished.returncode == 0, finished.stderr


def test_a_gemma1_has_one_scale_which_is_logged(tmp_path):
    export.save(tmp_path / "a.npz", random_params(PaliGemma(PG1)))
    finished = run_here("convert", str(tmp_path / "a.npz"), str(tmp_path / "b"))
    assert finished.returncode == 0, finished.stderr
    assert "queries are scaled by 0.3536, as in every Gemma 1" in finished.stderr
    assert scales_of(tmp_path / "b") == pytest.approx((8**-0.5, 0.0, 0.0))


def test_loading_an_npz_of_unpublished_sizes_logs_the_guess(npz, caplog):
    text = weights.load(npz)[0].config.text
    assert (text.attention_scale, text.attn_softcap) == pytest.approx((8**-0.5, 50.0))
    assert "queries are scaled by 0.3536 and attention is soft-capped at 50" in caplog.text
    caplog.clear()
    assert weights.load(npz, SCALED)[0].config.text.attention_scale == 0.25
    assert not caplog.text


@pytest.mark.parametrize("name", list(config.DECODERS))
def test_published_sizes_have_their_scales_with_any_vocabulary(name):
    model = config.variant(name)
    assert is_published(model)
    larger = replace(model, text=replace(model.text, vocab_size=257_216))
    assert model_from_shapes(parameter_shapes(larger), name) == larger
    assert not is_published(replace(model, text=replace(model.text, depth=3)))

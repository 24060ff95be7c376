"""`convert` writes a README.md that the Hub reads, without paths of this machine."""

import dataclasses
import io
import json
import re
import shutil
from contextlib import chdir, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import run_here
from conftest import PG1, random_params
from huggingface_hub import ModelCard
from huggingface_hub.repocard import metadata_load
from PIL import Image

from pg_ground import config
from pg_ground.assets import make_tokenizer
from pg_ground.checkpoints import export, manager
from pg_ground.checkpoints.run_directory import COMMIT_FILE
from pg_ground.models import PaliGemma
from pg_ground.reporting.model_card import model_card

SIZES = dataclasses.replace(PG1, text=dataclasses.replace(PG1.text, vocab_size=2048))

SOURCES = {
    "photos": config.Source(uri="jsonl:/home/me/secret/train.jsonl?a=1", boxes="box"),
    "rows": config.Source(uri="hf:jxu124/refcoco@train?token=abc", boxes="bbox"),
    "several": config.Source(uri="hf:org/a,org/b@train[:10%]+val?offline=1", boxes="bbox"),
    "scenes": config.Source(uri="synthetic:train?side=48", boxes="box"),
    "mine": config.Source(uri="hf:/home/me/rows@train", points="point", target="points"),
    "text": config.Source(uri="tfds:ref_coco/refcoco_unc?data_dir=/home/me/tfds", boxes="box",
                          prompt="/home/me/prompt.jinja"),
}  # fmt: skip


def write_run(workdir: Path, **changes) -> None:
    """Writes a finished run of six steps: weights, metrics, an evaluation and a machine."""
    settings = config.Config(
        model=SIZES,
        stages=("sft",),
        init=changes.pop("init", "google/paligemma2-3b-pt-448@main"),
        sft=config.Sft(sources=SOURCES, steps=6),
        **changes,
    )
    for step in (3, 6):
        folder = workdir / "checkpoints" / str(step)
        folder.mkdir(parents=True)
        manager.save_tree(folder / "params", random_params(PaliGemma(SIZES)))
        (folder / COMMIT_FILE).touch()
    (workdir / "config.json").write_text(json.dumps(dataclasses.asdict(settings)))
    lines = [{"step": step, "stage": "sft", "eval/val/acc50": step / 10} for step in (0, 3, 6)]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    evaluation = {"eval/val/acc50": 0.625, "eval/val/miou": 0.5, "run": {"params": "/home/me/run"}}
    (workdir / "eval.json").write_text(json.dumps(evaluation))
    machine = {"from_step": 0, "jax": "0.10.0", "python": "3.11.4", "devices": "8 × TPU v5e",
               "host": "secret-host", "commit": "abc123"}  # fmt: skip
    (workdir / "hardware.json").write_text(json.dumps([machine]))


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("card") / "run"
    workdir.mkdir()
    write_run(workdir)
    return workdir


@pytest.fixture(scope="module")
def exported(run_folder) -> Path:
    finished = run_here("convert", str(run_folder), str(run_folder.parent / "my-model"))
    assert finished.returncode == 0, finished.stderr
    return run_folder.parent / "my-model"


def test_the_hub_reads_the_metadata_of_an_exported_run(exported):
    card = ModelCard.load(exported / "README.md")
    data: Any = card.data  # has the fields of the README
    assert (data.license, data.library_name) == ("gemma", "transformers")
    assert data.pipeline_tag == "image-text-to-text"
    assert data.base_model == "google/paligemma2-3b-pt-448"
    assert data.datasets == ["jxu124/refcoco", "org/a", "org/b"]
    results = {result.metric_type: result.metric_value for result in data.eval_results}
    assert results == {"acc50": 0.625, "miou": 0.5}
    assert data.model_name == "my-model"
    assert (metadata_load(exported / "README.md") or {})["tags"][0] == "paligemma"


def test_a_card_says_what_is_known_and_nothing_private(exported, run_folder):
    card = (exported / "README.md").read_text()
    for text in (
        "**sft**, 6 steps",
        "step 6 of 6",
        "| val | acc50 | 0.625 |",
        "| val/acc50 | 0.000 | 0.600 |",
        "**sft/photos**: jsonl files, prompt `detect {phrase}`, answers of boxes",
        "**sft/rows**: hf:jxu124/refcoco@train",
        "**sft/several**: hf:org/a,org/b@train[:10%]+val",
        "**sft/scenes**: synthetic:train",
        "**sft/mine**: hf files",
        "**sft/text**: tfds:ref_coco/refcoco_unc, prompt `prompt.jinja`",
        "21 × 21 pixels",
        "jax 0.10.0, python 3.11.4 on 8 × TPU v5e",
        "commit abc123",
        "https://ai.google.dev/gemma/terms",
    ):
        assert text in card, text
    for text in ("/home", "secret", "token=", str(run_folder.parent), str(Path.home()), "?"):
        assert text not in card.split("## Use")[0], text


def test_an_older_checkpoint_has_no_metrics_of_another_step(run_folder):
    card = model_card(run_folder / "checkpoints" / "3", name="old")
    assert "0.625" not in card and "| val/acc50 | 0.000 | 0.300 |" in card
    data: Any = ModelCard(card).data
    assert data.eval_results is None


def test_a_checkpoint_without_a_run_has_a_card_of_what_is_known(tmp_path):
    export.save(tmp_path / "a.npz", random_params(PaliGemma(SIZES)))
    tokenizer = Path(make_tokenizer.__file__).with_name("tiny.model")
    finished = run_here("convert", "a.npz", "out", f"--tokenizer={tokenizer}", cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    data: Any = ModelCard.load(tmp_path / "out" / "README.md").data
    assert data.license == "gemma" and data.base_model is None and data.eval_results is None
    card = (tmp_path / "out" / "README.md").read_text()
    assert "# out\n" in card and "is not known" in card and str(tmp_path) not in card
    assert "## Training" not in card


def test_a_name_on_the_hub_is_the_base_and_a_path_is_not(tmp_path):
    export.save(tmp_path / "a.npz", random_params(PaliGemma(SIZES)))
    path = tmp_path / "a.npz"
    assert "base_model: google/x" in model_card(path, origin="google/x@main")
    for origin in (str(path), "runs/a.npz", "../x", "/data/x", "gs://bucket/x", "kaggle:a/b/c/d"):
        assert "base_model" not in model_card(path, origin=origin), origin
    (tmp_path / "google" / "x").mkdir(parents=True)
    with chdir(tmp_path):
        assert "base_model" not in model_card(path, origin="google/x")


def test_an_npz_has_no_card(tmp_path, run_folder):
    finished = run_here("convert", str(run_folder), str(tmp_path / "a.npz"))
    assert finished.returncode == 0 and [path.name for path in tmp_path.iterdir()] == ["a.npz"]


def snippets(card: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", card.read_text(), re.DOTALL)


def test_the_snippet_of_the_answer_format_prints_a_box(exported):
    printed = io.StringIO()
    with redirect_stdout(printed):
        exec(snippets(exported / "README.md")[1], {})
    name, box = printed.getvalue().split(" ", 1)
    expected = [200 * 640, 100 * 480, 800 * 640, 500 * 480]
    assert name == "cat"
    np.testing.assert_allclose(json.loads(box), np.array(expected) / 1023)


@pytest.mark.slow
@pytest.mark.needs("torch", "transformers")
@pytest.mark.filterwarnings("ignore")  # torch and transformers have warnings of their own
def test_the_snippet_of_a_card_runs_in_the_folder(exported, tmp_path):
    shutil.copytree(exported, tmp_path / "copy")
    Image.fromarray(np.full((40, 30, 3), 90, np.uint8)).save(tmp_path / "copy" / "photo.jpg")
    printed = io.StringIO()
    with chdir(tmp_path / "copy"), redirect_stdout(printed):
        exec(snippets(tmp_path / "copy" / "README.md")[0], {})
    assert printed.getvalue().strip()

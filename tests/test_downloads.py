"""Checkpoints on a Hub: a server on loopback answers as the Hugging Face Hub does."""

import base64
import dataclasses
import json
import os
import subprocess
import sys
import threading
import types
from collections.abc import Iterator
from contextlib import chdir
from dataclasses import replace
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import yaml
from commands import ROOT, run_here
from conftest import PG1, random_params
from PIL import Image

from pg_ground import config
from pg_ground.assets import make_tokenizer
from pg_ground.checkpoints import export
from pg_ground.checkpoints.conversion import convert
from pg_ground.checkpoints.run_directory import COMMIT_FILE
from pg_ground.models import PaliGemma
from pg_ground.reporting.model_card import model_card
from pg_ground.storage.downloads import checkpoint_path
from pg_ground.types import UserError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SIZES = replace(PG1, text=replace(PG1.text, vocab_size=2048))
"""As many tokens as the package's tokenizer has."""
TOKENIZER = Path(make_tokenizer.__file__).with_name("tiny.model")


class Hub(BaseHTTPRequestHandler):
    """The parts of the Hub's interface that a download uses. `files` are those of org/tiny."""

    files: dict[str, bytes] = {}  # noqa: RUF012

    def log_message(self, *_: object) -> None:
        pass

    pushed: list[dict] = []  # noqa: RUF012
    """The parts of the newest commit, and the request that made the repository."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Authorization") != "Bearer secret":
            self.send(401, b'{"error": "Invalid username or password."}', {})
        elif self.path == "/api/repos/create":
            self.pushed.append(json.loads(body))
            url = f"http://{self.headers['Host']}/org/new"
            self.send(200, json.dumps({"url": url, "name": "org/new"}).encode(), {})
        elif "/preupload/" in self.path:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            self.send(200, json.dumps({"files": files}).encode(), {})
        elif "/commit/" in self.path:
            self.pushed += [json.loads(line) for line in body.splitlines()]
            url = f"http://{self.headers['Host']}/org/new/commit/{COMMIT}"
            reply = {"success": True, "commitOid": COMMIT, "commitUrl": url}
            self.send(200, json.dumps(reply).encode(), {})
        else:  # /api/validate-yaml
            self.send(200, b'{"errors": [], "warnings": []}', {})

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if "/org/new" in path and self.headers.get("Authorization") != "Bearer secret":
            self.send(401, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif path == "/api/models/org/new":
            info = {"id": "org/new", "modelId": "org/new", "sha": COMMIT, "siblings": []}
            self.send(200, json.dumps(info).encode(), {"Content-Type": "application/json"})
        elif "/org/gated" in path:
            self.send(403, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access denied"})
        elif not path.startswith(("/api/models/org/tiny", "/org/tiny/")):
            self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif "/nowhere" in path:
            self.send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        elif "/tree/" in path:
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": sha256(data).hexdigest()}
                for name, data in self.files.items()
            ]
            self.send(200, json.dumps(tree).encode(), {"Content-Type": "application/json"})
        elif path.startswith("/api/"):
            siblings = [{"rfilename": name} for name in self.files]
            info = {"id": "org/tiny", "modelId": "org/tiny", "sha": COMMIT, "siblings": siblings}
            self.send(200, json.dumps(info).encode(), {"Content-Type": "application/json"})
        else:
            data = self.files[path.rpartition("/")[2]]
            headers = {"ETag": f'"{sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT}
            self.send(200, data, headers)

    def send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


RECIPE = """
from configs import tiny
from pg_ground import config

def get_config():
    c = tiny.get_config().unlock()
    c.stages = ("sft",)
    c.model = config.section(config.parse_model(MODEL, "model"))
    c.sft.update(steps=1, batch_size=8)
    c.sft.optimizer.update(lr=0.0, warmup_steps=0, schedule="constant")
    return c
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Iterator[dict[str, str]]:
    """The environment of a process for which a server on loopback is the Hub."""
    folder = tmp_path_factory.mktemp("hub")
    export.save(folder / "a.npz", random_params(PaliGemma(SIZES)))
    convert(folder / "a.npz", folder / "hf", "", str(TOKENIZER))
    Hub.files = {path.name: path.read_bytes() for path in (folder / "hf").iterdir()}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    yield {**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(folder / "cache"), "NO_PROXY": "*"}
    server.shutdown()
    server.server_close()


def run(hub: dict[str, str], *arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pg_ground", *arguments]
    environment = {**hub, **changes}
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
def test_a_checkpoint_of_the_hub_predicts_trains_and_converts(hub, tmp_path):
    image = tmp_path / "a.png"
    Image.fromarray(np.full((30, 40, 3), 99, np.uint8)).save(image)
    predict = ("predict", f"--image={image}", "--prompt=detect cat", "--max_new_tokens=4")
    first = run(hub, *predict, "--params=org/tiny")
    assert first.returncode == 0, first.stderr
    offline = run(hub, *predict, "--params=org/tiny@main", HF_HUB_OFFLINE="1")
    assert (offline.returncode, offline.stdout) == (0, first.stdout), offline.stderr

    converted = run(hub, "convert", "org/tiny", str(tmp_path / "b.npz"))
    assert converted.returncode == 0, converted.stderr
    local = run(hub, *predict, f"--params={tmp_path / 'b.npz'}")
    assert local.stdout == first.stdout, local.stderr

    recipe = tmp_path / "recipe.py"
    recipe.write_text(RECIPE.replace("MODEL", repr(dataclasses.asdict(SIZES))))
    train = ("train", f"--config={recipe}", f"--workdir={tmp_path / 'run'}")
    absent = run(hub, *train, "--config.init=org/absent")
    assert absent.returncode == 2
    message = "config.init=org/absent: no such file or folder, and the Hub has no model"
    assert message in absent.stderr.splitlines()[-1]
    tokenizer = "--config.data.tokenizer=org/tiny"
    trained = run(hub, *train, "--config.init=org/tiny", tokenizer)
    assert trained.returncode == 0, trained.stderr
    again = run(hub, *predict, f"--params={tmp_path / 'run'}")
    assert again.stdout == first.stdout, again.stderr  # a learning rate of 0


@pytest.mark.slow
def test_an_exported_run_is_pushed_with_a_model_card(hub, tiny_run, tmp_path):
    push = ("convert", str(tiny_run), str(tmp_path / "new"), "--push=org/new")
    refused = run(hub, *push, HF_TOKEN="wrong")
    assert refused.returncode == 2
    line = refused.stderr.splitlines()[-1]
    assert line.startswith("error: --push=org/new: the Hub refuses") and "hf auth login" in line
    assert not (tmp_path / "new").exists()

    Hub.pushed.clear()
    pushed = run(hub, *push, HF_TOKEN="secret")
    assert pushed.returncode == 0, pushed.stderr
    assert pushed.stdout.splitlines()[-1] == f"{hub['HF_ENDPOINT']}/org/new"
    assert Hub.pushed[0]["visibility"] == "private"
    files = {
        part["value"]["path"]: base64.b64decode(part["value"]["content"])
        for part in Hub.pushed
        if part.get("key") == "file"
    }
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "new").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.model", "README.md"} <= files.keys()
    card = files["README.md"].decode()
    metadata = yaml.safe_load(card.split("---\n")[1])
    assert (metadata["license"], metadata["library_name"]) == ("gemma", "transformers")
    assert "**grpo**, 6 steps" in card and "gaussian_point × 1.0, iou × 1.0" in card
    assert "step 12 of 12" in card and "| boxes/acc50 | 0.000 | 0.000 |" in card
    assert "**grpo/boxes**: synthetic:train, prompt" in card
    assert str(tiny_run) not in card and "synthetic:train?" not in card


def test_the_card_has_the_metrics_of_the_exported_step_and_no_paths(tmp_path):
    settings = config.Config(
        stages=("grpo",),
        init="runs/base",
        grpo=config.Grpo(
            steps=9, algorithm="/home/me/alg.py:mine", text_rewards={"/home/me/mine.py:f": 1.0}
        ),
    )
    run_folder = tmp_path / "run"
    for step in (4, 9):
        folder = run_folder / "checkpoints" / str(step)
        (folder / "params").mkdir(parents=True)
        (folder / COMMIT_FILE).touch()
    (run_folder / "config.json").write_text(json.dumps(dataclasses.asdict(settings)))
    lines = [{"step": step, "stage": "grpo", "eval/a/acc50": step / 10} for step in (0, 4, 9)]
    (run_folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    card = model_card(run_folder / "checkpoints" / "4", "org/new")
    assert "| metric | before training | step 4 |" in card and "| a/acc50 | 0.000 | 0.400 |" in card
    assert "step 4 of 9" in card and "`alg.py:mine`" in card and "mine.py:f × 1.0" in card
    assert "/home" not in card and "runs/base" in card  # runs/base is no local folder here
    (tmp_path / "runs" / "base").mkdir(parents=True)
    with chdir(tmp_path):
        assert "runs/base" not in model_card(run_folder / "checkpoints" / "4", "org/new")


def test_only_a_local_hugging_face_directory_can_be_pushed(tmp_path):
    for target, message in [("a.npz", "uploads a Hugging Face directory"), ("a", "ORG/NAME")]:
        repo = "org/a" if target == "a.npz" else "a"
        finished = run_here("convert", "src", str(tmp_path / target), f"--push={repo}")
        assert finished.returncode == 2 and message in finished.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("org/gated", "accept its terms at https://huggingface.co/org/gated, and log in"),
        ("org/absent", "the Hub has no model 'org/absent', or it is private"),
        ("org/tiny@nowhere", "org/tiny has no revision 'nowhere'"),
    ],
)
def test_a_checkpoint_that_the_hub_does_not_give_is_one_line(hub, name, message):
    finished = run(hub, "predict", f"--params={name}", "--image=README.md", "--prompt=x")
    assert finished.returncode == 2
    line = f"error: --params={name}: no such file or folder, and {message}"
    assert finished.stderr.splitlines()[-1].startswith(line), finished.stderr


@pytest.mark.slow
def test_a_checkpoint_outside_the_cache_is_one_line_without_network(hub, tmp_path):
    finished = run(
        hub, "predict", "--params=org/tiny", "--image=README.md", "--prompt=x",
        HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path),
    )  # fmt: skip
    assert finished.returncode == 2
    assert "org/tiny at main is not in the cache" in finished.stderr


def test_a_local_path_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "tiny").mkdir(parents=True)
    assert checkpoint_path("org/tiny", "--params") == Path("org/tiny")
    assert checkpoint_path("org/absent.npz", "--params") == Path("org/absent.npz")
    assert checkpoint_path("a/b/c", "--params") == Path("a/b/c")
    with pytest.raises(UserError, match="--params: ftp://host/a is an address"):
        checkpoint_path("ftp://host/a", "--params")
    with pytest.raises(UserError, match="a model of Kaggle is written as kaggle:google/"):
        checkpoint_path("kaggle:google/paligemma", "--params")


class Kaggle(types.ModuleType):
    """Stands for kagglehub: it needs an account and the network."""

    def __init__(self, folder: Path):
        super().__init__("kagglehub")
        self.folder = folder
        self.asked: list[str] = []

    def model_download(self, handle: str) -> str:
        self.asked.append(handle)
        if "absent" in handle:
            raise RuntimeError("403 Client Error.\n\nYou don't have permission")
        return str(self.folder)


def test_a_model_of_kaggle_is_its_npz(tmp_path, monkeypatch):
    kaggle = Kaggle(tmp_path)
    monkeypatch.setitem(sys.modules, "kagglehub", kaggle)
    assert checkpoint_path("kaggle:google/paligemma/jax/a", "--params") == tmp_path
    export.save(tmp_path / "a.npz", {"a": np.zeros(2, np.float32)})
    path = checkpoint_path("kaggle:google/paligemma/jax/a/2", "config.init")
    assert path == tmp_path / "a.npz"
    assert kaggle.asked == ["google/paligemma/jax/a", "google/paligemma/jax/a/2"]
    with pytest.raises(UserError, match="Kaggle does not give it .403 Client Error. You don't"):
        checkpoint_path("kaggle:google/paligemma/jax/absent", "config.init")
    monkeypatch.setitem(sys.modules, "kagglehub", None)
    with pytest.raises(UserError, match="config.init=kaggle:.* pip install kagglehub"):
        checkpoint_path("kaggle:google/paligemma/jax/a", "config.init")

"""Runs whose files lie in a bucket: a server on loopback answers as Google Cloud Storage does.

The same laws hold on a file system that renames no folders, as a mounted bucket.
"""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import fake_bucket
import numpy as np
import pytest
from commands import ROOT, assert_same_run
from conftest import random_params
from fake_bucket import Storage
from PIL import Image

from configs import tiny
from pg_ground import config
from pg_ground.checkpoints import export
from pg_ground.models import PaliGemma
from pg_ground.reporting import timeline
from pg_ground.tokenizer import load as load_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.needs("gcsfs")]

RECIPE = """
import os
from configs import tiny
from pg_ground import config
from pg_ground.config import Source

def get_config():
    c = tiny.get_config().unlock()
    data = os.environ["DATA"]
    c.init = f"{data}/weights.npz"
    c.data.tokenizer = f"{data}/tiny.model"
    scenes = config.section(Source(uri=f"jsonl:{data}/scenes.jsonl", image="image", boxes="box"))
    for part in (c.sft, c.grpo, c.eval):
        part.sources = {"scenes": scenes}
    c.grpo.rewards = {"iou": 1.0, "format": 0.2}
    c.checkpoint.best = "eval/scenes/acc50"
    c.checkpoint.keep = 9
    return c
"""
KILL_AT = "checkpoints/6/commit_success.txt"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A local folder with drawn images, their boxes, weights, a tokenizer and the recipe."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    lines = []
    for number in range(12):
        pixels = rng.integers(0, 255, (30, 40, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        box = [2 + number, 3, 20 + number, 25]
        lines.append(json.dumps({"image": f"{number}.png", "phrase": "red circle", "box": box}))
    lines.append(json.dumps({"image": "absent.png", "phrase": "red circle", "box": [0, 0, 9, 9]}))
    (folder / "scenes.jsonl").write_text("\n".join(lines))
    model = PaliGemma(config.parse(tiny.get_config()).model)
    export.save(folder / "weights.npz", random_params(model))
    (folder / "tiny.model").write_bytes(load_tokenizer().pieces.serialized_model_proto())
    (folder / "recipe.py").write_text(RECIPE)
    return folder


@pytest.fixture(scope="module")
def storage(data) -> Iterator[Storage]:
    """A bucket with the files of `data`."""
    with fake_bucket.serve() as server:
        for path in data.iterdir():
            server.put(f"data/{path.name}", path.read_bytes())
        yield server


@pytest.fixture(scope="module")
def bucket_run(storage, environment, data, tmp_path_factory) -> Path:
    """An empty folder, in which every command runs. gs://bucket/run has a run that was killed
    and resumed.
    """
    cwd = tmp_path_factory.mktemp("cwd")
    variables = environment | storage.environment | {"DATA": "gs://bucket/data"}
    train = ["train", f"--config={data}/recipe.py", "--workdir=gs://bucket/run"]
    kill_when(lambda: bool(storage.names(f"run/{KILL_AT}")), variables, train, cwd)
    resumed = run(variables, train, cwd)
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stdout.splitlines()[-1] == "gs://bucket/run/report.html"
    return cwd


@pytest.fixture(scope="module")
def local_run(environment, data, tmp_path_factory) -> Path:
    """The run on local files, without a kill."""
    folder = tmp_path_factory.mktemp("local")
    train = ["train", f"--config={data}/recipe.py", f"--workdir={folder}/run"]
    finished = run(environment | {"DATA": str(data)}, train, folder)
    assert finished.returncode == 0, finished.stderr
    said = (
        r"warning: 3 records cannot be used \(3 missing_image\); first eval/scenes 12: there is no"
    )
    assert len(re.findall(said, finished.stderr)) == 1, finished.stderr
    assert f"all are in {folder}/run/bad_records.jsonl" in finished.stderr
    return folder / "run"


def run(
    environment: dict[str, str], arguments: list[str], cwd: Path
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pg_ground", *arguments]
    completed = subprocess.run(
        command,
        env={"PYTHONPATH": str(ROOT)} | environment,
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Traceback" not in completed.stderr, completed.stderr
    return completed


def kill_when(
    condition: Callable[[], bool], environment: dict[str, str], arguments: list[str], cwd: Path
) -> None:
    """Starts a command, and kills it as soon as `condition()` is True."""
    command = [sys.executable, "-m", "pg_ground", *arguments]
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        command, env={"PYTHONPATH": str(ROOT)} | environment, cwd=cwd, stdout=pipe, stderr=pipe
    )
    while process.poll() is None and not condition():
        time.sleep(0.005)
    was_running = process.poll() is None
    process.kill()
    _, stderr = process.communicate()
    assert was_running, f"the run ended before the kill: {stderr.decode()}"


def download(storage: Storage, prefix: str, folder: Path) -> Path:
    """Copies the objects below `prefix` to a local folder."""
    for name in storage.names(prefix + "/"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(storage.objects[name].data)
    return folder / prefix


def test_a_killed_run_in_a_bucket_resumes_bit_for_bit(storage, bucket_run, local_run, tmp_path):
    copy = download(storage, "run", tmp_path)
    assert_same_run(copy, local_run)
    small = {"config.json", "hardware.json", "metrics.jsonl", "timeline.jsonl", "report.html"}
    assert small <= {path.name for path in copy.iterdir()}
    killed, resumed = timeline.read_sessions(copy)
    assert (killed.end, resumed.is_finished) == (None, True), "the bucket has both starts"
    assert sorted(path.name for path in (copy / "samples").iterdir()) == sorted(
        path.name for path in (local_run / "samples").iterdir()
    )
    assert list((copy / "tb").iterdir()) and list((copy / "best").iterdir())
    assert not list(bucket_run.iterdir()), "a command wrote into the local folder"


def test_other_commands_read_and_write_the_bucket(
    storage, bucket_run, local_run, environment, data, tmp_path
):
    remote = environment | storage.environment | {"DATA": "gs://bucket/data"}
    local = environment | {"DATA": str(data)}
    image = "--image=gs://bucket/data/0.png"

    def last_line(variables: dict[str, str], *arguments: str) -> str:
        finished = run(variables, list(arguments), bucket_run)
        assert finished.returncode == 0, finished.stderr
        return finished.stdout.splitlines()[-1]

    evaluate = ("evaluate", f"--config={data}/recipe.py")
    assert last_line(remote, *evaluate, "--workdir=gs://bucket/run") == "gs://bucket/run/eval.json"
    last_line(local, *evaluate, f"--workdir={local_run}", f"--out={tmp_path}")
    rows = storage.objects["run/predictions.jsonl"].data
    assert rows == (tmp_path / "predictions.jsonl").read_bytes()
    last_line(remote, "evaluate", "--predictions=gs://bucket/run/predictions.jsonl")

    predict = ("predict", image, "--prompt=detect red circle", "--max_new_tokens=8")
    answer = last_line(remote, *predict, "--params=gs://bucket/run", "--out=gs://bucket/out/a.png")
    assert answer == last_line(remote, *predict, f"--params={local_run}")
    assert storage.objects["out/a.png"].data.startswith(b"\x89PNG")
    for target in ("a.npz", "a.orbax", "a"):
        last_line(remote, "convert", "gs://bucket/run", f"gs://bucket/out/{target}")
        flags = [] if target == "a" else ["--tokenizer=gs://bucket/data/tiny.model"]
        params = f"--params=gs://bucket/out/{target}"
        assert answer == last_line(remote, *predict, params, *flags)
        again = run(remote, ["convert", "gs://bucket/run", f"gs://bucket/out/{target}"], tmp_path)
        assert again.returncode == 2 and "exists already" in again.stderr
    assert "report.html" in last_line(remote, "report", "gs://bucket/run")
    last_line(remote, "look", f"--config={data}/recipe.py", "--out=gs://bucket/out/look.html")
    assert b"red circle" in storage.objects["out/look.html"].data
    assert not list(bucket_run.iterdir()), "a command wrote into the local folder"


def test_a_file_that_changed_in_the_bucket_is_downloaded_again(
    storage, bucket_run, environment, tmp_path
):
    remote = environment | storage.environment
    remote["XDG_CACHE_HOME"] = str(tmp_path)
    assert run(remote, ["convert", "gs://bucket/run", "gs://bucket/hub"], tmp_path).returncode == 0
    first = run(remote, ["convert", "gs://bucket/hub", "gs://bucket/copy.npz"], tmp_path)
    assert first.returncode == 0, first.stderr
    text = storage.objects["hub/config.json"].data
    storage.put("hub/config.json", text.replace(b"{", b"[", 1))  # of the same size
    changed = run(remote, ["convert", "gs://bucket/hub", "gs://bucket/copy2.npz"], tmp_path)
    assert changed.returncode == 2
    assert "config.json" in changed.stderr.splitlines()[-1]

    storage.put("hub/config.json", text)
    del storage.objects["hub/model.safetensors"]
    gone = run(remote, ["convert", "gs://bucket/hub", "gs://bucket/copy3.npz"], tmp_path)
    assert gone.returncode == 2 and "has neither model.safetensors" in gone.stderr


def test_packed_files_are_written_to_the_bucket_and_read_from_it(
    storage, environment, data, tmp_path
):
    remote = environment | storage.environment | {"DATA": "gs://bucket/data"}
    (tmp_path / "pack.py").write_text(RECIPE.replace("(c.sft, c.grpo, c.eval)", "(c.sft,)"))
    one_source = '.unlock(); c.grpo.sources = {}; c.eval.sources = {}; c.stages = ("sft",)'
    recipe = (tmp_path / "pack.py").read_text().replace(".unlock()", one_source)
    (tmp_path / "pack.py").write_text(recipe.replace('c.checkpoint.best = "eval/scenes/acc50"', ""))
    flags = [f"--config={tmp_path}/pack.py", "--out=gs://bucket/packed", "--num_shards=2"]
    packed = run(remote, ["pack", *flags], tmp_path)
    assert packed.returncode == 0, packed.stderr
    done = json.loads(packed.stdout)["scenes"]
    assert done == {
        "uri": "arrayrecord:gs://bucket/packed/scenes@2.array_record",
        "records": 12,
        "missing_image": 1,
    }
    uri = f"--config.sft.sources.scenes.uri={done['uri']}"
    train = ["train", flags[0], "--workdir=gs://bucket/packed_run", uri, "--config.sft.steps=1"]
    finished = run(remote, train, tmp_path)
    assert finished.returncode == 0, finished.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["train", "--workdir=gs://absent/run"], "--workdir=gs://absent/run: a run cannot be"),
        (["train", "--workdir=gs://forbidden/run"], "--workdir=gs://forbidden/run: a run cannot"),
        (["evaluate", "--workdir=gs://forbidden/run"], "a bucket cannot be used: Forbidden"),
        (["look", "--out=gs://forbidden/a.html"], "gs://forbidden/a.html cannot be written"),
        (["look", "--out=gs://absent/a.html"], "gs://absent/a.html cannot be written"),
        (["evaluate", "--workdir=gs://absent/run"], "gs://absent/run"),
        (["evaluate", "--workdir=gs://bucket/absent"], "gs://bucket/absent"),
        (["evaluate", "--params=gs://bucket/absent.npz"], "gs://bucket/absent.npz: no such file"),
        (["train", "--workdir=w", "--config.init=gs://bucket/a.npz"], "gs://bucket/a.npz"),
        (["train", "--workdir=w", "--config.data.tokenizer=gs://bucket/no"], "gs://bucket/no"),
    ],
)
def test_what_is_not_in_the_bucket_is_one_line(storage, environment, tmp_path, flags, message):
    arguments = [flags[0], f"--config={ROOT}/configs/tiny.py", *flags[1:]]
    finished = run(environment | storage.environment, arguments, tmp_path)
    assert finished.returncode == 2, finished.stderr
    last = finished.stderr.splitlines()[-1]
    assert last.startswith("error: ") and message in last
    assert "Traceback" not in finished.stderr
    assert not list(tmp_path.rglob("gs:*"))


def test_a_checkpoint_that_was_begun_in_the_bucket_does_not_count(
    storage, bucket_run, environment, local_run, data, tmp_path
):
    """The run is killed while it writes the checkpoint of step 10."""
    for name in storage.names("run/"):
        if not name.startswith(("run/checkpoints/12", "run/checkpoints/10/commit")):
            storage.objects[name.replace("run/", "begun/", 1)] = storage.objects[name]
    begun = "begun/checkpoints/10"
    assert storage.names(begun)
    metadata = json.loads(storage.objects[f"{begun}/_CHECKPOINT_METADATA"].data)
    metadata["commit_timestamp_nsecs"] = None
    storage.put(f"{begun}/_CHECKPOINT_METADATA", json.dumps(metadata).encode())
    for name in storage.names("run/checkpoints/6/"):
        storage.objects[name.replace("run/", "begun/", 1)] = storage.objects[name]
    remote = environment | storage.environment | {"DATA": "gs://bucket/data"}
    train = ["train", f"--config={data}/recipe.py", "--workdir=gs://bucket/begun"]
    resumed = run(remote, train, tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert_same_run(download(storage, "begun", tmp_path), local_run)


def test_a_damaged_checkpoint_in_the_bucket_is_written_again(
    storage, bucket_run, environment, local_run, data, tmp_path
):
    for name in storage.names("run/"):
        storage.objects[name.replace("run/", "damaged/", 1)] = storage.objects[name]
    steps = {int(name.split("/")[2]) for name in storage.names("damaged/checkpoints/")}
    newest = f"damaged/checkpoints/{max(steps)}"
    for name in storage.names(f"{newest}/rest/"):
        if "/d/" in name:
            storage.put(name, storage.objects[name].data[:10])
    remote = environment | storage.environment | {"DATA": "gs://bucket/data"}
    train = ["train", f"--config={data}/recipe.py", "--workdir=gs://bucket/damaged"]
    resumed = run(remote, train, tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stderr.count(f"gs://bucket/{newest} is damaged (") == 1, resumed.stderr
    assert "and writes the damaged one again" in resumed.stderr
    assert_same_run(download(storage, "damaged", tmp_path), local_run)


def test_images_have_addresses(storage, environment, data, tmp_path):
    lines = (data / "scenes.jsonl").read_text().splitlines()[:3]
    (tmp_path / "root.jsonl").write_text("\n".join(lines))
    named = [json.loads(line) for line in lines]
    for record in named:
        record["image"] = f"gs://bucket/data/{record['image']}"
    (tmp_path / "named.jsonl").write_text("\n".join(map(json.dumps, named)))
    for name, flag in (("root", "image_root=gs://bucket/data"), ("named", "image=image")):
        flags = [f"--config.{part}.sources.scenes.{flag}" for part in ("sft", "grpo", "eval")]
        look = ["look", f"--config={data}/recipe.py", f"--out={tmp_path}/{name}.html", *flags]
        for part in ("sft", "grpo", "eval"):
            look.append(f"--config.{part}.sources.scenes.uri=jsonl:{tmp_path}/{name}.jsonl")
        variables = environment | storage.environment | {"DATA": str(data)}
        looked = run(variables, look, tmp_path)
        assert looked.returncode == 0, looked.stderr
        assert (tmp_path / f"{name}.html").read_text().count("<img") == 3


def test_a_run_on_a_mount_that_renames_no_folders(environment, data, local_run, tmp_path):
    """gcsfuse refuses to rename a folder of a bucket without hierarchical namespace."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(NO_RENAME)
    variables = environment | {"DATA": str(data)}
    variables["PYTHONPATH"] = os.pathsep.join([str(tmp_path / "site"), str(ROOT)])
    train = ["train", f"--config={data}/recipe.py", f"--workdir={tmp_path}/run"]
    kill_when((tmp_path / "run" / KILL_AT).exists, variables, train, tmp_path)
    resumed = run(variables, train, tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert_same_run(tmp_path / "run", local_run)


NO_RENAME = """
import errno, os

def without_folders(rename):
    def renamed(source, target, **more):
        if os.path.isdir(source):
            raise OSError(errno.EMFILE, "Too many open files", str(source))
        return rename(source, target, **more)
    return renamed

os.rename, os.replace = without_folders(os.rename), without_folders(os.replace)
"""

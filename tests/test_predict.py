"""The predict command reads completions by the same grammar as the rewards do."""

import json
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from commands import run, run_here
from conftest import PG1, random_params
from PIL import ExifTags, Image

from pg_ground import tokenizer
from pg_ground.checkpoints import weights
from pg_ground.evals.answers import loc_answers as answers
from pg_ground.evals.prediction import predict, predict_file, read_image
from pg_ground.models import PaliGemma
from pg_ground.rewards.device_rewards import read_answer
from pg_ground.types import BOXES, UserError
from pg_ground.vocab import EOS, PAD


def test_predict_and_rewards_read_the_same_answers():
    words = tokenizer.load()
    vocab = words.vocab
    rng = np.random.default_rng(0)
    pool = [
        vocab.loc0 + 7,
        vocab.loc0 + 1023,
        vocab.loc0,
        *vocab.separators,
        *vocab.spaces,
        *words.text(" red circle"),
    ]
    rows = rng.choice(
        pool, (400, 24), p=np.array([6, 6, 6, *[2] * (len(pool) - 3)]) / (18 + 2 * (len(pool) - 3))
    )
    lengths = rng.integers(1, 25, 400)
    mask = np.arange(24) < lengths[:, None]
    rows[np.arange(400), lengths - 1] = EOS
    tokens = np.where(mask, rows, PAD)
    names = jnp.full((400, 1, 1), PAD)
    read = read_answer(
        jnp.asarray(tokens[:, None]), jnp.asarray(mask[:, None]), jnp.full(400, BOXES), names, vocab
    )
    seen = 0
    for row in range(400):
        found = answers(tokens[row][mask[row]].tolist(), words, (1000, 500))
        boxes = np.asarray(read.boxes.yxyx[row, 0][np.asarray(read.boxes.valid[row, 0])])
        points = np.asarray(read.points.yx[row, 0][np.asarray(read.points.valid[row, 0])])
        pixels = np.array([500, 1000, 500, 1000])
        mine = np.array([[b["xyxy_px"][i] for i in (1, 0, 3, 2)] for b in found["boxes"]]).reshape(
            -1, 4
        )
        np.testing.assert_allclose(
            mine, boxes * pixels, atol=1e-3
        )  # answers are rounded to 1e-4 pixels
        mine = np.array([p["xy_px"][::-1] for p in found["points"]]).reshape(-1, 2)
        np.testing.assert_allclose(mine, points * pixels[:2], atol=1e-3)
        seen += len(boxes) + len(points)
    assert seen > 100


def test_labels_are_the_text_behind_the_loc_tokens():
    words = tokenizer.load()
    tokens = words.suffix(
        "<loc0000><loc0512><loc1023><loc1023> red circle ; <loc0100><loc0200> cat"
    )
    found = answers(tokens, words, (1023, 1023))
    assert [b["label"] for b in found["boxes"]] == ["red circle"] and [
        p["label"] for p in found["points"]
    ] == ["cat"]
    np.testing.assert_allclose(found["boxes"][0]["xyxy_px"], [512, 0, 1023, 1023], atol=1e-2)
    np.testing.assert_allclose(found["points"][0]["xy_px"], [200, 100], atol=1e-2)


@pytest.fixture(scope="module")
def params(tmp_path_factory) -> Path:
    """Random weights that fit the package's tokenizer."""
    path = tmp_path_factory.mktemp("params") / "tiny.npz"
    sizes = replace(PG1, text=replace(PG1.text, vocab_size=2048))
    weights.save(path, random_params(PaliGemma(sizes)))
    return path


SAVING = {".png": {}, ".webp": {"lossless": True}, ".jpg": {"quality": 95, "subsampling": 0}}


def photograph(path: Path, orientation: int = 1) -> np.ndarray:
    """Writes an image of 90x60 pixels as its orientation stores it, and returns how it should look."""
    pixels = (
        np.random.default_rng(0).integers(0, 255, (6, 9, 3), np.uint8).repeat(10, 0).repeat(10, 1)
    )
    stored = {1: pixels, 3: pixels[::-1, ::-1], 6: np.rot90(pixels), 8: np.rot90(pixels, -1)}[
        orientation
    ]
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    Image.fromarray(stored).save(path, exif=exif, **SAVING[path.suffix])
    return pixels


@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.jpg"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_the_image_is_turned_as_its_exif_says(params, tmp_path, name, orientation):
    shown = photograph(tmp_path / name, orientation)
    found, image = predict_file(params, tmp_path / name, "detect cat ; dog", "", 4)
    assert image.shape == shown.shape and found.keys() == {"text", "boxes", "points"}
    bound = 40 if name.endswith("jpg") else 0  # JPEG rounds at the edges of the squares
    assert np.abs(image.astype(int) - shown)[5:-5:10, 5:-5:10].max() <= bound


def test_the_command_prints_json_and_draws_a_picture_that_opens(params, tmp_path, environment):
    photograph(tmp_path / "a.jpg")
    done = run(
        environment, "predict", f"--params={params}", f"--image={tmp_path / 'a.jpg'}", "--prompt=detect cat ; dog",
        f"--out={tmp_path / 'o.png'}", "--max_new_tokens=4",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout).keys() == {"text", "boxes", "points"}
    with Image.open(tmp_path / "o.png") as picture:
        picture.load()


def test_what_cannot_be_used_ends_in_one_line(params, tmp_path):
    photograph(tmp_path / "a.jpg")
    data = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(data[: len(data) // 2])
    (tmp_path / "cut.npz").write_bytes(params.read_bytes()[:5000])
    good = {"params": params, "image": tmp_path / "a.jpg", "prompt": "detect cat"}
    for flags, said in (
        ({"image": tmp_path / "cut.jpg"}, "cut.jpg: "),
        ({"image": tmp_path / "none.jpg"}, "none.jpg"),
        ({"params": tmp_path / "cut.npz"}, "cut.npz cannot be read as a big_vision .npz"),
        ({"params": tmp_path / "none"}, "no such file or directory"),
    ):
        flags = [f"--{name}={value}" for name, value in (good | flags).items()]
        done = run_here("predict", *flags, f"--out={tmp_path / 'o.png'}")
        assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1, (
            done.stderr
        )
        assert not done.stdout and not (tmp_path / "o.png").exists()


def test_predict_takes_files_images_and_pixels(params, tmp_path):
    photograph(tmp_path / "a.png", orientation=6)
    model, loaded_params = weights.load(params)
    pixels = read_image(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        answers = [
            predict(model, loaded_params, value, "detect cat", max_new_tokens=4)
            for value in (str(tmp_path / "a.png"), tmp_path / "a.png", image, pixels)
        ]
    assert answers[0].keys() == {"text", "boxes", "points"}
    assert all(answer == answers[0] for answer in answers)
    expected, _ = predict_file(params, tmp_path / "a.png", "detect cat", "", 4)
    assert answers[0] == expected


def test_predict_refuses_a_tokenizer_of_another_size(tmp_path):
    model = PaliGemma(replace(PG1, text=replace(PG1.text, vocab_size=1664)))
    with pytest.raises(UserError, match="has 2048 tokens, but the model .* has 1664"):
        predict(model, {}, np.zeros((8, 8, 3), np.uint8), "detect cat")
    model = PaliGemma(replace(PG1, text=replace(PG1.text, vocab_size=2048)))
    with pytest.raises(UserError, match="image: pixels are float64"):
        predict(model, {}, np.zeros((8, 8, 3)), "detect cat")

"""Predictions for one image and one prompt, by the function and by the command."""

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
from pg_ground.checkpoints import export, weights
from pg_ground.evals.answers import loc_answers
from pg_ground.evals.prediction import predict, predict_file, read_image
from pg_ground.models import PaliGemma
from pg_ground.rewards.answer_reader import read_answer
from pg_ground.types import BOXES, UserError
from pg_ground.vocab import EOS, PAD


def random_completions(
    pieces: tokenizer.Tokenizer, count: int, length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns token ids and masks of completions. A third of the tokens are loc tokens."""
    vocab = pieces.vocab
    locs = [vocab.loc0 + 7, vocab.loc0 + 1023, vocab.loc0]
    others = [*vocab.separators, *vocab.spaces, *pieces.text(" red circle")]
    weight = np.array([6] * 3 + [2] * len(others))
    rng = np.random.default_rng(0)
    tokens = rng.choice([*locs, *others], (count, length), p=weight / weight.sum())
    lengths = rng.integers(1, length + 1, count)
    mask = np.arange(length) < lengths[:, None]
    tokens[np.arange(count), lengths - 1] = EOS
    return np.where(mask, tokens, PAD), mask


@pytest.mark.slow
def test_predict_and_rewards_read_the_same_answers():
    """Coordinates of answers are rounded to 1e-4 pixels."""
    pieces = tokenizer.load()
    tokens, mask = random_completions(pieces, 400, 24)
    parsed = read_answer(
        jnp.asarray(tokens[:, None]),
        jnp.asarray(mask[:, None]),
        jnp.full(400, BOXES),
        jnp.full((400, 1, 1), PAD),
        pieces.vocab,
    )
    width, height = 1000, 500
    object_count = 0
    for row in range(400):
        answer = loc_answers(tokens[row][mask[row]].tolist(), pieces, (width, height))
        yxyx = np.asarray(parsed.boxes.yxyx[row, 0][np.asarray(parsed.boxes.valid[row, 0])])
        yx = np.asarray(parsed.points.yx[row, 0][np.asarray(parsed.points.valid[row, 0])])
        boxes = [box["xyxy_px"] for box in answer["boxes"]]
        boxes = np.array(boxes).reshape(-1, 4)[:, [1, 0, 3, 2]]
        np.testing.assert_allclose(boxes, yxyx * [height, width, height, width], atol=1e-3)
        points = [point["xy_px"] for point in answer["points"]]
        points = np.array(points).reshape(-1, 2)[:, ::-1]
        np.testing.assert_allclose(points, yx * [height, width], atol=1e-3)
        object_count += len(boxes) + len(points)
    assert object_count > 100


def test_labels_are_the_text_behind_the_loc_tokens():
    pieces = tokenizer.load()
    text = "<loc0000><loc0512><loc1023><loc1023> red circle ; <loc0100><loc0200> cat"
    answer = loc_answers(pieces.suffix(text), pieces, (1023, 1023))
    (box,), (point,) = answer["boxes"], answer["points"]
    assert (box["label"], point["label"]) == ("red circle", "cat")
    np.testing.assert_allclose(box["xyxy_px"], [512, 0, 1023, 1023], atol=1e-2)
    np.testing.assert_allclose(point["xy_px"], [200, 100], atol=1e-2)


@pytest.fixture(scope="module")
def params(tmp_path_factory) -> Path:
    """Returns a checkpoint with random weights that fits the package's tokenizer."""
    path = tmp_path_factory.mktemp("params") / "tiny.npz"
    sizes = replace(PG1, text=replace(PG1.text, vocab_size=2048))
    export.save(path, random_params(PaliGemma(sizes)))
    return path


SAVE_OPTIONS = {".png": {}, ".webp": {"lossless": True}, ".jpg": {"quality": 95, "subsampling": 0}}


def write_photograph(path: Path, orientation: int = 1) -> np.ndarray:
    """Writes an image of 90 x 60 pixels with an EXIF orientation, and returns its upright pixels.

    The image consists of squares of 10 x 10 pixels.
    """
    squares = np.random.default_rng(0).integers(0, 255, (6, 9, 3), np.uint8)
    pixels = squares.repeat(10, 0).repeat(10, 1)
    stored = {
        1: pixels,
        3: pixels[::-1, ::-1],
        6: np.rot90(pixels),
        8: np.rot90(pixels, -1),
    }[orientation]
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    Image.fromarray(stored).save(path, exif=exif, **SAVE_OPTIONS[path.suffix])
    return pixels


@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.jpg"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_the_image_is_turned_by_its_exif_orientation(params, tmp_path, name, orientation):
    upright = write_photograph(tmp_path / name, orientation)
    answer, image = predict_file(params, tmp_path / name, "detect cat ; dog", "", 4)
    assert image.shape == upright.shape
    assert answer.keys() == {"text", "boxes", "points"}
    tolerance = 40 if name.endswith("jpg") else 0  # JPEG rounds at the edges of the squares
    difference = np.abs(image.astype(int) - upright)
    assert difference[5:-5:10, 5:-5:10].max() <= tolerance


def test_files_images_and_pixels_give_the_same_prediction(params, tmp_path):
    path = tmp_path / "a.png"
    write_photograph(path, orientation=6)
    model, loaded_params = weights.load(params)
    expected, _ = predict_file(params, path, "detect cat", "", 4)
    with Image.open(path) as image:
        for value in (str(path), path, image, read_image(path)):
            answer = predict(model, loaded_params, value, "detect cat", max_new_tokens=4)
            assert answer == expected


@pytest.mark.parametrize("bits", [10, 12, 14])
def test_an_image_that_becomes_dark_is_one_line_of_warning(params, tmp_path, caplog, bits):
    values = np.linspace(0, 2**bits - 1, 60 * 40).reshape(60, 40).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    predict_file(params, tmp_path / "a.png", "detect cat", "", 1)
    (message,) = [record.getMessage() for record in caplog.records if "dark" in record.getMessage()]
    assert message.startswith(f"--image={tmp_path}")
    assert message.endswith(f"dark: no value above {2**bits - 1} of 65535")


def test_a_16_bit_image_has_the_pixels_of_its_file(tmp_path):
    values = np.linspace(0, 2**16 - 1, 60 * 40).reshape(60, 40).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        np.testing.assert_array_equal(read_image(image), read_image(tmp_path / "a.png"))
    assert read_image(tmp_path / "a.png")[-1, -1].tolist() == [255] * 3


def test_a_wrong_tokenizer_or_image_is_refused():
    model = PaliGemma(replace(PG1, text=replace(PG1.text, vocab_size=1664)))
    with pytest.raises(UserError, match="has 2048 tokens, but the model .* has 1664"):
        predict(model, {}, np.zeros((8, 8, 3), np.uint8), "detect cat")
    model = PaliGemma(replace(PG1, text=replace(PG1.text, vocab_size=2048)))
    with pytest.raises(UserError, match="image: the pixels are float64 from 200 to 200"):
        predict(model, {}, np.full((8, 8, 3), 200.0), "detect cat")


def test_the_command_prints_json_and_draws_a_picture_that_opens(params, tmp_path, environment):
    write_photograph(tmp_path / "a.jpg")
    result = run(
        environment,
        "predict",
        f"--params={params}",
        f"--image={tmp_path / 'a.jpg'}",
        "--prompt=detect cat ; dog",
        f"--out={tmp_path / 'o.png'}",
        "--max_new_tokens=4",
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout).keys() == {"text", "boxes", "points"}
    with Image.open(tmp_path / "o.png") as picture:
        picture.load()


def test_a_wrong_file_ends_in_one_line(params, tmp_path):
    write_photograph(tmp_path / "a.jpg")
    data = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(data[: len(data) // 2])
    (tmp_path / "cut.npz").write_bytes(params.read_bytes()[:5000])
    good = {"params": params, "image": tmp_path / "a.jpg", "prompt": "detect cat"}
    for wrong, message in (
        ({"image": tmp_path / "cut.jpg"}, "cut.jpg: "),
        ({"image": tmp_path / "none.jpg"}, "none.jpg"),
        ({"params": tmp_path / "cut.npz"}, "cut.npz cannot be read as a big_vision .npz"),
        ({"params": tmp_path / "none"}, "no such file or directory"),
    ):
        flags = [f"--{name}={value}" for name, value in (good | wrong).items()]
        result = run_here("predict", *flags, f"--out={tmp_path / 'o.png'}")
        assert result.returncode == 2, result.stderr
        assert message in result.stderr
        assert result.stderr.count("\n") == 1, result.stderr
        assert not result.stdout
        assert not (tmp_path / "o.png").exists()

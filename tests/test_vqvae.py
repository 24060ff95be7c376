"""Masks to codes and back with big_vision's numbers, and errors for wrong weight files."""

import jax
import numpy as np
import pytest

from pg_ground.checkpoints import vqvae_file
from pg_ground.models import vqvae
from pg_ground.types import UserError

decode, encode = jax.jit(vqvae.decode), jax.jit(vqvae.encode)

WIDTHS = {"encoder.0": 3, "encoder.2": 4, "encoder.4": 5, "encoder.6": 6, "decoder.0": 7}
"""Of a file of other sizes than the published one's."""

DEPTH = 5


@pytest.fixture(scope="module")
def weights() -> dict[str, np.ndarray]:
    """Returns random weights in the layout of `vae-oid.npz`, every width another than its
    neighbours' where it may be.
    """
    rng = np.random.default_rng(0)

    def layer(
        name: str, taken: int, made: int, side: int, transposed: bool = False
    ) -> dict[str, np.ndarray]:
        shape = (taken, made, side, side) if transposed else (made, taken, side, side)
        kernel = rng.normal(0, (taken * side**2) ** -0.5, shape)
        return {
            f"{name}.weight": kernel.astype(np.float32),
            f"{name}.bias": rng.normal(0, 0.3, made).astype(np.float32),
        }

    def residual(name: str, width: int) -> dict[str, np.ndarray]:
        first, second, third = (
            layer(f"{name}.net.{place}", width, width, side)
            for place, side in ((0, 3), (2, 3), (4, 1))
        )
        return first | second | third

    found = {"_vq_vae._embedding": rng.normal(0, 1, (128, DEPTH)).astype(np.float32)}
    width = 1
    for name in ("encoder.0", "encoder.2", "encoder.4", "encoder.6"):
        found |= layer(name, width, WIDTHS[name], 4)
        width = WIDTHS[name]
    found |= (
        residual("encoder.8", width)
        | residual("encoder.9", width)
        | layer("encoder.10", width, DEPTH, 1)
    )
    found |= layer("decoder.0", DEPTH, 7, 1) | residual("decoder.2", 7) | residual("decoder.3", 7)
    for name, taken, made in (
        ("decoder.4", 7, 6),
        ("decoder.6", 6, 5),
        ("decoder.8", 5, 4),
        ("decoder.10", 4, 3),
    ):
        found |= layer(name, taken, made, 4, transposed=True)
    return found | layer("decoder.12", 3, 1, 1)


def test_masks_equal_big_visions(golden):
    """In float32, and in sums of the same terms: to a few roundings of numbers of 0.2."""
    folder = golden / "preprocessing"
    given = np.load(folder / "seg.npz")
    masks = decode(vqvae_file.load(folder / "tiny_vae.npz"), given["seg_idx"])
    np.testing.assert_allclose(masks, given["recon"][..., 0], atol=1e-6)


@pytest.mark.needs("torch")
def test_decoder_and_encoder_equal_torchs_layers(weights, tmp_path):
    """The published weights were trained in torch, whose names for layers are places in these
    stacks.
    """
    import torch

    np.savez(tmp_path / "vae.npz", **weights)
    params = vqvae_file.load(tmp_path / "vae.npz", encoder=True)
    given = {name: torch.from_numpy(value) for name, value in weights.items()}

    def run(part: str, places: dict[int, str], x):
        for place, kind in places.items():
            name = f"{part}.{place}"
            if kind == "residual":
                y = x
                for inner in (0, 2, 4):
                    weight, bias = (
                        given[f"{name}.net.{inner}.weight"],
                        given[f"{name}.net.{inner}.bias"],
                    )
                    y = torch.nn.functional.conv2d(y, weight, bias, 1, "same")
                    y = torch.relu(y) if inner < 4 else y
                x = x + y
                continue
            weight, bias = given[f"{name}.weight"], given[f"{name}.bias"]
            match kind:
                case "down":
                    x = torch.relu(torch.nn.functional.conv2d(x, weight, bias, 2, 1))
                case "up":
                    x = torch.relu(torch.nn.functional.conv_transpose2d(x, weight, bias, 2, 1))
                case "first":
                    x = torch.relu(torch.nn.functional.conv2d(x, weight, bias))
                case "last":
                    x = torch.nn.functional.conv2d(x, weight, bias)
        return x

    rng = np.random.default_rng(1)
    codes = rng.integers(0, 128, (3, 16))
    x = torch.from_numpy(weights["_vq_vae._embedding"][codes].reshape(3, 4, 4, DEPTH)).permute(
        0, 3, 1, 2
    )
    stack = {
        0: "first",
        2: "residual",
        3: "residual",
        4: "up",
        6: "up",
        8: "up",
        10: "up",
        12: "last",
    }
    theirs = run("decoder", stack, x)[:, 0].numpy()
    np.testing.assert_allclose(decode(params, codes), theirs, atol=1e-5)

    masks = rng.random((3, 64, 64)).astype(np.float32)
    stack = {0: "down", 2: "down", 4: "down", 6: "down", 8: "residual", 9: "residual", 10: "last"}
    made = (
        run("encoder", stack, torch.from_numpy(2 * masks - 1)[:, None])
        .permute(0, 2, 3, 1)
        .reshape(3, 16, DEPTH)
    )
    distances = torch.cdist(made, given["_vq_vae._embedding"]).numpy()
    found = np.asarray(encode(params, masks))
    chosen = np.take_along_axis(distances, found[..., None], -1)[..., 0]
    np.testing.assert_allclose(chosen, distances.min(-1), atol=1e-5)


def test_leading_axes_stay(weights):
    codes = np.random.default_rng(0).integers(0, 128, (2, 3, 16))
    masks = decode(weights, codes)
    assert masks.shape == (2, 3, 64, 64) and encode(weights, masks).shape == codes.shape
    np.testing.assert_allclose(masks[1, 2], decode(weights, codes[1, 2]), atol=1e-5)


def test_a_decoder_alone_reads(weights, tmp_path):
    """And what else is in the file does not matter."""
    alone = {name: value for name, value in weights.items() if not name.startswith("encoder")}
    np.savez(tmp_path / "vae.npz", **alone, **{"_vq_vae._ema_w": np.zeros(3, np.float32)})
    assert set(vqvae_file.load(tmp_path / "vae.npz")) == set(alone)
    with pytest.raises(
        UserError,
        match=r"it lacks encoder\.0\.weight, encoder\.0\.bias, encoder\.2\.weight and 19 more",
    ):
        vqvae_file.load(tmp_path / "vae.npz", encoder=True)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("decoder.6.weight", None, r"it lacks decoder\.6\.weight$"),
        ("_vq_vae._embedding", None, r"it lacks _vq_vae\._embedding$"),
        ("_vq_vae._embedding", (64, DEPTH), r"_vq_vae\._embedding is \[64, 5\], not \[128, 5\]$"),
        ("_vq_vae._embedding", (), r"_vq_vae\._embedding is \[\], not \[128, 0\]"),
        (
            "decoder.6.weight",
            (5, 6, 4, 4),
            r"decoder\.6\.weight is \[5, 6, 4, 4\], not \[6, 5, 4, 4\]$",
        ),
        (
            "decoder.2.net.2.weight",
            (7, 7, 1, 1),
            r"decoder\.2\.net\.2\.weight is \[7, 7, 1, 1\], not \[7, 7, 3, 3\]$",
        ),
        ("decoder.12.bias", (2,), r"decoder\.12\.bias is \[2\], not \[1\]$"),
        (
            "encoder.0.weight",
            (3, 3, 4, 4),
            r"encoder\.0\.weight is \[3, 3, 4, 4\], not \[3, 1, 4, 4\]$",
        ),
    ],
)
def test_other_weights_are_refused_by_name(weights, tmp_path, name, shape, message):
    other = dict(weights)
    del other[name]
    if shape is not None:
        other[name] = np.zeros(shape, np.float32)
    np.savez(tmp_path / "vae.npz", **other)
    with pytest.raises(
        UserError, match=r"vae\.npz is not the VQ-VAE of masks \(vae-oid\.npz\): .*" + message
    ):
        vqvae_file.load(tmp_path / "vae.npz", encoder=True)


def test_no_file_and_no_archive_are_refused(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        vqvae_file.load(tmp_path / "vae.npz")
    (tmp_path / "vae.npz").write_bytes(b"PK")
    with pytest.raises(UserError, match="cannot be read"):
        vqvae_file.load(tmp_path / "vae.npz")

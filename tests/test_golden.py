"""The model, the supervised loss and the sampler against big_vision's PaliGemma, number by number.

`../shared/golden/README.md` says how the numbers were made: float32 on random weights whose logits
reach about 43. Rounding moves such logits by 5e-4 at most (measured there against float64), so 2e-3
separates rounding from a mistake; a log-probability is a difference of two of them and gets half of
that, being exact where the softmax is peaked.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import unlabelled

from pg_ground.checkpoints import export, weights
from pg_ground.models import PaliGemma
from pg_ground.params import flatten
from pg_ground.rl import update
from pg_ground.rl.rollout import sample
from pg_ground.types import POLICY, Batch, TrainState, UserError
from pg_ground.vocab import EOS, vocab_of_size

LOGIT_TOLERANCE = 2e-3
LOGP_TOLERANCE = 1e-3


class Reference(NamedTuple):
    """One of big_vision's two tiny models with what it computed."""

    folder: Path
    sizes: dict[str, Any]
    io: dict[str, np.ndarray]
    model: PaliGemma
    params: Any
    batch: Batch


@pytest.fixture(
    scope="module", params=[pytest.param("bigvision_pg1", marks=pytest.mark.slow), "bigvision_pg2"]
)
def reference(request, golden) -> Reference:
    folder = golden / request.param
    sizes = json.loads((folder / "config.json").read_text())["config"]
    io = dict(np.load(folder / "io.npz"))
    model, params = weights.load(folder / "ckpt_f32.npz")
    return Reference(folder, sizes, io, model, params, batch_of(io))


def batch_of(io: dict[str, np.ndarray]) -> Batch:
    """Returns big_vision's one row of text per example as a prompt and a suffix, each padded on its
    right.
    """
    prompt, suffix = (
        rows_of(io["text"], io["mask_ar"] == 0),
        rows_of(io["text"], io["mask_loss"] == 1),
    )
    return unlabelled(jnp.asarray(io["image"]), *prompt, *suffix)


def rows_of(text: np.ndarray, taken: np.ndarray) -> tuple[jax.Array, jax.Array]:
    lengths = taken.sum(axis=1)
    mask = np.arange(lengths.max()) < lengths[:, None]
    out = np.zeros(mask.shape, text.dtype)
    out[mask] = text[taken]
    return jnp.asarray(out), jnp.asarray(mask)


def predicting(r: Reference, per_position: np.ndarray) -> np.ndarray:
    """Returns `[suffix tokens, …]` of big_vision's `[B, position, …]`: what stands at the position
    before each suffix token.
    """
    return per_position[r.io["mask_loss"][:, 1:] == 1]


def suffix_logits(model: PaliGemma, params: Any, batch: Batch) -> jax.Array:
    """Returns `[B, T, V]`: the logits that predict each suffix token."""
    prefix, first = model.prefill(params, batch.image, batch.prompt, batch.prompt_mask)
    tokens = batch.suffix[:, None]
    later, _ = model.extend(params, prefix, model.suffix_cache(prefix, 1, tokens.shape[2]), tokens)
    return jnp.concatenate([first[:, None], later[:, 0, :-1]], axis=1)


def keep_gradient() -> optax.GradientTransformation:
    """Returns an optimizer that moves nothing and whose state is the last gradient."""
    return optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params),
        lambda grads, state, params: (jax.tree.map(jnp.zeros_like, grads), grads),
    )


def sft(r: Reference, label_smoothing: float) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Returns the metrics and the gradient by name of one supervised step."""
    optimizer = keep_gradient()
    trees = {POLICY: r.params}
    state = TrainState(jnp.int32(0), trees, optimizer.init(trees))

    def step(state: TrainState, batch: Batch) -> Any:
        return update.sft_update(
            state,
            {},
            batch,
            model=r.model,
            optimizer=optimizer,
            vocab=vocab_of_size(r.model.config.text.vocab_size),
            grad_accum_steps=1,
            label_smoothing=label_smoothing,
            loc_smoothing_bins=0.0,
        )

    state, metrics = jax.jit(step)(state, r.batch)
    return metrics, flatten(state.opt_state[POLICY])


def test_sizes_are_read_from_the_shapes(reference):
    text, vision, llm, img = (
        reference.model.config.text,
        reference.model.config.vision,
        *map(reference.sizes.get, ("llm", "img")),
    )
    for name in (
        "width",
        "depth",
        "mlp_dim",
        "num_heads",
        "num_kv_heads",
        "head_dim",
        "vocab_size",
    ):
        assert getattr(text, name) == llm[name], name
    for name in ("width", "depth", "mlp_dim", "num_heads"):
        assert getattr(vision, name) == img[name], name
    assert (vision.patch_size, vision.patch_size) == tuple(img["patch_size"])
    assert reference.model.config.image_size == reference.sizes["res"]
    assert text.post_norms == llm.get("post_norms", False)
    assert text.attn_softcap == llm.get("attn_logits_softcap", 0.0)
    vocab = vocab_of_size(text.vocab_size)
    assert (vocab.loc0, vocab.seg0) == (reference.sizes["loc0"], reference.sizes["seg0"])


def test_logits_of_every_suffix_token(reference):
    logits = jax.jit(lambda params, batch: suffix_logits(reference.model, params, batch))(
        reference.params, reference.batch
    )
    found, mask = np.asarray(logits), np.asarray(reference.batch.suffix_mask)
    np.testing.assert_allclose(
        found[mask],
        predicting(reference, reference.io["text_logits"]),
        rtol=0,
        atol=LOGIT_TOLERANCE,
    )
    exact = np.load(reference.folder / "gold_f64.npz")["text_logits"]
    np.testing.assert_allclose(
        found[mask], predicting(reference, exact), rtol=0, atol=LOGIT_TOLERANCE
    )


def test_final_softcap(reference):
    """That of Gemma 2's pretraining; 0, as in Gemma 1, leaves the logits as they are."""
    cap = reference.sizes["llm"].get("final_logits_softcap", 0.0)
    text = replace(reference.model.config.text, final_softcap=cap)
    model = PaliGemma(replace(reference.model.config, text=text))
    logits = jax.jit(lambda params, batch: suffix_logits(model, params, batch))(
        reference.params, reference.batch
    )
    exact = np.load(reference.folder / "gold_f64.npz")[
        "text_logits_capped" if cap else "text_logits"
    ]
    found, mask = np.asarray(logits), np.asarray(reference.batch.suffix_mask)
    np.testing.assert_allclose(
        found[mask], predicting(reference, exact), rtol=0, atol=LOGIT_TOLERANCE
    )


def test_loss_and_the_gradient_of_every_parameter(reference):
    metrics, grads = sft(reference, label_smoothing=0.0)
    # a mean of log-probabilities is known as well as they are
    np.testing.assert_allclose(
        metrics["sft/loss"], reference.io["loss"], rtol=0, atol=LOGP_TOLERANCE
    )
    np.testing.assert_array_equal(metrics["sft/loss"], metrics["sft/nll"])
    gold = dict(np.load(reference.folder / "grads_f32.npz"))
    assert grads.keys() == gold.keys()
    # A softmax doesn't change when every key moves alike, so the gradient of the key bias is 0 and
    # what either side has there is
    # what its terms left over when they cancelled: float32's epsilon of them, and no term is larger
    # than the whole gradient.
    floor = float(np.finfo(np.float32).eps) * np.sqrt(
        sum(np.sum(np.square(g)) for g in gold.values())
    )
    for name, expected in gold.items():
        off, size = np.linalg.norm(np.asarray(grads[name]) - expected), np.linalg.norm(expected)
        assert off <= 1e-3 * size + floor, f"{name}: off by {off}, of {size}"


@pytest.mark.parametrize(
    "reference",
    ["bigvision_pg2", pytest.param("bigvision_pg1", marks=pytest.mark.slow)],
    indirect=True,
)
def test_loss_with_label_smoothing(reference):
    metrics, _ = sft(reference, label_smoothing=0.3)
    # 70 % of the gold token's log-probability and 30 % of the mean of the others': no less certain
    # than one of them
    np.testing.assert_allclose(
        metrics["sft/loss"], reference.io["loss_ls0.3"], rtol=0, atol=LOGP_TOLERANCE
    )
    np.testing.assert_allclose(
        metrics["sft/nll"], reference.io["loss"], rtol=0, atol=LOGP_TOLERANCE
    )


def test_greedy_answers_and_their_logps(reference):
    """Prompts are ragged here, and padded to big_vision's length."""
    io, model = reference.io, reference.model
    prompt, prompt_mask = jnp.asarray(io["prompt_text"]), jnp.asarray(io["prompt_mask_input"] == 1)
    inputs = (jnp.asarray(io["image"]), prompt, prompt_mask)
    greedy = jax.jit(lambda params, *x: sample(model, params, *x, jax.random.key(0), 1, 8, 0.0))(
        reference.params, *inputs
    )
    rl = np.load(reference.folder / "rl.npz")
    expected = rl["cap0_f32cache/tokens"]
    until_eos = (
        np.cumsum(expected == EOS, axis=1) - (expected == EOS) == 0
    )  # big_vision goes on after EOS
    np.testing.assert_array_equal(greedy.mask[:, 0], until_eos)
    np.testing.assert_array_equal(
        np.where(until_eos, greedy.tokens[:, 0], 0), np.where(until_eos, expected, 0)
    )
    found = np.asarray(greedy.logps[:, 0])[until_eos]
    np.testing.assert_allclose(
        found, rl["cap0_f32cache/decode_logp"][until_eos], rtol=0, atol=LOGP_TOLERANCE
    )

    logps, _ = jax.jit(model.completion_logps)(
        reference.params, *inputs, greedy.tokens, greedy.mask
    )
    forced = rl["cap0_f32cache/teacher_forced_text_logits"]
    np.testing.assert_allclose(
        np.asarray(logps[:, 0])[until_eos], forced[until_eos], rtol=0, atol=LOGP_TOLERANCE
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "reference",
    ["bigvision_pg2", pytest.param("bigvision_pg1", marks=pytest.mark.slow)],
    indirect=True,
)
@pytest.mark.parametrize("cap", [0.0, 30.0])
@pytest.mark.parametrize(
    ("dtype", "bound"),
    [("float32", 2e-4), pytest.param("bfloat16", 0.05, marks=pytest.mark.slow)],
)
def test_sampler_and_trainer_agree_on_logits_of_43_with_and_without_final_softcap(
    reference, cap, dtype, bound
):
    """big_vision caps decoded logits and not trained ones, which costs 0.8 nats; here one function
    computes both.

    Measured on a CPU: at most 3.7e-5 nats in float32. In bfloat16 the mean is 3.3e-5 and the
    largest 0.0083, since a number is known there to 2^-9 of its size; six times that is the bound.
    """
    config = replace(
        reference.model.config,
        dtype=dtype,
        text=replace(reference.model.config.text, final_softcap=cap),
    )
    model = PaliGemma(config)
    prompt, prompt_mask = (
        jnp.asarray(reference.io["prompt_text"]),
        jnp.asarray(reference.io["prompt_mask_input"] == 1),
    )
    inputs = (jnp.asarray(reference.io["image"]), prompt, prompt_mask)
    rollout = jax.jit(lambda params, *x: sample(model, params, *x, jax.random.key(1), 8, 8, 1.0))(
        reference.params, *inputs
    )
    logps, _ = jax.jit(model.completion_logps)(
        reference.params, *inputs, rollout.tokens, rollout.mask
    )
    differences = np.abs(np.asarray(logps - rollout.logps))[np.asarray(rollout.mask)]
    assert len(differences) > 200 and differences.max() <= bound
    assert np.asarray(rollout.logps).min() < -1


def test_an_image_of_another_example_changes_the_greedy_answers(reference):
    """The control of the test above: its tokens can't come from the prompts alone."""
    io, model = reference.io, reference.model
    prompt, prompt_mask = jnp.asarray(io["prompt_text"]), jnp.asarray(io["prompt_mask_input"] == 1)
    images = jnp.asarray(io["image"][::-1].copy())
    args = (reference.params, images, prompt, prompt_mask)
    greedy = jax.jit(lambda params, *x: sample(model, params, *x, jax.random.key(0), 1, 8, 0.0))(
        *args
    )
    assert (np.asarray(greedy.tokens[:, 0]) != io["decode_tokens"]).any(axis=1).all()


def test_bfloat16_checkpoint(reference):
    model, params = weights.load(reference.folder / "ckpt_bf16.npz")
    assert model.config == reference.model.config
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(params))
    logits = jax.jit(lambda params, batch: suffix_logits(model, params, batch))(
        params, reference.batch
    )
    expected = predicting(reference, reference.io["text_logits_bf16ckpt"])
    mask = np.asarray(reference.batch.suffix_mask)
    np.testing.assert_allclose(np.asarray(logits)[mask], expected, rtol=0, atol=LOGIT_TOLERANCE)
    assert (
        np.abs(expected - predicting(reference, reference.io["text_logits"])).max()
        > 10 * LOGIT_TOLERANCE
    )


def test_save_inverts_load(reference, tmp_path):
    export.save(tmp_path / "again.npz", reference.params)
    ours, theirs = (
        dict(np.load(tmp_path / "again.npz")),
        dict(np.load(reference.folder / "ckpt_f32.npz")),
    )
    assert ours.keys() == theirs.keys()
    for name in theirs:
        assert ours[name].dtype == theirs[name].dtype
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
    model, params = weights.load(tmp_path / "again.npz")
    assert model.config == reference.model.config
    jax.tree.map(np.testing.assert_array_equal, params, reference.params)


def test_every_parameter_that_does_not_fit_is_named_at_once(reference, tmp_path):
    arrays = dict(np.load(reference.folder / "ckpt_f32.npz"))
    del arrays["params/llm/final_norm/scale"], arrays["params/img/head/bias"]
    arrays["params/llm/lora/a"] = np.zeros(3, np.float32)
    arrays["params/img/embedding/bias"] = np.zeros((5, 7), np.float32)
    np.savez(tmp_path / "odd.npz", **arrays)
    with pytest.raises(UserError) as refused:
        weights.load(tmp_path / "odd.npz")
    text = str(refused.value)
    for part in (
        "odd.npz",
        "llm/final_norm/scale: missing",
        "img/head/bias: missing",
        "llm/lora/a: not a parameter",
    ):
        assert part in text
    width = reference.sizes["img"]["width"]
    assert f"img/embedding/bias: (5, 7) in the file, ({width},) in the model" in text
    assert "\n" not in text


def test_other_sizes_than_the_files_are_refused_with_both_shapes(reference):
    text = replace(reference.model.config.text, mlp_dim=8)
    with pytest.raises(
        UserError, match=r"llm/layers/mlp/linear: \(.*\) in the file, \(\d+, 8, \d+\) in the model"
    ):
        weights.load(reference.folder / "ckpt_f32.npz", replace(reference.model.config, text=text))


@pytest.mark.parametrize("content", [None, b"", b"PK\x03\x04 broken", b"text"])
def test_a_file_that_is_no_checkpoint_is_refused_in_one_line(tmp_path, content):
    path = tmp_path / "no.npz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"no\.npz") as refused:
        weights.load(path)
    assert "\n" not in str(refused.value)


def test_arrays_of_something_else_are_refused_with_what_is_missing(tmp_path):
    np.savez(tmp_path / "other.npz", **{"params/w": np.zeros(3)})
    with pytest.raises(
        UserError, match=r"other\.npz is not a PaliGemma checkpoint: it lacks img/embedding/kernel"
    ):
        weights.load(tmp_path / "other.npz")

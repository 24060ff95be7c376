"""Our parameters in google-research/big_vision's own PaliGemma, where that is installed or on the
Python path.

They are handed over as they are: the names are big_vision's, so nothing is renamed and no array is
reshaped.
"""

import importlib
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import PG1, PG2, Inputs, inputs, random_params

from pg_ground.config import Model
from pg_ground.models import PaliGemma
from pg_ground.params import flatten

pytestmark = pytest.mark.filterwarnings(
    "ignore"
)  # those of big_vision and what it imports are not ours

LOGIT_TOLERANCE = 1e-3
"""Logits reach 6.5 here and the two sides differ by float32's rounding, 5e-6 when measured.

Where tried, one entry of one parameter moved by 0.25, their standard deviation, moved a logit by
1.5e-3 or more; the vision tower's key bias moved none, as a softmax does not see it.
"""

CASES = {
    "gemma_2b": PG1,
    "gemma2_2b": PG2,
    "gemma2_27b": replace(
        PG2, text=replace(PG2.text, query_scale=(PG2.text.width // PG2.text.num_heads) ** -0.5)
    ),
}
"""big_vision's variants, and our tiny models that should do what these do."""


@pytest.fixture(params=CASES)
def case(request, monkeypatch) -> tuple[Model, Any]:
    """A tiny configuration of ours, and big_vision's model of the same sizes.

    big_vision takes a decoder's sizes by name from a table. Here that table answers with a variant
    in small: widths, depths and counts of heads are ours, and what makes the variant what it is
    stays big_vision's: post-norms, attention's soft-cap, the scale of queries. The final soft-cap
    is off, as in PaliGemma 2's transfers.
    """
    pytest.importorskip("big_vision", reason="google-research/big_vision is not installed")
    config, text, vision = (
        CASES[request.param],
        CASES[request.param].text,
        CASES[request.param].vision,
    )
    gemma = importlib.import_module("big_vision.models.ppp.gemma")
    paligemma = importlib.import_module("big_vision.models.proj.paligemma.paligemma")
    published = gemma.get_config

    def in_small(variant: str) -> Any:
        sizes = published(variant)
        for name in ("width", "depth", "mlp_dim", "num_heads", "num_kv_heads", "head_dim"):
            sizes[name] = getattr(text, name)
        sizes["final_logits_softcap"] = 0.0
        return sizes

    monkeypatch.setattr(gemma, "get_config", in_small)
    img = {name: getattr(vision, name) for name in ("width", "depth", "mlp_dim", "num_heads")}
    patch = (vision.patch_size, vision.patch_size)
    return config, paligemma.Model(
        img={**img, "patch_size": patch, "pool_type": "none", "scan": True},
        llm={"variant": request.param, "vocab_size": text.vocab_size, "scan": True},
    )


def rows_of(x: Inputs) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns image, text and mask_ar of one row per completion, and which positions predict a
    token of it.

    A row is prompt, completion and padding; mask_ar is 0 on the prompt and 1 behind, on padding
    too.
    """
    prompt, prompt_mask, tokens, mask = map(np.asarray, (x.prompt, x.prompt_mask, x.tokens, x.mask))
    b, g, t = tokens.shape
    image = np.repeat(np.asarray(x.image), g, axis=0)
    text = np.zeros((b, g, prompt.shape[1] + t), np.int32)
    mask_ar, predicts = np.ones_like(text), np.zeros(text.shape, bool)
    for i, j in np.ndindex(b, g):
        start, length = prompt_mask[i].sum(), mask[i, j].sum()
        text[i, j, : start + length] = np.concatenate(
            [prompt[i, prompt_mask[i]], tokens[i, j, mask[i, j]]]
        )
        mask_ar[i, j, :start] = 0
        predicts[i, j, start - 1 : start + length - 1] = True
    return image, *(array.reshape(b * g, -1) for array in (text, mask_ar, predicts))


def test_big_visions_parameters_have_our_names_and_shapes(case):
    """Every parameter that big_vision's `init` makes is one of ours by name, shape and type, and
    there is no other.
    """
    config, theirs = case
    image, text, mask_ar, _ = rows_of(inputs(PaliGemma(config)))
    expected = jax.eval_shape(theirs.init, jax.random.key(0), image[:1], text[:1], mask_ar[:1])
    found = jax.eval_shape(PaliGemma(config).init, jax.random.key(0))
    assert expected.keys() == {"params"}
    kinds = [
        {name: (a.shape, a.dtype) for name, a in flatten(tree).items()}
        for tree in (found, expected["params"])
    ]
    assert kinds[0] == kinds[1]


def test_big_vision_computes_our_logits_from_our_parameters(case):
    """At every position that predicts a token of a completion, whatever the lengths of prompt and
    completion.
    """
    config, theirs = case
    model = PaliGemma(config)
    params, x = random_params(model), inputs(model)
    image, text, mask_ar, predicts = rows_of(x)
    apply = jax.jit(lambda params, *rows: theirs.apply({"params": params}, *rows)[1]["text_logits"])
    expected = apply(params, image, text, mask_ar)[predicts]

    @jax.jit
    def ours(params: Any, x: Inputs) -> jax.Array:
        prefix, first = model.prefill(params, x.image, x.prompt, x.prompt_mask)
        later, _ = model.extend(
            params, prefix, model.suffix_cache(prefix, *x.tokens.shape[1:]), x.tokens
        )
        first = jnp.broadcast_to(first[:, None, None], later[:, :, :1].shape)
        return jnp.concatenate([first, later[:, :, :-1]], axis=2)

    found = ours(params, x)[x.mask]
    assert found.shape == expected.shape and len(found) > 60
    np.testing.assert_allclose(found, expected, rtol=0, atol=LOGIT_TOLERANCE)
    assert np.abs(expected).max() > 3

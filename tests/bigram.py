"""A policy of three matrices tests rules that every policy obeys.

Its update compiles in a second.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from conftest import PG1, Tiny

from pg_ground.config import Model
from pg_ground.models import PaliGemma

WIDTH = 6


@dataclass(frozen=True)
class Bigram:
    """Predicts a token from the previous token and from the means of image and prompt."""

    config: Model = PG1

    def completion_scores(
        self,
        params: Any,
        image: jax.Array,
        prompt: jax.Array,
        prompt_mask: jax.Array,
        tokens: jax.Array,
        score: Any,
        dropout_key: Any = None,
    ) -> Any:
        """Returns `score`'s tree of `[B, G, T]` arrays, as `PaliGemma.completion_scores` does."""
        prompt_embeddings = jnp.where(prompt_mask[..., None], params["embedding"][prompt], 0)
        context = prompt_embeddings.mean(axis=1) + image.mean(axis=(1, 2)) @ params["image"]
        start = jnp.broadcast_to(prompt[:, None, :1], (*tokens.shape[:2], 1))
        previous = jnp.concatenate([start, tokens[..., :-1]], axis=-1)
        hidden = jnp.tanh(params["embedding"][previous] + context[:, None, None])
        return score(hidden, hidden @ params["head"], tokens)

    completion_logps = PaliGemma.completion_logps


def random_bigram() -> Tiny:
    """Returns a bigram policy with random parameters."""
    rng = np.random.default_rng(0)
    vocab_size = PG1.text.vocab_size
    shapes = {"embedding": (vocab_size, WIDTH), "image": (3, WIDTH), "head": (WIDTH, vocab_size)}
    params = {
        name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()
    }
    return Tiny(Bigram(), params)  # pyright: ignore[reportArgumentType]

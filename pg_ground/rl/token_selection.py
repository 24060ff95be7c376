"""Token selections: which tokens of a minibatch the objective counts, chosen before an update."""

from collections.abc import Callable
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, PRNGKeyArray

from pg_ground.rl.options import Option
from pg_ground.types import Array

TokenSelectionShare = Annotated[
    float, Option("share of the tokens that the selection picks", minimum=1e-9, maximum=1)
]


class TokenStatistics(NamedTuple):
    """Every token of a minibatch under the policy before the update."""

    logps: Float[Array, "B G T"]
    entropy: Float[Array, "B G T"]
    advantages: Float[Array, "B G #T"]
    mask: Bool[Array, "B G T"]
    key: PRNGKeyArray


class TokenSelection(NamedTuple):
    """How the objective of each token is changed."""

    factor: Float[Array, "B G T"]
    """Factor of the objective. 0 removes a token from the objective, but not from the average."""
    penalised: Float[Array, "B G T"]
    """1 if |log-ratio| of the token is added to the loss."""


Selection = Callable[..., TokenSelection]
"""`(statistics, **options)` to the selection."""


def top_entropy(
    tokens: TokenStatistics, *, token_selection_share: TokenSelectionShare = 0.2
) -> TokenSelection:
    """Returns factor 1 for the share of tokens with the highest entropy, else 0 (arXiv 2506.01939).

    The threshold is an interpolated quantile in float32, as in TRL.
    """
    entropies = jnp.where(tokens.mask, tokens.entropy.astype(jnp.float32), jnp.inf)
    ordered = jnp.sort(entropies, axis=None)
    last = jnp.maximum(tokens.mask.sum() - 1, 0)
    position = (1 - token_selection_share) * last
    low = jnp.floor(position).astype(jnp.int32)
    step = ordered[jnp.minimum(low + 1, last)] - ordered[low]
    threshold = ordered[low] + (position - low) * step
    selected = (tokens.entropy >= threshold) & tokens.mask
    return TokenSelection(selected.astype(tokens.logps.dtype), jnp.zeros_like(tokens.logps))


def clip_cov(
    tokens: TokenStatistics, *, token_selection_share: TokenSelectionShare = 2e-4
) -> TokenSelection:
    """Returns factor 0 for a random share of the tokens with a high covariance (Clip-Cov, arXiv
    2505.22617).

    The covariance of log-probability and advantage must lie in (1, 5).
    """
    covariance = _covariance(tokens)
    eligible = (covariance > 1) & (covariance < 5) & tokens.mask
    draws = jax.random.uniform(tokens.key, eligible.shape, tokens.logps.dtype)
    draws = jnp.where(eligible, draws, -1.0)
    removed = _largest(draws, tokens.mask, token_selection_share) & eligible
    return TokenSelection(1.0 - removed, jnp.zeros_like(tokens.logps))


def kl_cov(
    tokens: TokenStatistics, *, token_selection_share: TokenSelectionShare = 2e-4
) -> TokenSelection:
    """Penalises |log-ratio| of the share of tokens with the largest covariance (KL-Cov, arXiv
    2505.22617)."""
    covariance = jnp.where(tokens.mask, _covariance(tokens), -jnp.inf)
    top = _largest(covariance, tokens.mask, token_selection_share)
    return TokenSelection(jnp.ones_like(tokens.logps), top.astype(tokens.logps.dtype))


TOKEN_SELECTIONS: dict[str, Selection] = {
    selection.__name__: selection for selection in (top_entropy, clip_cov, kl_cov)
}


def _covariance(tokens: TokenStatistics) -> Float[Array, "B G T"]:
    """Returns each token's contribution to the covariance of advantage and log-probability over
    the batch."""
    count = jnp.maximum(tokens.mask.sum(), 1)

    def centre(values: Array) -> Array:
        return values - jnp.sum(values * tokens.mask) / count

    return centre(tokens.advantages) * centre(tokens.logps)


def _largest(
    values: Float[Array, "B G T"], mask: Bool[Array, "B G T"], share: float
) -> Bool[Array, "B G T"]:
    """Returns True for the largest `share` of the tokens, at least one."""
    count = jnp.maximum(jnp.floor(share * mask.sum()), 1)
    rank = jnp.argsort(jnp.argsort(-values, axis=None)).reshape(values.shape)
    return rank < count

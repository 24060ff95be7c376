"""Estimators of KL(policy || reference policy) from sampled tokens, in nats per token.

Each takes `gap` = log π − log π_ref and `ratio` = π / π_old of each token
(joschu.net/blog/kl-approx.html).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Float

from pg_ground.types import Array

KlEstimator = Callable[[Float[Array, "B G T"], Float[Array, "B G T"]], Float[Array, "B G T"]]
"""`(gap, ratio)` to the penalty of each token in nats."""


def k1(gap: Array, ratio: Array) -> Array:
    """Returns the gap.

    It is unbiased, but its expected gradient on-policy is 0: use it in the reward, not in the loss.
    """
    return gap


def k2(gap: Array, ratio: Array) -> Array:
    """Returns gap² / 2. Its gradient on-policy is the gradient of the KL."""
    return jnp.square(gap) / 2


def k3(gap: Array, ratio: Array) -> Array:
    """Returns exp(−gap) − 1 + gap, which is never negative."""
    return jnp.exp(-gap) - 1 + gap


def k3_corrected(gap: Array, ratio: Array) -> Array:
    """Returns k3 × ratio.

    Its gradient is the gradient of the KL, also off-policy (arXiv 2512.02556).
    """
    return k3(gap, ratio) * ratio


def absolute(gap: Array, ratio: Array) -> Array:
    """Returns |gap|."""
    return absolute_value(gap)


def absolute_value(values: Array) -> Array:
    """Returns absolute values whose gradient at 0 is 0.

    `jnp.abs` has gradient 1 there, and every gap and log-ratio is 0 at the first update.
    """
    return values * jnp.sign(values)


def straight_through(estimator: KlEstimator) -> KlEstimator:
    """Returns an estimator with the value of `estimator` and the gradient of `k2`."""

    def penalty(gap: Array, ratio: Array) -> Array:
        gradient_part = k2(gap, ratio)
        return gradient_part + jax.lax.stop_gradient(estimator(gap, ratio) - gradient_part)

    return penalty


KL_ESTIMATORS: dict[str, KlEstimator] = {
    **{estimator.__name__: estimator for estimator in (k1, k2, k3, k3_corrected, absolute)},
    **{f"{estimator.__name__}+": straight_through(estimator) for estimator in (k1, k3, absolute)},
}
"""By name. The names with "+" have the value of the estimator and the gradient of `k2`."""

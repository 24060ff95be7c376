"""What a step needs of each device's memory, by arithmetic: no compiler asked, so at once and for any device.

Parameters, optimizer, batches and caches are counted exactly, from shapes and places. What the compiler adds (activations, gradients,
weights gathered for a layer) is a formula, whose terms are named where they stand; benchmarks/results compares it with XLA's figures.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from pg_ground import chips, programs, sharding
from pg_ground.config import Config
from pg_ground.model import PaliGemma
from pg_ground.params import flatten, unflatten

KINDS = ("parameters", "optimizer", "reference", "rollout weights", "batch", "cache", "activations")
"""What a device holds while a program runs. Activations are everything the compiler adds, gradients included."""


class Shares(NamedTuple):
    """How many of each thing one device works on at once."""

    prompts: float
    """Of a micro-batch."""
    group: int
    tokens: int
    """Of a completion."""

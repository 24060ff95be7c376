"""The accelerators that programs are compiled for: what one chip holds, computes and moves.

Peaks and memory are those of cloud.google.com/tpu/docs (system architecture of each version); link bandwidths those of
jax-ml.github.io/scaling-book (chapter 2), all axes of the torus in both directions. HBM is what XLA lets a program use.
"""

import math
from typing import NamedTuple

from pg_ground.types import UserError


class Chip(NamedTuple):
    """One device, as jax counts them."""

    hbm_bytes: float
    flops: float
    """Of bfloat16 matrix products, a second."""
    hbm_bandwidth: float
    """Bytes a second."""
    link_bandwidth: float
    """Bytes a second that collectives over a whole slice can bring to a chip."""


GIB, GB, TERA = 2.0**30, 1e9, 1e12

CHIPS: dict[str, Chip] = {
    "v4": Chip(31.25 * GIB, 275 * TERA, 1228 * GB, 270 * GB),
    "v5e": Chip(15.75 * GIB, 197 * TERA, 819 * GB, 180 * GB),
    "v5p": Chip(95.74 * GIB, 459 * TERA, 2765 * GB, 540 * GB),
    "v6e": Chip(31.25 * GIB, 918 * TERA, 1640 * GB, 360 * GB),
    "tpu7x": Chip(
        94.75 * GIB, 1153 * TERA, 3690 * GB, 600 * GB
    ),  # half a chip: jax counts its two chiplets as devices
}

TOPOLOGIES: dict[str, tuple[str, ...]] = {
    "v4": ("1x1x1", "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8"),
    "v5e": ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    "v5p": ("1x1x1", "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8"),
    "v6e": ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    "tpu7x": ("1x1x1", "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4"),
}
"""Slices that are sold, by chips along each axis of the torus."""

KINDS = {"TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p", "TPU v6 lite": "v6e",
         "TPU v6e": "v6e", "TPU7x": "tpu7x"}  # fmt: skip
"""By what jax calls a device's kind."""


def known() -> str:
    """Returns the topologies, in a line."""
    return ", ".join(f"{chip}:{{{'|'.join(shapes)}}}" for chip, shapes in TOPOLOGIES.items())


def parse_topology(name: str) -> tuple[str, str, int]:
    """Returns the version, the shape and the number of slices of a name such as v5e:2x4, or 2*v5e:16x16 for two slices.

    Raises:
      UserError: no such topology.
    """
    slices, star, rest = name.rpartition("*")
    version, _, shape = rest.partition(":")
    if shape not in TOPOLOGIES.get(version, ()) or (
        star and not (slices.isdigit() and int(slices) > 0)
    ):
        raise UserError(
            f"--topology={name} does not exist: there are {known()}, and N*TOPOLOGY for N slices"
        )
    return version, shape, int(slices) if star else 1


def count(topology: str) -> int:
    """Returns the number of devices of a topology."""
    _, shape, slices = parse_topology(topology)
    return (
        slices * math.prod(map(int, shape.split("x"))) * (2 if topology.startswith("tpu7x") else 1)
    )

"""Published figures of TPUs and of one GPU: memory, peak rates, and the slices that are sold.

Peaks and memory: cloud.google.com/tpu/docs (system architecture of each version). Link bandwidths:
jax-ml.github.io/scaling-book (chapter 2), all axes of the torus in both directions. `hbm_bytes` is
the memory that XLA lets a program use.
"""

import math
from typing import NamedTuple

from pg_ground.types import UserError


class Chip(NamedTuple):
    """The figures of one device, as jax counts devices."""

    hbm_bytes: float
    flops: float
    """Peak of bfloat16 matrix products, in operations per second."""
    hbm_bandwidth: float
    """Bytes per second."""
    link_bandwidth: float
    """Bytes per second that a chip receives in collectives over the whole slice."""


GIB = 2.0**30
GB = 1e9
TERA = 1e12

CHIPS: dict[str, Chip] = {
    "v4": Chip(31.25 * GIB, 275 * TERA, 1228 * GB, 270 * GB),
    "v5e": Chip(15.75 * GIB, 197 * TERA, 819 * GB, 180 * GB),
    "v5p": Chip(95.74 * GIB, 459 * TERA, 2765 * GB, 540 * GB),
    "v6e": Chip(31.25 * GIB, 918 * TERA, 1640 * GB, 360 * GB),
    # Half a chip: jax counts the two chiplets of a chip as two devices.
    "tpu7x": Chip(94.75 * GIB, 1153 * TERA, 3690 * GB, 600 * GB),
}

H100 = Chip(80 * GB, 989 * TERA, 3350 * GB, 450 * GB)
"""NVIDIA H100 SXM, by its data sheet: dense bfloat16, and NVLink in one direction."""

TOPOLOGIES: dict[str, tuple[str, ...]] = {
    "v4": ("1x1x1", "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8"),
    "v5e": ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    "v5p": ("1x1x1", "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8"),
    "v6e": ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    "tpu7x": ("1x1x1", "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4"),
}
"""The slices that are sold: the number of chips along each axis of the torus."""

DEVICE_KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "tpu7x",
}
"""The version of each `device_kind` of jax."""


def topology_names() -> str:
    """Returns all topologies in one line, such as v5e:{1x1|2x2|…}."""
    return ", ".join(f"{chip}:{{{'|'.join(shapes)}}}" for chip, shapes in TOPOLOGIES.items())


def parse_topology(name: str) -> tuple[str, str, int]:
    """Returns the version, the shape and the number of slices of a topology.

    `v5e:2x4` is one slice, `2*v5e:16x16` is two slices.

    Raises:
      UserError: the topology does not exist.
    """
    slices, star, slice_name = name.rpartition("*")
    version, _, shape = slice_name.partition(":")
    is_count = slices.isdigit() and int(slices) > 0
    if shape not in TOPOLOGIES.get(version, ()) or (star and not is_count):
        raise UserError(
            f"--topology={name} does not exist: "
            f"there are {topology_names()}, and N*TOPOLOGY for N slices"
        )
    return version, shape, int(slices) if star else 1


def device_count(topology: str) -> int:
    """Returns the number of jax devices of a topology."""
    version, shape, slices = parse_topology(topology)
    devices_per_chip = 2 if version == "tpu7x" else 1
    return slices * chip_count(shape) * devices_per_chip


def chip_count(shape: str) -> int:
    """Returns the number of chips of a slice such as 2x4."""
    return math.prod(map(int, shape.split("x")))

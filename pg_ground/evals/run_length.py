"""Masks in rows: COCO's run lengths, down the columns, beginning with what is not the object."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool


def runs_of(mask: Bool[np.ndarray, "H W"]) -> dict[str, Any]:
    """Returns a mask as run lengths, `{"size": [H, W], "counts": […]}`."""
    flat = mask.T.reshape(-1)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flat])))
    return {"size": list(mask.shape), "counts": np.diff([0, *edges.tolist(), flat.size]).tolist()}


def mask_of(runs: Mapping[str, Any]) -> Bool[np.ndarray, "H W"]:
    """Returns the mask of run lengths."""
    height, width = runs["size"]
    return (
        np.repeat(np.arange(len(runs["counts"])) % 2 == 1, runs["counts"]).reshape(width, height).T
    )

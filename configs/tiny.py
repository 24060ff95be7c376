"""Runs both stages in about a minute. The tests use this recipe, and it shows what a run writes.

python -m pg_ground.train --config=configs/tiny.py --workdir=runs/tiny

Hardware: any CPU. Time: about a minute, most of it compilation. Expected: the model learns nothing
in 6 + 6 steps.
"""

from ml_collections import ConfigDict

from pg_ground import config
from pg_ground.config import Source


def scenes(split: str, target: str, loose: float = 0.0) -> ConfigDict:
    """Returns a source of drawn scenes with prompts such as "detect red circle".

    `target` "points" asks "point to red circle" instead. `loose` is the largest share of a shape's
    extent by which each side of a box is too far out.
    """
    limit = "&scenes=32" if split == "heldout" else ""
    uri = f"synthetic:{split}?side=32&shapes=2&loose={loose}{limit}"
    if target == "boxes":
        return config.section(Source(uri=uri, boxes="box"))
    return config.section(
        Source(uri=uri, target="points", boxes="box", points="point", prompt="point to {phrase}")
    )


def get_config() -> ConfigDict:
    """Returns the settings of both stages."""
    c = config.template()

    c.model.image_size = 32
    c.model.vision.update(width=16, depth=2, mlp_dim=32, num_heads=2, patch_size=8)
    c.model.text.update(width=16, depth=2, mlp_dim=32, num_heads=2, num_kv_heads=1, head_dim=8)
    c.model.text.vocab_size = 2048
    c.model.coordinate_init = "sinusoid"
    c.data.prompt_length = 8
    c.data.suffix_length = 8
    c.data.check_records = 200

    c.sft.steps = 6
    c.sft.batch_size = 8
    c.sft.optimizer.lr = 1e-3
    c.sft.sources = {
        "boxes": scenes("train", "boxes", loose=0.5),
        "points": scenes("train", "points"),
    }

    c.grpo.steps = 6
    c.grpo.batch_size = 8
    c.grpo.group_size = 4
    c.grpo.max_new_tokens = 8
    c.grpo.optimizer.lr = 1e-3
    c.grpo.rewards = {"iou": 1.0, "gaussian_point": 1.0, "format": 0.2}
    c.grpo.sources = {"boxes": scenes("train", "boxes"), "points": scenes("train", "points")}

    c.eval.sources = {"boxes": scenes("heldout", "boxes"), "points": scenes("heldout", "points")}
    c.eval.batch_size = 32
    c.eval.max_new_tokens = 8
    c.log.every = 2
    c.log.samples_every = 6
    c.checkpoint.every = 4
    return c.lock()

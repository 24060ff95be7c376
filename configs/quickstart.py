"""The main job: a small PaliGemma learns from nothing to ground phrases, first from loose boxes, then by GRPO on exact reward.

python -m pg_ground.train --config=configs/quickstart.py --workdir=runs/quickstart

The task is drawn on the fly (`synthetic:`): 48-pixel scenes with three shapes, "detect red circle" and "point to red circle".
The boxes that SFT learns from are drawn loosely: each side lies outside the shape by a random share, 0 to 60 %, of the shape's
extent, so that the right box has IoU 0.39 with the mean label. Points are exact. GRPO is rewarded by IoU with the exact box and
by nearness to the exact centre or point.

Two arms spend the same compute on SFT alone, with the loose labels and with exact ones:
    --config=configs/quickstart.py:sft_loose    --config=configs/quickstart.py:sft_exact
All three over several seeds, in one table: python benchmarks/quickstart.py

Hardware: two CPU cores. Time: about four minutes. Result on held-out scenes, three seeds: acc@.5 from 0.20-0.24 after SFT to
0.62-0.74 after GRPO (2026-11-21, 5151723; the whole table is in the README).
"""

from ml_collections import ConfigDict

from pg_ground import config
from pg_ground.config import Source
from pg_ground.types import UserError

LOOSE = 0.6
SFT_STEPS, GRPO_STEPS = 1000, 400
SFT_STEPS_PER_GRPO_STEP = 3
"""What a GRPO step costs in time, so that the arms spend the same: 2.7 to 2.9 measured on two CPU devices, rounded up
in favour of SFT."""
SPLITS = {"train": "train?side=48&seed=0", "heldout": "heldout?side=48&seed=1&scenes=512"}
"""The recipe was chosen looking at held-out scenes of seed 0: what is reported comes from 512 that no choice has seen."""


def get_config(arm: str = "grpo") -> ConfigDict:
    c = config.template()

    c.model.image_size = 48
    c.model.vision.update(width=64, depth=2, mlp_dim=256, num_heads=4, patch_size=8)
    c.model.text.update(
        width=64,
        depth=3,
        mlp_dim=256,
        num_heads=4,
        num_kv_heads=1,
        head_dim=16,
        query_scale=16**-0.5,
    )
    c.model.text.vocab_size = 2048
    c.model.coordinate_init = "sinusoid"
    c.model.remat = "none"
    c.model.scan_unroll = 3
    c.data.prompt_length = 8
    c.data.suffix_length = 8
    c.data.check_records = 200

    c.sft.steps = SFT_STEPS
    c.sft.batch_size = 32
    c.sft.loc_smoothing_bins = 60.0
    c.sft.optimizer.update(name="muon", lr=5e-3, b2=0.99, schedule="cosine", warmup_steps=50)
    c.sft.sources = {"boxes": boxes("train", LOOSE), "points": points("train")}

    c.grpo.steps = GRPO_STEPS
    c.grpo.batch_size = 32
    c.grpo.group_size = 8
    c.grpo.max_new_tokens = 8
    c.grpo.algorithm = "grpo"
    c.grpo.kl_coef = 0.0
    c.grpo.rewards = {"iou": 1.0, "gaussian_point": 1.0, "format": 0.2}
    c.grpo.optimizer.update(name="muon", lr=3e-3, b2=0.99, schedule="linear", warmup_steps=10)
    c.grpo.sources = {"boxes": boxes("train"), "points": points("train")}

    c.eval.sources = {"boxes": boxes("heldout"), "points": points("heldout")}
    c.eval.batch_size = 128
    c.eval.max_new_tokens = 8
    c.log.every = 25
    c.log.samples_every = 100
    c.checkpoint.every = 500
    c.mesh.cpu_devices = 2

    if arm not in ("grpo", "sft_loose", "sft_exact"):
        raise UserError(
            f"configs/quickstart.py:{arm} does not exist: there are grpo, sft_loose and sft_exact"
        )
    if arm != "grpo":
        c.stages = ("sft",)
        c.sft.steps = SFT_STEPS + SFT_STEPS_PER_GRPO_STEP * GRPO_STEPS
        c.sft.sources["boxes"] = boxes("train", {"sft_loose": LOOSE, "sft_exact": 0.0}[arm])
    return c.lock()


def boxes(split: str, loose: float = 0.0) -> ConfigDict:
    """Returns `detect {phrase}` on scenes whose boxes are drawn up to that share too wide on each side."""
    return config.section(Source(uri=f"synthetic:{SPLITS[split]}&loose={loose}", boxes="box"))


def points(split: str) -> ConfigDict:
    """Returns `point to {phrase}`, with the exact boxes as the regions that points should lie in."""
    return config.section(
        Source(
            uri=f"synthetic:{SPLITS[split]}",
            target="points",
            boxes="box",
            points="point",
            prompt="point to {phrase}",
        )
    )

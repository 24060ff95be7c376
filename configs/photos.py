r"""Trains a small model by GRPO on photographs with boxes in pixels, from a JSON-lines file.

python -m pg_ground.train --config=configs/photos.py --workdir=runs/photos \
    --config.grpo.sources.photos.uri=jsonl:PATH/triples.jsonl

A line of the file:

    {"image": "1.jpg", "expression": "left dog", "bbox_xyxy": [12.0, 30.5, 200.0, 180.0]}

The images are in `images/` beside the file. Other field names and formats go into the entry below.
configs/paligemma.py does the same from published weights. The model here is small and has PaliGemma
1's shape.

Hardware: any CPU. Time: about two minutes for 20 steps. Expected: the model learns nothing in 20
steps from random weights. The pictures in `samples/` show the photographs, the annotated boxes
and the model's guesses.
"""

from ml_collections import ConfigDict

from pg_ground import config
from pg_ground.config import Source

PHOTOS = Source(
    uri="jsonl:photos.jsonl",
    image_root="images",
    phrase="expression",
    boxes="bbox_xyxy",
    box_format="xyxy_px",
    prompt="detect {phrase}",
    name="",
)


def get_config() -> ConfigDict:
    """Returns the settings of the reinforced stage."""
    c = config.template()
    c.stages = ("grpo",)

    c.model.image_size = 224
    c.model.vision.update(width=64, depth=2, mlp_dim=128, num_heads=4, patch_size=14)
    c.model.text.update(width=64, depth=2, mlp_dim=256, num_heads=4, num_kv_heads=1, head_dim=16)
    c.model.text.vocab_size = 2048
    c.model.coordinate_init = "sinusoid"
    c.data.prompt_length = 64
    c.data.suffix_length = 8

    c.grpo.steps = 20
    c.grpo.batch_size = 8
    c.grpo.group_size = 8
    c.grpo.max_new_tokens = 8
    c.grpo.optimizer.lr = 1e-3
    c.grpo.rewards = {"iou": 1.0, "giou": 0.5, "format": 0.2}
    c.grpo.sources = {"photos": config.section(PHOTOS)}

    c.log.every = 2
    c.log.samples_every = 10
    c.checkpoint.every = 10
    return c.lock()

r"""Detects all objects of an image: COCO, or your own classes in COCO's format.

The argument is MODEL_SLICE, a name of `RECIPES`. All commands run in the folder of the checkout, in
its environment (`python3 -m venv --without-pip .venv` if there is none, then
`. .venv/bin/activate`; README.md installs the package).

1. Rehearse the recipe on this machine. It needs no data, no weights and no TPU:

       python -m pg_ground.rehearse --config=configs/detection.py:pg2_3b_448_v5e_8

2. Get the data: 20 GB to download, into data/coco/. The disk needs 41 GB until the
   .zip files are removed, and 21 GB afterwards.

       mkdir -p data/coco && cd data/coco
       curl -fLOC - http://images.cocodataset.org/annotations/annotations_trainval2017.zip
       curl -fLOC - http://images.cocodataset.org/zips/train2017.zip
       curl -fLOC - http://images.cocodataset.org/zips/val2017.zip
       for file in *.zip; do python -m zipfile -e "$file" . && rm "$file"; done; cd ../..

   Your own classes: a file of annotations in COCO's format for each split.

       --config.sft.sources.train.uri='coco:MINE/train.json?ask=image&images=MINE/images'
       --config.grpo.sources.train.uri=… --config.eval.sources.val.uri=…

3. Get the weights and the tokenizer, 12 GB at most, after you have accepted the licence on the Hub:

       hf auth login
       hf download google/paligemma2-3b-pt-448 --local-dir weights/pg2_448

4. Check the data, copy it to a bucket, train, score and export:

       python -m pg_ground.rehearse --config=configs/detection.py:pg2_3b_448_v5e_8 --data_only \
           --config.data.tokenizer=weights/pg2_448
       gcloud storage cp -r data/coco gs://BUCKET/coco
       gcloud storage cp -r weights/pg2_448 gs://BUCKET/pg2_448
       python -m pg_ground.train --config=configs/detection.py:pg2_3b_448_v5e_8 \
           --distributed=auto --workdir=gs://BUCKET/runs/coco --config.data.dir=gs://BUCKET/coco \
           --config.init=gs://BUCKET/pg2_448 --config.data.tokenizer=gs://BUCKET/pg2_448
       python -m pg_ground.evaluate --config=configs/detection.py:pg2_3b_448_v5e_8 \
           --workdir=gs://BUCKET/runs/coco --out=scores \
           --config.data.dir=gs://BUCKET/coco --config.data.tokenizer=gs://BUCKET/pg2_448
       python -m pg_ground.convert gs://BUCKET/runs/coco exported

An answer names every object: `<loc…><loc…><loc…><loc…> person ; …`, at most 32 objects of an image
in training. All objects of an image count in the evaluation, which is COCO's mAP with the
likelihood of each label as its score. The stages are supervised training and GRPO with the reward
`detection` of "Tuning computer vision models with task rewards" (arXiv 2302.08242), where mAP rose
from 39 to 54 for another model. PaliGemma 2 3B at 448 pixels has a mAP of 38.5 by supervised
training (arXiv 2412.03555).

Hours at best, from the programs that were compiled for each slice on 2026-11-28 (jax 0.10.2; no
run was timed). GiB is the largest program on a chip. The evaluations are not counted here.

                                            s a step:             hours:              chip-
recipe                  slice      prompts  GiB    SFT  sampling, update   SFT, GRPO, eval.   hours
pg1_3b_448_v5e_8        v5e:2x4         64   12.4    1.99   1.58   2.42    2.0  2.1  0.1         33
pg2_3b_448_v5e_8        v5e:2x4         64   13.4    2.19   2.22   2.70    2.3  2.5  0.1         39
pg2_3b_448_v5p_8        v5p:2x2x1      128   40.2    3.77   1.97   4.63    1.9  1.7  0.0         15
pg2_3b_448_v6e_8        v6e:2x4         64   13.3    0.71   1.11   0.79    0.7  1.0  0.0         14
pg2_3b_448_lora_v5e_1   v5e:1x1          8    9.5    1.55   2.26   2.00    12.7  17.5  0.0       30
pg2_3b_448_lora_h100    H100 *          32   31.5    1.23   0.94   1.60    2.5  2.6  0.0          5

* By arithmetic, at best: nothing was compiled for a GPU. The operations of each program are divided
by 989 TFLOP/s, the bytes of weights and caches by 3.35 TB/s. One H100 has 74.5 GiB (80 GB).
"""

from ml_collections import ConfigDict

from pg_ground import config
from pg_ground.config import Source

from . import tpu
from .tpu import V5E_8, V5P_8, V6E_8, Recipe

RECIPES: dict[str, Recipe] = {
    "pg1_3b_448_v5e_8": Recipe("pg1_3b_448", V5E_8, 64),
    "pg2_3b_448_v5e_8": Recipe("pg2_3b_448", V5E_8, 64),
    "pg2_3b_448_v5p_8": Recipe("pg2_3b_448", V5P_8, 128),
    "pg2_3b_448_v6e_8": Recipe("pg2_3b_448", V6E_8, 64),
    "pg2_3b_448_lora_v5e_1": Recipe("pg2_3b_448", "v5e:1x1", 8, lora=True, grad_accum_steps=2),
    "pg2_3b_448_lora_h100": Recipe("pg2_3b_448", "", 32, lora=True),
}
"""MODEL_SLICE."""

OBJECTS = 32
"""Objects of an image in training. 97 % of COCO's images have at most 25."""

TOKENS = 256
"""An object has four loc tokens, a name of one or two tokens, and a separator."""

SFT_QUESTIONS = 4 * 118_287
"""Four passes over train2017."""

GRPO_QUESTIONS = 118_287


def get_config(name: str = "pg2_3b_448_v5e_8") -> ConfigDict:
    """Returns the settings of MODEL_SLICE.

    Raises:
      UserError: there is no recipe of this name.
    """
    recipe = tpu.find_recipe("configs/detection.py", name, RECIPES)
    c = tpu.make_config(recipe).unlock()
    c.stages = ("sft", "grpo")
    c.model.logits_block = 16  # each block gathers the embedding
    c.data.dir = "data/coco"
    c.data.prompt_length = 16
    c.data.suffix_length = TOKENS
    c.data.max_boxes = 100

    tpu.set_sft(c, recipe, SFT_QUESTIONS)
    c.sft.sources = {"train": coco("train2017", OBJECTS)}

    c.grpo.steps = GRPO_QUESTIONS // recipe.prompts
    c.grpo.max_new_tokens = TOKENS
    c.grpo.rewards = {"detection": 1.0, "format": 0.1}
    c.grpo.optimizer.warmup_steps = c.grpo.steps // 50
    c.grpo.sources = {"train": coco("train2017", OBJECTS)}

    c.eval.sources = {"val": coco("val2017", 0)}
    c.eval.benchmarks = {"val": "detection"}
    c.eval.examples = 0
    c.eval.interim_examples = 512
    c.eval.every = c.grpo.steps // 10
    c.eval.max_new_tokens = TOKENS
    c.eval.rollouts = 0
    c.checkpoint.best = "eval/val/ap"
    return c.lock()


def coco(split: str, max_objects: int) -> ConfigDict:
    """Returns the images of a split with all their objects: one question for each image."""
    file = f"{{dir}}/annotations/instances_{split}.json"
    source = Source(
        uri=f"coco:{file}?ask=image&images={{dir}}/{split}",
        boxes="boxes",
        box_format="xywh_px",
        label="categories",
        max_objects=max_objects,
        empty="keep",
        flat_boxes="drop",
        prompt="detect all classes",
        name="",
    )
    return config.section(source)

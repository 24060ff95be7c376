r"""Finds the elements of interfaces: trains on WaveUI, and measures ScreenSpot-v2 at 896 pixels.

The argument is MODEL_SLICE, a name of `RECIPES`. All commands run in the folder of the checkout, in
its environment (`python3 -m venv --without-pip .venv` if there is none, then
`. .venv/bin/activate`; README.md installs the package).

1. Rehearse the recipe on this machine. It needs no data, no weights and no TPU:

       python -m pg_ground.rehearse --config=configs/gui.py:pg2_3b_896_v5p_8

2. Get the data: 12 GB to download and on the disk, in data/gui/.

       hf download agentsea/wave-ui-25k --repo-type=dataset --local-dir data/gui/wave-ui-25k
       hf download OS-Copilot/ScreenSpot-v2 --repo-type=dataset --local-dir data/gui/ScreenSpot-v2
       python -m zipfile -e data/gui/ScreenSpot-v2/screenspotv2_image.zip data/gui/ScreenSpot-v2

   Your own screenshots: an entry such as `gui_boxes` of configs/data.py.

3. Get the weights and the tokenizer, 12 GB at most, after you have accepted the licence on the Hub:

       hf auth login
       hf download google/paligemma2-3b-pt-896 --local-dir weights/pg2_896

4. Check the data, copy it to a bucket, train, score and export:

       python -m pg_ground.rehearse --config=configs/gui.py:pg2_3b_896_v5p_8 --data_only \
           --config.data.tokenizer=weights/pg2_896
       gcloud storage cp -r data/gui gs://BUCKET/gui
       gcloud storage cp -r weights/pg2_896 gs://BUCKET/pg2_896
       python -m pg_ground.train --config=configs/gui.py:pg2_3b_896_v5p_8 --distributed=auto \
           --workdir=gs://BUCKET/runs/gui --config.data.dir=gs://BUCKET/gui \
           --config.init=gs://BUCKET/pg2_896 --config.data.tokenizer=gs://BUCKET/pg2_896
       python -m pg_ground.evaluate --config=configs/gui.py:pg2_3b_896_v5p_8 \
           --workdir=gs://BUCKET/runs/gui --out=scores \
           --config.data.dir=gs://BUCKET/gui --config.data.tokenizer=gs://BUCKET/pg2_896
       python -m pg_ground.convert gs://BUCKET/runs/gui exported

The answer is the box of the element. ScreenSpot counts its centre as the click, and reports
accuracy by platform and by type of element. The names of WaveUI's fields come from its dataset
card: look at the data before you train, with `look` and this recipe.

Published: GUI-G1-3B has 90.3 on ScreenSpot, POINTS-GUI-G-8B has 95.7 on ScreenSpot-v2. No PaliGemma
has a published result.

Hours at best, from the programs that were compiled for each slice on 2026-11-28 (jax 0.10.2; no
run was timed). GiB is the largest program on a chip.

                                            s a step:             hours:              chip-
recipe                  slice      prompts  GiB    SFT  sampling, update   SFT, GRPO, eval.   hours
pg2_3b_448_v5e_8        v5e:2x4         64   12.3    1.82   0.24   0.96    0.2  0.3  0.0          4
pg2_3b_896_v5p_8        v5p:2x2x1       32   47.2    3.59   0.56   1.82    0.8  1.0  0.1          7
pg2_3b_896_v6e_8        v6e:2x4         32   23.9    2.65   0.32   1.32    0.6  0.7  0.1         11
pg2_3b_448_lora_v5e_1   v5e:1x1          8   11.5    1.26   0.25   0.66    1.1  1.6  0.1          3
pg2_3b_448_lora_h100    H100 *          32   24.6    1.00   0.20   0.53    0.2  0.3  0.0          1

* By arithmetic, at best: nothing was compiled for a GPU. The operations of each program are divided
by 989 TFLOP/s, the bytes of weights and caches by 3.35 TB/s. One H100 has 74.5 GiB (80 GB).
"""

from ml_collections import ConfigDict

from pg_ground import config
from pg_ground.config import Source

from . import tpu
from .tpu import V5E_8, V5P_8, V6E_8, Recipe

RECIPES: dict[str, Recipe] = {
    "pg2_3b_448_v5e_8": Recipe("pg2_3b_448", V5E_8, 64),
    "pg2_3b_896_v5p_8": Recipe("pg2_3b_896", V5P_8, 32),
    "pg2_3b_896_v6e_8": Recipe("pg2_3b_896", V6E_8, 32),
    "pg2_3b_448_lora_v5e_1": Recipe("pg2_3b_448", "v5e:1x1", 8, lora=True),
    "pg2_3b_448_lora_h100": Recipe("pg2_3b_448", "", 32, lora=True),
}
"""MODEL_SLICE."""

SFT_QUESTIONS = 2 * 24_978
"""Two passes over WaveUI-25k."""

GRPO_QUESTIONS = 2 * 24_978


def get_config(name: str = "pg2_3b_896_v5p_8") -> ConfigDict:
    """Returns the settings of MODEL_SLICE.

    Raises:
      UserError: there is no recipe of this name.
    """
    recipe = tpu.find_recipe("configs/gui.py", name, RECIPES)
    c = tpu.make_config(recipe).unlock()
    c.stages = ("sft", "grpo")
    c.data.dir = "data/gui"
    c.data.prompt_length = 64
    c.data.suffix_length = 8
    c.data.max_boxes = 1

    tpu.set_sft(c, recipe, SFT_QUESTIONS)
    c.sft.sources = {"wave_ui": wave_ui()}

    c.grpo.steps = GRPO_QUESTIONS // recipe.prompts
    c.grpo.max_new_tokens = 8
    # The click is the centre of the box.
    c.grpo.rewards = {"iou": 1.0, "gaussian_point": 0.5, "format": 0.2}
    c.grpo.optimizer.warmup_steps = c.grpo.steps // 50
    c.grpo.sources = {"wave_ui": wave_ui()}

    c.eval.sources = {"screenspot_v2": screenspot_v2()}
    c.eval.benchmarks = {"screenspot_v2": "screenspot_v2"}
    c.eval.examples = 0
    c.eval.every = c.grpo.steps // 5
    c.eval.max_new_tokens = 8
    c.eval.rollouts = 0
    c.checkpoint.best = "eval/screenspot_v2/accuracy"
    return c.lock()


def wave_ui() -> ConfigDict:
    """Returns the elements of WaveUI-25k: one question for each."""
    source = Source(
        uri="parquet:{dir}/wave-ui-25k/data/train-*.parquet",
        phrase="name",
        boxes="bbox",
        box_format="xyxy_px",
        prompt="detect {phrase}",
        name="",
    )
    return config.section(source)


def screenspot_v2() -> ConfigDict:
    """Returns the questions of ScreenSpot-v2."""
    source = Source(
        uri="json:{dir}/ScreenSpot-v2/screenspot_*_v2.json",
        image="img_filename",
        image_root="screenspotv2_image",
        phrase="instruction",
        boxes="bbox",
        box_format="xywh_px",
        prompt="detect {phrase}",
        name="",
    )
    return config.section(source)

r"""Points to things: trains on PixMo-Points, whose images are streamed from the web.

The argument is MODEL_SLICE, a name of `RECIPES`. All commands run in the folder of the checkout, in
its environment (`python3 -m venv --without-pip .venv` if there is none, then
`. .venv/bin/activate`; README.md installs the package).

1. Rehearse the recipe on this machine. It needs no data, no weights and no TPU. The miniature's
   images come from a web server on this machine:

       python -m pg_ground.rehearse --config=configs/pixmo_points.py:pg2_3b_448_v5e_8

2. Get the rows, 0.2 GB, into data/pixmo/. Their images are addresses on the web.

       for name in pixmo-points pixmo-points-eval pixmo-count; do
         hf download allenai/$name --repo-type=dataset --local-dir data/pixmo/$name
       done

   A run fetches each image once, into data/pixmo/images. Fetch them before a pod is rented:

       python -m pg_ground.prefetch --config=configs/pixmo_points.py:pg2_3b_448_v5e_8

   An address that is dead, or whose image has another hash, is a bad record. Some are dead today;
   a run goes on while less than 30 % of the records are bad (`data.bad_record_share`). After the
   prefetch, `--config.data.fetch.offline=True` asks no dead address again. For a pod, pack the
   records with their images; the batches stay the same. The command prints the sources' uris:

       python -m pg_ground.pack --config=configs/pixmo_points.py:pg2_3b_448_v5e_8 \
           --config.data.fetch.offline=True --out=gs://BUCKET/packed

3. Get the weights and the tokenizer, 12 GB at most, after you have accepted the licence on the Hub:

       hf auth login
       hf download google/paligemma2-3b-pt-448 --local-dir weights/pg2_448

4. Copy the files to a bucket, train, score and export:

       gcloud storage cp -r data/pixmo gs://BUCKET/pixmo
       gcloud storage cp -r weights/pg2_448 gs://BUCKET/pg2_448
       python -m pg_ground.train --config=configs/pixmo_points.py:pg2_3b_448_v5e_8 \
           --distributed=auto --workdir=gs://BUCKET/runs/pixmo \
           --config.data.dir=gs://BUCKET/pixmo \
           --config.init=gs://BUCKET/pg2_448 --config.data.tokenizer=gs://BUCKET/pg2_448
       python -m pg_ground.evaluate --config=configs/pixmo_points.py:pg2_3b_448_v5e_8 \
           --workdir=gs://BUCKET/runs/pixmo --out=scores \
           --config.data.dir=gs://BUCKET/pixmo --config.data.tokenizer=gs://BUCKET/pg2_448
       python -m pg_ground.convert gs://BUCKET/runs/pixmo exported

A question asks for all things of a label, at most 16 in training and 40 in the evaluation; of more
things, random ones count. A label that is not on the image has an empty answer. The evaluation is
precision, recall and F1 of PixMo-Points-Eval and of a held-out part of the training rows, and the
exact counts of PixMo-Count. Point-Bench is the entry `point_bench` of configs/data.py. Published by
others: MolmoPoint-8B 70.7 on Point-Bench (arXiv 2603.28069).

Hours at best, from the programs that were compiled for each slice on 2026-11-28 (jax 0.10.2; no
run was timed). GiB is the largest program on a chip. The evaluations are not counted here.

                                            s a step:             hours:              chip-
recipe                  slice      prompts  GiB    SFT  sampling, update   SFT, GRPO, eval.   hours
pg1_3b_448_v5e_8        v5e:2x4         64   11.3    1.75   0.54   1.32    1.9  1.0  0.0         24
pg2_3b_448_v5e_8        v5e:2x4         64   12.5    1.93   0.66   1.46    2.1  1.2  0.0         27
pg2_3b_448_v5p_8        v5p:2x2x1      128   33.8    3.31   0.63   2.50    1.8  0.9  0.0         11
pg2_3b_448_v6e_8        v6e:2x4        128   17.1    1.13   0.48   0.80    0.6  0.4  0.0          8
pg2_3b_448_lora_v5e_1   v5e:1x1          8   11.8    1.34   0.69   1.05    11.6  7.7  0.0        19
pg2_3b_448_lora_h100    H100 *          32   25.5    1.07   0.30   0.84    2.3  1.3  0.0          4

* By arithmetic, at best: nothing was compiled for a GPU. The operations of each program are divided
by 989 TFLOP/s, the bytes of weights and caches by 3.35 TB/s. One H100 has 74.5 GiB (80 GB).
"""

from typing import Any

from ml_collections import ConfigDict

from pg_ground import config
from pg_ground.config import Source

from . import tpu
from .tpu import V5E_8, V5P_8, V6E_8, Recipe

RECIPES: dict[str, Recipe] = {
    "pg1_3b_448_v5e_8": Recipe("pg1_3b_448", V5E_8, 64),
    "pg2_3b_448_v5e_8": Recipe("pg2_3b_448", V5E_8, 64),
    "pg2_3b_448_v5p_8": Recipe("pg2_3b_448", V5P_8, 128),
    "pg2_3b_448_v6e_8": Recipe("pg2_3b_448", V6E_8, 128),
    "pg2_3b_448_lora_v5e_1": Recipe("pg2_3b_448", "v5e:1x1", 8, lora=True),
    "pg2_3b_448_lora_h100": Recipe("pg2_3b_448", "", 32, lora=True),
}
"""MODEL_SLICE."""

POINTS = 16
"""Things of a question in training."""

LARGEST = 40
"""Things of a question in an evaluation. Of more things, this many random ones count."""

TOKENS = 80
"""A point has two loc tokens, and a separator of two tokens at most."""

SFT_QUESTIONS = 500_000

GRPO_QUESTIONS = 128_000

ROWS = "parquet:{dir}/pixmo-points/data/train-*.parquet"


def get_config(name: str = "pg2_3b_448_v5e_8") -> ConfigDict:
    """Returns the settings of MODEL_SLICE.

    Raises:
      UserError: there is no recipe of this name.
    """
    recipe = tpu.find_recipe("configs/pixmo_points.py", name, RECIPES)
    c = tpu.make_config(recipe).unlock()
    c.stages = ("sft", "grpo")
    c.model.logits_block = 8  # each block gathers the embedding
    c.data.dir = "data/pixmo"
    c.data.fetch.cache_dir = "data/pixmo/images"
    c.data.fetch.concurrency = 32
    c.data.fetch.retries = 1  # each try of a dead host takes 20 s
    c.data.bad_record_share = 0.3
    c.data.prompt_length = 48
    c.data.suffix_length = TOKENS
    c.data.max_boxes = LARGEST

    tpu.set_sft(c, recipe, SFT_QUESTIONS)
    c.sft.sources = training_sources()

    c.grpo.steps = GRPO_QUESTIONS // recipe.prompts
    c.grpo.max_new_tokens = TOKENS
    c.grpo.rewards = {"distance_gaussian": 1.0, "count_graded": 0.2, "format": 0.2}
    c.grpo.text_rewards = {"count_exact": 1.0}
    c.grpo.reward_settings.distance_unit = "diagonal"
    c.grpo.reward_settings.distance_sigma_share = 0.05
    c.grpo.optimizer.warmup_steps = c.grpo.steps // 50
    c.grpo.sources = training_sources()

    test = "parquet:{dir}/pixmo-points-eval/data/test-*.parquet"
    c.eval.sources = {
        "held_out": points(ROWS, sampling="end:1%", max_objects=LARGEST),
        "points_eval": points(test, max_objects=LARGEST),
        "counts_eval": counts("parquet:{dir}/pixmo-count/data/test-*.parquet"),
    }
    c.eval.benchmarks = {
        "held_out": "pointing",
        "points_eval": "pointing",
        "counts_eval": "counting",
    }
    c.eval.examples = 0
    c.eval.interim_examples = 256
    c.eval.every = c.grpo.steps // 10
    c.eval.max_new_tokens = TOKENS
    c.eval.rollouts = 0
    c.checkpoint.best = "eval/points_eval/f1"
    return c.lock()


def training_sources() -> dict[str, ConfigDict]:
    """Returns the two sources of both stages: points, and a fifth as many counts."""
    return {
        "points": points(ROWS, sampling="first:98%", max_objects=POINTS),
        "counts": counts("parquet:{dir}/pixmo-count/data/train-*.parquet", weight=0.2),
    }


def points(uri: str, **settings: Any) -> ConfigDict:
    """Returns rows of PixMo-Points: all points of a label, in percent of the image."""
    source = Source(
        uri=uri,
        image="image_url",
        image_sha256="image_sha256",
        phrase="label",
        target="points",
        points="points",
        point_format="xy_percent",
        empty="keep",
        prompt="point to {phrase}",
        name="",
        **settings,
    )
    return config.section(source)


def counts(uri: str, **settings: Any) -> ConfigDict:
    """Returns rows of PixMo-Count as questions for the number."""
    source = Source(
        uri=uri,
        image="image_url",
        image_sha256="image_sha256",
        phrase="label",
        target="text",
        suffix="{count}",
        prompt="answer en how many {phrase} are there?",
        name="",
        **settings,
    )
    return config.section(source)

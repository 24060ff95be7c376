r"""Trains PaliGemma on RefCOCO, RefCOCO+ and RefCOCOg, and measures acc@.5 on all eight splits.

The argument is MODEL_SLICE, a name of `RECIPES`: pg2_3b_448_v5e_8 is PaliGemma 2 3B at 448 pixels
on a v5e slice of eight chips. All commands run in the folder of the checkout, in its environment
(`python3 -m venv --without-pip .venv` if there is none, then `. .venv/bin/activate`).

1. Rehearse the recipe on this machine. It needs no data, no weights and no TPU, but five minutes on
   two idle cores (up to fifteen on busy ones), and 6 GB of disk for a while. libtpu (150 MB) tells
   the hours on the slice:

       pip --python .venv/bin/python install -e '.[tpu]'
       python -m pg_ground.rehearse --config=configs/refcoco.py:pg2_3b_448_v5e_8

2. Get the data into data/refcoco/: 13 GB to download. The disk needs 27 GB until the .zip files are
   removed, and 14 GB afterwards.

       mkdir -p data/refcoco && cd data/refcoco
       site=bvisionweb1.cs.unc.edu/licheng/referit/data
       curl -fLOC - https://web.archive.org/web/20220413011718if_/https://$site/refcoco.zip
       curl -fLOC - https://web.archive.org/web/20220413011656if_/https://$site/refcoco+.zip
       curl -fLOC - https://web.archive.org/web/20220413012904if_/https://$site/refcocog.zip
       curl -fLOC - http://images.cocodataset.org/zips/train2014.zip
       for file in *.zip; do python -m zipfile -e "$file" . && rm "$file"; done; cd ../..

   (The site of the annotations is offline; these are archived copies.) Training uses big_vision's
   combined set: the train splits of the three datasets, without any image of a val or test split.
   `--config.data.dir=gs://BUCKET/refcoco` reads another folder. configs/data.py has other forms of
   the same data: tfds, big_vision's builder, and rows on the Hub.

3. Get the weights and the tokenizer, 12 GB at most. Accept the licence on the Hub, then

       hf auth login
       hf download google/paligemma2-3b-pt-448 --local-dir weights/pg2_448

4. Check your files. The first command reads every record once, with its image; it takes from
   twenty minutes to hours, by the number of cores. The second repeats the rehearsal on your data:

       python -m pg_ground.rehearse --config=configs/refcoco.py:pg2_3b_448_v5e_8 --data_only \
           --config.data.tokenizer=weights/pg2_448
       python -m pg_ground.rehearse --config=configs/refcoco.py:pg2_3b_448_v5e_8 \
           --config.init=weights/pg2_448 --config.data.tokenizer=weights/pg2_448

5. Copy the files to a bucket. Train on the slice (docs/tpu.md leads to one), and export. The run
   writes 121 GB of checkpoints at most. `pip --python .venv/bin/python install -e '.[gcs]'` lets
   this machine read gs://BUCKET:

       gcloud storage cp -r data/refcoco gs://BUCKET/refcoco
       gcloud storage cp -r weights/pg2_448 gs://BUCKET/pg2_448
       python -m pg_ground.train --config=configs/refcoco.py:pg2_3b_448_v5e_8 --distributed=auto \
           --workdir=gs://BUCKET/runs/refcoco --config.data.dir=gs://BUCKET/refcoco \
           --config.init=gs://BUCKET/pg2_448 --config.data.tokenizer=gs://BUCKET/pg2_448
       python -m pg_ground.report --workdir=gs://BUCKET/runs/refcoco --out=report.html
       python -m pg_ground.convert gs://BUCKET/runs/refcoco exported

   `report --watch` shows the run while it trains. The run scores all splits at its end. To write
   every answer to a file, score them again:

       python -m pg_ground.evaluate --config=configs/refcoco.py:pg2_3b_448_v5e_8 \
           --workdir=gs://BUCKET/runs/refcoco --out=scores \
           --config.data.dir=gs://BUCKET/refcoco --config.data.tokenizer=gs://BUCKET/pg2_448

The stages are supervised training and GRPO with the reward IoU. A checkpoint such as
paligemma2-3b-mix-448 knows the task: `--config.stages='("grpo",)'` starts GRPO at once. At the end
of each stage all 57,457 held-out questions are answered. During a stage, an evaluation answers 512
questions of each split.

acc@.5 is the share of answers whose box has an IoU of at least 0.5 with the right box. Google has
published no acc@.5 of PaliGemma on RefCOCO. Published by others, val/testA/testB of RefCOCO,
of RefCOCO+, and val/test of RefCOCOg: EGM-Qwen3-VL-4B by GRPO (arXiv 2601.13633)
93.5/95.1/90.0, 89.7/93.1/84.9, 90.4/90.8.

Hours at best, from the programs that were compiled for each slice on 2026-11-28 (jax 0.10.2; no
run was timed). GiB is the largest program on a chip.

                                            s a step:             hours:              chip-
recipe                  slice      prompts  GiB    SFT  sampling, update   SFT, GRPO, eval.   hours
pg1_3b_224_v5e_8        v5e:2x4        128   10.2    0.93   0.15   0.54    0.3  0.4  0.1          6
pg1_3b_448_v5e_8        v5e:2x4         64   11.2    1.66   0.24   0.87    1.2  1.2  0.4         22
pg1_3b_448_v6e_8        v6e:2x4        128   16.5    0.84   0.11   0.44    0.3  0.3  0.2          6
pg2_3b_224_v5e_8        v5e:2x4        128   11.1    1.01   0.15   0.59    0.4  0.4  0.1          7
pg2_3b_224_v5p_8        v5p:2x2x1      256   23.2    1.74   0.26   1.02    0.3  0.4  0.0          3
pg2_3b_224_v6e_8        v6e:2x4        256   12.1    0.43   0.07   0.25    0.1  0.1  0.0          2
pg2_3b_448_v5e_8        v5e:2x4         64   12.3    1.82   0.24   0.96    1.3  1.3  0.3         24
pg2_3b_448_v5p_8        v5p:2x2x1      128   33.0    3.13   0.42   1.64    1.1  1.1  0.2         10
pg2_3b_448_v6e_8        v6e:2x4        128   16.7    1.05   0.15   0.53    0.4  0.4  0.2          8
pg2_3b_896_v5p_8        v5p:2x2x1       32   47.2    3.59   0.56   1.82    5.0  5.3  0.9         45
pg2_3b_896_v6e_8        v6e:2x4         32   23.9    2.65   0.32   1.32    3.7  3.6  1.0         67
pg2_3b_224_lora_v5e_1   v5e:1x1         16    9.0    0.71   0.15   0.42    2.0  2.6  0.4          5
pg2_3b_448_lora_v5e_1   v5e:1x1          8   11.5    1.26   0.25   0.66    7.0  8.1  1.5         17
pg2_3b_224_lora_h100    H100 *          64   15.3    0.56   0.12   0.34    0.4  0.5  0.1          1
pg2_3b_448_lora_h100    H100 *          32   24.6    1.00   0.20   0.53    1.4  1.6  0.3          3

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
    "pg1_3b_224_v5e_8": Recipe("pg1_3b_224", V5E_8, 128),
    "pg1_3b_448_v5e_8": Recipe("pg1_3b_448", V5E_8, 64),
    "pg1_3b_448_v6e_8": Recipe("pg1_3b_448", V6E_8, 128),
    "pg2_3b_224_v5e_8": Recipe("pg2_3b_224", V5E_8, 128),
    "pg2_3b_224_v5p_8": Recipe("pg2_3b_224", V5P_8, 256),
    "pg2_3b_224_v6e_8": Recipe("pg2_3b_224", V6E_8, 256),
    "pg2_3b_448_v5e_8": Recipe("pg2_3b_448", V5E_8, 64),
    "pg2_3b_448_v5p_8": Recipe("pg2_3b_448", V5P_8, 128),
    "pg2_3b_448_v6e_8": Recipe("pg2_3b_448", V6E_8, 128),
    "pg2_3b_896_v5p_8": Recipe("pg2_3b_896", V5P_8, 32),
    "pg2_3b_896_v6e_8": Recipe("pg2_3b_896", V6E_8, 32),
    "pg2_3b_224_lora_v5e_1": Recipe("pg2_3b_224", "v5e:1x1", 16, lora=True),
    "pg2_3b_448_lora_v5e_1": Recipe("pg2_3b_448", "v5e:1x1", 8, lora=True),
    "pg2_3b_224_lora_h100": Recipe("pg2_3b_224", "", 64, lora=True),
    "pg2_3b_448_lora_h100": Recipe("pg2_3b_448", "", 32, lora=True),
}
"""MODEL_SLICE. Not every model is listed with every slice: `--config.grpo.batch_size` and the other
flags change a recipe, and `compile --search` finds the largest batch."""

SPLITS = {
    "refcoco": ("unc", ("val", "testA", "testB")),
    "refcoco+": ("unc", ("val", "testA", "testB")),
    "refcocog": ("umd", ("val", "test")),
}
"""The held-out splits of each dataset, and who made them."""

SFT_QUESTIONS = 320_000
"""About one pass. The three train splits have 321,327 sentences, the combined one has fewer."""

GRPO_QUESTIONS = 256_000


def get_config(name: str = "pg2_3b_448_v5e_8") -> ConfigDict:
    """Returns the settings of MODEL_SLICE.

    Raises:
      UserError: there is no recipe of this name.
    """
    recipe = tpu.find_recipe("configs/refcoco.py", name, RECIPES)
    c = tpu.make_config(recipe).unlock()
    c.stages = ("sft", "grpo")
    c.data.dir = "data/refcoco"
    c.data.prompt_length = 64
    c.data.suffix_length = 8
    c.data.max_boxes = 1

    tpu.set_sft(c, recipe, SFT_QUESTIONS)
    c.sft.sources = {"combined": refer("combined", "train")}

    c.grpo.steps = GRPO_QUESTIONS // recipe.prompts
    c.grpo.max_new_tokens = 8
    c.grpo.optimizer.warmup_steps = c.grpo.steps // 50
    c.grpo.sources = {"combined": refer("combined", "train")}

    c.eval.sources = {
        f"{dataset}_{split}": refer(dataset, split, split_by=split_by)
        for dataset, (split_by, splits) in SPLITS.items()
        for split in splits
    }
    c.eval.benchmarks = {source: source for source in c.eval.sources}
    c.eval.examples = 0
    c.eval.interim_examples = 512
    c.eval.every = c.grpo.steps // 10
    c.eval.max_new_tokens = 8
    c.eval.rollouts = 0
    c.checkpoint.best = "eval/refcoco_val/acc50"
    return c.lock()


def refer(dataset: str, split: str, **options: Any) -> ConfigDict:
    """Returns the questions of one split: one for each sentence, with the box of its object.

    Args:
      options: of the uri, such as split_by="unc".
    """
    options = {"dataset": dataset, **options, "split": split, "images": "{dir}/train2014"}
    query = "&".join(f"{key}={value}" for key, value in options.items())
    source = Source(
        uri=f"refer:{{dir}}?{query}",
        phrase="sentences[].raw",
        boxes="bbox",
        box_format="xywh_px",
        prompt="detect {phrase}",
        name="",
    )
    return config.section(source)

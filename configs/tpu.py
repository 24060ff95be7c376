r"""Recipes for TPU slices: PaliGemma 1 and 2, with every parameter or with adapters.

python -m pg_ground.compile --config=configs/tpu.py:pg1_3b_224_v5e_8 --topology=v5e:2x4
python -m pg_ground.train --config=configs/tpu.py:pg1_3b_224_v5e_8 --distributed=auto \
    --workdir=/shared/run --config.init=… --config.data.tokenizer=… \
    --config.grpo.sources.boxes.uri=… --config.eval.sources.boxes.uri=…

The argument is a name in `RECIPES`. Data, weights and rewards are those of configs/paligemma.py.
Each prompt has 8 completions of 64 tokens. docs/tpu.md leads from an empty cloud project to a run.

Each recipe was compiled ahead of time for its slice on 2026-11-27 (benchmarks/results has all
columns). No such run has been timed. The table shows GiB a chip and seconds at best, for sampling
and for the update, and the resource that binds the update.

                                                 GiB:          s at best:       update
recipe                   slice      prompts  sampling  update  sampling  update   bound by
pg1_3b_224_v5e_8         v5e:2x4        128      10.3     8.7      0.43    1.20   FLOPs
pg1_3b_224_v5p_8         v5p:2x2x1      256      16.4    23.3      0.55    2.05   FLOPs
pg1_3b_448_v5e_8         v5e:2x4         64      10.4     9.3      0.44    1.20   FLOPs
pg1_3b_448_v5p_8         v5p:2x2x1      128      16.1    25.4      0.56    2.07   FLOPs
pg2_3b_224_v5e_8         v5e:2x4        128      11.9     9.1      0.50    1.32   FLOPs
pg2_3b_224_v5p_8         v5p:2x2x1      256      21.7    24.9      0.57    2.27   FLOPs
pg2_3b_448_v5e_8         v5e:2x4         64      11.6     9.6      0.53    1.33   FLOPs
pg2_3b_448_v5p_8         v5p:2x2x1      128      20.7    24.5      0.58    2.28   FLOPs
pg1_3b_224_lora_v5e_1    v5e:1x1          8       6.0     7.4      0.34    0.43   FLOPs
pg1_3b_224_lora_v5e_8    v5e:2x4        256       7.7    13.4      0.65    1.72   FLOPs
pg1_3b_224_lora_v5p_8    v5p:2x2x1      256       9.7    21.0      0.56    1.47   FLOPs
pg1_3b_448_lora_v5e_8    v5e:2x4         96       7.9    13.1      0.54    1.25   FLOPs
pg1_3b_448_lora_v5p_8    v5p:2x2x1      128      11.3    22.3      0.56    1.43   FLOPs
pg2_3b_224_lora_v5e_8    v5e:2x4        256      10.2    13.5      0.73    1.95   FLOPs
pg2_3b_224_lora_v5p_8    v5p:2x2x1      256      14.8    20.4      0.58    1.67   FLOPs
pg2_3b_448_lora_v5e_8    v5e:2x4        128       9.7    15.1      0.85    1.90   FLOPs
pg2_3b_448_lora_v5p_8    v5p:2x2x1      128      13.7    21.6      0.58    1.63   FLOPs
pg2_10b_224_v5e_64       v5e:8x8        256       7.5     7.6      0.43    1.18   FLOPs
pg2_10b_224_v5p_16       v5p:2x2x2      128      37.1    25.0      0.65    2.02   FLOPs
pg2_28b_224_v5p_16       v5p:2x2x2       64      49.6    59.3      6.27    2.99   FLOPs
pg1_3b_224_v5e_256       v5e:16x16     1024       6.1     1.6      0.32    0.30   FLOPs
"""

from collections.abc import Mapping
from typing import NamedTuple

from ml_collections import ConfigDict

from pg_ground.types import UserError, nearest

from . import paligemma


class Recipe(NamedTuple):
    """The work of a slice."""

    model: str
    """VARIANT_PIXELS of configs/paligemma.py."""
    topology: str
    """Slice of TPUs; "" is one GPU."""
    prompts: int
    """Prompts per step, over all chips."""
    lora: bool = False
    grad_accum_steps: int = 1
    replica: int = 1
    """Groups of chips that each hold all parameters."""
    model_axis: int = 1
    """Chips that share each matrix, for models whose gathered weights do not fit for sampling."""
    logits_block: int = 2


V5E_8 = "v5e:2x4"
V5P_8 = "v5p:2x2x1"
"""Four chips. They are sold as v5p-8, by their cores."""

V6E_8 = "v6e:2x4"

SFT_LEARNING_RATE = 1e-5
"""The best rate of most of PaliGemma's transfers (arXiv 2407.07726, arXiv 2412.03555)."""

SFT_ADAPTER_FACTOR = 10
"""Adapters need larger steps than the matrices that they are added to."""

RECIPES: dict[str, Recipe] = {
    "pg1_3b_224_v5e_8": Recipe("pg1_3b_224", V5E_8, 128),
    "pg1_3b_224_v5p_8": Recipe("pg1_3b_224", V5P_8, 256),
    "pg1_3b_448_v5e_8": Recipe("pg1_3b_448", V5E_8, 64),
    "pg1_3b_448_v5p_8": Recipe("pg1_3b_448", V5P_8, 128),
    "pg2_3b_224_v5e_8": Recipe("pg2_3b_224", V5E_8, 128),
    "pg2_3b_224_v5p_8": Recipe("pg2_3b_224", V5P_8, 256),
    "pg2_3b_448_v5e_8": Recipe("pg2_3b_448", V5E_8, 64),
    "pg2_3b_448_v5p_8": Recipe("pg2_3b_448", V5P_8, 128),
    "pg1_3b_224_lora_v5e_1": Recipe("pg1_3b_224", "v5e:1x1", 8, lora=True),
    "pg1_3b_224_lora_v5e_8": Recipe("pg1_3b_224", V5E_8, 256, lora=True),
    "pg1_3b_224_lora_v5p_8": Recipe("pg1_3b_224", V5P_8, 256, lora=True),
    "pg1_3b_448_lora_v5e_8": Recipe("pg1_3b_448", V5E_8, 96, lora=True),
    "pg1_3b_448_lora_v5p_8": Recipe("pg1_3b_448", V5P_8, 128, lora=True),
    "pg2_3b_224_lora_v5e_8": Recipe("pg2_3b_224", V5E_8, 256, lora=True),
    "pg2_3b_224_lora_v5p_8": Recipe("pg2_3b_224", V5P_8, 256, lora=True),
    "pg2_3b_448_lora_v5e_8": Recipe("pg2_3b_448", V5E_8, 128, lora=True),
    "pg2_3b_448_lora_v5p_8": Recipe("pg2_3b_448", V5P_8, 128, lora=True),
    "pg2_10b_224_v5e_64": Recipe("pg2_10b_224", "v5e:8x8", 256, model_axis=4),
    "pg2_10b_224_v5p_16": Recipe("pg2_10b_224", "v5p:2x2x2", 128),
    "pg2_28b_224_v5p_16": Recipe("pg2_28b_224", "v5p:2x2x2", 64),
    "pg1_3b_224_v5e_256": Recipe("pg1_3b_224", "v5e:16x16", 1024, replica=4),
}


def get_config(name: str = "pg1_3b_224_v5e_8") -> ConfigDict:
    """Returns the config of a recipe.

    Raises:
      UserError: there is no recipe of this name.
    """
    return make_config(find_recipe("configs/tpu.py", name, RECIPES))


def find_recipe(file: str, name: str, recipes: Mapping[str, Recipe]) -> Recipe:
    """Returns the recipe of this name in a config file.

    Raises:
      UserError: there is no recipe of this name.
    """
    if name not in recipes:
        raise UserError(f"{file}:{name} does not exist: {nearest(name, recipes)}")
    return recipes[name]


def make_config(recipe: Recipe) -> ConfigDict:
    """Returns the config of a recipe with 64 tokens in an answer and the data of
    configs/paligemma.py."""
    c = paligemma.get_config(recipe.model + ("" if recipe.lora else "_full")).unlock()
    c.model.logits_block = recipe.logits_block
    c.mesh.replica = recipe.replica
    c.mesh.model = recipe.model_axis
    c.data.prompt_length = 32
    c.data.suffix_length = 64
    c.data.max_boxes = 10
    c.grpo.batch_size = recipe.prompts
    c.grpo.grad_accum_steps = recipe.grad_accum_steps
    c.grpo.max_new_tokens = 64
    c.eval.batch_size = recipe.prompts
    c.eval.max_new_tokens = 64
    return c.lock()


def set_sft(c: ConfigDict, recipe: Recipe, questions: int) -> None:
    """Sets the supervised stage of a recipe: a cosine schedule over so many questions."""
    c.sft.batch_size = 2 * recipe.prompts
    c.sft.grad_accum_steps = recipe.grad_accum_steps
    c.sft.steps = questions // c.sft.batch_size
    factor = SFT_ADAPTER_FACTOR if recipe.lora else 1
    c.sft.optimizer.update(
        lr=SFT_LEARNING_RATE * factor, schedule="cosine", warmup_steps=c.sft.steps // 20, b2=0.95
    )

r"""Improves published PaliGemma weights by GRPO on your boxes.

python -m pg_ground.train --config=configs/paligemma.py:pg2_3b_448 --workdir=runs/pg2 \
    --config.init=paligemma2-3b-pt-448.b16.npz \
    --config.data.tokenizer=paligemma_tokenizer.model \
    --config.grpo.sources.boxes.uri=jsonl:/data/train.jsonl \
    --config.eval.sources.boxes.uri=jsonl:/data/val.jsonl

The argument is VARIANT_PIXELS. VARIANT is pg1_3b, pg2_3b, pg2_10b or pg2_28b. PIXELS is 224, 448 or
896. The recipe trains adapters on a frozen bfloat16 base. With `:pg2_3b_448_full` it trains every
parameter.

- `init` is a big_vision `.npz`, a Hugging Face directory, or a run.
- `data.tokenizer` is big_vision's paligemma_tokenizer.model, the tokenizer.model of a Hugging Face
  directory, or the tokenizer of plain Gemma.
- A line of the data has this form. The images are in `images/` beside the file. Other field names
  and formats go into `boxes()` below.

    {"image": "1.jpg", "expression": "left dog", "bbox_xyxy": [12.0, 30.5, 200.0, 180.0]}

Hardware: `python benchmarks/trained_bytes.py` prints the memory of parameters and optimizer: 6.1 GB
for the adapters of pg1_3b. Activations need more. Time and results are not measured: no published
weights were available.
"""

from ml_collections import ConfigDict

from pg_ground import config
from pg_ground.config import Source
from pg_ground.types import UserError

LEARNING_RATES = {"pg1_3b": 1e-6, "pg2_3b": 1e-6, "pg2_10b": 3e-7, "pg2_28b": 1e-7}
"""Learning rates of full GRPO: a tenth of the best supervised transfer rates (arXiv 2412.03555).

Larger models need smaller rates.
"""

ADAPTER_FACTOR = 100
"""Adapters start at zero and need larger steps. The product is a usual rate of LoRA recipes."""


def get_config(argument: str = "pg2_3b_448") -> ConfigDict:
    """Returns the settings for VARIANT_PIXELS, or VARIANT_PIXELS_full."""
    c = config.template()
    name, _, pixels = argument.removesuffix("_full").rpartition("_")
    if pixels not in ("224", "448", "896"):
        raise UserError(
            f"configs/paligemma.py:{argument}: the argument is VARIANT_PIXELS, "
            "for example pg2_3b_448 or pg2_3b_448_full"
        )
    c.model = config.section(config.variant(name, int(pixels)))
    c.model.dtype = "bfloat16"
    c.model.frozen_dtype = "bfloat16"
    c.init = "checkpoint.npz"
    c.stages = ("grpo",)
    c.data.prompt_length = 48
    c.data.suffix_length = 16

    c.grpo.steps = 2000
    c.grpo.batch_size = 32
    c.grpo.group_size = 8
    c.grpo.grad_accum_steps = 4
    c.grpo.max_new_tokens = 16
    c.grpo.rewards = {"iou": 1.0, "format": 0.2}
    c.grpo.kl_coef = 0.0
    c.grpo.optimizer.update(lr=LEARNING_RATES[name], schedule="linear", warmup_steps=20, b2=0.95)
    if not argument.endswith("_full"):
        c.model.lora.update(rank=16, alpha=32.0)
        c.grpo.optimizer.lr *= ADAPTER_FACTOR
    c.grpo.sources = {"boxes": boxes()}

    c.eval.sources = {"boxes": boxes()}
    c.eval.examples = 512
    c.eval.every = 200
    c.log.every = 5
    c.checkpoint.every = 100
    return c.lock()


def boxes() -> ConfigDict:
    """Returns a source of photographs: a line of the file has one box and one expression."""
    source = Source(
        uri="jsonl:train.jsonl",
        image_root="images",
        phrase="expression",
        boxes="bbox_xyxy",
        box_format="xyxy_px",
        prompt="detect {phrase}",
    )
    return config.section(source)

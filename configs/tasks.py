"""The reward recipes of four systems for reinforced grounding, in PaliGemma's own answers: SFT into the answer's form, then GRPO.

python -m pg_ground.train --config=configs/tasks.py:grounding --workdir=runs/grounding \\
    --config.grpo.sources.questions.uri=jsonl:DIR/triples.jsonl

The argument is a name in `TASKS`. One flag gives both stages their data, since they share the entry. Images lie beside the file
unless it is said otherwise (`--config.grpo.sources.questions.image_root=DIR` is another folder, from the file's). By name: the
system, a line of its data, and which of its defects (by number, as in `test_defect_NN_…`) cannot happen here:

point_environment   synthetic-grounding. {"image_filename": "a.png", "test_samples": [{"name": "Search", "bbox": [x1, y1, x2, y2],
                    "point": [x, y]}]}. Gold moves with the resized image (23); a list of guesses is matched (24).
grounding           RLLaVA. {"image": "1.jpg", "expression": "left dog", "bbox_xyxy": [x1, y1, x2, y2]}, images in `images/`.
                    The format is a whole grammar (9), nothing is evaluated (5), loc tokens survive decoding (27), averages
                    are over the batch (15).
open_vocabulary     RLLaVA. {"image": "1.jpg", "problem": "Detect all dogs …", "solution": "<answer>[{'Position':
                    [x1, y1, x2, y2], 'Confidence': 1}]</answer>"}. Junk of confidence 0 earns nothing beyond its form, and
                    an empty answer where there is nothing earns 1 (10).
counting            RLLaVA. {"image_path": "1.jpg", "question": "cows", "ground_truth": 8}. Several numbers are no answer (9).
single_box          EasyDistill. Data as for grounding. Reversed boxes earn 0 (3), no reward exceeds 1 (4) or is rounded (6).
multi_box           EasyDistill. [{"image_path": "1.jpg", "instruction": "…", "abs_box": {"0": [[x1, y1, x2, y2]], "1": []}}],
                    one list of all, as published: its uri is json:FILE. All classes count (1), matched by the rewards
                    themselves and not gated at IoU 0.5 (2).
spatial             ReinforceSight. {"image_path": "1.jpg", "question": "…", "cot": "…", "answer": "left"}. Two relations, or
                    none, are wrong (18); reasoning earns only with a right answer (19); SFT is on the answer alone (22).
relations           Made from scenes: labels fit the question (20). Drawn ones, unless the uri is relations:jsonl:FILE,
                    {"image": "1.jpg", "objects": [{"name": "vase", "box": [x1, y1, x2, y2], "depth": 1.2}, …]}.

From published weights, with the sizes, rates and batches of configs/paligemma.py: `configs/tasks.py:grounding+pg2_3b_448` and
`--config.init=… --config.data.tokenizer=…`. Where the weights know the form of the answer, skip SFT: `--config.stages=grpo,`.

Hardware: any CPU. Time: two to six minutes on two busy cores. Expected: random weights learn the form of an answer, hardly more.
"""

from dataclasses import replace
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from pg_ground import config
from pg_ground.config import Source
from pg_ground.types import UserError

from . import paligemma
from .data import ENTRIES
from .photos import PHOTOS


class Task(NamedTuple):
    """A system's questions and rewards, and its settings of `config.grpo` but for rates and batches, which belong to a model."""

    source: Source
    grpo: dict[str, Any]
    rewards: dict[str, float]
    text_rewards: dict[str, float]
    answer_tokens: int = 8
    prompt_tokens: int = 48


DETECTIONS = Source(
    uri="jsonl:ovd.jsonl", phrase="problem", target="text", suffix="{solution}", prompt="{phrase}"
)
COUNTS = replace(
    ENTRIES["count_jsonl"],
    suffix="<think>I see {ground_truth} {question}.</think> <answer>{ground_truth}</answer>",
)
RELATIONS = Source(
    uri="jsonl:spatial.jsonl",
    image="image_path",
    phrase="question",
    target="text",
    suffix="{cot} Therefore, the answer is: {answer}",
    prompt="answer en {phrase}",
)
SCENES = replace(
    RELATIONS,
    uri="relations:synthetic:train?side=64&scenes=4096",
    image="image",
    boxes="objects.box",
    label="objects.name",
)

SYNTHETIC_GROUNDING = {"algorithm": "grpo", "group_size": 8}
"""An environment: its trainer is the user's."""

RLLAVA = {
    "algorithm": "dual_clip",
    "kl": "k3",
    "kl_coef": 0.01,
    "advantage_epsilon": 1e-6,
    "minibatches": 4,
    "group_size": 5,
    "optimizer": {"weight_decay": 0.01},
}

EASYDISTILL = {
    "algorithm": "grpo",
    "kl": "k3",
    "kl_coef": 0.04,
    "advantage_epsilon": 1e-4,
    "group_size": 8,
}

REINFORCESIGHT = {
    "algorithm": "grpo",
    "kl": "k3",
    "kl_coef": 0.12,
    "group_size": 8,
    "optimizer": {"weight_decay": 0.01, "clip_norm": 0.5},
}

TASKS = {
    "point_environment": Task(
        ENTRIES["gui_points"],
        SYNTHETIC_GROUNDING,
        {"format": 0.2, "distance_gaussian": 0.8},
        {},
        answer_tokens=40,
    ),
    "grounding": Task(
        PHOTOS,
        RLLAVA | {"group_size": 3},
        {"format": 0.5, "iou_squared": 0.5},
        {},
        prompt_tokens=72,
    ),
    "open_vocabulary": Task(
        DETECTIONS,
        RLLAVA,
        {},
        {"ovd_iou": 0.33, "ovd_confidence": 0.33, "ovd_format": 0.34, "ovd": 0.0},
        answer_tokens=192,
        prompt_tokens=192,
    ),
    "counting": Task(
        COUNTS,
        RLLAVA,
        {},
        {"think_answer_format": 0.5, "count_exact": 0.5, "count_graded": 0.0},
        answer_tokens=48,
    ),
    "single_box": Task(
        PHOTOS,
        EASYDISTILL,
        {"format": 1.0, "gaussian_point": 1.0, "gaussian_coverage": 1.0, "iou": 0.0},
        {},
        prompt_tokens=72,
    ),
    "multi_box": Task(
        ENTRIES["easydistill_multi"],
        EASYDISTILL,
        {"format": 1.0, "gaussian_point": 1.0, "gaussian_coverage": 1.0, "label": 0.0},
        {},
        answer_tokens=80,
        prompt_tokens=96,
    ),
    "spatial": Task(
        RELATIONS, REINFORCESIGHT, {}, {"spatial": 1.0}, answer_tokens=192, prompt_tokens=128
    ),
    "relations": Task(
        SCENES, REINFORCESIGHT, {}, {"spatial": 1.0}, answer_tokens=192, prompt_tokens=128
    ),
}


def get_config(argument: str = "grounding") -> ConfigDict:
    name, _, variant = argument.partition("+")
    if name not in TASKS:
        raise UserError(f"configs/tasks.py:{name} does not exist: {config.nearest(name, TASKS)}")
    task = TASKS[name]
    c = paligemma.get_config(variant).unlock() if variant else small()
    c.stages = ("sft", "grpo")
    c.data.prompt_length = task.prompt_tokens
    c.data.suffix_length = task.answer_tokens
    c.data.max_boxes = 16

    c.grpo.max_new_tokens = task.answer_tokens
    c.grpo.rewards = task.rewards
    c.grpo.text_rewards = task.text_rewards
    c.grpo.update(task.grpo)
    c.grpo.sources = {"questions": config.section(task.source)}
    c.sft.sources = c.grpo.sources  # the same object: what a flag sets in one it sets in both
    c.eval.sources = {}
    return c.lock()


def small() -> ConfigDict:
    """Returns a model that trains on a laptop, with rates and batches for it."""
    c = config.template()
    c.model.image_size = 224
    c.model.vision.update(width=64, depth=2, mlp_dim=128, num_heads=4, patch_size=14)
    c.model.text.update(
        width=64,
        depth=2,
        mlp_dim=256,
        num_heads=4,
        num_kv_heads=1,
        head_dim=16,
        query_scale=16**-0.5,
    )
    c.model.text.vocab_size = 2048
    c.model.coordinate_init = "sinusoid"
    c.sft.steps = 200
    c.sft.batch_size = 8
    c.sft.optimizer.lr = 3e-3
    c.grpo.steps = 20
    c.grpo.batch_size = 8
    c.grpo.optimizer.lr = 3e-4
    c.log.every = 2
    c.log.samples_every = 10
    c.checkpoint.every = 100
    return c

r"""The reward recipes of four other systems, with PaliGemma's form of the answers.

python -m pg_ground.train --config=configs/tasks.py:grounding --workdir=runs/grounding \
    --config.grpo.sources.questions.uri=jsonl:DIR/triples.jsonl

SFT teaches the form of the answer, then GRPO improves it. The argument is a name in `TASKS`. Both
stages share one entry, so one flag gives both their data. Images lie beside the file by default.
`--config.grpo.sources.questions.image_root=DIR` names another folder, relative to the file.

The list has the system of each task, a line of its data, and the defects of the system that cannot
happen here. The numbers are those of the tests `test_defect_NN_…`.

point_environment   synthetic-grounding. {"image_filename": "a.png", "test_samples": [
                    {"name": "Search", "bbox": [x1, y1, x2, y2], "point": [x, y]}]}.
                    The annotation is scaled with the image (23). A list of guesses is matched (24).
grounding           RLLaVA. {"image": "1.jpg", "expression": "left dog",
                    "bbox_xyxy": [x1, y1, x2, y2]}, images in `images/`.
                    The format is a whole grammar (9). No answer is run by eval (5). Loc tokens
                    survive decoding (27). Averages are over the batch (15).
open_vocabulary     RLLaVA. {"image": "1.jpg", "problem": "Detect all dogs …",
                    "solution": "<answer>[{'Position': [x1, y1, x2, y2],
                    'Confidence': 1}]</answer>"}.
                    Wrong boxes of confidence 0 earn only the reward for their form. An empty answer
                    earns 1 if there is no object (10).
counting            RLLaVA. {"image_path": "1.jpg", "question": "cows", "ground_truth": 8}.
                    Several numbers are no answer (9).
single_box          EasyDistill. It has the same data as grounding. Reversed boxes earn 0 (3).
                    No reward is above 1 (4) or rounded (6).
multi_box           EasyDistill. [{"image_path": "1.jpg", "instruction": "…",
                    "abs_box": {"0": [[x1, y1, x2, y2]], "1": []}}], one list of all records as
                    published. Its uri is json:FILE. All classes count (1). The rewards themselves
                    match boxes, without a gate at IoU 0.5 (2).
spatial             ReinforceSight. {"image_path": "1.jpg", "question": "…", "cot": "…",
                    "answer": "left"}. Two relations, or none, are wrong (18). Reasoning earns only
                    with a right answer (19). SFT learns the answer alone (22).
relations           Made from scenes, so labels fit the question (20). The scenes are drawn, or
                    come from relations:jsonl:FILE with {"image": "1.jpg", "objects": [
                    {"name": "vase", "box": [x1, y1, x2, y2], "depth": 1.2}, …]}.

To start from published weights, add a recipe of configs/paligemma.py to the argument, for example
`configs/tasks.py:grounding+pg2_3b_448`, and set `--config.init=… --config.data.tokenizer=…`.
If the weights know the form of the answer, skip SFT: `--config.stages=grpo,`.

Hardware: any CPU. Time: two to six minutes on two busy cores. Expected: from random weights the
model learns the form of an answer and little more.
"""

from dataclasses import replace
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from pg_ground import config
from pg_ground.config import Source
from pg_ground.types import UserError, nearest

from . import paligemma
from .data import ENTRIES
from .photos import PHOTOS


class Task(NamedTuple):
    """The questions and rewards of a system, and its settings of `config.grpo`.

    Learning rates and batch sizes are not part of it: they belong to a model.
    """

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
"""synthetic-grounding is an environment. It has no trainer, so these are GRPO's settings."""

RLLAVA = {
    "algorithm": "dual_clip",
    "kl_estimator": "k3",
    "kl_coef": 0.01,
    "advantage_epsilon": 1e-6,
    "minibatches": 4,
    "group_size": 5,
    "optimizer": {"weight_decay": 0.01},
}

EASYDISTILL = {
    "algorithm": "grpo",
    "kl_estimator": "k3",
    "kl_coef": 0.04,
    "advantage_epsilon": 1e-4,
    "group_size": 8,
}

REINFORCESIGHT = {
    "algorithm": "grpo",
    "kl_estimator": "k3",
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
    """Returns the settings of a task, or of TASK+MODEL with a model of configs/paligemma.py."""
    name, _, variant = argument.partition("+")
    if name not in TASKS:
        raise UserError(f"configs/tasks.py:{name} does not exist: {nearest(name, TASKS)}")
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
    c.sft.sources = c.grpo.sources  # the same object, so a flag sets both
    c.eval.sources = {}
    return c.lock()


def small() -> ConfigDict:
    """Returns the settings of a model that trains on a laptop, with its rates and batch sizes."""
    c = config.template()
    c.model.image_size = 224
    c.model.vision.update(width=64, depth=2, mlp_dim=128, num_heads=4, patch_size=14)
    c.model.text.update(width=64, depth=2, mlp_dim=256, num_heads=4, num_kv_heads=1, head_dim=16)
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

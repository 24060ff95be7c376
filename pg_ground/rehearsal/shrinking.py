"""The recipe in small: the same programs, with fewer layers, narrower layers and fewer steps."""

from dataclasses import replace
from typing import Any

from pg_ground.config import Config, Grpo, Model
from pg_ground.storage.paths import to_path

DEPTH = 2
"""Layers of each tower: a loop over layers needs two."""

TEXT_FACTOR, VISION_FACTOR = 16, 8
"""Divisors of widths. The heads and the vocabulary stay."""

LARGEST_IMAGE = 448
"""At 896 pixels, the attention of 4,096 image tokens takes minutes on two cores."""

STEPS = {"sft": 2, "grpo": 3}
QUESTIONS = 4
"""Held-out questions of each source."""

TOKENS = 64
"""Longest answer."""


def shrink_model(model: Model) -> Model:
    """Returns the sizes of the rehearsed model: `DEPTH` layers, narrower, with every head."""
    text, vision = model.text, model.vision
    return replace(
        model,
        image_size=min(model.image_size, LARGEST_IMAGE),
        coordinate_init="sinusoid",
        text=replace(
            text,
            width=text.width // TEXT_FACTOR,
            mlp_dim=text.mlp_dim // TEXT_FACTOR,
            head_dim=max(text.head_dim // TEXT_FACTOR, 2),
            depth=min(text.depth, DEPTH),
        ),
        vision=replace(
            vision,
            width=vision.width // VISION_FACTOR,
            mlp_dim=vision.mlp_dim // VISION_FACTOR,
            depth=min(vision.depth, DEPTH),
        ),
        lora=replace(model.lora, rank=min(model.lora.rank, 4)),
    )


def shrink(config: Config, devices: int, tokenizer: str, cache: str) -> Config:
    """Returns the config of the rehearsal of a run.

    Rewards, algorithm, sources, dtypes and the kinds of steps are those of `config`.

    Args:
      devices: the devices of all processes together.
      tokenizer: the file of the tokenizer.
      cache: the folder of compiled programs.
    """
    return replace(
        config,
        init="",
        model=shrink_model(config.model),
        data=replace(
            config.data,
            tokenizer=tokenizer,
            workers=0,
            check_records=min(config.data.check_records, 200),
        ),
        sft=_shrink_stage(config.sft, "sft", devices),
        grpo=_shrink_stage(config.grpo, "grpo", devices),
        eval=replace(
            config.eval,
            examples=QUESTIONS,
            max_new_tokens=min(config.eval.max_new_tokens, TOKENS),
            interim_examples=min(config.eval.interim_examples, QUESTIONS // 2),
            batch_size=devices,
            at_start=False,
            every=0,
            every_epochs=0.0,
            rollouts=min(config.eval.rollouts, 1),
            vqvae=config.eval.vqvae if _exists(config.eval.vqvae) else "",
        ),
        log=replace(config.log, every=1, samples_every=STEPS["grpo"], samples=2, wandb=""),
        checkpoint=replace(config.checkpoint, every=1, keep=2, best=""),
        mesh=replace(config.mesh, data=-1, compile_cache=f"{cache}/programs"),
    )


def _shrink_stage(stage: Any, name: str, devices: int) -> Any:
    """Returns `Sft` or `Grpo` with few steps of few questions: one for each device and part."""
    parts = min(stage.grad_accum_steps, 2)
    stage = replace(stage, steps=STEPS[name], grad_accum_steps=parts)
    if isinstance(stage, Grpo):
        stage = replace(stage, max_new_tokens=min(stage.max_new_tokens, TOKENS))
    optimizer = replace(stage.optimizer, warmup_steps=min(stage.optimizer.warmup_steps, 1))
    return replace(stage, batch_size=devices * stage.parts_per_step, optimizer=optimizer)


def _exists(path: str) -> bool:
    return bool(path) and to_path(path, "config.eval.vqvae").exists()

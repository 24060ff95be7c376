"""TRL's GRPOTrainer, which a torch user would run.

pip install torch==2.13.0 transformers==5.23.0 trl==1.16.0 accelerate datasets peft sentencepiece
    pillow

The released TRL scores PaliGemma's completions with a mask that lets tokens see later tokens. That
is wrong, but the same amount of work.
"""

import copy
import tempfile
from typing import Any

import torch
import trl
import trl.trainer.grpo_trainer as grpo_trainer
from datasets import Dataset
from torch_peers import (
    Device,
    final_norm,
    loc_share,
    make_model,
    make_processor,
    random_questions,
    send_facts,
)
from transformers import TrainerCallback
from work import CLIP_NORM, KL_COEF, LR, PhaseTimer, Work, read_work, wait_for_request


class StepLog:
    """The timer and the checks of the current step."""

    def __init__(self, work: Work, model: Any):
        self.work = work
        self._model = model
        self._device = Device(work.device)
        self.checks: dict[str, float] = {}
        self.timer = self._device.timer()
        self._before = final_norm(model)

    def start_step(self) -> None:
        """Starts the measurements of a step."""
        self._before = final_norm(self._model)
        self.timer: PhaseTimer = self._device.timer()

    def send(self) -> None:
        """Sends the measurements of the step. TRL does not report the norm of the gradient."""
        change = float((final_norm(self._model) - self._before).abs().max())
        self.timer.send(
            self._device.peak(), grad_norm=float("nan"), parameter_change=change, **self.checks
        )


class TimedTrainer(trl.GRPOTrainer):
    """TRL's trainer, with the phases of its steps timed."""

    def __init__(self, log: StepLog, **arguments: Any):
        self._log = log
        super().__init__(**arguments)

    def _prepare_inputs(self, inputs: Any) -> Any:
        timer = self._log.timer
        accumulates = self._log.work.grad_accum_steps > 1 and "rollout" in timer.seconds
        timer.end_phase("update" if accumulates else "data")
        try:
            return super()._prepare_inputs(inputs)
        finally:
            timer.end_phase("update" if "update" in timer.seconds else "score")

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        work, timer = self._log.work, self._log.timer
        timer.end_phase("score")
        generated = super()._generate_single_turn(*args, **kwargs)
        timer.end_phase("rollout")
        completions = generated[0]
        self._log.checks["decode_steps"] = min(map(len, completions))
        self._log.checks["completions"] = len(completions)
        prefix = work.model_size.image_tokens + work.prompt_tokens
        assert {len(ids) for ids in args[0]} == {prefix}
        return generated


class StepCallback(TrainerCallback):
    """Sends the measurements of each step, then waits until the next step is requested."""

    def __init__(self, log: StepLog):
        self._log = log

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._log.timer.end_phase("update")
        self._log.send()
        control.should_training_stop = not self.wait()

    def wait(self) -> bool:
        """Returns whether another step is requested, and starts its measurements."""
        is_requested = wait_for_request()
        self._log.start_step()
        return is_requested


def trl_arguments(work: Work) -> dict[str, Any]:
    """Returns the arguments of TRL's GRPOConfig."""
    return {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": work.completions // work.grad_accum_steps,
        "gradient_accumulation_steps": work.grad_accum_steps,
        "num_generations": work.group,
        "max_completion_length": work.tokens,
        "max_steps": 1000,
        "beta": KL_COEF,
        "learning_rate": LR,
        "lr_scheduler_type": "constant",
        "max_grad_norm": CLIP_NORM,
        "weight_decay": 0.0,
        "loss_type": "grpo",
        "generation_kwargs": {"min_new_tokens": work.tokens},
        "gradient_checkpointing": work.checkpointing,
        "use_cpu": work.device == "cpu",
        "bf16": work.dtype == "bfloat16",
        "report_to": "none",
        "logging_strategy": "no",
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataloader_num_workers": 0,
        "shuffle_dataset": False,
    }


def make_dataset(work: Work) -> Dataset:
    """Returns random prompts and images as conversations."""
    prompts, images = random_questions(work, 0, work.prompts * 8)
    rows = [
        {"prompt": [{"role": "user", "content": prompt}], "image": image}
        for prompt, image in zip(prompts, images, strict=True)
    ]
    return Dataset.from_list(rows)


def main() -> None:
    work = read_work()
    torch.set_num_threads(work.threads)
    model = make_model(work)
    # TRL would read the reference policy from disk.
    grpo_trainer.create_model_from_path = lambda *args, **kwargs: copy.deepcopy(model)
    log = StepLog(work, model)
    callback = StepCallback(log)
    trainer = TimedTrainer(
        log,
        model=model,
        reward_funcs=[loc_share],
        args=trl.GRPOConfig(**trl_arguments(work)),
        train_dataset=make_dataset(work),
        processing_class=make_processor(work),
        callbacks=[callback],
    )
    send_facts(work, model, "trl", "accelerate")
    if callback.wait():
        trainer.train()


if __name__ == "__main__":
    main()

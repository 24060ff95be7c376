"""pg_ground's own step: the GRPO stage of `pg_ground.train`, on random prompts."""

from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict
from work import (
    CLIP_NORM,
    LR,
    PhaseTimer,
    Work,
    peak_rss,
    read_work,
    reset_peak_rss,
    send,
    versions,
    wait_for_request,
)

from pg_ground import config
from pg_ground.config import Source
from pg_ground.parallel import sharding
from pg_ground.params import flatten, unflatten
from pg_ground.tokenizer import Tokenizer
from pg_ground.tokenizer import load as load_tokenizer
from pg_ground.training.setup import Setup, abstract_batch, init_params, make_setup
from pg_ground.training.stage import Runtime, Stage
from pg_ground.training.stages import make_stages
from pg_ground.training.timing import StepTimer
from pg_ground.types import BOXES, POLICY, Answer, Array, Batch, TrainState
from pg_ground.vocab import BOS, NEWLINE

T = TypeVar("T")


class BlockingTimer(StepTimer):
    """Also measures CPU seconds: it waits for each phase before the next one is dispatched."""

    def __init__(self, phase_timer: PhaseTimer):
        super().__init__()
        self._phase_timer = phase_timer

    def lap(self, phase: str, value: T) -> T:
        jax.block_until_ready(value)
        self._phase_timer.end_phase(phase)
        return value


class OneBatch:
    """A batch iterator with one batch."""

    def __init__(self, batch: Batch):
        self._batch = batch

    def __next__(self) -> Batch:
        return self._batch

    def prepare(self) -> None:
        pass

    def get_state(self) -> dict[str, Any]:
        return {}

    def set_state(self, state: Mapping[str, Any]) -> None:
        pass


def stray_share(answer: Answer, batch: Batch, settings: Any) -> Array:
    """Returns a reward that differs between random answers: loc tokens in no box, per 16."""
    return answer.stray / 16


def recipe(work: Work) -> ConfigDict:
    """Returns the work as a config that `config.parse` reads."""
    size = work.model_size
    c = config.template()
    c.model.image_size = size.image
    c.model.vision.update(
        width=size.vision_width,
        depth=size.vision_depth,
        mlp_dim=size.vision_mlp,
        num_heads=size.vision_heads,
        patch_size=size.patch,
    )
    c.model.text.update(
        width=size.width,
        depth=size.depth,
        mlp_dim=size.mlp,
        num_heads=size.heads,
        num_kv_heads=1,
        head_dim=size.head_dim,
        query_scale=size.head_dim**-0.5,
        vocab_size=size.vocab,
    )
    c.model.dtype = work.dtype
    c.model.remat = "nothing_saveable" if work.checkpointing else "none"
    c.data.update(prompt_length=work.prompt_tokens, suffix_length=work.tokens)
    c.stages = ("grpo",)
    c.grpo.update(
        batch_size=work.prompts,
        group_size=work.group,
        max_new_tokens=work.tokens,
        grad_accum_steps=work.grad_accum_steps,
        algorithm="grpo",  # its KL coefficient is 0.04
        rewards={f"{__file__}:stray_share": 1.0},
        sources={"none": config.section(Source(uri="synthetic:train", boxes="box"))},
    )
    c.grpo.optimizer.update(name="adamw", lr=LR, weight_decay=0.0, clip_norm=CLIP_NORM)
    return c


def random_batch(setup: Setup, mesh: Mesh, seed: int) -> Batch:
    """Returns prompts and images of noise, each with ground-truth boxes."""
    random = np.random.default_rng(seed)
    abstract = abstract_batch(setup, setup.config.grpo.batch_size)
    batch = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), abstract)
    prompt = random.integers(NEWLINE + 1, 900, batch.prompt.shape, np.int32)
    prompt[:, 0], prompt[:, -1] = BOS, NEWLINE
    corners = random.uniform(0, 0.6, batch.gold.boxes.yxyx[..., :2].shape)
    yxyx = np.concatenate([corners, corners + 0.3], -1, dtype=np.float32)
    boxes = batch.gold.boxes._replace(yxyx=yxyx, valid=batch.gold.boxes.valid | True)
    rows = batch._replace(
        image=random.integers(0, 256, batch.image.shape, np.uint8),
        prompt=prompt,
        prompt_mask=batch.prompt_mask | True,
        gold=batch.gold._replace(boxes=boxes, target=batch.gold.target + BOXES),
    )
    return sharding.put_batch(mesh, rows)


def final_norm(state: TrainState) -> np.ndarray:
    """Returns a copy of a parameter that every update changes."""
    return np.asarray(state.params[POLICY]["llm"]["final_norm"]["scale"]).copy()


def measured_step(
    stage: Stage, state: TrainState, batch: Batch, number: int, is_cuda: bool
) -> TrainState:
    """Does one step and sends its measurements."""
    before = final_norm(state)
    phase_timer = PhaseTimer(lambda: None, (lambda: None) if is_cuda else reset_peak_rss)
    timer = BlockingTimer(phase_timer)
    state, output = stage.step(state, OneBatch(batch), number, timer)
    jax.block_until_ready(state)
    stats = jax.devices()[0].memory_stats() or {}
    mask = output.sampled_mask
    assert mask is not None
    phase_timer.send(
        stats["peak_bytes_in_use"] if is_cuda else peak_rss(),
        decode_steps=float(mask.any(axis=(0, 1)).sum()),
        completions=float(mask.shape[0] * mask.shape[1]),
        grad_norm=float(output.metrics["optim/grad_norm"]),
        parameter_change=float(np.abs(final_norm(state) - before).max()),
    )
    return state


def main() -> None:
    work = read_work()
    c = config.parse(recipe(work))
    mesh = sharding.make_mesh(c.mesh)
    setup = make_setup(c, mesh, sharding.hbm_bytes(mesh))
    stage = make_stages(setup)[-1]
    tokenizer = Tokenizer(load_tokenizer().pieces, setup.vocab)
    params = init_params(c, setup.model, setup.trained)
    send(
        versions=versions("pg-ground", "jax", "jaxlib", "flax", "optax"),
        parameters=sum(leaf.size for leaf in flatten(params).values()),
        platform=jax.default_backend(),
    )
    state = stage.init(params)
    number = 0
    with stage.open(Runtime(mesh, unflatten({}), tokenizer, None), state):
        while wait_for_request():
            batch = jax.block_until_ready(random_batch(setup, mesh, number))
            state = measured_step(stage, state, batch, number, work.device == "cuda")
            number += 1


if __name__ == "__main__":
    main()

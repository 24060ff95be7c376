"""pg_ground's own step: the sampler, the programs and their order are those of `pg_ground.train`."""

from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from work import CLIP_NORM, LR, Laps, Work, asked, peak_rss, reset_peak_rss, say, versions, work

from pg_ground import config
from pg_ground.aot.jobs import batch_like
from pg_ground.config import Config, Source
from pg_ground.models import PaliGemma
from pg_ground.parallel import sharding
from pg_ground.params import flatten, unflatten
from pg_ground.rl.scored_rollouts import weights_at
from pg_ground.tokenizer import Tokenizer
from pg_ground.tokenizer import load as load_tokenizer
from pg_ground.training import programs
from pg_ground.training.loop import Run, begin, fresh_state
from pg_ground.training.recorder import Stopwatch
from pg_ground.training.rollout_worker import LOTS, RolloutWorker, make_reward_workers
from pg_ground.types import BOXES, Batch
from pg_ground.vocab import BOS, NEWLINE, vocab_of_size


class Watch(Stopwatch):
    """A stopwatch of CPU seconds too: it waits for every phase before the next is dispatched."""

    def __init__(self, laps: Laps):
        super().__init__()
        self.laps = laps

    def lap(self, phase: str, value: Any) -> Any:
        jax.block_until_ready(value)
        self.laps.lap(phase)
        return value


def stray_share(answer: Any, batch: Any, settings: Any) -> Any:
    """Returns a reward that random answers differ in: loc tokens that belong to no box, per 16."""
    return answer.stray / 16


def recipe(w: Work) -> ConfigDict:
    """Returns the work as a config that `config.parse` reads."""
    s, c = w.of, config.template()
    c.model.image_size = s.image
    c.model.vision.update(
        width=s.vision_width,
        depth=s.vision_depth,
        mlp_dim=s.vision_mlp,
        num_heads=s.vision_heads,
        patch_size=s.patch,
    )
    c.model.text.update(
        width=s.width,
        depth=s.depth,
        mlp_dim=s.mlp,
        num_heads=s.heads,
        num_kv_heads=1,
        head_dim=s.head_dim,
    )
    c.model.text.update(query_scale=s.head_dim**-0.5, vocab_size=s.vocab)
    c.model.dtype = w.dtype
    c.model.remat = "nothing_saveable" if w.checkpointing else "none"
    c.data.prompt_length, c.data.suffix_length = w.prompt_tokens, w.tokens
    c.stages = ("grpo",)
    c.grpo.update(
        batch_size=w.prompts,
        group_size=w.group,
        max_new_tokens=w.tokens,
        grad_accum_steps=w.grad_accum_steps,
    )
    c.grpo.rewards = {f"{__file__}:stray_share": 1.0}
    c.grpo.algorithm = "grpo"  # KL to the reference policy: 0.04
    c.grpo.optimizer.update(name="adamw", lr=LR, weight_decay=0.0, clip_norm=CLIP_NORM)
    c.grpo.sources = {"none": config.section(Source(uri="synthetic:train", boxes="box"))}
    return c


def random_batch(c: Config, mesh: Any, seed: int) -> Batch:
    """Returns prompts and images of noise, and a gold box each."""
    random = np.random.default_rng(seed)
    batch = jax.tree.map(
        lambda like: np.zeros(like.shape, like.dtype), batch_like(c, mesh, c.grpo.batch_size)
    )
    prompt = random.integers(NEWLINE + 1, 900, batch.prompt.shape, np.int32)
    prompt[:, 0], prompt[:, -1] = BOS, NEWLINE
    low = random.uniform(0, 0.6, batch.gold.boxes.yxyx[..., :2].shape)
    boxes = batch.gold.boxes._replace(yxyx=np.concatenate([low, low + 0.3], -1, dtype=np.float32))
    gold = batch.gold._replace(
        boxes=boxes._replace(valid=boxes.valid | True), target=batch.gold.target + BOXES
    )
    image = random.integers(0, 256, batch.image.shape, np.uint8)
    made = batch._replace(
        image=image, prompt=prompt, prompt_mask=batch.prompt_mask | True, gold=gold
    )
    return sharding.put_batch(mesh, made)


def main() -> None:
    w = work()
    c = config.parse(recipe(w))
    mesh = sharding.make_mesh(c.mesh)
    model = PaliGemma(c.model, sharding.activation_sharding(mesh))
    trained, frozen = programs.layout(c, model, mesh)
    factors = programs.factors_of(c, trained | frozen)
    tokenizer = Tokenizer(load_tokenizer().pieces, vocab_of_size(c.model.text.vocab_size))
    params, nothing = begin(c, model, trained | frozen), unflatten(frozen)
    run = Run(c, None, model, nothing, factors, tokenizer, mesh, None, None)  # pyright: ignore[reportArgumentType]: no files
    state = fresh_state(run, "grpo", params)
    ref_params = jax.tree.map(lambda leaf: leaf.copy(), state.params)
    compare = programs.compiled(programs.grpo_compare(c, model), c, mesh)
    learn = programs.compiled(programs.grpo_update(c, model, mesh, factors, state), c, mesh)
    read = programs.reader(c, mesh, state.params)
    key, weights, step = jax.random.key(c.seed), weights_at(c.grpo.all_rewards, 0), 0
    cuda = w.device == "cuda"
    count = sum(leaf.size for leaf in flatten(state.params).values())
    say(
        versions=versions("pg-ground", "jax", "jaxlib", "flax", "optax"),
        parameters=count,
        platform=jax.default_backend(),
    )
    with make_reward_workers(c.grpo) as workers:
        sampler = RolloutWorker(c, model, mesh, nothing, tokenizer, workers)
        while asked():
            batch = jax.block_until_ready(random_batch(c, mesh, step))
            before = np.asarray(state.params["llm"]["final_norm"]["scale"]).copy()
            laps = Laps(lambda: None, (lambda: None) if cuda else reset_peak_rss)
            watch, own_key = Watch(laps), jax.random.fold_in(key, step)
            sampled, _ = sampler(
                read(state.params), lambda batch=batch: batch, own_key, weights, watch
            )
            learned_from, _ = watch.lap(
                "score", compare(sampled, nothing, ref_params, weights, state.kl_coef)
            )
            state, updated = watch.lap(
                "update", learn(state, nothing, learned_from, jax.random.fold_in(own_key, LOTS))
            )
            peak = (
                (jax.devices()[0].memory_stats() or {})["peak_bytes_in_use"] if cuda else peak_rss()
            )
            laps.report(
                peak,
                turns=float(sampled.rollout.mask.any(axis=(0, 1)).sum()),
                completions=float(
                    sampled.rollout.tokens.shape[0] * sampled.rollout.tokens.shape[1]
                ),
                grad_norm=float(updated["optim/grad_norm"]),
                moved=float(
                    np.abs(np.asarray(state.params["llm"]["final_norm"]["scale"]) - before).max()
                ),
            )
            step += 1


if __name__ == "__main__":
    main()

"""A GRPO step of big_vision's own parts: its PaliGemma, its decode loop, and an update such as its trainer's.

`variant` is empty for a whole step, or decode for sampling alone. What its configs choose for PaliGemma is chosen here too:
layers scanned, a cache as long as prompt and completion. Its trainer's update is a function inside of `main` that nobody can
call, so the loss is written here in the same way: log_softmax and one-hot, on one row for each completion. big_vision has no
groups: an image and its prompt are repeated for each completion (`best_of_n` of its decode loop repeats the cache instead, but
hands back only the likeliest). Its decoder's activations are float32 whatever the work says; its cache, bfloat16 unless told, is
as the work says.
"""

import sys
from importlib import import_module
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import FrozenConfigDict
from work import (
    CLIP_NORM,
    KL_COEF,
    LOC,
    LR,
    Laps,
    Work,
    asked,
    peak_rss,
    reset_peak_rss,
    say,
    versions,
    work,
)

BOS, NEWLINE, NO_TOKEN = 2, 108, -1
HOW = (
    "git clone https://github.com/google-research/big_vision; git -C big_vision checkout 0127fb6; pip install tensorflow; "
    "then --big_vision=big_vision"
)


def model_of(w: Work) -> Any:
    gemma = import_module("big_vision.models.ppp.gemma")
    published, s = gemma.get_config, w.of

    def sized(variant: str) -> Any:
        config = published(variant)
        config.update(
            width=s.width,
            depth=s.depth,
            mlp_dim=s.mlp,
            num_heads=s.heads,
            num_kv_heads=1,
            head_dim=s.head_dim,
        )
        return config

    gemma.get_config = sized  # pyright: ignore[reportAttributeAccessIssue]: it takes a decoder's sizes by name only
    img = {
        "width": s.vision_width, "depth": s.vision_depth, "mlp_dim": s.vision_mlp, "num_heads": s.vision_heads,
        "patch_size": (s.patch, s.patch), "pool_type": "none", "scan": True, "head_zeroinit": False, "dtype_mm": w.dtype,
        "remat_policy": "nothing_saveable" if w.checkpointing else "everything_saveable"}  # fmt: skip
    llm = {
        "vocab_size": s.vocab,
        "cache_dtype": w.dtype,
        "remat_policy": "nothing_saveable" if w.checkpointing else "none",
    }
    return import_module("big_vision.models.proj.paligemma.paligemma").Model(
        img=FrozenConfigDict(img), llm=FrozenConfigDict(llm)
    )


def batch_of(w: Work, place: Any, seed: int) -> dict[str, jax.Array]:
    """Returns prompts and images of noise, each of them once per completion."""
    random = np.random.default_rng(seed)
    prompt = random.integers(NEWLINE + 1, 900, (w.prompts, w.prompt_tokens), np.int32)
    prompt[:, 0], prompt[:, -1] = BOS, NEWLINE
    image = random.uniform(-1, 1, (w.prompts, w.of.image, w.of.image, 3)).astype(np.float32)
    text = prompt.repeat(w.group, 0)
    made = {
        "image": image.repeat(w.group, 0),
        "text": text,
        "mask_ar": np.zeros_like(text),
        "mask_input": text >= 0,
    }
    return jax.block_until_ready(jax.device_put({**made, "_mask": np.ones(w.rows, bool)}, place))


def main() -> None:
    w = work()
    try:
        model = model_of(w)
        decode = import_module("big_vision.trainers.proj.paligemma.predict_fns").get_all(model)[
            "decode"
        ]
    except ImportError as error:
        sys.exit(f"{error}: {HOW}")
    if w.grad_accum_steps > 1:
        sys.exit(
            "big_vision's trainer of PaliGemma takes a batch whole: only --grad_accum_steps=1 is equal work"
        )
    tx = optax.chain(optax.clip_by_global_norm(CLIP_NORM), optax.adam(LR))

    @jax.jit
    def logps(params: Any, batch: dict[str, jax.Array], chosen: jax.Array) -> jax.Array:
        """Returns log-probabilities of the chosen tokens [rows, tokens]."""
        text = jnp.concatenate([batch["text"], chosen], 1)[:, :-1]
        causal = jnp.concatenate([batch["mask_ar"], jnp.ones_like(chosen)], 1)[:, :-1]
        logits, _ = model.apply({"params": params}, batch["image"], text, causal, train=True)
        logp = jax.nn.log_softmax(logits[:, w.prompt_tokens - 1 :])
        return (logp * jax.nn.one_hot(chosen, w.of.vocab)).sum(-1)

    @jax.jit
    def score(
        reference: Any, batch: dict[str, jax.Array], chosen: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Returns advantages [rows, 1] and the reference policy's log-probabilities."""
        is_loc = (chosen >= w.of.text_vocab) & (chosen < w.of.text_vocab + LOC)
        rewards = is_loc.sum(-1).reshape(w.prompts, w.group) / 16
        advantages = (rewards - rewards.mean(1, keepdims=True)) / (
            rewards.std(1, keepdims=True, ddof=1) + 1e-4
        )
        return advantages.reshape(-1, 1), logps(reference, batch, chosen)

    def update(
        state: dict[str, Any],
        batch: dict[str, jax.Array],
        chosen: jax.Array,
        adv: jax.Array,
        ref: jax.Array,
    ) -> Any:
        def loss(params: Any) -> jax.Array:
            own = logps(params, batch, chosen)
            ratio, apart = jnp.exp(own - jax.lax.stop_gradient(own)), ref - own
            kept = -jnp.minimum(ratio * adv, ratio.clip(0.8, 1.2) * adv)
            return (kept + KL_COEF * (jnp.exp(apart) - apart - 1)).mean()

        grads = jax.grad(loss)(state["params"])
        updates, opt = tx.update(grads, state["opt"])
        return {
            "params": optax.apply_updates(state["params"], updates),
            "opt": opt,
        }, optax.global_norm(grads)

    def init(batch: dict[str, jax.Array]) -> dict[str, Any]:
        params = model.init(jax.random.key(0), batch["image"], batch["text"], batch["mask_ar"])[
            "params"
        ]
        return {"params": params, "opt": tx.init(params) if whole else None}

    devices, cuda, whole, seed = np.array(jax.devices()), w.device == "cuda", not w.variant, 0
    place = jax.NamedSharding(jax.sharding.Mesh(devices, ("data",)), jax.P())
    update = jax.jit(update, donate_argnums=0, out_shardings=place)
    state = jax.jit(init, out_shardings=place)(batch_of(w, place, seed))
    reference = jax.tree.map(jnp.copy, state["params"]) if whole else None
    count = sum(leaf.size for leaf in jax.tree.leaves(state["params"]))
    say(
        versions=versions("jax", "jaxlib", "flax", "optax"),
        parameters=count,
        platform=jax.default_backend(),
    )
    while asked():
        batch, seed = batch_of(w, place, seed), seed + 1
        before = np.asarray(state["params"]["llm"]["final_norm"]["scale"]).copy()
        laps = Laps(lambda: None, (lambda: None) if cuda else reset_peak_rss)
        chosen = decode(
            state,
            batch,
            devices=devices,
            max_decode_len=w.tokens,
            eos_token=NO_TOKEN,
            sampler="temperature(t=1.0)",
        )
        jax.block_until_ready(chosen)
        laps.lap("rollout")
        checks = {"turns": chosen.shape[1], "completions": chosen.shape[0]}
        if whole:
            scored = jax.block_until_ready(score(reference, batch, chosen))
            laps.lap("score")
            state, norm = jax.block_until_ready(update(state, batch, chosen, *scored))
            laps.lap("update")
            moved = np.abs(np.asarray(state["params"]["llm"]["final_norm"]["scale"]) - before).max()
            checks |= {"grad_norm": float(norm), "moved": float(moved)}
        peak = (jax.devices()[0].memory_stats() or {})["peak_bytes_in_use"] if cuda else peak_rss()
        laps.report(peak, **checks)


if __name__ == "__main__":
    main()

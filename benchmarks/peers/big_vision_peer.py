"""A GRPO step of big_vision's own parts: its PaliGemma, its decode loop, and its trainer's update.

`variant` is empty for a whole step, or decode for sampling alone. The choices of big_vision's
PaliGemma configs are made here too: layers are scanned, and the cache is as long as prompt and
completion. The update of its trainer is a function inside `main` that nobody can call. Therefore
the loss is written here in the same way: log_softmax and one-hot, on one row for each completion.

big_vision has no groups, so an image and its prompt are repeated for each completion. (`best_of_n`
of its decode loop repeats the cache instead, but returns only the likeliest completion.) Its
decoder's activations are always float32. Its cache has the dtype of the work; big_vision's default
is bfloat16.
"""

import sys
from functools import partial
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
    PhaseTimer,
    Work,
    peak_rss,
    read_work,
    reset_peak_rss,
    send,
    versions,
    wait_for_request,
)

BOS, NEWLINE = 2, 108

NO_TOKEN = -1
"""The decode loop's end token: no completion ends early."""

INSTALL = (
    "git clone https://github.com/google-research/big_vision; "
    "git -C big_vision checkout 0127fb6; pip install tensorflow; then --big_vision=big_vision"
)


def make_model(work: Work) -> Any:
    """Returns big_vision's PaliGemma of the work's size."""
    gemma = import_module("big_vision.models.ppp.gemma")
    size = work.model_size
    published = gemma.get_config

    def get_config(variant: str) -> Any:
        config = published(variant)
        config.update(
            width=size.width,
            depth=size.depth,
            mlp_dim=size.mlp,
            num_heads=size.heads,
            num_kv_heads=1,
            head_dim=size.head_dim,
        )
        return config

    # The model takes the sizes of its decoder only by the name of a variant.
    gemma.get_config = get_config  # pyright: ignore[reportAttributeAccessIssue]
    img = {
        "width": size.vision_width,
        "depth": size.vision_depth,
        "mlp_dim": size.vision_mlp,
        "num_heads": size.vision_heads,
        "patch_size": (size.patch, size.patch),
        "pool_type": "none",
        "scan": True,
        "head_zeroinit": False,
        "dtype_mm": work.dtype,
        "remat_policy": "nothing_saveable" if work.checkpointing else "everything_saveable",
    }
    llm = {
        "vocab_size": size.vocab,
        "cache_dtype": work.dtype,
        "remat_policy": "nothing_saveable" if work.checkpointing else "none",
    }
    paligemma = import_module("big_vision.models.proj.paligemma.paligemma")
    return paligemma.Model(img=FrozenConfigDict(img), llm=FrozenConfigDict(llm))


def import_big_vision(work: Work) -> tuple[Any, Any]:
    """Returns the model and the decode function.

    Ends the program if big_vision is not installed, or cannot do equal work.
    """
    if work.grad_accum_steps > 1:
        sys.exit(
            "big_vision's trainer of PaliGemma takes a batch whole: "
            "only --grad_accum_steps=1 is equal work"
        )
    try:
        model = make_model(work)
        predict_fns = import_module("big_vision.trainers.proj.paligemma.predict_fns")
        return model, predict_fns.get_all(model)["decode"]
    except ImportError as error:
        sys.exit(f"{error}: {INSTALL}")


def random_batch(work: Work, sharding: Any, seed: int) -> dict[str, jax.Array]:
    """Returns prompts and images of noise, each once per completion."""
    random = np.random.default_rng(seed)
    side = work.model_size.image
    prompt = random.integers(NEWLINE + 1, 900, (work.prompts, work.prompt_tokens), np.int32)
    prompt[:, 0], prompt[:, -1] = BOS, NEWLINE
    image = random.uniform(-1, 1, (work.prompts, side, side, 3)).astype(np.float32)
    text = prompt.repeat(work.group, 0)
    batch = {
        "image": image.repeat(work.group, 0),
        "text": text,
        "mask_ar": np.zeros_like(text),
        "mask_input": text >= 0,
        "_mask": np.ones(work.completions, bool),
    }
    return jax.block_until_ready(jax.device_put(batch, sharding))


class Steps:
    """The functions of a GRPO step."""

    def __init__(self, work: Work, model: Any):
        self._work = work
        self._model = model
        self._optimizer = optax.chain(optax.clip_by_global_norm(CLIP_NORM), optax.adam(LR))

    def init(self, batch: dict[str, jax.Array]) -> dict[str, Any]:
        """Returns random parameters, and the optimizer's state if the step has an update."""
        inputs = (batch["image"], batch["text"], batch["mask_ar"])
        params = self._model.init(jax.random.key(0), *inputs)["params"]
        has_update = not self._work.variant
        return {"params": params, "opt": self._optimizer.init(params) if has_update else None}

    def logps(self, params: Any, batch: dict[str, jax.Array], completions: jax.Array) -> jax.Array:
        """Returns the log-probabilities of the completions' tokens, [rows, tokens]."""
        text = jnp.concatenate([batch["text"], completions], 1)[:, :-1]
        is_causal = jnp.concatenate([batch["mask_ar"], jnp.ones_like(completions)], 1)[:, :-1]
        inputs = (batch["image"], text, is_causal)
        logits, _ = self._model.apply({"params": params}, *inputs, train=True)
        logp = jax.nn.log_softmax(logits[:, self._work.prompt_tokens - 1 :])
        return (logp * jax.nn.one_hot(completions, self._work.model_size.vocab)).sum(-1)

    def score(
        self, reference: Any, batch: dict[str, jax.Array], completions: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Returns the advantages [rows, 1] and the reference policy's log-probabilities."""
        first_loc = self._work.model_size.text_vocab
        is_loc = (completions >= first_loc) & (completions < first_loc + LOC)
        rewards = is_loc.sum(-1).reshape(self._work.prompts, self._work.group) / 16
        centred = rewards - rewards.mean(1, keepdims=True)
        advantages = centred / (rewards.std(1, keepdims=True, ddof=1) + 1e-4)
        return advantages.reshape(-1, 1), self.logps(reference, batch, completions)

    def update(
        self,
        state: dict[str, Any],
        batch: dict[str, jax.Array],
        completions: jax.Array,
        advantages: jax.Array,
        ref_logps: jax.Array,
    ) -> tuple[dict[str, Any], jax.Array]:
        """Returns the new state and the norm of the gradient."""

        def loss(params: Any) -> jax.Array:
            logps = self.logps(params, batch, completions)
            ratio = jnp.exp(logps - jax.lax.stop_gradient(logps))
            log_ratio = ref_logps - logps
            policy_loss = -jnp.minimum(ratio * advantages, ratio.clip(0.8, 1.2) * advantages)
            return (policy_loss + KL_COEF * (jnp.exp(log_ratio) - log_ratio - 1)).mean()

        grads = jax.grad(loss)(state["params"])
        updates, opt = self._optimizer.update(grads, state["opt"])
        params = optax.apply_updates(state["params"], updates)
        return {"params": params, "opt": opt}, optax.global_norm(grads)


def final_norm(state: dict[str, Any]) -> np.ndarray:
    """Returns a copy of a parameter that every update changes."""
    return np.asarray(state["params"]["llm"]["final_norm"]["scale"]).copy()


def main() -> None:
    work = read_work()
    model, decode = import_big_vision(work)
    devices = np.array(jax.devices())
    is_cuda = work.device == "cuda"
    has_update = not work.variant
    seed = 0
    sharding = jax.NamedSharding(jax.sharding.Mesh(devices, ("data",)), jax.P())
    sample = partial(
        decode,
        devices=devices,
        max_decode_len=work.tokens,
        eos_token=NO_TOKEN,
        sampler="temperature(t=1.0)",
    )
    steps = Steps(work, model)
    score = jax.jit(steps.score)
    update = jax.jit(steps.update, donate_argnums=0, out_shardings=sharding)
    state = jax.jit(steps.init, out_shardings=sharding)(random_batch(work, sharding, seed))
    reference = jax.tree.map(jnp.copy, state["params"]) if has_update else None
    send(
        versions=versions("jax", "jaxlib", "flax", "optax"),
        parameters=sum(leaf.size for leaf in jax.tree.leaves(state["params"])),
        platform=jax.default_backend(),
    )
    while wait_for_request():
        batch = random_batch(work, sharding, seed)
        seed += 1
        before = final_norm(state)
        timer = PhaseTimer(lambda: None, (lambda: None) if is_cuda else reset_peak_rss)
        completions = jax.block_until_ready(sample(state, batch))
        timer.end_phase("rollout")
        checks = {"decode_steps": completions.shape[1], "completions": completions.shape[0]}
        if has_update:
            scores = jax.block_until_ready(score(reference, batch, completions))
            timer.end_phase("score")
            state, norm = jax.block_until_ready(update(state, batch, completions, *scores))
            timer.end_phase("update")
            change = float(np.abs(final_norm(state) - before).max())
            checks |= {"grad_norm": float(norm), "parameter_change": change}
        stats = jax.devices()[0].memory_stats() or {}
        timer.send(stats["peak_bytes_in_use"] if is_cuda else peak_rss(), **checks)


if __name__ == "__main__":
    main()

"""The programs of a run: what `train` runs step by step and `compile` compiles ahead of time, from the same lines.

Each is a pure function with what it donates and where its results lie; `compiled` is where they meet `jax.jit`.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from pg_ground.config import Config, Grpo
from pg_ground.models import PaliGemma
from pg_ground.parallel import memory_model, sharding
from pg_ground.parallel.sharding import AnyMesh
from pg_ground.params import (
    AbstractParams,
    flatten,
    is_adapter,
    join,
    lr_factors,
    map_named,
    unflatten,
)
from pg_ground.rewards import device_rewards
from pg_ground.rl import loss, scored_rollouts, update
from pg_ground.rl.advantages import greedy_baseline
from pg_ground.rl.rollout import sample
from pg_ground.rl.scored_rollouts import PolicyBatch, ScoredRollouts
from pg_ground.training import optimizers
from pg_ground.types import Array, Batch, Rollout, TrainState, UserError
from pg_ground.vocab import CONTROL, Vocab


class Program(NamedTuple):
    """A function, and how it is to be compiled."""

    function: Callable[..., Any]
    donated: tuple[int, ...] = ()
    places: Any = None
    """Shardings of its results; None leaves them to the compiler."""


def compiled(program: Program, config: Config, mesh: Mesh) -> Any:
    """Returns the program as jax compiles it on first use, with the options that this mesh wants."""
    places = {} if program.places is None else {"out_shardings": program.places}
    options = sharding.compiler_options(config.mesh, mesh) or None
    return jax.jit(
        program.function, donate_argnums=program.donated, compiler_options=options, **places
    )


def names(c: Config) -> list[str]:
    """Returns the names of the programs of a run that are worth compiling."""
    found = ["sft"] if "sft" in c.stages else []
    if "grpo" in c.stages:
        found += ["rollout", *["reference"] * looks_at_reference(c.grpo), "update"]
    return found + ["evaluation"] * bool(c.eval.sources)


def layout(
    config: Config, model: PaliGemma, mesh: AnyMesh
) -> tuple[AbstractParams, AbstractParams]:
    """Returns name, shape, dtype and place of the parameters that are trained, and of those that are frozen.

    Raises:
      UserError: a pattern or a rule that matches nothing, or an array that this mesh cannot split.
    """
    shapes = flatten(jax.eval_shape(model.init, jax.random.key(0)))
    sharding.check_rules(config.mesh.rules, list(shapes))
    if config.model.lora.rank and not any(map(is_adapter, shapes)):
        raise UserError(
            f"config.model.lora.pattern {config.model.lora.pattern!r} names no matrix, such as llm/layers/mlp/linear"
        )
    factors = lr_factors(shapes, config.lr_factors)
    dtypes = {
        name: jnp.dtype(config.model.param_dtype if factors[name] else config.model.frozen_dtype)
        for name in shapes
    }
    like = {name: jax.ShapeDtypeStruct(leaf.shape, dtypes[name]) for name, leaf in shapes.items()}
    places = sharding.infer_shardings(mesh, like, config.mesh.rules)
    like = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=places[name])
        for name, leaf in like.items()
    }
    return {name: like[name] for name in like if factors[name]}, {
        name: like[name] for name in like if not factors[name]
    }


def factors_of(config: Config, names: Iterable[str]) -> dict[str, float]:
    """Returns what the learning rate of each trained parameter is multiplied by."""
    return {name: factor for name, factor in lr_factors(names, config.lr_factors).items() if factor}


def updates_a_step(config: Config, stage: str) -> int:
    """Returns how often the optimizer moves the parameters in one step of a stage."""
    return config.grpo.num_iterations * config.grpo.minibatches if stage == "grpo" else 1


def optimizer_of(
    config: Config, stage: str, factors: Mapping[str, float]
) -> optax.GradientTransformation:
    """Returns the optimizer of a stage."""
    c = config.sft if stage == "sft" else config.grpo
    return optimizers.optimizer(c.optimizer, c.steps * updates_a_step(config, stage), factors)


def state_like(
    config: Config, mesh: AnyMesh, stage: str, factors: Mapping[str, float], params: Any
) -> TrainState:
    """Returns shapes, dtypes and places of a state of a stage."""
    like = TrainState(
        cast(Any, jax.ShapeDtypeStruct((), jnp.int32)),
        params,
        jax.eval_shape(optimizer_of(config, stage, factors).init, params),
        cast(Any, jax.ShapeDtypeStruct((), jnp.float32)),
    )
    places = sharding.infer_shardings(mesh, like, config.mesh.rules)
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        like,
        places,
    )


def sft_update(
    config: Config,
    model: PaliGemma,
    mesh: AnyMesh,
    factors: Mapping[str, float],
    state: TrainState,
    vocab: Vocab,
) -> Program:
    """Returns (state, frozen, batch, dropout_key=) → (state, metrics), one supervised step."""
    c = config.sft
    learn = partial(
        update.sft_update,
        model=model,
        optimizer=optimizer_of(config, "sft", factors),
        vocab=vocab,
        grad_accum_steps=c.grad_accum_steps,
        label_smoothing=c.label_smoothing,
        loc_smoothing_bins=c.loc_smoothing_bins,
    )
    return Program(learn, (0,), (sharding.infer_shardings(mesh, state, config.mesh.rules), None))


def grpo_update(
    config: Config, model: PaliGemma, mesh: AnyMesh, factors: Mapping[str, float], state: TrainState
) -> Program:
    """Returns (state, frozen, experience, key) → (state, metrics), all updates of one reinforced step."""
    c = config.grpo
    learn = partial(
        update.grpo_update,
        model=model,
        optimizer=optimizer_of(config, "grpo", factors),
        algorithm=loss.choose(c),
        temperature=c.temperature,
        grad_accum_steps=c.grad_accum_steps,
        minibatches=c.minibatches,
        updates=c.num_iterations,
        kl_target=c.kl_target,
        kl_horizon=c.kl_horizon,
    )
    return Program(learn, (0,), (sharding.infer_shardings(mesh, state, config.mesh.rules), None))


def reference_logps(config: Config, model: PaliGemma) -> Program:
    """Returns (ref_params, frozen, batch, rollout) → log-probabilities of the completions under the reference policy."""
    c = config.grpo

    def score(ref_params: Any, frozen: Any, batch: Batch, rollout: Rollout) -> Array:
        return update.completion_logps_in_parts(
            model,
            join(frozen, ref_params),
            batch,
            rollout,
            c.temperature,
            c.grad_accum_steps * c.minibatches,
        )[0]

    return Program(score)


def grpo_compare(config: Config, model: PaliGemma) -> Program:
    """Returns (sampled, frozen, ref_params or None, weights, kl_coef) → (experience, metrics): the reference policy's pass."""
    c, row = config.grpo, loss.choose(config.grpo)
    reference = reference_logps(config, model).function

    def compare(
        sampled: ScoredRollouts, frozen: Any, ref_params: Any, weights: dict[str, Any], kl_coef: Any
    ) -> tuple[PolicyBatch, dict[str, Any]]:
        kl_coef = kl_coef if c.kl_target else row.kl_coef
        ref_logps = (
            None
            if ref_params is None
            else reference(ref_params, frozen, sampled.batch, sampled.rollout)
        )
        measures = device_rewards.measures(
            sampled.rollout, sampled.answer, sampled.rewards, weights
        )
        return scored_rollouts.compare(
            sampled, ref_logps, weights, kl_coef, row, c.advantage_epsilon
        ), measures

    return Program(compare)


def looks_at_reference(c: Grpo) -> bool:
    """Returns whether there is a KL to the reference policy."""
    return bool(loss.choose(c).kl_coef or c.kl_target)


def temperatures(c: Grpo) -> list[float]:
    """Returns the temperature of each completion of a group: a last, greedy one where the algorithm compares with it."""
    return [c.temperature] * c.group_size + [0.0] * (loss.choose(c).advantage is greedy_baseline)


def rollout(config: Config, model: PaliGemma) -> Program:
    """Returns (params, frozen, batch, key) → the completions of a batch's prompts."""
    c = config.grpo
    temperature = temperatures(c)

    def roll(params: Any, frozen: Any, batch: Batch, key: jax.Array) -> Rollout:
        inputs = (batch.image, batch.prompt, batch.prompt_mask)
        draw = (
            key,
            len(temperature),
            c.max_new_tokens,
            jnp.array(temperature),
            c.top_p,
            c.top_k,
            CONTROL + c.suppress_tokens,
        )
        return sample(model, join(frozen, params), *inputs, *draw)

    return Program(roll)


def rollout_weights(config: Config, mesh: AnyMesh, params: Any) -> Program:
    """Returns params → the same as sampling reads them: in the dtype of activations, and whole on every device (of `model`).

    A decoder reads every weight for every token: gathered and cast once a step, they are read where they are. Norms stay as they
    are, since they are computed in float32: sampler and trainer stay one function.
    """
    dtype = jnp.dtype(config.model.dtype)

    def gather(params: Any) -> Any:
        return map_named(lambda name, leaf: leaf if _of_norm(name) else leaf.astype(dtype), params)

    return Program(gather, (), sharding.gathered_shardings(mesh, params, config.mesh.rules))


def _of_norm(name: str) -> bool:
    return "norm" in name.rpartition("/")[0].rpartition("/")[2].lower()


def read_like(config: Config, mesh: AnyMesh, params: Any) -> Any:
    """Returns the shapes, dtypes and places of what `rollout_weights` makes of such parameters; these where it changes none."""
    program = rollout_weights(config, mesh, params)
    made = jax.eval_shape(program.function, params)
    found = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        made,
        program.places,
    )

    def same(a: Any, b: Any) -> bool:
        return a.dtype == b.dtype and a.sharding.is_equivalent_to(b.sharding, a.ndim)

    return params if all(jax.tree.leaves(jax.tree.map(same, params, found))) else found


def gathers(config: Config, mesh: AnyMesh, hbm_bytes: float | None) -> bool:
    """Returns whether sampling reads gathered weights: as configured; for `auto`, where they fit beside what stays.

    Sharded weights are gathered again for every token. On one device there is only the cast to save. Where it is not known how
    much memory a device has (a CPU's is everybody's), nothing is copied.
    """
    wanted = config.grpo.rollout_weights
    if wanted != "auto":
        return wanted == "gathered"
    if hbm_bytes is None:
        return False
    c, model = config.grpo, PaliGemma(config.model, sharding.activation_sharding(mesh))
    trained, frozen = (unflatten(like) for like in layout(config, model, mesh))
    factors = factors_of(config, [*flatten(trained), *flatten(frozen)])
    state = state_like(config, mesh, "grpo", factors, trained)
    share = memory_model.work(
        config, mesh, c.batch_size, len(temperatures(c)), c.max_new_tokens, c.rollout_parts
    )
    needed = memory_model.cache(config, mesh, share) + memory_model.sampling(
        config, mesh, share, True
    )
    needed += sharding.bytes_per_device((state, frozen)) + (
        sharding.bytes_per_device(trained) if looks_at_reference(c) else 0.0
    )
    for tree in (trained, frozen):
        read = read_like(config, mesh, tree)
        needed += 0.0 if read is tree else sharding.bytes_per_device(read)
    return needed <= SAFE_SHARE * hbm_bytes


SAFE_SHARE = 0.9
"""Of a device's memory that an estimate may fill: it is good to some 10 %."""


def reader(config: Config, mesh: Mesh, params: Any) -> Callable[[Any], Any]:
    """Returns the function that makes of such parameters what sampling reads: `rollout_weights`, or the same."""
    if (
        not gathers(config, mesh, sharding.hbm_bytes(mesh))
        or read_like(config, mesh, params) is params
    ):
        return lambda params: params
    gather = compiled(rollout_weights(config, mesh, params), config, mesh)
    # as large as a model: while an update ran, it would come on top of what that needs
    return lambda params: gather(jax.block_until_ready(params))

"""One program of a run, traced and compiled for a topology: the half of `compile` that needs jax and libtpu."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from pg_ground.aot import flops, tpu_specs
from pg_ground.config import Config
from pg_ground.evals.programs import make_eval_programs
from pg_ground.models import PaliGemma
from pg_ground.parallel import memory_model, sharding
from pg_ground.parallel.sharding import AnyMesh
from pg_ground.params import flatten, is_multiplied, join, map_named, unflatten
from pg_ground.reporting.tables import Table
from pg_ground.rl.scored_rollouts import PolicyBatch
from pg_ground.training import programs
from pg_ground.types import Batch, Boxes, Gold, Points, Rollout, UserError
from pg_ground.vocab import vocab_of_size

FACTS_FILE = "facts.json"
"""Written in the directory of a compilation just before XLA compiles the program."""

DONE_FILE = "done.json"
"""Written after the program is compiled to the end."""


class Job(NamedTuple):
    """A program with the shapes it is called with, and what a device holds while it runs (bytes by kind)."""

    function: Callable[[], Any]
    """Makes what jax.jit returns."""
    arguments: tuple[Any, ...]
    inside: dict[str, float]
    """Among the arguments, and caches that the program makes."""
    beside: dict[str, float]
    """In memory all the same."""
    activations: float
    """What the compiler is expected to add."""
    tokens: int = 0
    """Whose logits are computed with a gradient, and so computed again."""


def compile_program(config: Config, topology: str, name: str, directory: Path) -> None:
    """Compiles a program, having written down in `directory` what is known of it before.

    Raises:
      UserError: no such topology or libtpu, or a batch that the mesh does not divide.
    """
    mesh = sharding.make_mesh(config.mesh, devices_of(topology))
    job = job_of(
        config, mesh, name, tpu_specs.CHIPS[tpu_specs.parse_topology(topology)[0]].hbm_bytes
    )
    start = time.monotonic()
    traced = job.function().trace(*job.arguments)
    turns = config.eval.max_new_tokens if name == "evaluation" else config.grpo.max_new_tokens
    facts = {
        "flops": flops.count(traced.jaxpr.jaxpr, turns) / mesh.size,
        "useful_flops": useful_flops(config, mesh, name, turns) / mesh.size,
        "inside": job.inside,
        "beside": job.beside,
        "expected": job.activations,
        "while_trip_count": turns,
    }
    lowered = traced.lower()
    (directory / FACTS_FILE).write_text(json.dumps(facts))
    lowered.compile()
    (directory / DONE_FILE).write_text(json.dumps({"seconds": time.monotonic() - start}))


def devices_of(topology: str) -> list[Any]:
    """Returns the devices of a TPU slice that need not be there.

    Raises:
      UserError: libtpu is not installed, or does not know the topology.
    """
    from jax.experimental import topologies

    version, shape, slices = tpu_specs.parse_topology(topology)
    single = all(side == "1" for side in shape.split("x"))
    given = {"chips_per_host_bounds": [1, 1, 1]} if single else {}
    given |= {"num_slices": slices} if slices > 1 else {}
    try:
        return list(
            topologies.get_topology_desc(
                platform="tpu", topology_name=f"{version}:{shape}", **given
            ).devices
        )
    except Exception as error:  # jax raises what libtpu gives it, of several kinds
        raise UserError(
            f"--topology={topology}: {str(error).strip().splitlines()[0][:300]}; is pg-ground[tpu] installed?"
        ) from None


def useful_flops(config: Config, mesh: Mesh, name: str, turns: int) -> float:
    """Returns the operations of a program over all devices, had it the memory to recompute nothing."""
    kept = replace(config, model=replace(config.model, remat="none"))
    job = job_of(kept, mesh, name, None)
    again = 2.0 * job.tokens * config.model.text.vocab_size * config.model.text.width
    return flops.count(job.function().trace(*job.arguments).jaxpr.jaxpr, turns) - again


def job_of(config: Config, mesh: AnyMesh, name: str, hbm_bytes: float | None) -> Job:
    """Returns the named program as `train` would call it on devices with that much memory (None: not known)."""
    c, looks = config.grpo, "grpo" in config.stages and programs.looks_at_reference(config.grpo)
    stage = "sft" if name == "sft" or "grpo" not in config.stages else "grpo"
    model = PaliGemma(config.model, sharding.activation_sharding(mesh))
    trained, frozen = (unflatten(like) for like in programs.layout(config, model, mesh))
    factors = programs.factors_of(config, [*flatten(trained), *flatten(frozen)])
    state = programs.state_like(config, mesh, stage, factors, trained)
    kept = {
        "parameters": sharding.bytes_per_device((trained, frozen)),
        "optimizer": sharding.bytes_per_device(state.opt),
    }
    reference = {"reference": sharding.bytes_per_device(trained)} if looks else {}
    key = jax.eval_shape(lambda: jax.random.key(0))
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=sharding.replicated(mesh))
    vocab = vocab_of_size(config.model.text.vocab_size)
    gathered = stage == "grpo" and programs.gathers(config, mesh, hbm_bytes)
    read, read_frozen = (
        programs.read_like(config, mesh, tree) if gathered else tree for tree in (trained, frozen)
    )
    copied = (
        {"rollout weights": sharding.bytes_per_device(read_frozen)}
        if read_frozen is not frozen
        else {}
    )

    def compiled(program: programs.Program) -> Callable[[], Any]:
        return lambda: programs.compiled(program, config, cast(Mesh, mesh))

    def learning(questions: int, group: int, tokens: int, parts: int) -> float:
        share = memory_model.work(config, mesh, questions, group, tokens, parts)
        dtype = jnp.dtype(config.model.dtype)
        other = sharding.bytes_per_device(
            [leaf for leaf in jax.tree.leaves((trained, frozen)) if leaf.dtype != dtype]
        )
        gradients = map_named(
            lambda name, leaf: leaf.update(dtype=dtype) if is_multiplied(name) else leaf, trained
        )
        so_far = sharding.bytes_per_device(trained) * (parts > 1)
        return memory_model.learning(
            config, mesh, share, sharding.bytes_per_device(gradients) + so_far, other
        )

    if name == "sft":
        batch = batch_like(config, mesh, config.sft.batch_size)
        program = programs.sft_update(config, model, mesh, factors, state, vocab)
        added = learning(
            config.sft.batch_size, 1, config.data.suffix_length, config.sft.grad_accum_steps
        )
        return Job(
            compiled(program),
            (state, frozen, batch),
            kept | {"batch": sharding.bytes_per_device(batch)},
            {},
            added,
            batch.suffix.size,
        )
    if name == "evaluation":
        batch, tokens = batch_like(config, mesh, config.eval.batch_size), config.eval.max_new_tokens
        scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=sharding.replicated(mesh))
        group = max(1, config.eval.rollouts)
        share = memory_model.work(config, mesh, config.eval.batch_size, group, tokens)
        inside = {
            "parameters": kept["parameters"],
            "batch": sharding.bytes_per_device(batch),
            "cache": memory_model.cache(config, mesh, share),
        }
        beside = {"optimizer": kept["optimizer"]} | reference | copied
        arguments = (join(frozen, trained), batch, scalar, key, group)
        return Job(
            lambda: (
                make_eval_programs(
                    model, vocab, config.eval, config.grpo.rewards, config.grpo.reward_settings
                ).answer
            ),
            arguments,
            inside,
            beside,
            memory_model.sampling(config, mesh, share, False),
        )
    if name == "rollout":
        part = batch_like(config, mesh, c.batch_size // c.rollout_parts)
        share = memory_model.work(
            config,
            mesh,
            c.batch_size,
            len(programs.temperatures(c)),
            c.max_new_tokens,
            c.rollout_parts,
        )
        own = {
            tree: sharding.bytes_per_device(tree_)
            for tree, tree_ in (("read", read), ("frozen", read_frozen))
        }
        inside = {
            "batch": sharding.bytes_per_device(part),
            "cache": memory_model.cache(config, mesh, share),
        }
        inside["rollout weights"] = own["read"] * (read is not trained) + own["frozen"] * (
            read_frozen is not frozen
        )
        inside["parameters"] = sum(own.values()) - inside["rollout weights"]
        beside = {
            "optimizer": kept["optimizer"],
            "parameters": kept["parameters"] - inside["parameters"],
        } | reference
        added = memory_model.sampling(config, mesh, share, gathered)
        return Job(
            compiled(programs.rollout(config, model)),
            (read, read_frozen, part, key),
            inside,
            beside,
            added,
        )
    batch, rollout = batch_like(config, mesh, c.batch_size), rollout_like(config, mesh)
    if name == "reference":
        inside = {
            "reference": sharding.bytes_per_device(trained),
            "parameters": sharding.bytes_per_device(frozen),
            "batch": sharding.bytes_per_device((batch, rollout)),
        }
        beside = {
            "optimizer": kept["optimizer"],
            "parameters": sharding.bytes_per_device(trained),
        } | copied
        share = memory_model.work(
            config,
            mesh,
            c.batch_size,
            c.group_size,
            c.max_new_tokens,
            c.grad_accum_steps * c.minibatches,
        )
        program = programs.reference_logps(config, model)
        return Job(
            compiled(program),
            (trained, frozen, batch, rollout),
            inside,
            beside,
            memory_model.forward(config, mesh, share),
        )
    scores = rows((c.batch_size, c.group_size), jnp.float32, mesh)
    experience = PolicyBatch(batch, rollout, scores, rollout.logps if looks else None)
    added = learning(
        c.batch_size // c.minibatches, c.group_size, c.max_new_tokens, c.grad_accum_steps
    )
    return Job(
        compiled(programs.grpo_update(config, model, mesh, factors, state)),
        (state, frozen, experience, key),
        kept | {"batch": sharding.bytes_per_device(experience)},
        reference | copied,
        added,
        rollout.tokens.size * c.num_iterations,
    )


def estimate(config: Config, mesh: AnyMesh, name: str, hbm_bytes: float | None) -> dict[str, float]:
    """Returns the bytes by kind that a device holds while the named program runs, by arithmetic alone."""
    job = job_of(config, mesh, name, hbm_bytes)
    kinds = {
        kind: job.inside.get(kind, 0.0) + job.beside.get(kind, 0.0) for kind in memory_model.KINDS
    }
    return kinds | {"activations": job.activations}


def estimates(
    config: Config, mesh: AnyMesh, names: Sequence[str], hbm_bytes: float | None, where: str
) -> Table:
    """Returns the table of `estimate` for the named programs, in GiB a device."""
    found = {name: estimate(config, mesh, name, hbm_bytes) for name in names}
    rows = [
        [name, *(f"{size / tpu_specs.GIB:.3g}" for size in (sum(kinds.values()), *kinds.values()))]
        for name, kinds in found.items()
    ]
    worst = max(sum(kinds.values()) for kinds in found.values())
    limit = "" if hbm_bytes is None else f" of {hbm_bytes / tpu_specs.GIB:.3g}"
    title = f"{where}: about {worst / tpu_specs.GIB:.3g}{limit} GiB a device, by arithmetic"
    return Table(title, ["program", "GiB", *memory_model.KINDS], rows, "")


def rows(shape: tuple[int, ...], dtype: Any, mesh: AnyMesh) -> Any:
    """Returns the shape and place of an array whose first axis is B."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.batch_sharding(mesh))


def batch_like(config: Config, mesh: AnyMesh, questions: int) -> Batch:
    """Returns the shapes of a batch, as the pipeline stacks it.

    Raises:
      UserError: the mesh does not divide it.
    """
    sharding.check_batch_size(mesh, questions, "batch_size (of a program)")
    d, side, k = config.data, config.model.image_size, config.data.max_boxes

    def of(*shape: int, dtype: Any = jnp.int32) -> Any:
        return rows((questions, *shape), dtype, mesh)

    boxes = Boxes(of(k, 4, dtype=jnp.float32), of(k), of(k, dtype=jnp.bool_))
    points = Points(of(k, 2, dtype=jnp.float32), of(k), of(k, dtype=jnp.bool_))
    masks = of(k, d.mask_size, d.mask_size, dtype=jnp.bool_)
    gold = Gold(boxes, points, of(), of(k, d.suffix_length), masks)
    return Batch(
        image=of(side, side, 3, dtype=jnp.uint8),
        prompt=of(d.prompt_length),
        prompt_mask=of(d.prompt_length, dtype=jnp.bool_),
        suffix=of(d.suffix_length),
        suffix_mask=of(d.suffix_length, dtype=jnp.bool_),
        gold=gold,
        size=of(2),
        source=of(),
        index=of(),
    )


def rollout_like(config: Config, mesh: AnyMesh) -> Rollout:
    """Returns the shapes of the completions of a step."""
    c = config.grpo
    shape = (c.batch_size, c.group_size, c.max_new_tokens)
    return Rollout(*(rows(shape, dtype, mesh) for dtype in (jnp.int32, jnp.bool_, jnp.float32)))

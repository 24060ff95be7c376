"""One program of a run, traced and compiled for a topology: the half of `compile` that needs jax and libtpu."""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from pg_ground import chips, flops, programs, sharding
from pg_ground.config import Config
from pg_ground.evaluate import answerer
from pg_ground.model import PaliGemma
from pg_ground.params import flatten, join, unflatten
from pg_ground.rl.experience import Experience
from pg_ground.types import Batch, Boxes, Gold, Points, Rollout, UserError
from pg_ground.vocab import vocab_of_size


class Job(NamedTuple):
    """A program with the shapes it is called with, and what a chip holds while it runs (bytes by kind)."""

    function: Any
    """What jax.jit returned."""
    arguments: tuple[Any, ...]
    inside: dict[str, float]
    """Among the arguments, and caches that the program makes."""
    beside: dict[str, float]
    """In memory all the same."""
    tokens: int
    """Whose logits are computed with a gradient, and so computed again."""


def compile_program(config: Config, topology: str, name: str, directory: Path) -> None:
    """Compiles a program, having written down in `directory` what is known of it before.

    Raises:
      UserError: no such topology or libtpu, or a batch that the mesh does not divide.
    """
    mesh = sharding.make_mesh(config.mesh, devices_of(topology))
    job = job_of(config, mesh, name)
    start = time.monotonic()
    traced = job.function.trace(*job.arguments)
    turns = config.eval.max_new_tokens if name == "evaluation" else config.grpo.max_new_tokens
    facts = {
        "flops": flops.count(traced.jaxpr.jaxpr, turns) / mesh.size,
        "useful_flops": useful_flops(config, mesh, name, turns) / mesh.size,
        "inside": job.inside,
        "beside": job.beside,
        "turns": turns,
    }
    lowered = traced.lower()
    (directory / "facts.json").write_text(json.dumps(facts))
    lowered.compile()
    (directory / "done.json").write_text(json.dumps({"seconds": time.monotonic() - start}))


def devices_of(topology: str) -> list[Any]:
    """Returns the devices of a TPU slice that need not be there.

    Raises:
      UserError: libtpu is not installed, or does not know the topology.
    """
    from jax.experimental import topologies

    version, shape, slices = chips.parse_topology(topology)
    single = all(side == "1" for side in shape.split("x"))
    given = {"chips_per_host_bounds": [1, 1, 1]} if single else {}
    given |= {"num_slices": slices} if slices > 1 else {}
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=f"{version}:{shape}", **given).devices)
    except Exception as error:  # jax raises what libtpu gives it, of several kinds
        raise UserError(
            f"--topology={topology}: {str(error).strip().splitlines()[0][:300]}; is pg-ground[tpu] installed?"
        ) from None


def useful_flops(config: Config, mesh: Mesh, name: str, turns: int) -> float:
    """Returns the operations of a program over all devices, had it the memory to recompute nothing."""
    kept = replace(config, model=replace(config.model, remat="none"))
    job = job_of(kept, mesh, name)
    again = 2.0 * job.tokens * config.model.text.vocab_size * config.model.text.width
    return flops.count(job.function.trace(*job.arguments).jaxpr.jaxpr, turns) - again


def job_of(config: Config, mesh: Mesh, name: str) -> Job:
    """Returns the named program as `train` would call it."""
    model = PaliGemma(config.model, sharding.places(mesh))
    trained, frozen = (unflatten(like) for like in programs.layout(config, model, mesh))
    factors = programs.factors_of(config, [*flatten(trained), *flatten(frozen)])
    stage = "sft" if name == "sft" else "grpo" if "grpo" in config.stages else "sft"
    state = programs.state_like(config, mesh, stage, factors, trained)
    parameters, optimizer = held((trained, frozen)), held(state.opt)
    c = config.grpo
    looks = stage == "grpo" and programs.looks_at_reference(c)
    reference = {"reference": held(trained)} if looks else {}
    key = jax.eval_shape(lambda: jax.random.key(0))
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=sharding.replicated(mesh))
    vocab = vocab_of_size(config.model.text.vocab_size)
    if name == "sft":
        batch = batch_like(config, mesh, config.sft.batch_size)
        jitted = programs.compiled(programs.sft_update(config, model, mesh, factors, state, vocab), config, mesh)
        inside = {"parameters": parameters, "optimizer": optimizer, "batch": held(batch)}
        return Job(jitted, (state, frozen, batch), inside, {}, batch.suffix.size)
    if name == "evaluation":
        batch = batch_like(config, mesh, config.eval.batch_size)
        jitted = answerer(model, vocab, config.eval.max_new_tokens)
        scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=sharding.replicated(mesh))
        cache = cache_bytes(config, mesh, config.eval.batch_size, 1, config.eval.max_new_tokens)
        inside = {"parameters": parameters, "batch": held(batch), "cache": cache}
        return Job(jitted, (join(frozen, trained), batch, scalar, key), inside, {"optimizer": optimizer} | reference, 0)
    batch = batch_like(config, mesh, c.batch_size)
    if name == "rollout":
        part = batch_like(config, mesh, c.batch_size // c.rollout_parts)
        gathered = programs.gathers(config, mesh)
        read, read_frozen = (programs.read_like(config, mesh, tree) if gathered else tree for tree in (trained, frozen))
        jitted = programs.compiled(programs.rollout(config, model), config, mesh)
        cache = cache_bytes(config, mesh, part.prompt.shape[0], len(programs.temperatures(c)), c.max_new_tokens)
        inside = {"rollout weights" if gathered else "parameters": held((read, read_frozen)), "batch": held(part), "cache": cache}
        beside = {"optimizer": optimizer, "parameters": parameters if gathered else 0.0} | reference
        return Job(jitted, (read, read_frozen, part, key), inside, beside, 0)
    rollout = rollout_like(config, mesh)
    if name == "reference":
        jitted = programs.compiled(programs.reference_logps(config, model), config, mesh)
        inside = {"reference": held(trained), "parameters": held(frozen), "batch": held((batch, rollout))}
        beside = {"optimizer": optimizer, "parameters": held(trained)}
        return Job(jitted, (trained, frozen, batch, rollout), inside, beside, 0)
    if name != "update":
        raise UserError(f"there is no program {name}")
    scores = rows((c.batch_size, c.group_size), jnp.float32, mesh)
    experience = Experience(batch, rollout, scores, rollout.logps if looks else None)
    jitted = programs.compiled(programs.grpo_update(config, model, mesh, factors, state), config, mesh)
    inside = {"parameters": parameters, "optimizer": optimizer, "batch": held(experience)}
    still = programs.gathers(config, mesh) and bool(frozen)
    beside = reference | ({"rollout weights": held(programs.read_like(config, mesh, frozen))} if still else {})
    return Job(jitted, (state, frozen, experience, key), inside, beside, rollout.tokens.size * c.updates_per_rollout)


def held(tree: Any) -> float:
    """Returns the bytes that one device holds of a tree of shapes with places."""

    def own(leaf: Any) -> float:
        return float(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize

    return sum(map(own, jax.tree.leaves(tree)))


def cache_bytes(config: Config, mesh: Mesh, prompts: int, group: int, length: int) -> float:
    """Returns the bytes of a device's share of the keys and values of prompts and completions."""
    text, m = config.model.text, config.model
    slots = (m.image_size // m.vision.patch_size) ** 2 + config.data.prompt_length + group * length
    rows_here = prompts / (mesh.shape["replica"] * mesh.shape["data"])
    return 2.0 * text.depth * rows_here * slots * text.num_kv_heads * text.head_dim * jnp.dtype(m.dtype).itemsize


def rows(shape: tuple[int, ...], dtype: Any, mesh: Mesh) -> Any:
    """Returns the shape and place of an array whose first axis is B."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.batch_sharding(mesh))


def batch_like(config: Config, mesh: Mesh, questions: int) -> Batch:
    """Returns the shapes of a batch, as the pipeline stacks it.

    Raises:
      UserError: the mesh does not divide it.
    """
    sharding.check_rows(mesh, questions, "batch_size (of a program)")
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


def rollout_like(config: Config, mesh: Mesh) -> Rollout:
    """Returns the shapes of the completions of a step."""
    c = config.grpo
    shape = (c.batch_size, c.group_size, c.max_new_tokens)
    return Rollout(*(rows(shape, dtype, mesh) for dtype in (jnp.int32, jnp.bool_, jnp.float32)))

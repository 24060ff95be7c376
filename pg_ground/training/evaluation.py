"""Evaluation during a run: its program, and the function that the recorder calls."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from pg_ground.data.bad_records import BadRecords
from pg_ground.data.datasets import Examples
from pg_ground.evals.programs import EvalPrograms, make_eval_programs
from pg_ground.evals.runner import EvalContext, evaluate_sources
from pg_ground.parallel import memory_model, sharding
from pg_ground.params import join
from pg_ground.tokenizer import Tokenizer
from pg_ground.training import setup as setups
from pg_ground.training.program import Memory, Program
from pg_ground.training.setup import Setup
from pg_ground.training.stage import Stage
from pg_ground.types import Params


def eval_programs(setup: Setup) -> EvalPrograms:
    """Returns the jitted programs of an evaluation."""
    config = setup.config
    return make_eval_programs(setup.model, setup.vocab, config.eval, config.grpo)


def make_evaluate(
    setup: Setup,
    mesh: Mesh,
    frozen: Params,
    sources: dict[str, Examples],
    tokenizer: Tokenizer,
    bad_records: BadRecords,
) -> Callable[[Params, bool], dict[str, float]]:
    """Returns the function `(trained parameters, is_interim) → held-out metrics`.

    An interim evaluation asks `eval.interim_examples` questions of each source. The others ask
    `eval.examples`, and report both numbers.
    """
    config = setup.config
    context = EvalContext(
        config.eval, config.data, config.seed, tokenizer, mesh, bad_records, config.grpo
    )
    programs = eval_programs(setup)

    def evaluate(params: Params, is_interim: bool) -> dict[str, float]:
        interim, final = config.eval.interim_examples or config.eval.examples, config.eval.examples
        limits = (interim,) if is_interim else (interim, final)
        return evaluate_sources(programs, join(frozen, params), sources, context, limits).metrics

    return evaluate


def all_programs(setup: Setup, stages: Sequence[Stage]) -> dict[str, Program]:
    """Returns the programs of all stages and of the evaluation, by name."""
    programs: dict[str, Program] = {}
    for stage in stages:
        programs |= stage.programs()
    if setup.config.eval.sources:
        programs["evaluation"] = evaluation_program(setup, stages)
    return programs


def evaluation_program(setup: Setup, stages: Sequence[Stage]) -> Program:
    """Returns the program that answers a batch of held-out questions, beside the stage that
    needs the most memory."""
    settings = setup.config.eval
    batch = setups.abstract_batch(setup, settings.batch_size)
    replicated = sharding.replicated(setup.mesh)
    temperature = jax.ShapeDtypeStruct((), jnp.float32, sharding=replicated)
    group = max(1, settings.rollouts)
    params = join(setup.frozen_tree, setup.trained_tree)
    work = memory_model.device_work(setup.mesh, settings.batch_size, group, settings.max_new_tokens)
    inside = {
        "parameters": sharding.bytes_per_device(params),
        "batch": sharding.bytes_per_device(batch),
        "cache": memory_model.cache_bytes(setup.architecture, setup.mesh, work),
    }
    resident = max(
        (stage.resident_memory() for stage in stages), key=lambda kinds: sum(kinds.values())
    )
    beside = {kind: size for kind, size in resident.items() if kind != "parameters"}
    activations = memory_model.sampling_bytes(setup.architecture, setup.mesh, work, gathered=False)
    return Program(
        eval_programs(setup).answer,
        (params, batch, temperature, setups.abstract_key(setup.mesh), group),
        memory=Memory(inside, beside, activations),
        decode_steps=settings.max_new_tokens,
        is_jitted=True,
    )

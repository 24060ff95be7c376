"""The stage of GRPO and its relatives.

A step samples groups of completions, scores them, compares them within the group, and updates the
policy.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp

from pg_ground.checkpoints import manager, vqvae_file
from pg_ground.config import Grpo
from pg_ground.data.batches import BatchIterator
from pg_ground.data.datasets import Examples
from pg_ground.models import vqvae
from pg_ground.parallel import memory_model, multiprocess, sharding
from pg_ground.parallel.memory_model import device_work
from pg_ground.params import join
from pg_ground.reporting import progress
from pg_ground.reporting.tables import Table
from pg_ground.rewards import device_rewards
from pg_ground.rewards.answer_reader import DecodeMasks
from pg_ground.rewards.reward_functions import load_device_rewards, make_reward_workers
from pg_ground.rl import advantages, scored_rollouts
from pg_ground.rl.algorithms import Algorithm, make_algorithm
from pg_ground.rl.kl import k1
from pg_ground.rl.rollout import sample
from pg_ground.rl.scored_rollouts import PolicyBatch, ScoredRollouts, weights_at
from pg_ground.rl.update import completion_logps, grpo_update
from pg_ground.storage.paths import to_path
from pg_ground.tokenizer import Tokenizer
from pg_ground.training import reward_coverage
from pg_ground.training import setup as setups
from pg_ground.training.learning_memory import learning_memory
from pg_ground.training.program import Memory, Program, jit_program
from pg_ground.training.rollout_samples import draw_samples
from pg_ground.training.rollout_weights import (
    AbstractRolloutWeights,
    abstract_rollout_weights,
    make_gather,
)
from pg_ground.training.rollout_worker import UPDATE_KEY, RolloutWorker
from pg_ground.training.setup import Setup
from pg_ground.training.stage import Runtime, StepOutput
from pg_ground.training.timing import StepTimer
from pg_ground.types import (
    POLICY,
    Array,
    Batch,
    JsonDict,
    Metrics,
    Params,
    Rollout,
    TrainState,
    UserError,
)
from pg_ground.vocab import CONTROL


class GrpoStage:
    """The stage of reinforcement learning. Its section is `config.grpo`."""

    name = "grpo"
    phases = MappingProxyType({"rollout": "rollout", "score": "reference", "update": "update"})
    data_seed = 1_000_003

    def __init__(self, setup: Setup):
        self.setup = setup
        self.settings = setup.config.grpo
        self.algorithm = make_algorithm(self.settings.algorithm, self.settings.algorithm_overrides)

    @property
    def has_reference(self) -> bool:
        """Whether the loss or the reward needs the reference policy."""
        return bool(self.algorithm.kl_coef or self.settings.kl_target)

    @property
    def has_greedy(self) -> bool:
        """Whether each group has one more completion, a greedy one, whose reward is the
        baseline."""
        return self.algorithm.advantage is advantages.greedy_baseline

    @property
    def temperatures(self) -> list[float]:
        """The temperature of each completion of a group."""
        greedy = [0.0] if self.has_greedy else []
        return [self.settings.temperature] * self.settings.group_size + greedy

    def check(self) -> None:
        """Raises UserError if the settings do not fit the mesh, the rewards or the algorithm."""
        settings = self.settings
        check_algorithm(self.algorithm, settings)
        load_device_rewards(settings)
        make_reward_workers(settings)
        parts = settings.parts_per_step
        for divisor, setting in (
            (parts, "grpo.batch_size / grad_accum_steps / minibatches"),
            (settings.rollout_parts, "grpo.batch_size / rollout_parts"),
        ):
            sharding.check_batch_size(self.setup.mesh, settings.batch_size // divisor, setting)

    def check_data(self, parts: Sequence[Examples], tokenizer: Tokenizer) -> Table:
        """Returns the table of the rewards of each source.

        Raises:
          UserError: the rewards do not apply to a question, or cannot teach anything.
        """
        config = self.setup.config
        coverages = reward_coverage.measure(
            parts, self.settings, tokenizer, config.data, bool(config.eval.vqvae)
        )
        reward_coverage.check(coverages, self.settings)
        return reward_coverage.table(coverages, self.settings)

    def resident_memory(self) -> dict[str, float]:
        """Returns the bytes of parameters, optimizer, reference policy and gathered frozen
        weights."""
        common = setups.resident_memory(self.setup, self.settings)
        copied = self._copied_memory(self._rollout_weights())
        return common | self._reference_memory() | copied

    def init(self, params: Params) -> TrainState:
        """Returns the train state at the start of the stage."""
        return setups.init_state(self.setup, self.settings, params, self.algorithm.kl_coef)

    def abstract_state(self) -> TrainState:
        """Returns shapes, dtypes and shardings of the train state."""
        return setups.abstract_state(self.setup, self.settings)

    @contextmanager
    def open(self, runtime: Runtime, state: TrainState) -> Iterator[None]:
        """Prepares the steps, and starts and ends the reward workers."""
        config = self.setup.config
        programs = {
            name: jit_program(program, config.mesh, runtime.mesh)
            for name, program in self.programs().items()
        }
        gathered = self._rollout_weights().gathered
        self._runtime = runtime
        self._key = jax.random.key(config.seed)
        self._learning_rates = setups.learning_rates(self.settings)
        self._ref_params = self._reference_policy(state) if self.has_reference else None
        self._reference = programs.get("reference")
        self._compare = jax.jit(self._compute_advantages)
        self._update = programs["update"]
        self._gather = make_gather(self.setup, runtime.mesh, state.params[POLICY], gathered)
        gather_frozen = make_gather(self.setup, runtime.mesh, runtime.frozen, gathered)
        with self.open_worker(runtime, gather_frozen(runtime.frozen)) as worker:
            self._worker = worker
            yield

    @contextmanager
    def open_worker(self, runtime: Runtime, frozen: Params) -> Iterator[RolloutWorker]:
        """Yields the rollout worker. Its processes for text rewards end with the context.

        Args:
          frozen: the frozen parameters as sampling reads them.
        """
        program = self._rollout_program(self._rollout_weights())
        generate = jit_program(program, self.setup.config.mesh, runtime.mesh)
        with make_reward_workers(self.settings) as reward_workers:
            reward_workers.set_state(
                runtime.saved.get("reward_workers", reward_workers.get_state())
            )
            yield RolloutWorker(
                self.settings, runtime.mesh, generate, frozen, runtime.tokenizer, reward_workers,
                self.has_greedy, self._mask_decoder(),
            )  # fmt: skip

    def _mask_decoder(self) -> DecodeMasks | None:
        """Returns the decoder of mask codes; None without `config.eval.vqvae`."""
        path = self.setup.config.eval.vqvae
        if not path:
            return None
        return partial(vqvae.decode, vqvae_file.load(to_path(path, "config.eval.vqvae")))

    def step(
        self, state: TrainState, batches: BatchIterator, number: int, timer: StepTimer
    ) -> tuple[TrainState, StepOutput]:
        """Dispatches one step of GRPO (arXiv 2402.03300, algorithm 1)."""
        key = jax.random.fold_in(self._key, number)
        weights = weights_at(self.settings.all_rewards, number)
        errors_before = self._worker.reward_errors()
        rollout_params = self._gather(state.params[POLICY])

        def generate_and_score(key: jax.Array) -> ScoredRollouts:
            with progress.phase("data"):
                batch = timer.lap("data", next(batches))
            generated = self._worker.generate(rollout_params, batch, key, timer)
            batches.prepare()
            return self._worker.score(generated, weights, timer)

        scored = generate_and_score(key)
        scored, sampling_metrics = self._worker.refill(scored, generate_and_score, key, timer)
        error_metrics = self._reward_errors(errors_before)
        ref_logps = self._reference_logps(scored, timer)
        policy_batch, reward_metrics = timer.lap(
            "score", self._compare(scored, ref_logps, weights, state.kl_coef)
        )
        update_key = jax.random.fold_in(key, UPDATE_KEY)
        with progress.phase("update"):
            state, metrics = self._update(state, self._runtime.frozen, policy_batch, update_key)
            timer.lap("update", metrics)
        metrics = reward_metrics | metrics | sampling_metrics | error_metrics
        return state, StepOutput(
            metrics | {"optim/lr": self._learning_rates[number]},
            completions=self.settings.batch_size * self.settings.group_size,
            sampled_mask=scored.rollout.mask,
            draw_samples=partial(self._draw_samples, scored, policy_batch.advantages),
            saved={"reward_workers": self._worker.reward_state()},
        )

    def _reward_errors(self, before: dict[str, int]) -> Metrics:
        """Returns the number of errors of each text reward in this step, over all processes.

        It is called after the host has read the texts, so that the processes do not wait for the
        update.
        """
        errors = self._worker.reward_errors()
        counts = {f"reward/errors/{name}": count - before[name] for name, count in errors.items()}
        return multiprocess.sum_over_processes(counts)

    def _reference_policy(self, state: TrainState) -> Params:
        """Returns the trained parameters at the start of this stage.

        The first step saves them, a resumed run restores them.
        """
        policy = state.params[POLICY]
        if self._runtime.workdir is None:
            return jax.tree.map(jnp.copy, policy)
        path = self._runtime.workdir / "reference"
        if int(state.step) == 0:
            manager.save_tree(path, policy)
            return jax.tree.map(jnp.copy, policy)
        try:
            return manager.restore_tree(path, policy)
        except UserError as error:
            raise UserError(
                f"{error}: a new run with the same settings writes the same {path.name} at the "
                "start of this stage, which can be copied"
            ) from error

    def _reference_logps(self, scored: ScoredRollouts, timer: StepTimer) -> Array | None:
        """Returns the log-probabilities of the completions under the reference policy; None
        without one."""
        if self._reference is None:
            return None
        inputs = (self._ref_params, self._runtime.frozen, scored.batch, scored.rollout)
        with progress.phase("reference"):
            return timer.lap("score", self._reference(*inputs))

    def _compute_advantages(
        self,
        scored: ScoredRollouts,
        ref_logps: Array | None,
        weights: JsonDict,
        kl_coef: Array,
    ) -> tuple[PolicyBatch, Metrics]:
        """Returns the policy batch, and the metrics of rewards and completions."""
        coefficient = kl_coef if self.settings.kl_target else self.algorithm.kl_coef
        batch = scored_rollouts.compute_advantages(
            scored, ref_logps, weights, coefficient, self.algorithm
        )
        metrics = device_rewards.reward_metrics(
            scored.rollout, scored.answer, scored.rewards, weights
        )
        return batch, metrics

    def _draw_samples(self, scored: ScoredRollouts, advantages: Array) -> Any:
        config = self.setup.config
        return draw_samples(
            scored, advantages, self._runtime.mesh, self._runtime.tokenizer,
            list(self.settings.sources), config.log.samples,
        )  # fmt: skip

    # Programs

    def programs(self) -> dict[str, Program]:
        """Returns rollout, reference (if the algorithm has a KL) and update."""
        weights = self._rollout_weights()
        programs = {"rollout": self._rollout_program(weights)}
        if self.has_reference:
            programs["reference"] = self._reference_program(weights)
        return programs | {"update": self._update_program(weights)}

    def _rollout_weights(self) -> AbstractRolloutWeights:
        return abstract_rollout_weights(self.setup, len(self.temperatures), self.has_reference)

    def _rollout_program(self, weights: AbstractRolloutWeights) -> Program:
        """Returns `(params, frozen, batch, key) → Rollout`."""
        settings = self.settings
        setup = self.setup
        temperatures = self.temperatures

        @jax.named_scope("rollout")
        def rollout(params: Params, frozen: Params, batch: Batch, key: jax.Array) -> Rollout:
            return sample(
                setup.model, join(frozen, params), batch.image, batch.prompt, batch.prompt_mask,
                key, len(temperatures), settings.max_new_tokens, jnp.array(temperatures),
                settings.top_p, settings.top_k, CONTROL + settings.suppress_tokens,
            )  # fmt: skip

        batch = setups.abstract_batch(setup, settings.batch_size // settings.rollout_parts)
        work = device_work(
            setup.mesh, settings.batch_size, len(temperatures), settings.max_new_tokens,
            settings.rollout_parts,
        )  # fmt: skip
        trees = ((weights.trained, setup.trained_tree), (weights.frozen, setup.frozen_tree))
        copies = [read for read, stored in trees if weights.gathered and read != stored]
        copied = sum(map(sharding.bytes_per_device, copies), 0.0)
        read = sharding.bytes_per_device((weights.trained, weights.frozen)) - copied
        state = self.abstract_state()
        inside = {
            "batch": sharding.bytes_per_device(batch),
            "cache": memory_model.cache_bytes(setup.architecture, setup.mesh, work),
            "rollout weights": copied,
            "parameters": read,
        }
        beside = {
            "optimizer": sharding.bytes_per_device(state.opt_state),
            "parameters": sharding.bytes_per_device((setup.trained_tree, setup.frozen_tree)) - read,
        }
        activations = memory_model.sampling_bytes(
            setup.architecture, setup.mesh, work, weights.gathered
        )
        return Program(
            rollout,
            (weights.trained, weights.frozen, batch, setups.abstract_key(setup.mesh)),
            memory=Memory(inside, beside | self._reference_memory(), activations),
            decode_steps=settings.max_new_tokens,
        )

    def _reference_program(self, weights: AbstractRolloutWeights) -> Program:
        """Returns `(ref_params, frozen, batch, rollout) → f32[B, G, T]` log-probabilities under
        the reference policy."""
        settings = self.settings
        setup = self.setup
        parts = settings.parts_per_step

        @jax.named_scope("reference")
        def reference(ref_params: Params, frozen: Params, batch: Batch, rollout: Rollout) -> Array:
            params = join(frozen, ref_params)
            temperature = settings.temperature
            return completion_logps(setup.model, params, batch, rollout, temperature, parts)[0]

        batch = setups.abstract_batch(setup, settings.batch_size)
        rollout = self._abstract_rollout()
        trained = sharding.bytes_per_device(setup.trained_tree)
        inside = self._reference_memory() | {
            "parameters": sharding.bytes_per_device(setup.frozen_tree),
            "batch": sharding.bytes_per_device((batch, rollout)),
        }
        beside = {
            "optimizer": sharding.bytes_per_device(self.abstract_state().opt_state),
            "parameters": trained,
        }
        work = device_work(
            setup.mesh, settings.batch_size, settings.group_size, settings.max_new_tokens, parts
        )
        activations = memory_model.forward_bytes(setup.architecture, setup.mesh, work)
        return Program(
            reference,
            (setup.trained_tree, setup.frozen_tree, batch, rollout),
            memory=Memory(inside, beside | self._copied_memory(weights), activations),
        )

    def _update_program(self, weights: AbstractRolloutWeights) -> Program:
        """Returns `(state, frozen, policy_batch, key) → (state, metrics)`, all updates of one
        step."""
        settings = self.settings
        setup = self.setup
        state = self.abstract_state()
        update = partial(
            grpo_update,
            model=setup.model,
            optimizer=setups.make_optimizer(setup, settings),
            algorithm=self.algorithm,
            temperature=settings.temperature,
            grad_accum_steps=settings.grad_accum_steps,
            minibatches=settings.minibatches,
            num_iterations=settings.num_iterations,
            kl_target=settings.kl_target,
            kl_horizon=settings.kl_horizon,
        )
        batch = setups.abstract_batch(setup, settings.batch_size)
        rollout = self._abstract_rollout()
        shape = (settings.batch_size, settings.group_size, 1)
        estimates = setups.abstract_rows(shape, jnp.float32, setup.mesh)
        ref_logps = rollout.logps if self.has_reference else None
        policy_batch = PolicyBatch(batch, rollout, estimates, ref_logps)
        memory = learning_memory(
            setup,
            state,
            inputs=policy_batch,
            questions=settings.batch_size // settings.minibatches,
            group=settings.group_size,
            tokens=settings.max_new_tokens,
            parts=settings.grad_accum_steps,
            beside=self._reference_memory() | self._copied_memory(weights),
        )
        shardings = sharding.infer_shardings(setup.mesh, state, setup.config.mesh.rules)
        return Program(
            update,
            (state, setup.frozen_tree, policy_batch, setups.abstract_key(setup.mesh)),
            donate_argnums=(0,),
            out_shardings=(shardings, None),
            memory=memory,
            gradient_tokens=int(rollout.tokens.size) * settings.num_iterations,
        )

    def _reference_memory(self) -> dict[str, float]:
        """Returns the bytes of the reference policy: a second copy of the trained parameters.

        Both policies share the frozen parameters.
        """
        if not self.has_reference:
            return {}
        return {"reference": sharding.bytes_per_device(self.setup.trained_tree)}

    def _copied_memory(self, weights: AbstractRolloutWeights) -> dict[str, float]:
        """Returns the bytes of the gathered copy of the frozen parameters, which stays in memory
        for all steps."""
        if not weights.gathered or weights.frozen == self.setup.frozen_tree:
            return {}
        return {"rollout weights": sharding.bytes_per_device(weights.frozen)}

    def _abstract_rollout(self) -> Rollout:
        """Returns the abstract arrays of the completions of a step."""
        settings = self.settings
        shape = (settings.batch_size, settings.group_size, settings.max_new_tokens)
        tokens, mask, logps = (
            setups.abstract_rows(shape, dtype, self.setup.mesh)
            for dtype in (jnp.int32, jnp.bool_, jnp.float32)
        )
        return Rollout(tokens, mask, logps, loss_mask=mask)


def check_algorithm(algorithm: Algorithm, settings: Grpo) -> None:
    """Raises UserError for settings of the stage that do not fit the algorithm."""
    has_kl = bool(algorithm.kl_coef or settings.kl_target)
    completions = settings.batch_size * settings.group_size
    outside_group = (advantages.greedy_baseline, advantages.whitened)
    faults = {
        "kl_target steers kl_coef, which is 0: set a kl_coef to start from": (
            settings.kl_target and not algorithm.kl_coef
        ),
        "kl_estimator is k1, whose gradient in a loss is 0 on average: set kl_in_reward or k3": (
            has_kl and algorithm.kl_estimator is k1 and not algorithm.kl_in_reward
        ),
        "kl_in_reward has no effect on normalised_then_summed, which takes each reward alone": (
            has_kl
            and algorithm.kl_in_reward
            and algorithm.advantage is advantages.normalised_then_summed
        ),
        "dynamic_sampling looks at the spread within groups, which this advantage does not use": (
            settings.dynamic_sampling and algorithm.advantage in outside_group
        ),
        "kl_horizon is too short: set it above 0.2 * batch_size * group_size": (
            settings.kl_target and settings.kl_horizon <= 0.2 * completions
        ),
    }
    for fault, is_present in faults.items():
        if is_present:
            raise UserError(f"config.grpo.{fault}")

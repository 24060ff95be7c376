"""Supervised fine-tuning: cross-entropy on the suffixes of a batch."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import MappingProxyType

import jax

from pg_ground.data.batches import BatchIterator
from pg_ground.data.datasets import Examples
from pg_ground.parallel import sharding
from pg_ground.reporting import progress
from pg_ground.rl.update import sft_update
from pg_ground.tokenizer import Tokenizer
from pg_ground.training import setup as setups
from pg_ground.training.learning_memory import learning_memory
from pg_ground.training.program import Program, jit_program
from pg_ground.training.setup import Setup
from pg_ground.training.stage import Runtime, StepOutput
from pg_ground.training.timing import StepTimer
from pg_ground.types import Params, TrainState


class SftStage:
    """The supervised stage. Its section is `config.sft`."""

    name = "sft"
    phases = MappingProxyType({"update": "sft"})
    data_seed = 0

    def __init__(self, setup: Setup):
        self.setup = setup
        self.settings = setup.config.sft

    def check(self) -> None:
        """Raises UserError if the mesh does not divide a part of the batch."""
        rows = self.settings.batch_size // self.settings.grad_accum_steps
        setting = "sft.batch_size / grad_accum_steps"
        sharding.check_batch_size(self.setup.mesh, rows, setting)

    def check_data(self, parts: Sequence[Examples], tokenizer: Tokenizer) -> None:
        """Does nothing: any suffix can be learned."""

    def programs(self) -> dict[str, Program]:
        """Returns the update, `(state, frozen, batch, dropout_key=None) → (state, metrics)`."""
        settings = self.settings
        state = self.abstract_state()
        update = partial(
            sft_update,
            model=self.setup.model,
            optimizer=setups.make_optimizer(self.setup, settings),
            vocab=self.setup.vocab,
            grad_accum_steps=settings.grad_accum_steps,
            label_smoothing=settings.label_smoothing,
            loc_smoothing_bins=settings.loc_smoothing_bins,
        )
        rules = self.setup.config.mesh.rules
        shardings = sharding.infer_shardings(self.setup.mesh, state, rules)
        batch = setups.abstract_batch(self.setup, settings.batch_size)
        memory = learning_memory(
            self.setup,
            state,
            inputs=batch,
            questions=settings.batch_size,
            group=1,
            tokens=self.setup.config.data.suffix_length,
            parts=settings.grad_accum_steps,
        )
        program = Program(
            update,
            (state, self.setup.frozen_tree, batch),
            donate_argnums=(0,),
            out_shardings=(shardings, None),
            memory=memory,
            gradient_tokens=int(batch.suffix.size),
        )
        return {"sft": program}

    def abstract_state(self) -> TrainState:
        """Returns shapes, dtypes and shardings of the train state."""
        return setups.abstract_state(self.setup, self.settings)

    def resident_memory(self) -> dict[str, float]:
        """Returns the bytes of parameters and optimizer."""
        return setups.resident_memory(self.setup, self.settings)

    def init(self, params: Params) -> TrainState:
        """Returns the train state at the start of the stage."""
        return setups.init_state(self.setup, self.settings, params)

    @contextmanager
    def open(self, runtime: Runtime, state: TrainState) -> Iterator[None]:
        """Prepares the jitted update."""
        config = self.setup.config
        self._update = jit_program(self.programs()["sft"], config.mesh, runtime.mesh)
        self._frozen = runtime.frozen
        self._key = jax.random.key(config.seed)
        self._learning_rates = setups.learning_rates(self.settings)
        yield

    def step(
        self, state: TrainState, batches: BatchIterator, number: int, timer: StepTimer
    ) -> tuple[TrainState, StepOutput]:
        """Dispatches one supervised update."""
        with progress.phase("data"):
            batch = timer.lap("data", next(batches))
        dropout = self.setup.config.model.lora.dropout
        dropout_key = jax.random.fold_in(self._key, number) if dropout else None
        with progress.phase("update"):
            state, metrics = self._update(state, self._frozen, batch, dropout_key=dropout_key)
            timer.lap("update", metrics)
        batches.prepare()
        return state, StepOutput(metrics | {"optim/lr": self._learning_rates[number]})

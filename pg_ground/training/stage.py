"""The interface of a stage.

`train`, `compile`, `bench` and the memory model know stages by this interface alone.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol, runtime_checkable

from jax.sharding import Mesh
from PIL import Image

from pg_ground.data.batches import BatchIterator
from pg_ground.data.datasets import Examples
from pg_ground.reporting.tables import Table
from pg_ground.storage.paths import FilePath
from pg_ground.tokenizer import Tokenizer
from pg_ground.training.program import Program
from pg_ground.training.setup import StageSettings
from pg_ground.training.timing import StepTimer
from pg_ground.types import Array, JsonDict, JsonObject, Metrics, Params, TrainState

NO_STATE: JsonObject = {}


class RolloutSamples(NamedTuple):
    """The first prompts of a step with their completions."""

    sheet: Image.Image
    """The completions drawn on their images."""
    prompts: list[JsonDict]
    """The records that `reporting.rollout_pictures.rollout_record` makes."""


class StepOutput(NamedTuple):
    """The results of a step that are not part of the train state.

    Arrays can still be in computation.
    """

    metrics: Metrics
    completions: int = 0
    """Number of sampled completions."""
    sampled_mask: Array | None = None
    """bool[B, G, T], True for sampled tokens; None if the stage samples nothing."""
    draw_samples: Callable[[], RolloutSamples] | None = None
    """Draws the completions of this step; None if the stage samples nothing."""
    saved: JsonObject = NO_STATE
    """JSON values of this process for the checkpoint's record."""


class Runtime(NamedTuple):
    """The parts of a run that exist on the devices and on disk. All stages share them."""

    mesh: Mesh
    frozen: Params
    tokenizer: Tokenizer
    workdir: FilePath | None
    """None if nothing is written, as in a benchmark."""
    saved: JsonObject = NO_STATE
    """JSON values that `StepOutput.saved` had in the checkpoint that the run resumes from."""


@runtime_checkable
class Stage(Protocol):
    """One stage of a run, such as supervised fine-tuning or GRPO."""

    @property
    def name(self) -> str:
        """Name of the stage and of its section in the config."""
        ...

    @property
    def settings(self) -> StageSettings:
        """The section of the config."""
        ...

    @property
    def phases(self) -> Mapping[str, str]:
        """The program that each phase of a step spends its time in, by the phase's name."""
        ...

    @property
    def data_seed(self) -> int:
        """Added to the config's seed for the order of the data, so that two stages do not see
        the same scenes."""
        ...

    def check(self) -> None:
        """Raises UserError if the settings do not fit the mesh, the rewards or the algorithms."""
        ...

    def check_data(self, parts: Sequence[Examples], tokenizer: Tokenizer) -> Table | None:
        """Returns a table of what the stage can learn from its sources; None if it has none.

        Raises:
          UserError: it can learn nothing from a source.
        """
        ...

    def programs(self) -> dict[str, Program]:
        """Returns the programs that are worth compiling, by name. No array is made."""
        ...

    def abstract_state(self) -> TrainState:
        """Returns shapes, dtypes and shardings of the train state."""
        ...

    def resident_memory(self) -> dict[str, float]:
        """Returns the bytes per device, by kind, that stay in memory between the programs of a
        step."""
        ...

    def init(self, params: Params) -> TrainState:
        """Returns the train state at the start of the stage."""
        ...

    def open(self, runtime: Runtime, state: TrainState) -> AbstractContextManager[None]:
        """Prepares the steps: jitted programs, the reference policy and reward workers.

        Leaving the context ends the workers.
        """
        ...

    def step(
        self, state: TrainState, batches: BatchIterator, number: int, timer: StepTimer
    ) -> tuple[TrainState, StepOutput]:
        """Dispatches step `number` (from 0).

        Returns the new state and the output; devices can still be at work.
        """
        ...

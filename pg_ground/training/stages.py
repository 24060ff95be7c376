"""The stages that exist, by name.

A new stage is one module, one entry of `STAGES`, and one section and one name in `config.STAGES`.
"""

from collections.abc import Callable

from pg_ground.training.grpo import GrpoStage
from pg_ground.training.setup import Setup
from pg_ground.training.sft import SftStage
from pg_ground.training.stage import Stage

STAGES: dict[str, Callable[[Setup], Stage]] = {stage.name: stage for stage in (SftStage, GrpoStage)}


def make_stages(setup: Setup) -> list[Stage]:
    """Returns the stages of a run in the order of `config.stages`, with their settings checked.

    Raises:
      UserError: settings do not fit the mesh, the rewards or the algorithms.
    """
    stages = [STAGES[name](setup) for name in setup.config.stages]
    for stage in stages:
        stage.check()
    return stages

"""The settings of a run in its working directory.

The first start writes them. A run that resumes compares its settings with them.
"""

import dataclasses
import json
from collections.abc import Sequence

from pg_ground.checkpoints import run_directory
from pg_ground.config import Config
from pg_ground.parallel import multiprocess
from pg_ground.storage.files import write_atomically
from pg_ground.storage.paths import FilePath, remove_tree
from pg_ground.types import UserError, nearest

MAY_DIFFER = (
    "log.",
    "eval.",
    "checkpoint.every",
    "checkpoint.keep",
    "mesh.",
    "data.dir",
    "data.workers",
    "data.read_threads",
    "data.fetch.",
    "grpo.reward_workers.",
    "init",
)
"""Settings that a resumed run can change: names, and beginnings of names that end in a dot.

They do not change which numbers are computed. Another mesh only changes the order of sums. `init`
is not read again, because a checkpoint has all parameters.
"""


def check_run_config(workdir: FilePath, config: Config, accept: Sequence[str] = ()) -> None:
    """Writes `config.json`, or checks that the run in the directory can continue with `config`.

    A run continues bit for bit if its settings are the same. It also continues if only settings of
    `MAY_DIFFER` differ, or the steps of a stage that has not ended: a constant learning rate does
    not depend on them.

    Args:
      accept: names of other settings that may differ, and beginnings of names.

    Raises:
      UserError: the directory holds a checkpoint of a run with other settings, or the processes do
        not share the directory.
    """
    if run_directory.steps(workdir):
        _check_can_continue(workdir, config, accept)
    elif accept:
        raise UserError(f"--accept={','.join(accept)}: {workdir} has no checkpoint to continue")
    file = workdir / run_directory.CONFIG_FILE
    multiprocess.barrier("run config is read")  # no process may write before all have looked
    if multiprocess.is_main_process():
        if not run_directory.steps(workdir):
            # A run that ended before its first checkpoint can have left parameters of other
            # settings.
            remove_tree(workdir / run_directory.BEST)
        write_atomically(file, json.dumps(dataclasses.asdict(config), indent=1) + "\n")
    multiprocess.barrier("run config is written")
    is_visible = multiprocess.all_gather(file.is_file())
    if not all(is_visible):
        raise UserError(
            f"process {is_visible.index(False)} does not find {file}, which process 0 has written: "
            "--workdir must be on a file system that all processes share"
        )


def _check_can_continue(workdir: FilePath, config: Config, accept: Sequence[str]) -> None:
    """Raises UserError if the run in `workdir` cannot continue with `config`."""
    old_config = run_directory.run_config(workdir)
    new = multiprocess.flatten_settings(dataclasses.asdict(config))
    old = multiprocess.flatten_settings(dataclasses.asdict(old_config))
    changed = [name for name in sorted(new.keys() | old.keys()) if new.get(name) != old.get(name)]
    for pattern in accept:
        if not any(_matches(name, (pattern,)) for name in changed):
            raise UserError(
                f"--accept={pattern}: this setting is the same as in {workdir}; "
                f"{nearest(pattern, changed)}"
            )
    newest_step = max(run_directory.steps(workdir))
    for stage in set(old_config.stages) & set(config.stages):
        _check_steps(stage, old_config, config, newest_step)
    refused = [
        f"config.{name} is {new.get(name, 'absent')!r:.100}, was {old.get(name, 'absent')!r:.100}"
        for name in changed
        if not _matches(name, (*MAY_DIFFER, *accept, *_free_steps(old_config, config)))
    ]
    if refused:
        names = ",".join(text.split()[0].removeprefix("config.") for text in refused[:3])
        more = f"; and {len(refused) - 3} more" if len(refused) > 3 else ""
        raise UserError(
            f"{workdir} holds a run with other settings ({'; '.join(refused[:3])}{more}): choose "
            f"another --workdir, or continue that run with --accept={names}"
        )


def _matches(name: str, patterns: Sequence[str]) -> bool:
    """Returns whether a pattern is the name, or the name of a section around it."""
    return any(
        name == pattern or name.startswith(f"{pattern.rstrip('.')}.") for pattern in patterns
    )


def _free_steps(old: Config, new: Config) -> list[str]:
    """Returns the settings `STAGE.steps` that do not change the steps that have been made.

    Only a constant learning rate does not depend on the number of steps.
    """
    return [
        f"{stage}.steps"
        for stage in old.stages
        if stage in new.stages
        and new.stage_settings(stage).optimizer.schedule == "constant"
        and old.stage_settings(stage).optimizer.schedule == "constant"
    ]


def _check_steps(stage: str, old: Config, new: Config, newest_step: int) -> None:
    """Raises UserError if the number of steps of a stage differs and the run is past its end."""
    steps = new.stage_settings(stage).steps
    old_steps = old.stage_settings(stage).steps
    if steps == old_steps:
        return
    earlier = old.stages[: old.stages.index(stage)]
    start = sum(old.stage_settings(name).steps for name in earlier)
    if newest_step > start + old_steps:
        raise UserError(
            f"config.{stage}.steps is {steps}, was {old_steps}: this stage has ended, so its "
            "steps cannot change"
        )
    if newest_step > start + steps:
        raise UserError(
            f"config.{stage}.steps is {steps}: the run has already made "
            f"{newest_step - start} steps of this stage"
        )

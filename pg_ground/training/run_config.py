"""The settings of a run in its working directory.

The first start writes them. A run that resumes compares its settings with them.
"""

import dataclasses
import json
from pathlib import Path

from pg_ground.checkpoints import manager, run_directory
from pg_ground.config import Config
from pg_ground.parallel import multiprocess
from pg_ground.reporting.files import write_atomically
from pg_ground.types import UserError

MAY_DIFFER = ("log.", "checkpoint.every", "checkpoint.keep", "mesh.")
"""Settings that a resumed run can change.

They do not change what is computed; another mesh changes the order of sums.
"""


def check_run_config(workdir: Path, config: Config) -> None:
    """Writes `config.json`, or checks that the directory holds a run with the same settings.

    Raises:
      UserError: the directory holds a checkpoint of a run with other settings (except
        `MAY_DIFFER`), or the processes do not share the directory.
    """
    if any((workdir / "checkpoints").glob("[0-9]*")):
        _check_same(workdir, config)
    file = workdir / run_directory.CONFIG_FILE
    multiprocess.barrier("run config is read")  # no process may write before all have looked
    if multiprocess.is_main_process():
        if not run_directory.steps(workdir):
            # A run that ended before its first checkpoint can have left parameters of other
            # settings.
            manager.remove_tree(workdir / run_directory.BEST)
        write_atomically(file, json.dumps(dataclasses.asdict(config), indent=1) + "\n")
    multiprocess.barrier("run config is written")
    is_visible = multiprocess.all_gather(file.is_file())
    if not all(is_visible):
        raise UserError(
            f"process {is_visible.index(False)} does not find {file}, which process 0 has written: "
            "--workdir must be on a file system that all processes share"
        )


def _check_same(workdir: Path, config: Config) -> None:
    """Raises UserError if the run in `workdir` has other settings."""
    new = multiprocess.flatten_settings(dataclasses.asdict(config))
    stored = multiprocess.flatten_settings(dataclasses.asdict(run_directory.run_config(workdir)))
    differences = [
        f"config.{name} is {new.get(name, 'absent')!r}, was {stored.get(name, 'absent')!r}"
        for name in sorted(new.keys() | stored.keys())
        if new.get(name, ()) != stored.get(name, ()) and not name.startswith(MAY_DIFFER)
    ]
    if differences:
        raise UserError(
            f"{workdir} holds a run with other settings ({'; '.join(differences[:3])}): choose "
            "another --workdir"
        )

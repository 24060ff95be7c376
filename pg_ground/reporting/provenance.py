"""The machine and the source that a run uses, in `hardware.json`."""

import json
import os
import platform
import subprocess
from pathlib import Path

import jax

from pg_ground.storage.files import write_atomically
from pg_ground.types import JsonDict

FILE = "hardware.json"


def record_machine(workdir: Path, resumed_step: int | None) -> None:
    """Adds this machine to `hardware.json`, unless it is the newest machine there.

    Machines that the run came to after `resumed_step` are removed.

    Args:
      resumed_step: the step of the checkpoint that the run continues from, None for a new run.
    """
    file = workdir / FILE
    machines = []
    if resumed_step is not None and file.is_file():
        machines = [
            machine
            for machine in json.loads(file.read_text(encoding="utf-8"))
            if machine["from_step"] <= resumed_step
        ]
    this_machine = describe_machine()
    if not machines or {**machines[-1], "from_step": 0} != {"from_step": 0, **this_machine}:
        machines.append({"from_step": resumed_step or 0, **this_machine})
    write_atomically(file, json.dumps(machines, indent=1) + "\n")


def describe_machine() -> JsonDict:
    """Returns the devices, the host, the versions of jax and Python, and the commit of the
    package."""
    return {
        "devices": f"{jax.device_count()} × {jax.devices()[0].device_kind}",
        "processes": jax.process_count(),
        "host": platform.node(),
        "processor": f"{os.cpu_count()} × {_processor()}",
        "jax": jax.__version__,
        "python": platform.python_version(),
        "commit": commit(Path(__file__).parent),
    }


def chip_count() -> int:
    """Returns the number of chips of the run, or of its hosts if it is on CPUs.

    A chip of some TPUs has two devices.
    """
    devices = jax.devices()
    if devices[0].platform == "cpu":
        return jax.process_count()
    chips = {
        (getattr(device, "slice_index", 0), *getattr(device, "coords", (device.id,)))
        for device in devices
    }
    return len(chips)


def commit(folder: Path) -> str | None:
    """Returns the commit that is checked out in a folder, with `-dirty` if a file differs from it.

    Returns None if the folder does not belong to a git repository.
    """

    def git(*words: str) -> str | None:
        try:
            finished = subprocess.run(
                ["git", "-C", str(folder), *words],
                capture_output=True,
                text=True,
                timeout=10,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return finished.stdout.strip() if finished.returncode == 0 else None

    # A package in a virtual environment can lie in the folder of another repository. Git would
    # return the commit of that repository.
    if git("ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    return git("describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()

"""What a run runs on and from which source: written down at each start, as `hardware.json`."""

import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import jax

from pg_ground.reporting.files import write_atomically

FILE = "hardware.json"


def note(workdir: Path, resumed: int | None) -> None:
    """Adds this machine to those of the run, unless it is the last of them; `resumed`: see `Recorder`."""
    file = workdir / FILE
    known = (
        json.loads(file.read_text(encoding="utf-8"))
        if resumed is not None and file.is_file()
        else []
    )
    kept = [one for one in known if one["from_step"] <= (resumed or 0)]
    now = describe()
    if not kept or {**kept[-1], "from_step": 0} != {"from_step": 0, **now}:
        kept.append({"from_step": resumed or 0, **now})
    write_atomically(file, json.dumps(kept, indent=1) + "\n")


def describe() -> dict[str, Any]:
    """Returns this machine, its devices and the versions of what runs on it: of the package its commit, in a checkout of it."""
    return {
        "devices": f"{jax.device_count()} × {jax.devices()[0].device_kind}",
        "processes": jax.process_count(),
        "host": platform.node(),
        "processor": f"{os.cpu_count()} × {_processor()}",
        "jax": jax.__version__,
        "python": platform.python_version(),
        "commit": commit(Path(__file__).parent),
    }


def commit(folder: Path) -> str | None:
    """Returns the commit checked out there, with `-dirty` if a file differs from it; None if git does not keep that folder."""

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(folder), *words],
                capture_output=True,
                text=True,
                timeout=10,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # of a package among somebody's own files, as in a virtual environment, git would tell their commit
    if git("ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    return git("describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()

"""The process that compiles one program for a TPU topology. `compilation.py` starts it.

python -m pg_ground.aot.compile_worker DIRECTORY

DIRECTORY/request.json holds the run's settings, the topology and the name of the program.
"""

import json
import sys
from pathlib import Path

import jax

from pg_ground import config
from pg_ground.aot import jobs
from pg_ground.types import UserError


def main(directory: Path) -> None:
    jax.config.update("jax_platforms", "cpu")  # with libtpu installed, jax would look for a TPU
    request = json.loads((directory / "request.json").read_text())
    settings = config.parse(request["settings"])
    jobs.compile_program(settings, request["topology"], request["program"], directory)


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]))
    except UserError as error:
        sys.exit(str(error))  # the last line of the log becomes the parent's error

"""The works of versus.py as configs: `python -m pg_ground.bench --config=benchmarks/config.py:small` has our phases beside what
the machine could do."""

import sys
from pathlib import Path

from ml_collections import ConfigDict

sys.path.insert(
    0, str(Path(__file__).parent / "peers")
)  # they are programs, and import one another as such
import ours
from work import SIZES, Work


def get_config(size: str = "tiny") -> ConfigDict:
    s, cpu = SIZES[size], not size.startswith("3b")
    dtype, device = ("float32", "cpu") if cpu else ("bfloat16", "cuda")
    c = ours.recipe(Work(size, s.prompts, s.group, s.tokens, 16, dtype, True, device, 1, 1, ""))
    c.mesh.cpu_devices = 1
    return c

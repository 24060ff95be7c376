"""The work of versus.py as configs for `bench`.

`python -m pg_ground.bench --config=benchmarks/config.py:small` shows the phases of our step beside
the roofline of the machine.
"""

import sys
from pathlib import Path

from ml_collections import ConfigDict

# The peers are programs, and import one another as top-level modules.
sys.path.insert(0, str(Path(__file__).parent / "peers"))
import ours
from work import SIZES, Work


def get_config(name: str = "tiny") -> ConfigDict:
    """Returns the config of a size: 3b sizes for a GPU in bfloat16, the others for one CPU."""
    size = SIZES[name]
    on_gpu = name.startswith("3b")
    c = ours.recipe(
        Work(
            size=name,
            prompts=size.prompts,
            group=size.group,
            tokens=size.tokens,
            prompt_tokens=16,
            dtype="bfloat16" if on_gpu else "float32",
            checkpointing=True,
            device="cuda" if on_gpu else "cpu",
            threads=1,
            grad_accum_steps=1,
            variant="",
        )
    )
    c.mesh.cpu_devices = 1
    return c

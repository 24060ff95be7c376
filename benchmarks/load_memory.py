"""Measures the peak host memory of loading a checkpoint onto virtual CPU devices.

On a CPU the parameters count too.

python benchmarks/load_memory.py --params=/data/random_pg1_3b.npz [--dtype=bfloat16] [--devices=8]

Prints one JSON object. `over_bytes` is the peak memory of the process minus the size of the
checkpoint.
"""

import json
import resource
import time
from collections.abc import Sequence
from pathlib import Path

import jax

import pg_ground
from pg_ground import cli, config
from pg_ground.parallel import sharding


def main(argv: Sequence[str]) -> None:
    flags = cli.parse_script_flags(argv, {"params": cli.REQUIRED, "dtype": "", "devices": 8})
    mesh_settings = config.Mesh(cpu_devices=flags["devices"])
    sharding.set_cpu_devices(mesh_settings)
    path = Path(flags["params"])
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    size = sum(file.stat().st_size for file in files)
    started, before = time.perf_counter(), _peak_bytes()
    _, params = pg_ground.load(path, mesh=sharding.make_mesh(mesh_settings), dtype=flags["dtype"])
    seconds = time.perf_counter() - started
    leaves = jax.tree.leaves(params)
    print(json.dumps({
        "params": path.name,
        "file_bytes": size,
        "parameter_bytes": sum(leaf.nbytes for leaf in leaves),
        "devices": len(leaves[0].sharding.device_set),
        "largest_device_bytes": max(
            sum(
                shard.data.nbytes
                for leaf in leaves for shard in leaf.addressable_shards if shard.device == device
            )
            for device in leaves[0].sharding.device_set
        ),
        "peak_bytes_before": before,
        "peak_bytes": _peak_bytes(),
        "over_bytes": _peak_bytes() - size,
        "over_gib": round((_peak_bytes() - size) / 2**30, 3),
        "load_s": round(seconds, 1),
    }, indent=1))  # fmt: skip


def _peak_bytes() -> int:
    """Returns the largest resident size of this process so far (Linux counts it in kibibytes)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    cli.run_script(main)

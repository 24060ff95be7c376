"""The table of estimated memory: one row for each program of a run."""

from collections.abc import Mapping

from pg_ground.parallel import memory_model
from pg_ground.reporting.tables import Table
from pg_ground.training.program import Program

GIB = 2.0**30


def memory_table(programs: Mapping[str, Program], hbm_bytes: float | None, where: str) -> Table:
    """Returns the estimated memory of each program in GiB per device.

    Args:
      hbm_bytes: memory of a device; None if it is unknown.
      where: the devices in words.
    """
    kinds = {name: program.memory.by_kind for name, program in programs.items()}
    rows = [
        [name, *(f"{size / GIB:.3g}" for size in (sum(sizes.values()), *sizes.values()))]
        for name, sizes in kinds.items()
    ]
    largest = max(sum(sizes.values()) for sizes in kinds.values())
    limit = "" if hbm_bytes is None else f" of {hbm_bytes / GIB:.3g}"
    title = f"{where}: about {largest / GIB:.3g}{limit} GiB per device, by arithmetic"
    return Table(title, ["program", "GiB", *memory_model.KINDS], rows, "")

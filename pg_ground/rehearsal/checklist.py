"""The checklist of a rehearsal: what ran, what it found, and what could not be checked."""

import time
from collections.abc import Callable
from typing import NamedTuple

from pg_ground.data.records import clip_text
from pg_ground.reporting.tables import Table
from pg_ground.types import UserError

LONGEST = 200
"""Characters of an error in the table. The last line of the command has the whole error."""

DONE, FAILED, UNCHECKED = "ok", "FAILED", "not checked"


class Item(NamedTuple):
    """One line of the checklist."""

    name: str
    state: str
    """`DONE`, `FAILED` or `UNCHECKED`."""
    finding: str
    seconds: float = 0.0


class Checklist:
    """The items so far. An item that fails ends the rehearsal after the table is printed."""

    def __init__(self, announce: Callable[[str], object]):
        """Args:
        announce: is called with the name of an item when it starts, and with its finding.
        """
        self.items: list[Item] = []
        self._announce = announce

    def run(self, name: str, check: Callable[[], str]) -> None:
        """Runs a check, which returns its finding.

        Raises:
          UserError: the check raised it. The item is recorded as failed.
        """
        start = time.monotonic()
        self._announce(f"{name} …")
        try:
            finding = check()
        except UserError as error:
            finding = clip_text(str(error), LONGEST)
            self.items.append(Item(name, FAILED, finding, time.monotonic() - start))
            raise
        except (KeyboardInterrupt, SystemExit):
            self.items.append(Item(name, FAILED, "stopped", time.monotonic() - start))
            raise
        self.items.append(Item(name, DONE, finding, time.monotonic() - start))
        self._announce(f"{name}: {finding} ({self.items[-1].seconds:.0f} s)")

    def skip(self, name: str, reason: str) -> None:
        """Records what could not be checked, and why."""
        self.items.append(Item(name, UNCHECKED, reason))

    def table(self, title: str) -> Table:
        """Returns all items as a table."""
        rows = [
            [item.name, item.state, f"{item.seconds:.0f}" if item.seconds else "", item.finding]
            for item in self.items
        ]
        return Table(title, ["", "", "s", "finding"], rows, "")

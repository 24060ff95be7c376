"""Tables of the findings about sources: what was read, what is bad, and how records were read."""

import re
from collections.abc import Iterator, Sequence

from pg_ground.data.source_check import Check, name_collisions
from pg_ground.data.text_budgets import WHOLE_SOURCE
from pg_ground.reporting.tables import Table

MAX_COLLISIONS = 5
"""Groups of similar names that are shown of each source."""

MAX_TEXT = 200
"""Characters of a fault that are shown."""

SOURCE = re.compile(r"^(?:source .*?|config\.\S+ \(.*?\)): ")
"""The beginning of a message that names its source, or the setting of a source."""

DIGITS = re.compile(r"\d+")


def tables(checks: Sequence[Check]) -> Iterator[Table]:
    """Yields the tables of all sources; a table without rows is left out."""
    yield _overview(checks)
    for table in (_faults(checks), _readings(checks), _lengths(checks)):
        if table.rows:
            yield table


def notes(checks: Sequence[Check]) -> Iterator[str]:
    """Yields doubts about units, prompts and names, one line each."""
    for check in checks:
        if check.budget is not None:
            yield from (f"source {check.name}: {doubt}" for doubt in check.budget.doubts)
        collisions = name_collisions(check.findings.names)
        for group in collisions[:MAX_COLLISIONS]:
            differ = "names that differ only in case, blanks or Unicode form"
            yield f"source {check.name}: {differ}: {group}"
        if len(collisions) > MAX_COLLISIONS:
            more = len(collisions) - MAX_COLLISIONS
            yield f"source {check.name}: {more} more groups of similar names"


def _overview(checks: Sequence[Check]) -> Table:
    rows = []
    for check in checks:
        findings = check.findings
        rate = check.questions / check.seconds if check.seconds else 0.0
        counts = [check.questions, findings.usable, findings.bad.total(), findings.empty]
        rows.append([check.name, *map(str, counts), f"{rate:.0f}"])
    columns = ["source", "questions", "usable", "bad", "empty", "questions per second"]
    return Table("records", columns, rows, "empty: without boxes or points, and left out")


def _faults(checks: Sequence[Check]) -> Table:
    """Returns the first faults of each kind.

    If the faults of a source look like the faults of an earlier source, it has one row: a missing
    folder of images makes every record of every source bad.
    """
    rows = []
    shown: dict[tuple[str, str], str] = {}
    for check in checks:
        for kind, count in check.findings.bad.most_common():
            faults = check.findings.faults[kind]
            forms = [(kind, fault_form(text)) for _, text in faults]
            if all(form in shown for form in forms):
                first_index = str(faults[0][0])
                rows.append([check.name, kind, str(count), first_index, f"as {shown[forms[0]]}"])
                continue
            for i, (index, text) in enumerate(faults):
                name, number = (check.name, str(count)) if i == 0 else ("", "")
                rows.append([name, kind if i == 0 else "", number, str(index), text[:MAX_TEXT]])
            shown |= {form: check.name for form in forms if form not in shown}
    columns = ["source", "kind", "records", "question", "what is wrong"]
    return Table("records that cannot be used", columns, rows)


def fault_form(text: str) -> str:
    """Returns a message without the name of its source and without its numbers.

    Messages with the same form have the same cause.
    """
    return DIGITS.sub("0", SOURCE.sub("", text))


def _readings(checks: Sequence[Check]) -> Table:
    rows = []
    for check in checks:
        of_source = check.budget.notes.items() if check.budget else ()
        rows += [[check.name, n, note] for note, n in of_source if n == WHOLE_SOURCE]
        for note, count in check.findings.notes.most_common():
            rows.append([check.name, str(count), note])
    return Table("how records are read", ["source", "records", "reading"], rows)


def _lengths(checks: Sequence[Check]) -> Table:
    rows = []
    for check in checks:
        longest = check.findings.longest
        if longest:
            cells = [f"{number} (question {index})" for number, index in longest.values()]
            rows.append([check.name, *cells])
    columns = ["source", "prompt tokens", "suffix tokens", "objects"]
    return Table("longest of the usable questions", columns, rows)

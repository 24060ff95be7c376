"""Groups of the questions of a benchmark, such as platforms and categories, and their metrics."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from pg_ground.evals.rows import Columns, Row
from pg_ground.types import UserError

FIELDS: dict[str, tuple[str, ...]] = {
    "platform": ("data_source", "platform"),
    "ui_type": ("data_type", "ui_type"),
    "group": ("group",),
}
"""The names of a question's group fields, each with its usual fields in a record."""


class Grouping(NamedTuple):
    """How a benchmark groups its questions.

    A question belongs to the groups of each of its values, and to the group of all values together:
    `mobile`, `text` and `mobile_text`.
    """

    metric: str
    """The metric whose mean is reported for each group, under the name of the group."""
    values: dict[str, dict[str, str]]
    """The group of each value in lower case, by the name of the field (FIELDS)."""
    published: dict[str, int]
    """The published number of questions of some groups."""
    macro: str = ""
    """Name of the mean over the groups of all values together; "" reports none."""


def _named(*names: str) -> dict[str, str]:
    return {name: name for name in names}


UI_TYPES = {"text": "text", "icon": "icon", "widget": "icon", "icon/widget": "icon"}

GROUPINGS: dict[str, Grouping] = {
    "screenspot_v2": Grouping(
        "accuracy",
        {
            "platform": {
                **dict.fromkeys(("ios", "android", "mobile"), "mobile"),
                **dict.fromkeys(("windows", "macos", "desktop"), "desktop"),
                **dict.fromkeys(("shop", "forum", "tool", "gitlab", "web"), "web"),
            },
            "ui_type": UI_TYPES,
        },
        {
            **{"mobile_text": 290, "desktop_text": 194, "web_text": 234},
            **{"mobile_icon": 211, "desktop_icon": 140, "web_icon": 203},
        },
        macro="macro_accuracy",
    ),
    "screenspot_pro": Grouping(
        "accuracy",
        {
            "group": _named("dev", "creative", "cad", "scientific", "office", "os"),
            "ui_type": UI_TYPES,
        },
        {
            **{"dev_text": 154, "creative_text": 198, "cad_text": 197},
            **{"scientific_text": 144, "office_text": 177, "os_text": 107},
            **{"dev_icon": 145, "creative_icon": 143, "cad_icon": 64},
            **{"scientific_icon": 110, "office_icon": 53, "os_icon": 89},
        },
    ),
}
"""The groups of benchmarks, by the name in `Benchmark.groups`."""


def read_groups(name: str, field: Callable[[str], Any], where: str) -> list[str]:
    """Returns the groups of a question.

    Args:
      name: a key of GROUPINGS.
      field: returns the value of a field of FIELDS, or None.
      where: the record, for error messages.

    Raises:
      UserError: a value is absent or unknown.
    """
    groups = []
    for field_name, names in GROUPINGS[name].values.items():
        value = field(field_name)
        group = names.get(str(value).strip().lower())
        if group is None:
            usual = " or ".join(FIELDS[field_name])
            raise UserError(
                f"{where}: {field_name} ({usual}) is {value!r:.40}, but the questions of {name} "
                f"have {', '.join(names)}"
            )
        groups.append(group)
    return [*groups, *(["_".join(groups)] if len(groups) > 1 else [])]


def record_field(record: Mapping[str, Any], name: str) -> Any:
    """Returns the value of a field of FIELDS in a record; None if it has none of the usual ones."""
    return next((record[path] for path in FIELDS[name] if record.get(path) is not None), None)


def columns(name: str, rows: Sequence[Row], metrics: Columns) -> Columns:
    """Returns the metric of a grouping for each group that rows belong to, by the group's name.

    Args:
      metrics: the columns of the benchmark.
    """
    grouping = GROUPINGS[name]
    memberships = [frozenset(row["gold"].get("groups", ())) for row in rows]
    values = metrics[grouping.metric]
    return {
        group: np.where([group in groups for groups in memberships], values, np.nan)
        for group in group_names(grouping)
        if any(group in groups for groups in memberships)
    }


def group_names(grouping: Grouping) -> list[str]:
    """Returns the names of all groups of a grouping: those of each field, then all together."""
    parts = [list(dict.fromkeys(names.values())) for names in grouping.values.values()]
    together = parts[0]
    for names in parts[1:]:
        together = [f"{first}_{second}" for first in together for second in names]
    return list(dict.fromkeys([*(name for names in parts for name in names), *together]))


def combined(name: str, means: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the mean over the groups of all values together, if the grouping reports it.

    Args:
      means: the mean of each metric: numbers, or arrays of one shape.
    """
    grouping = GROUPINGS[name]
    cells = group_names(grouping)[sum(len(set(v.values())) for v in grouping.values.values()) :]
    if not grouping.macro or not all(cell in means for cell in cells):
        return {}
    return {grouping.macro: sum(means[cell] for cell in cells) / len(cells)}


def check_group_counts(name: str, rows: Sequence[Row], alternative: str) -> None:
    """Raises UserError if rows have groups, but not the published numbers of questions.

    Args:
      alternative: a benchmark for any number of questions, for the error message.
    """
    published = GROUPINGS[name].published
    questions = {str(row["id"]): row["gold"].get("groups", ()) for row in rows}
    counts = Counter(group for groups in questions.values() for group in groups)
    if not counts:
        return
    wrong = [group for group, count in published.items() if counts[group] != count]
    if wrong:
        group = wrong[0]
        raise UserError(
            f"{name} has {published[group]} questions of {group}, but there are {counts[group]}: "
            f"--benchmark={alternative} takes any number"
        )

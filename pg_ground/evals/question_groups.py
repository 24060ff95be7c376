"""Groups of the questions of a benchmark, such as platforms and categories, and their metrics."""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from pg_ground.evals.rows import Columns, Row
from pg_ground.types import JsonDict, JsonObject, UserError

FIELDS: dict[str, tuple[str, ...]] = {
    "platform": ("data_source", "platform"),
    "ui_type": ("data_type", "ui_type"),
    "group": ("group",),
    "category": ("category",),
    "dimension": ("subtask_l1",),
    "subtask": ("subtask_l2",),
    "distractors": ("distractor_count", "distractors"),
}
"""The names of a question's group fields, each with its usual fields in a record."""


class Grouping(NamedTuple):
    """How a benchmark groups its questions.

    A question belongs to the groups of each of its values, and to the cell of all values together:
    `mobile`, `text` and `mobile_text`.
    """

    metric: str
    """The metric whose mean is reported for each group, under the name of the group."""
    values: dict[str, dict[str, str]]
    """The group of each value in lower case, by the name of the field (FIELDS)."""
    published: dict[str, int]
    """The published number of questions of some groups."""
    macro: str = ""
    """Name of the mean over the cells; "" reports none."""
    refined_by: str = ""
    """A last field whose values are groups only together with the others, and may be absent."""
    absent: str = ""
    """The group of the questions that have no target, whatever box their record has."""


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
    "point_bench": Grouping(
        "accuracy",
        {
            "category": {
                **dict.fromkeys(("affordable", "affordance"), "affordance"),
                **dict.fromkeys(("steerable", "steerability"), "steerable"),
                **_named("spatial", "counting", "reasoning"),
            }
        },
        {},
        macro="macro_accuracy",
    ),
    "groundingme": Grouping(
        "accuracy",
        {
            "dimension": _named("discriminative", "spatial", "limited", "rejection"),
            "subtask": _named(
                *("appearance", "component", "text", "state"),
                *("relationship", "counting", "occlusion", "small"),
            ),
        },
        {},
        refined_by="subtask",
        absent="rejection",
    ),
    "ref_adv_s": Grouping(
        "accuracy",
        {
            "distractors": {
                **dict.fromkeys(map(str, range(2)), "distractors_0_1"),
                **dict.fromkeys(map(str, range(2, 4)), "distractors_2_3"),
                **dict.fromkeys(map(str, range(4, 7)), "distractors_4_6"),
                **dict.fromkeys(map(str, range(7, 1000)), "distractors_7"),
            }
        },
        {},
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
    grouping = GROUPINGS[name]
    groups = []
    for field_name, names in grouping.values.items():
        value = field(field_name)
        if field_name == grouping.refined_by and value in (None, ""):
            return groups
        group = names.get(_value_text(value))
        if group is None:
            usual = " or ".join(FIELDS[field_name])
            raise UserError(
                f"{where}: {field_name} ({usual}) is {value!r:.40}, but the questions of {name} "
                f"have {', '.join(list(names)[:12])}"
            )
        groups.append(group)
    singles = groups[:-1] if grouping.refined_by else groups
    return [*singles, *(["_".join(groups)] if len(groups) > 1 else [])]


def _value_text(value: Any) -> str:
    """Returns a value in lower case; of a list, which may be JSON in a text, its length."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except ValueError:
            return value
    if isinstance(value, list | tuple | np.ndarray):
        value = len(value)
    return str(value).strip().lower()


def with_groups(name: str, gold: JsonObject, groups: Sequence[str]) -> JsonDict:
    """Returns the ground truth of a question with its groups, and without boxes if none is there.

    Args:
      name: a key of GROUPINGS.
      groups: the result of `read_groups`.
    """
    no_boxes = {"boxes": []} if GROUPINGS[name].absent in groups else {}
    return {**gold, **no_boxes, "groups": list(groups)}


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


def cells(grouping: Grouping) -> list[str]:
    """Returns the names of the groups of all values together."""
    names = [""]
    for values in grouping.values.values():
        names = [f"{name}_{value}" for name in names for value in dict.fromkeys(values.values())]
    return [name[1:] for name in names]


def group_names(grouping: Grouping) -> list[str]:
    """Returns the names of all groups of a grouping: the groups of each field, then the cells."""
    parts = [
        group
        for field_name, names in grouping.values.items()
        if field_name != grouping.refined_by
        for group in names.values()
    ]
    return list(dict.fromkeys([*parts, *cells(grouping)]))


def combined(name: str, means: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the mean over the cells, if the grouping reports it.

    Args:
      means: the mean of each metric: numbers, or arrays of one shape.
    """
    grouping = GROUPINGS[name]
    values = [means[cell] for cell in cells(grouping) if cell in means]
    if not grouping.macro or len(values) < len(cells(grouping)):
        return {}
    return {grouping.macro: sum(values) / len(values)}


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

"""Names of classes that a dataset declares: numbers in its rows become these names.

Datasets of Hugging Face declare them as the feature ClassLabel, in the metadata of a parquet file
or in the README of the dataset.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pg_ground.data.records import BadRecord, list_names, short
from pg_ground.types import JsonDict

Names = dict[tuple[str, ...], list[str]]
"""Class names by the path of a field. A list on the way has no part in the path."""


MAX_SHARED = 5
"""Names of several classes that a note lists."""


def shared_names(classes: Sequence[tuple[str, str]]) -> list[str]:
    """Returns in words which names several classes have. Such classes are one class.

    Args:
      classes: the id and the name of each class. White space in names counts as one space.
    """
    ids_by_name: dict[str, list[str]] = {}
    for class_id, name in classes:
        ids_by_name.setdefault(" ".join(name.split()), []).append(class_id)
    shared = [(name, ids) for name, ids in ids_by_name.items() if len(ids) > 1]
    texts = [
        f"{len(ids)} classes ({list_names(ids)}) have the name {short(name)} and are one class"
        for name, ids in shared[:MAX_SHARED]
    ]
    more = len(shared) - MAX_SHARED
    return [*texts, f"{more} more names of several classes"] if more > 0 else texts


def class_name(names: Sequence[str], number: int, field: str) -> str | int | None:
    """Returns the name of a class; its number if the name is the number; None for -1 or less.

    Args:
      names: the name of each class.
      number: the number of the class.
      field: the path of the field, for the error.

    Raises:
      BadRecord: bad_record, if there is no such class.
    """
    if number < 0:
        return None
    if number >= len(names):
        raise BadRecord("bad_record", f"class {number} of {field}: there are {len(names)} names")
    return number if names[number] == str(number) else names[number]


def with_class_names(record: JsonDict, names: Names) -> JsonDict:
    """Returns a record with names in place of class numbers. Other fields stay the same objects.

    Raises:
      BadRecord: bad_record, if a number has no name.
    """
    for path, classes in names.items():
        record = _replaced(record, path, classes, ".".join(path))
    return record


def _replaced(value: Any, path: Sequence[str], names: Sequence[str], field: str) -> Any:
    if isinstance(value, list):
        return [_replaced(item, path, names, field) for item in value]
    if path:
        if not isinstance(value, Mapping) or path[0] not in value:
            return value
        return {**value, path[0]: _replaced(value[path[0]], path[1:], names, field)}
    is_whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    if isinstance(value, bool) or not is_whole:
        return value  # a name, or null
    return class_name(names, int(value), field)


def names_of_schema(metadata: Mapping[bytes, bytes] | None) -> Names:
    """Returns the class names in the metadata of an Arrow schema, as `datasets` writes it."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return {}
    return names_of_features(features)


def names_of_features(features: object) -> Names:
    """Returns the class names in the JSON of `datasets.Features`."""
    if isinstance(features, list):
        return names_of_features(features[0]) if len(features) == 1 else {}
    if not isinstance(features, Mapping):
        return {}
    kind = features.get("_type")
    if kind == "ClassLabel":
        return _leaf(features.get("names"))
    if isinstance(kind, str):
        return names_of_features(features.get("feature"))
    return _fields({str(name): names_of_features(inner) for name, inner in features.items()})


def names_of_card(dataset_info: object, config: str) -> Names:
    """Returns the class names in `dataset_info` of a dataset's README.

    Args:
      dataset_info: one entry, or a list with an entry for each config.
      config: the name of the config.
    """
    entries = dataset_info if isinstance(dataset_info, list) else [dataset_info]
    entries = [entry for entry in entries if isinstance(entry, Mapping)]
    chosen = [entry for entry in entries if entry.get("config_name", "default") == config]
    if len(entries) == 1 and (config == "default" or "config_name" not in entries[0]):
        chosen = entries
    return _names_of_list(chosen[0].get("features")) if chosen else {}


def _names_of_list(features: object) -> Names:
    """Returns the class names in a README's list of features, each with a `name` and a type."""
    if not isinstance(features, list):
        return {}
    fields = [field for field in features if isinstance(field, Mapping) and "name" in field]
    return _fields({str(field["name"]): _names_of_type(field) for field in fields})


def _names_of_type(feature: object) -> Names:
    """Returns the class names of a feature: {dtype: …}, {list: …}, {sequence: …} or {struct: …}."""
    if isinstance(feature, list):
        return _names_of_list(feature)
    if not isinstance(feature, Mapping):
        return {}
    if isinstance(label := feature.get("class_label"), Mapping):
        names = label.get("names")
        return _leaf(_in_order(names) if isinstance(names, Mapping) else names)
    kinds = ("dtype", "list", "sequence", "large_list", "struct")
    return next((_names_of_type(feature[kind]) for kind in kinds if kind in feature), {})


def _in_order(names: Mapping[Any, Any]) -> list[Any] | None:
    """Returns the names of {"0": name, "1": name, …} in order; None for other keys."""
    by_number = {str(number): name for number, name in names.items()}
    ordered = [by_number.get(str(number)) for number in range(len(by_number))]
    return None if None in ordered else ordered


def _leaf(names: object) -> Names:
    return {(): [str(name) for name in names]} if isinstance(names, list) and names else {}


def _fields(fields: Mapping[str, Names]) -> Names:
    return {
        (name, *path): classes for name, inner in fields.items() for path, classes in inner.items()
    }

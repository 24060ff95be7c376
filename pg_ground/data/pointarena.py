"""Point-Bench in the files of PointArena (arXiv 2505.09990): questions, images and masks.

The uri is `pointarena:DIR`. DIR holds the files of the dataset PointArena/pointarena-data on the
Hugging Face hub, unpacked: `data.json`, `selected_images/CATEGORY/` and `selected_masks/CATEGORY/`.
"""

from typing import Any

from pg_ground.data.records import BadRecord, Records, short
from pg_ground.data.tables import BadEntry, RecordList, load_json
from pg_ground.storage.json_values import Repeated
from pg_ground.storage.paths import to_path
from pg_ground.types import JsonDict, UserError

IMAGES = "selected_images"
MASKS = "selected_masks"


def open_pointarena(location: str) -> Records:
    """Returns the questions of Point-Bench that have a mask, as PointArena's evaluator takes them.

    A record has the fields of `data.json` (`user_input`, `category`, `count`, …), and the paths
    `image` and `mask` in the folder.

    Raises:
      UserError: there is no `data.json`, or it is no list of questions.
    """
    uri = f"pointarena:{location}"
    folder = to_path(location, f"source {uri}")
    entries = load_json(folder / "data.json", uri)
    if not isinstance(entries, list):
        raise UserError(f"source {uri}: data.json is {short(entries)}, not a list of questions")
    records = [
        _record(entry, number)
        for number, entry in enumerate(entries)
        if not isinstance(entry, dict) or "mask_filename" in entry
    ]
    if not any(isinstance(record, dict) for record in records):
        raise UserError(f"source {uri}: data.json has no question with a mask_filename")
    return RecordList(records, "data.json", folder)


def _record(entry: Any, number: int) -> JsonDict | BadEntry:
    """Returns a question with its paths, or why it has none."""
    try:
        image = "/".join((IMAGES, *_names(entry, "image_filename", number)))
        mask = "/".join((MASKS, *_names(entry, "mask_filename", number)))
        return {**entry, "image": image, "mask": mask}
    except BadRecord as bad:
        return BadEntry(bad.kind, str(bad))


def _names(entry: Any, field: str, number: int) -> tuple[str, str]:
    """Returns the category of a question and the name of a file in the category's folder."""
    where = f"question {number} of data.json"
    if isinstance(entry, Repeated):
        raise BadRecord("bad_json", f"{where}: {entry.fault}")
    if not isinstance(entry, dict):
        raise BadRecord("bad_json", f"{where} is {short(entry)}, not a JSON object")
    for name in ("category", field):
        if not isinstance(entry.get(name), str):
            kind = "missing_field" if entry.get(name) is None else "bad_entry"
            raise BadRecord(kind, f"{where}: {name} is {short(entry.get(name))}")
    return entry["category"], entry[field]

"""Questions about the positions of objects relative to each other, made from scenes.

`relations:URI?tasks=2d,depth,distance&margin=0.25&margin_m=0.3&scenes=N`. URI is any source of
scenes with its options, such as `jsonl:scenes.jsonl` or `synthetic:train?side=64&scenes=4096`.
A scene is a record

    {"image": "1.jpg", "objects": [{"name": "red chair", "box": [x1, y1, x2, y2],
                                    "depth": 2.5, "xyz": [0.1, 0.4, 2.5]}, …]}

Boxes are in pixels. `depth` is the distance from the camera and `xyz` the position, both in metres;
both may be missing. The answer to a question follows from the geometry, and a template decides
which kind of answer it asks for. A relation that is not clear, within a margin, is not asked about.
"""

import itertools
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from pg_ground.data.coco import name_text
from pg_ground.data.records import BadRecord, Records, list_names, short
from pg_ground.data.tables import BadEntry
from pg_ground.storage.paths import FilePath
from pg_ground.types import JsonDict, UserError, nearest

TASKS = {"2d": "box", "depth": "depth", "distance": "xyz"}
"""The field of an object that each task needs."""

FIELDS = {
    "box": (4, "x1 < x2 and y1 < y2 in pixels"),
    "depth": (1, "metres"),
    "xyz": (3, "metres"),
}
"""How many numbers each field of an object has, and their meaning."""

MAX_OBJECTS = 6
"""Objects of a scene that questions are about.

A crowded scene has thousands of triples of objects, and would outweigh the other scenes.
"""

MAX_SCENES = 2**17
"""The largest number of scenes without the option `scenes`. Opening a source reads all of them."""

OPTIONS = ("tasks", "margin", "margin_m", "scenes")
"""The options of `relations:`. The other options of the uri belong to the source of the scenes."""


class Relation(NamedTuple):
    """The position of a first object relative to a second object."""

    task: str
    opposite: str
    """The relation of the second object to the first."""
    observation: str
    """The sentence of the chain of thought that says what can be seen."""
    statement: str
    """The sentence that states the relation."""


SIDEWAYS = (
    "They differ more from side to side than in height: "
    "going from left to right, the {} comes first and then the {}."
)
UPRIGHT = (
    "They differ more in height than from side to side: "
    "going from the top down, the {} comes first and then the {}."
)
INWARDS = "Going from the camera into the scene, the {} comes first and then the {}."
AROUND = "Going outwards from the {{ref}}, the {} comes first and then the {}."
FORWARD = ("{a}", "{b}")
BACKWARD = ("{b}", "{a}")

RELATIONS = {
    "left": Relation("2d", "right", SIDEWAYS.format(*FORWARD), "the {a} is to the left of the {b}"),
    "right": Relation(
        "2d", "left", SIDEWAYS.format(*BACKWARD), "the {a} is to the right of the {b}"
    ),
    "above": Relation("2d", "below", UPRIGHT.format(*FORWARD), "the {a} is above the {b}"),
    "below": Relation("2d", "above", UPRIGHT.format(*BACKWARD), "the {a} is below the {b}"),
    "in front of": Relation(
        "depth", "behind", INWARDS.format(*FORWARD), "the {a} is in front of the {b}"
    ),
    "behind": Relation(
        "depth", "in front of", INWARDS.format(*BACKWARD), "the {a} is behind the {b}"
    ),
    "closer": Relation(
        "distance",
        "farther",
        AROUND.format(*FORWARD),
        "the {a} is closer to the {ref} than the {b}",
    ),
    "farther": Relation(
        "distance",
        "closer",
        AROUND.format(*BACKWARD),
        "the {a} is farther from the {ref} than the {b}",
    ),
}

NEEDS = {
    "2d": "I need to compare where the {a} and the {b} are in the image.",
    "depth": "I need to compare how far back in the scene the {a} and the {b} are.",
    "distance": "I need to compare how far in space the {a} and the {b} are from the {ref}.",
}
"""The first sentence of the chain of thought of each task."""


class SceneObject(NamedTuple):
    """The name and the geometry of an object."""

    name: str
    box: tuple[float, ...]
    depth: tuple[float, ...]
    """One number. Unknown numbers are NaN, here and in `xyz`."""
    xyz: tuple[float, ...]


class Template(NamedTuple):
    """The text of a question, with the kind of its answer."""

    task: str
    kind: str
    """The answer is the "relation" of a to b, "yes/no", or the "object" a or b."""
    asked: str
    """The relation that the question names; "" if the relation is the answer."""
    text: str


TEMPLATES = (
    Template("2d", "relation", "", "Where is the {a} relative to the {b}?"),
    Template(
        "2d", "relation", "", "On which side of the {b} is the {a}: left, right, above or below?"
    ),
    Template("2d", "yes/no", "left", "Is the {a} to the left of the {b}?"),
    Template("2d", "yes/no", "right", "Is the {a} to the right of the {b}?"),
    Template("2d", "yes/no", "above", "Is the {a} above the {b}?"),
    Template("2d", "yes/no", "below", "Is the {a} below the {b}?"),
    Template("2d", "object", "left", "Which is more to the left, the {a} or the {b}?"),
    Template("2d", "object", "right", "Which is more to the right, the {a} or the {b}?"),
    Template("2d", "object", "above", "Which is higher up in the image, the {a} or the {b}?"),
    Template("2d", "object", "below", "Which is lower down in the image, the {a} or the {b}?"),
    Template("depth", "relation", "", "Is the {a} in front of the {b} or behind it?"),
    Template("depth", "yes/no", "in front of", "Is the {a} in front of the {b}?"),
    Template("depth", "yes/no", "behind", "Is the {a} behind the {b}?"),
    Template(
        "depth", "object", "in front of", "Of the {a} and the {b}, which is nearer to the camera?"
    ),
    Template(
        "depth", "object", "behind", "Of the {a} and the {b}, which is farther from the camera?"
    ),
    Template(
        "distance", "relation", "", "Is the {a} closer to the {ref} than the {b} is, or farther?"
    ),
    Template("distance", "yes/no", "closer", "Is the {a} nearer to the {ref} than the {b} is?"),
    Template("distance", "yes/no", "farther", "Is the {a} farther from the {ref} than the {b} is?"),
    Template("distance", "object", "closer", "Which is closer to the {ref}, the {a} or the {b}?"),
    Template(
        "distance", "object", "farther", "Which is farther from the {ref}, the {a} or the {b}?"
    ),
)

RELATION_NAMES = tuple(RELATIONS)
"""The code of a relation is its index here."""

_NAME = re.compile(r"(?=..)[A-Za-z]+(?:[ '-][A-Za-z]+)*")
_POSITION_WORDS = re.compile(
    r"\b(?:(?:left|right)(?:wards?)?|above|over|below|under(?:neath)?|beneath|before|behind|after"
    r"|(?:clos|near|f[au]rth)er|on top of|in (?:front|back)|(?:high|low)er than"
    r"|(?:up|down) from|ahead of|(?:more|less) (?:distant|proximate)|camera|viewer|yes|no)\b"
)


@dataclass(frozen=True)
class Questions:
    """Questions by index: `image`, `question`, `answer`, `cot` (chain of thought) and `task`.

    `objects` are the objects that the question names, as the scene has them.
    """

    scenes: Records
    rows: Int[np.ndarray, "N 6"]
    """The scene; the objects a, b and the reference (-1 for none); the relation; the template."""
    bad: Sequence[BadEntry] = ()
    """The scenes that cannot be used. They are bad records behind the questions."""

    @property
    def root(self) -> FilePath | None:
        return self.scenes.root

    def __len__(self) -> int:
        return len(self.rows) + len(self.bad)

    def __getitem__(self, index: int) -> JsonDict:
        if index >= len(self.rows):
            fault = self.bad[index - len(self.rows)]
            raise BadRecord(fault.kind, fault.message)
        number, *object_indices, relation, template = self.rows[index].tolist()
        scene = self.scenes[number]
        objects = [scene["objects"][i] for i in object_indices if i >= 0]
        names = [item["name"] for item in objects]
        question = write_question(TEMPLATES[template], RELATION_NAMES[relation], names)
        return {"image": scene["image"], "objects": objects} | question


def open_relations(location: str, open_scenes: Callable[[str], Records]) -> Questions:
    """Returns questions about scenes. No question comes twice.

    Within a task, each answer is equally frequent. An answer that is an object's name counts as
    "the first" or "the second" object of the question. The order is random and always the same.
    Questions are about at most `MAX_OBJECTS` objects of a scene. The name of such an object is
    unique in its scene, consists of letters, and names no position, unlike "left dog". A scene
    that cannot be used is one bad record behind the questions.

    Args:
      location: `URI?options`.
      open_scenes: opens a source by its uri.

    Raises:
      UserError: an option does not exist, no scene can be used, or no relation is clear.
    """
    source = f"source relations:{location}"
    uri, options = _split_location(location)
    scenes = open_scenes(uri)
    tasks = options.get("tasks", ",".join(TASKS)).split(",")
    for task in tasks:
        if task not in TASKS:
            raise UserError(f"{source}: no task {task!r}; {nearest(task, TASKS)}")
    margin = _number_option(options, "margin", 0.25, 0, source)
    margin_m = _number_option(options, "margin_m", 0.3, 0, source)
    count = min(int(_number_option(options, "scenes", len(scenes), 1, source)), len(scenes))
    if count > MAX_SCENES and "scenes" not in options:
        raise UserError(
            f"{source}: there are {count} scenes, which are all read first; "
            f"set how many to use, as in scenes=4096"
        )
    facts, bad = _read_facts(scenes, count, tasks, margin, margin_m)
    if len(bad) == count:
        raise UserError(f"{source}: no scene can be used: {bad[0].message}")
    _check_tasks(tasks, {RELATIONS[fact[-1]].task for fact in facts}, options, count, source)
    coded = [(*indices, RELATION_NAMES.index(relation)) for *indices, relation in facts]
    return Questions(scenes, _balanced(_questions_by_answer(np.array(coded, np.int32))), bad)


def _read_facts(
    scenes: Records, count: int, tasks: Sequence[str], margin: float, margin_m: float
) -> tuple[list[tuple[int, int, int, int, str]], list[BadEntry]]:
    """Returns the scene, the objects and the relation of each fact, and the bad scenes."""
    facts = []
    bad = []
    for number in range(count):
        try:
            objects = _scene_objects(scenes, number)
        except BadRecord as fault:
            bad.append(BadEntry(fault.kind, f"scene {number}{fault}"))
            continue
        facts += [
            (number, *fact)
            for fact in _facts(objects, margin, margin_m)
            if RELATIONS[fact[-1]].task in tasks
        ]
    return facts, bad


def _split_location(location: str) -> tuple[str, dict[str, str]]:
    """Returns the uri of the scenes with its own options, and the options of `relations:`."""
    uri, _, query = location.partition("?")
    options: dict[str, str] = {}
    scene_options: list[str] = []
    for option in query.split("&"):
        name, _, value = option.partition("=")
        if name in OPTIONS:
            options[name] = value
        elif name:
            scene_options.append(f"{name}={value}")
    return (f"{uri}?{'&'.join(scene_options)}" if scene_options else uri), options


def _check_tasks(
    tasks: Sequence[str],
    possible: set[str],
    options: Mapping[str, str],
    count: int,
    source: str,
) -> None:
    """Raises UserError if a task that the uri names, or every task, gives no question."""
    missing = [task for task in tasks if task not in possible]
    if missing and ("tasks" in options or not possible):
        needs = ", ".join(f"{task} (needs {TASKS[task]})" for task in missing)
        raise UserError(f"{source}: in {count} scenes no relation is clear for {needs}")


def _balanced(groups: Mapping[Any, Int[np.ndarray, "N 6"]]) -> Int[np.ndarray, "M 6"]:
    """Returns the same number of rows of each group, in random order."""
    rng = np.random.default_rng(0)
    size = min(map(len, groups.values()))
    chosen = [rng.permutation(rows)[:size] for rows in groups.values()]
    return rng.permutation(np.concatenate(chosen))


def write_question(template: Template, relation: str, names: Sequence[str]) -> dict[str, str]:
    """Returns question, answer, chain of thought (`cot`) and task.

    The chain of thought says what must be known, what can be seen, and what follows.

    Args:
      template: the text of the question.
      relation: the relation of the first name to the second.
      names: of a, b and, for the task distance, the reference.
    """
    fields: dict[str, str] = dict(zip(("a", "b", "ref"), names, strict=False))
    answer = write_answer(template, relation, *names[:2])
    fact = RELATIONS[relation]
    conclusion = {
        "relation": fact.statement,
        "yes/no": f"{answer}, {fact.statement}",
        "object": f"it is the {answer}",
    }[template.kind]
    thought = f"{NEEDS[template.task]} {fact.observation} So {conclusion}."
    return {
        "question": template.text.format(**fields),
        "answer": answer,
        "cot": thought.format(**fields),
        "task": template.task,
    }


def write_answer(template: Template, relation: str, a: str, b: str) -> str:
    """Returns the answer to a question about a and b, whose relation (of a to b) is `relation`."""
    if template.kind == "relation":
        return relation
    is_true = relation == template.asked
    if template.kind == "yes/no":
        return "yes" if is_true else "no"
    return a if is_true else b


def side(a: Sequence[float], b: Sequence[float], margin: float) -> str:
    """Returns the side of box b on which the centre of box a is: left, right, above, below, or "".

    The result is "" if neither axis is clear. On a clear axis the centres are farther apart than on
    the other axis, by more than `margin` of the larger extent along it.
    """
    across, down = ((a[i] + a[i + 2] - b[i] - b[i + 2]) / 2 for i in (0, 1))
    width, height = (max(a[i + 2] - a[i], b[i + 2] - b[i]) for i in (0, 1))
    if abs(across) - abs(down) > margin * width:
        return "left" if across < 0 else "right"
    if abs(down) - abs(across) > margin * height:
        return "above" if down < 0 else "below"
    return ""


def _facts(
    objects: Mapping[int, SceneObject], margin: float, margin_m: float
) -> Iterator[tuple[int, int, int, str]]:
    """Yields a, b, the reference (-1 for none) and the relation of a to b, if it is clear.

    Each pair of objects comes in both orders.
    """

    def compare(first: float, second: float, relation: str) -> str:
        if not abs(first - second) > margin_m:  # also if a distance is NaN
            return ""
        return relation if first < second else RELATIONS[relation].opposite

    for a, b in itertools.permutations(objects, 2):
        first = objects[a]
        second = objects[b]
        relations = [
            (-1, side(first.box, second.box, margin)),
            (-1, compare(first.depth[0], second.depth[0], "in front of")),
        ]
        for ref in objects.keys() - {a, b}:
            distance_a, distance_b = (
                math.dist(objects[ref].xyz, item.xyz) for item in (first, second)
            )
            relations.append((ref, compare(distance_a, distance_b, "closer")))
        yield from ((a, b, ref, relation) for ref, relation in relations if relation)


def _scene_objects(scenes: Records, number: int) -> dict[int, SceneObject]:
    """Returns the objects of a scene that questions may be about, by their index in the scene.

    Raises:
      BadRecord: the scene cannot be used. The text continues "scene 5".
    """
    try:
        scene = scenes[number]
    except BadRecord as bad:
        raise BadRecord(bad.kind, f": {bad}") from bad
    values = scene.get("objects")
    if "image" not in scene or not isinstance(values, list):
        raise BadRecord(
            "missing_field", f" has {list_names(scene)}; it needs an image and a list of objects"
        )
    objects = [_scene_object(value, f", object {i}") for i, value in enumerate(values)]
    counts = Counter(item.name.lower() for item in objects)
    usable = [
        i
        for i, item in enumerate(objects)
        if counts[item.name.lower()] == 1 and is_object_name(item.name)
    ]
    chosen = np.random.default_rng(number).permutation(usable)[:MAX_OBJECTS]
    return {i: objects[i] for i in chosen.tolist()}


def is_object_name(text: str) -> bool:
    """Returns whether a text names a thing and cannot be mistaken for a position or yes or no."""
    return bool(_NAME.fullmatch(text)) and not _POSITION_WORDS.search(text.lower())


def _scene_object(value: object, where: str) -> SceneObject:
    """Returns an object of a scene. Raises BadRecord, which begins with `where`."""
    name = name_text(value.get("name")) if isinstance(value, Mapping) else None
    if not isinstance(value, Mapping) or name is None:
        raise BadRecord("bad_entry", f"{where} is {short(value)}; it needs a name")
    geometry = {
        field: _field_numbers(value.get(field), field, count, meaning, where)
        for field, (count, meaning) in FIELDS.items()
    }
    x1, y1, x2, y2 = geometry["box"]
    if not (x1 < x2 and y1 < y2):
        raise BadRecord("bad_box", f"{where}: box is {value['box']}, not {FIELDS['box'][1]}")
    return SceneObject(name, **geometry)


def _field_numbers(
    value: Any, field: str, count: int, meaning: str, where: str
) -> tuple[float, ...]:
    """Returns the numbers of an object's field. A missing depth or xyz is NaN."""
    numbers = [value] if count == 1 and value is not None else value
    if numbers is None and field != "box":
        return (math.nan,) * count
    if (
        not isinstance(numbers, list)
        or len(numbers) != count
        or not all(map(_is_finite_number, numbers))
    ):
        unit = "number" if count == 1 else "numbers"
        kind = "bad_box" if field == "box" else "bad_entry"
        raise BadRecord(kind, f"{where}: {field} is {short(value)}, not {count} {unit}, {meaning}")
    return tuple(map(float, numbers))


def _is_finite_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _questions_by_answer(
    facts: Int[np.ndarray, "F 5"],
) -> dict[tuple[str, str], Int[np.ndarray, "N 6"]]:
    """Returns every question about the facts, by task and answer."""
    groups = defaultdict(list)
    for number, template in enumerate(TEMPLATES):
        for code, (name, relation) in enumerate(RELATIONS.items()):
            rows = facts[facts[:, -1] == code]
            is_askable = template.asked in ("", name, relation.opposite)
            if relation.task == template.task and is_askable and len(rows):
                answer = write_answer(template, name, "a", "b")
                groups[template.task, answer].append(np.insert(rows, 5, number, axis=1))
    return {key: np.concatenate(rows) for key, rows in groups.items()}


def _number_option(
    options: Mapping[str, str], name: str, default: float | int, minimum: int, source: str
) -> float:
    """Returns an option's value. It must be a whole number if `minimum` is 1."""
    try:
        value = float(options.get(name, default))
    except ValueError:
        value = math.nan
    if not minimum <= value < math.inf or (minimum and value % 1):
        kind = "whole number" if minimum else "number"
        raise UserError(f"{source}: {name}={options[name]}, but it must be a {kind} from {minimum}")
    return value

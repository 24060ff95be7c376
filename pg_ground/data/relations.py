"""Questions about how objects lie to one another, made from scenes.

`relations:URI?tasks=2d,depth,distance&margin=0.25&margin_m=0.3&scenes=N`, where URI is any source of scenes, options and all:
`relations:jsonl:scenes.jsonl`, `relations:synthetic:train?side=64&scenes=4096`. A scene is a record

    {"image": "1.jpg", "objects": [{"name": "red chair", "box": [x1, y1, x2, y2], "depth": 2.5, "xyz": [0.1, 0.4, 2.5]}, …]}

with boxes in pixels and, where they are known, distance from the camera and place, in metres. A template says what kind of answer
it wants, and the answer follows from the geometry by that kind; what is too close to call is not asked.
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

from pg_ground.config import nearest
from pg_ground.data.records import BadRecord, Records
from pg_ground.types import UserError

TASKS = {"2d": "box", "depth": "depth", "distance": "xyz"}
"""What can be asked about, and what objects need for it."""

FORMS = {"box": (4, "x1 < x2 and y1 < y2 in pixels"), "depth": (1, "metres"), "xyz": (3, "metres")}
"""How many numbers each of these is, and of what."""

OBJECTS = 6
"""Objects of a scene that are asked about: a crowded one has thousands of triples, and should not outweigh the others."""

MOST_SCENES = 2**17
"""Scenes that are read without being told how many; each is looked at once when the source is opened."""


class Relation(NamedTuple):
    """How the first object lies to the second."""

    task: str
    opposite: str
    """That of the second to the first."""
    seen: str
    stated: str


SIDEWAYS = "They differ more from side to side than in height: going from left to right, the {} comes first and then the {}."
UPRIGHT = "They differ more in height than from side to side: going from the top down, the {} comes first and then the {}."
INWARDS = "Going from the camera into the scene, the {} comes first and then the {}."
AROUND = "Going outwards from the {{ref}}, the {} comes first and then the {}."
FORWARD, BACKWARD = ("{a}", "{b}"), ("{b}", "{a}")

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

NEEDED = {
    "2d": "I need to compare where the {a} and the {b} are in the image.",
    "depth": "I need to compare how far back in the scene the {a} and the {b} are.",
    "distance": "I need to compare how far in space the {a} and the {b} are from the {ref}.",
}


class Placed(NamedTuple):
    """An object as far as questions need it."""

    name: str
    box: tuple[float, ...]
    depth: tuple[float, ...]
    """One number; NaN where it is not known, here and below."""
    xyz: tuple[float, ...]


class Template(NamedTuple):
    """A way to ask."""

    task: str
    kind: str
    """Of answer: "relation" (that of a to b), "yes/no", or "object" (the name of a or of b)."""
    asked: str
    """The relation that the question names; "" where it is the answer."""
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

CODES = tuple(RELATIONS)
"""A relation as a number is its place here."""

_NAME = re.compile(r"(?=..)[A-Za-z]+(?:[ '-][A-Za-z]+)*")
_PLACES = re.compile(
    r"\b(?:(?:left|right)(?:wards?)?|above|over|below|under(?:neath)?|beneath|before|behind|after|(?:clos|near|f[au]rth)er"
    r"|on top of|in (?:front|back)|(?:high|low)er than|(?:up|down) from|ahead of|(?:more|less) (?:distant|proximate)"
    r"|camera|viewer|yes|no)\b"
)


@dataclass(frozen=True)
class Questions:
    """Questions by index: `image`, `question`, `answer`, `cot`, `task`, and `objects`, those it names, as the scene has them."""

    scenes: Records
    rows: Int[np.ndarray, "N 6"]
    """Scene, a, b and reference (-1 for none) among its objects, relation, template."""

    @property
    def root(self) -> Any:
        return self.scenes.root

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        number, *places, relation, template = self.rows[index].tolist()
        scene = self.scenes[number]
        objects = [scene["objects"][place] for place in places if place >= 0]
        names = [one["name"] for one in objects]
        return {"image": scene["image"], "objects": objects} | ask(
            TEMPLATES[template], CODES[relation], names
        )


def open_relations(rest: str, open_scenes: Callable[[str], Records]) -> Questions:
    """Returns questions, each answer to each task equally often and none twice, in an order that is random and always the same.

    Answers by name count as "the first" and "the second". Asked about are objects (up to `OBJECTS` of a scene) with names that
    nothing else there has, that consist of letters, and that do not say where something is, as "left dog" does.

    Args:
      open_scenes: opens a source by its uri.

    Raises:
      UserError: an option does not exist or a scene is not of the form above, or there is nothing to ask.
    """
    where, (uri, _, query) = f"source relations:{rest}", rest.partition("?")
    options = {
        name: value
        for name, _, value in (option.partition("=") for option in query.split("&"))
        if name
    }
    own = {
        name: options.pop(name)
        for name in ("tasks", "margin", "margin_m", "scenes")
        if name in options
    }
    scenes = open_scenes(
        uri + "?" * bool(options) + "&".join(f"{name}={value}" for name, value in options.items())
    )
    tasks = own.get("tasks", ",".join(TASKS)).split(",")
    for task in tasks:
        if task not in TASKS:
            raise UserError(f"{where}: no task {task!r}; {nearest(task, TASKS)}")
    margin, margin_m = (
        _option(own, "margin", 0.25, 0, where),
        _option(own, "margin_m", 0.3, 0, where),
    )
    count = min(int(_option(own, "scenes", len(scenes), 1, where)), len(scenes))
    if count > MOST_SCENES and "scenes" not in own:
        raise UserError(
            f"{where}: there are {count} scenes, which are all read first; say how many to use, as in scenes=4096"
        )
    facts = [
        (number, *fact)
        for number in range(count)
        for fact in _facts(_objects(scenes, number, where), margin, margin_m)
        if RELATIONS[fact[-1]].task in tasks
    ]
    found = {RELATIONS[fact[-1]].task for fact in facts}
    if missing := [task for task in tasks if task not in found and ("tasks" in own or not found)]:
        lacks = ", ".join(f"{task} (needs {TASKS[task]})" for task in missing)
        raise UserError(
            f"{where}: in {count} scenes there is nothing to ask about {lacks} that is not too close to call"
        )
    groups = _by_answer(
        np.array([(*places, CODES.index(relation)) for *places, relation in facts], np.int32)
    )
    rng, least = np.random.default_rng(0), min(map(len, groups.values()))
    return Questions(
        scenes,
        rng.permutation(
            np.concatenate([rng.permutation(rows)[:least] for rows in groups.values()])
        ),
    )


def ask(template: Template, relation: str, names: Sequence[str]) -> dict[str, str]:
    """Returns question, answer, chain of thought and task, where `relation` is that of the first name to the second.

    The chain of thought says what has to be known, what is seen and what follows from it, in words.
    """
    fields: dict[str, str] = dict(zip(("a", "b", "ref"), names, strict=False))
    answer, about = answer_to(template, relation, *names[:2]), RELATIONS[relation]
    follows = {
        "relation": about.stated,
        "yes/no": f"{answer}, {about.stated}",
        "object": f"it is the {answer}",
    }[template.kind]
    thought = f"{NEEDED[template.task]} {about.seen} So {follows}."
    return {
        "question": template.text.format(**fields),
        "answer": answer,
        "cot": thought.format(**fields),
        "task": template.task,
    }


def answer_to(template: Template, relation: str, a: str, b: str) -> str:
    """Returns the answer to a question about a and b, where `relation` is that of a to b: of the kind that the template wants."""
    if template.kind == "relation":
        return relation
    holds = relation == template.asked
    return ("yes" if holds else "no") if template.kind == "yes/no" else a if holds else b


def side(a: Sequence[float], b: Sequence[float], margin: float) -> str:
    """Returns where box a lies to box b, by their centres: left, right, above or below.

    "" where neither axis leads: the longer way must be longer by more than `margin` of the larger extent along it.
    """
    across, down = ((a[i] + a[i + 2] - b[i] - b[i + 2]) / 2 for i in (0, 1))
    width, height = (max(a[i + 2] - a[i], b[i + 2] - b[i]) for i in (0, 1))
    if abs(across) - abs(down) > margin * width:
        return "left" if across < 0 else "right"
    if abs(down) - abs(across) > margin * height:
        return "above" if down < 0 else "below"
    return ""


def _facts(
    objects: Mapping[int, Placed], margin: float, margin_m: float
) -> Iterator[tuple[int, int, int, str]]:
    """Yields a, b, the reference (-1 for none) and the relation of a to b wherever it is clear, both ways round."""

    def ordered(first: float, second: float, relation: str) -> str:
        if not abs(first - second) > margin_m:  # nor where one is NaN
            return ""
        return relation if first < second else RELATIONS[relation].opposite

    for a, b in itertools.permutations(objects, 2):
        one, other = objects[a], objects[b]
        found = [
            (-1, side(one.box, other.box, margin)),
            (-1, ordered(one.depth[0], other.depth[0], "in front of")),
        ]
        for ref in objects.keys() - {a, b}:
            near, far = (math.dist(objects[ref].xyz, it.xyz) for it in (one, other))
            found.append((ref, ordered(near, far, "closer")))
        yield from ((a, b, ref, relation) for ref, relation in found if relation)


def _objects(scenes: Records, number: int, where: str) -> dict[int, Placed]:
    """Returns the objects of a scene that can be asked about, by their places among all of them."""
    try:
        scene = scenes[number]
    except BadRecord as bad:
        raise UserError(f"{where}: scene {number}: {bad}") from bad
    objects = scene.get("objects")
    if "image" not in scene or not isinstance(objects, list):
        raise UserError(
            f"{where}: scene {number} has {', '.join(map(str, scene))}; it needs an image and a list of objects"
        )
    placed = [
        _placed(one, f"{where}: scene {number}, object {place}")
        for place, one in enumerate(objects)
    ]
    names = Counter(one.name.lower() for one in placed)
    fit = [i for i, one in enumerate(placed) if names[one.name.lower()] == 1 and is_name(one.name)]
    return {i: placed[i] for i in np.random.default_rng(number).permutation(fit)[:OBJECTS].tolist()}


def is_name(text: str) -> bool:
    """Returns whether a text names a thing, and could not be taken for an answer of another kind."""
    return bool(_NAME.fullmatch(text)) and not _PLACES.search(text.lower())


def _placed(one: object, where: str) -> Placed:
    if not isinstance(one, Mapping) or not isinstance(one.get("name"), str):
        raise UserError(f"{where} is {one!r:.60}; it needs a name")
    numbers = {}
    for field, (count, form) in FORMS.items():
        value = one.get(field)
        given = [value] if count == 1 and value is not None else value
        if given is None and field != "box":
            given = [math.nan] * count
        elif not isinstance(given, list) or len(given) != count or not all(map(_is_number, given)):
            raise UserError(
                f"{where}: {field} is {value!r:.60}, not {count} number{'s' * (count > 1)}, {form}"
            )
        numbers[field] = tuple(map(float, given))
    x1, y1, x2, y2 = numbers["box"]
    if not (x1 < x2 and y1 < y2):
        raise UserError(f"{where}: box is {one['box']}, not {FORMS['box'][1]}")
    return Placed(one["name"], **numbers)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _by_answer(facts: Int[np.ndarray, "F 5"]) -> dict[tuple[str, str], Int[np.ndarray, "N 6"]]:
    """Returns every question that can be asked about the facts, by task and answer."""
    groups = defaultdict(list)
    for number, template in enumerate(TEMPLATES):
        for code, (name, relation) in enumerate(RELATIONS.items()):
            rows = facts[facts[:, -1] == code]
            if (
                relation.task == template.task
                and template.asked in ("", name, relation.opposite)
                and len(rows)
            ):
                groups[template.task, answer_to(template, name, "a", "b")].append(
                    np.insert(rows, 5, number, axis=1)
                )
    return {key: np.concatenate(rows) for key, rows in groups.items()}


def _option(
    options: Mapping[str, str], name: str, default: float | int, least: int, where: str
) -> float:
    """Returns an option's value, a whole number if its least is 1."""
    try:
        value = float(options.get(name, default))
    except ValueError:
        value = math.nan
    if not least <= value < math.inf or (least and value % 1):
        kind = "whole number" if least else "number"
        raise UserError(f"{where}: {name}={options[name]}, where a {kind} from {least} is wanted")
    return value

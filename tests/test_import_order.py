"""Which module may import which, read from the source: an import points to a lower floor, or down inside its own room.

The order is written down here, and a module that is not in it fails the test: adding one means saying where it stands.
"""

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "pg_ground"

WORDS = ("types", "vocab", "config", "params")
"""Floor 0. In order: `config` may import the two before it."""

CONCERNS = (
    "boxes",
    "tokenizer",
    "sharding",
    "optim",
    "metrics",
    "checkpoints",
    "draw",
    "pages",
    "processes",
)
"""Floor 1: one concern each; they import floor 0 only, and not one another."""

ASSETS = ("assets", "assets.make_tokenizer")
"""Floor 1 too: data files, and the script that makes them."""

ROOMS = {
    "model": (
        "blocks",
        "lora",
        "siglip",
        "gemma",
        "paligemma",
        "files",
        "vqvae",
        "hugging_face",
        "weights",
    ),
    "data": (
        *(
            "synthetic",
            "records",
            "masks",
            "sampling",
            "tables",
            "hub",
            "arrayrecord",
            "tfds",
            "refer",
            "relations",
            "fetch",
        ),
        *("sources", "examples", "pipeline"),
    ),
    "measure": (
        *(
            "rows",
            "runs",
            "answers",
            "boxes",
            "frames",
            "intervals",
            "segmentation",
            "detection",
            "grounding",
            "pointing",
            "counting",
            "cv_bench",
            "environment",
        ),
        *("benchmarks", "files"),
    ),
    "rl": (
        *("advantages", "loss", "rewards", "experience", "rollout", "update"),
        *("grammars", "text_rewards", "judge_worker", "judges"),
    ),
}
"""Floor 2. In order: a module may import those before it in its own room; a room's `__init__` stands on top of it."""

ENTRY_POINTS = (
    *(
        "cli",
        "chips",
        "hlo",
        "flops",
        "memory",
        "programs",
        "exam",
        "evaluate",
        "ahead",
        "hardware",
        "report",
        "diary",
        "sampler",
        "doctor",
        "look",
        "predict",
        "train",
        "prefetch",
        "pack",
        "convert",
        "compile",
        "bench",
    ),
    *("__main__", "__init__"),
)
"""Floor 3. In order: each may import those before it, and everything below."""

FLAX_ROOM = "model"


def places() -> dict[str, tuple[int, str, int]]:
    """Returns each module's floor, room (or own name, for what has no room) and place within it."""
    found = {}
    for place, name in enumerate(WORDS):
        found[name] = (0, "words", place)
    for name in (*CONCERNS, *ASSETS):
        found[name] = (1, name, 0)
    for room, modules in ROOMS.items():
        for place, name in enumerate(modules):
            found[f"{room}.{name}"] = (2, room, place)
        found[room] = (2, room, len(modules))
    for place, name in enumerate(ENTRY_POINTS):
        found[name] = (3, "entry points", place)
    return found


PLACES = places()


def module_name(path: Path) -> str:
    """Returns `model.gemma` for `pg_ground/models/gemma.py`, `model` for `pg_ground/model/__init__.py`."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def sources() -> dict[str, str]:
    return {
        module_name(path): path.read_text(encoding="utf-8")
        for path in sorted(PACKAGE.rglob("*.py"))
    }


@functools.cache
def nodes(source: str) -> list[ast.AST]:
    return list(ast.walk(ast.parse(source)))


def imports(source: str) -> Iterator[str]:
    """Yields the dotted names that `source` imports, at the top or inside functions; for `from a import b` it is `a.b`."""
    for node in nodes(source):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, (
                f"line {node.lineno}: imports of the package are written out, not relative"
            )
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_modules(source: str) -> Iterator[str]:
    """Yields the modules of the package that `source` imports."""
    for name in imports(source):
        first, _, rest = name.partition(".")
        if first == "pg_ground":
            while (
                rest and rest not in PLACES
            ):  # what is left over is a name inside the module, not a module
                rest = rest.rpartition(".")[0]
            yield rest or "__init__"


def faults(modules: dict[str, str]) -> list[str]:
    """Returns one line for each import that points up or sideways, each use of jit or flax out of place, each unknown module."""
    found = []
    for name, source in modules.items():
        if name not in PLACES:
            found.append(f"{name} has no floor")
            continue
        floor, room, place = PLACES[name]
        for other in own_modules(source):
            other_floor, other_room, other_place = PLACES[other]
            below = other_floor < floor or (
                other_floor == floor and other_room == room and other_place < place
            )
            if not below and other != name:
                found.append(
                    f"{name} imports {other}, which is {'above' if other_floor > floor else 'beside'} it"
                )
        if floor < 3 and calls_jit(source):
            found.append(f"{name} compiles: jax.jit is for entry points")
        if room != FLAX_ROOM and any(
            imported.split(".")[0] == "flax" for imported in imports(source)
        ):
            found.append(f"{name} imports flax, which is for {FLAX_ROOM}")
    return found


def calls_jit(source: str) -> bool:
    """Returns whether `jit` or `pmap` is taken from jax, as an attribute or by an import."""
    names = ("jit", "pmap")
    attributes = (n.attr for n in nodes(source) if isinstance(n, ast.Attribute))
    return any(a in names for a in attributes) or any(
        n in [f"jax.{name}" for name in names] for n in imports(source)
    )


def test_every_import_points_down():
    assert faults(sources()) == []


def test_the_package_was_read():
    modules = sources()
    assert (
        len(modules) > 25 and sum(len(set(own_modules(source))) for source in modules.values()) > 60
    )
    assert {"programs", "exam", "train"} <= {
        name for name, source in modules.items() if calls_jit(source)
    }
    assert any(imported.startswith("flax") for imported in imports(modules["model.gemma"]))


@pytest.mark.parametrize(
    ("name", "line", "fault"),
    [
        ("types", "from pg_ground.vocab import PAD", "types imports vocab, which is beside it"),
        (
            "boxes",
            "from pg_ground.rl import rewards",
            "boxes imports rl.rewards, which is above it",
        ),
        (
            "boxes",
            "import pg_ground.training.optimizers",
            "boxes imports optim, which is beside it",
        ),
        (
            "rl.update",
            "from pg_ground.models.paligemma import PaliGemma",
            "rl.update imports model.paligemma, which is beside it",
        ),
        (
            "rl.update",
            "from pg_ground.model import PaliGemma",
            "rl.update imports model, which is beside it",
        ),
        ("rl.rollout", "from pg_ground import data", "rl.rollout imports data, which is beside it"),
        (
            "rl.loss",
            "from pg_ground.rl.update import accumulate",
            "rl.loss imports rl.update, which is beside it",
        ),
        (
            "data.sources",
            "from pg_ground.data import examples",
            "data.sources imports data.examples, which is beside it",
        ),
        (
            "evaluate",
            "from pg_ground.train import Run",
            "evaluate imports train, which is beside it",
        ),
        (
            "model.gemma",
            "from pg_ground import load",
            "model.gemma imports __init__, which is above it",
        ),
        ("metrics", "import jax\njax.jit(len)", "metrics compiles: jax.jit is for entry points"),
        ("rl.update", "from jax import jit", "rl.update compiles: jax.jit is for entry points"),
        ("rl.update", "import flax.linen as nn", "rl.update imports flax, which is for model"),
        ("train", "from flax import linen", "train imports flax, which is for model"),
        ("rl.ppo", "", "rl.ppo has no floor"),
    ],
)
def test_a_planted_fault_is_found(name, line, fault):
    """At the top of a module, and inside a function of it."""
    modules = sources()
    for planted in (line, "def late():\n    " + line.replace("\n", "\n    ") if line else ""):
        source = modules.get(name, "") + "\n" + planted
        assert fault in faults(modules | {name: source})


def test_imports_that_point_down_are_no_faults():
    for name, line in (
        ("config", "from pg_ground import types, vocab"),
        ("rl.update", "from pg_ground.rl import advantages, rollout"),
        ("model", "import pg_ground.checkpoints.weights"),
        (
            "train",
            "from pg_ground import boxes, cli, data, rl\nfrom pg_ground.model import PaliGemma, weights",
        ),
    ):
        assert faults({name: line}) == []

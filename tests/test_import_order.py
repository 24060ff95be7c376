"""An import points down: to an earlier line of `ORDER`, or earlier inside the same package.

The order is written here by hand. A module that is not listed fails the test, so whoever adds a
module decides where it stands. The imports are read from the source text. Nothing is imported.
"""

import ast
import functools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "pg_ground"

ORDER: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("", ("types",)),
    ("storage", ("json_values", "paths", "codecs", "files", "local_copy", "downloads", "uploads")),
    ("", ("vocab", "params")),
    (
        "rl",
        (
            "options",
            "advantages",
            "objectives",
            "importance_sampling",
            "token_selection",
            "kl",
            "algorithms",
            "loss",
            "scored_rollouts",
            "rollout",
            "update",
        ),
    ),
    # `config` takes the options of an algorithm from their declarations in `rl`. So `rl` knows a
    # model, a batch and a device only through `types` and its own Protocols.
    ("", ("config",)),
    ("", ("boxes", "tokenizer")),
    ("assets", ("make_tokenizer",)),
    ("readers", ("parsers", "locations", "answer_formats", "gold_text")),
    ("parallel", ("sharding", "multiprocess", "memory_model")),
    ("models", ("quantization", "blocks", "lora", "siglip", "gemma", "paligemma", "vqvae")),
    (
        "checkpoints",
        (
            "tensor_files",
            "finite_values",
            "vqvae_file",
            "hugging_face_names",
            "hugging_face_config",
            "safetensors_files",
            "vocabulary_rows",
            "peft",
            "hugging_face",
            "run_directory",
            "manager",
            "model_sizes",
            "scales",
            "adaptation",
            "weights",
            "export",
            "conversion",
        ),
    ),
    (
        "data",
        (
            "records",
            "image_values",
            "image_files",
            "pixel_depth",
            "record_fields",
            "row_filters",
            "chat_turns",
            "names",
            "images",
            "sampling",
            "box_formats",
            "annotations",
            "frames",
            "run_lengths",
            "masks",
            "synthetic",
            "class_names",
            "tables",
            "splits",
            "arrow_files",
            "coco",
            "hub",
            "arrayrecord",
            "tfds",
            "refer",
            "pointarena",
            "relations",
            "fetch",
            "sources",
            "examples",
            "batch_rows",
            "datasets",
            "mixture",
            "bad_records",
            "batches",
            "units",
            "text_budgets",
            "source_check",
            "packing",
            "prefetching",
        ),
    ),
    (
        "rewards",
        (
            "text_example",
            "location_rewards",
            "word_rewards",
            "spatial_rewards",
            "agent_rewards",
            "text_rewards",
            "worker_process",
            "workers",
            "text_questions",
            "answer_reader",
            "device_rewards",
            "reward_functions",
        ),
    ),
    (
        "reporting",
        (
            "tables",
            "progress",
            "html_page",
            "drawing",
            "rollout_pictures",
            "metric_writers",
            "provenance",
            "timeline",
            "run_files",
            "goodput",
            "curves",
            "gallery",
            "report",
            "watch",
            "model_card",
            "data_report",
        ),
    ),
    (
        "evals",
        (
            "rows",
            "image_identity",
            "intervals",
            "answers",
            "box_format_check",
            "detection",
            "segmentation",
            "grounding",
            "detection_f1",
            "grec",
            "rejection",
            "pointing",
            "mask_points",
            "counting",
            "cv_bench",
            "environment",
            "question_groups",
            "benchmarks",
            "question_masks",
            "file_answers",
            "record_files",
            "prediction_files",
            "scoring",
            "exports",
            "programs",
            "questions",
            "runner",
            "evaluation",
            "prediction",
            "transformers_answers",
            "verification_questions",
            "verification",
        ),
    ),
    (
        "training",
        (
            "timing",
            "optimizers",
            "program",
            "setup",
            "stage",
            "memory_table",
            "learning_memory",
            "rollout_weights",
            "rollout_worker",
            "reward_coverage",
            "rollout_samples",
            "run_config",
            "entry_flags",
            "recorder",
            "evaluation",
            "sft",
            "grpo",
            "stages",
            "loop",
            "dry_run",
            "data_check",
        ),
    ),
    (
        "aot",
        (
            "tpu_specs",
            "hlo_proto",
            "hlo_analysis",
            "flops",
            "bounds",
            "jobs",
            "compile_worker",
            "compilation",
            "roofline",
            "estimates",
            "benchmark",
        ),
    ),
    (
        "rehearsal",
        (
            "checklist",
            "miniatures",
            "stand_in_tokenizer",
            "shrinking",
            "typed_paths",
            "data",
            "processes",
            "costs",
            "steps",
        ),
    ),
    ("", ("cli",)),
    (
        "",
        (
            "train",
            "evaluate",
            "predict",
            "report",
            "look",
            "prefetch",
            "pack",
            "convert",
            "compile",
            "bench",
            "rehearse",
        ),
    ),
    ("", ("api",)),
    ("", ("__main__", "__init__")),
)
"""Lines from the lowest to the highest: a package ("" is the top of `pg_ground`) and its modules.

The modules of a line stand in order too. A package's `__init__` stands above its modules.
"""

COMMANDS = dict(ORDER[-3:-2])[""]
"""The commands do not import one another."""

KNOW_NO_MODEL = ("data", "rewards")
"""These packages see a model only as a Protocol: they import nothing of `NETWORKS`."""

NETWORKS = ("models", "checkpoints")

FLAX_PACKAGE = "models"

COMPILES = ("training", "evals", "aot", "reporting", *COMMANDS)
"""Only these may call `jax.jit`. Other packages hold pure functions."""

TOP_LEVEL_LIMIT = 21
"""Modules at the top of `pg_ground`, `__init__` and `__main__` included."""


def ranks() -> dict[str, int]:
    """Returns the rank of every module by its dotted name. A module may import lower ranks."""
    names = []
    for package, modules in ORDER:
        names += [f"{package}.{module}" if package else module for module in modules]
        names += [package] if package else []
    return {name: rank for rank, name in enumerate(names)}


RANKS = ranks()

TOP_NAMES = list(
    dict.fromkeys(
        name for package, modules in ORDER for name in ([package] if package else modules)
    )
)
"""Packages and modules at the top of `pg_ground`, in order."""


def module_name(path: Path) -> str:
    """Returns `models.gemma` for models/gemma.py and `models` for models/__init__.py."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def read_sources() -> dict[str, str]:
    """Returns the source text of every module by its dotted name."""
    paths = sorted(PACKAGE.rglob("*.py"))
    return {module_name(path): path.read_text(encoding="utf-8") for path in paths}


@functools.cache
def nodes(source: str) -> list[ast.AST]:
    return list(ast.walk(ast.parse(source)))


def imports(source: str) -> Iterator[str]:
    """Yields the dotted names that `source` imports, also inside functions.

    `from a import b` yields `a.b`.
    """
    for node in nodes(source):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: write the package name, no leading dots"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def package_imports(source: str) -> Iterator[str]:
    """Yields the modules of pg_ground that `source` imports."""
    for name in imports(source):
        first, _, module = name.partition(".")
        if first != "pg_ground":
            continue
        while module and module not in RANKS:  # the last part is a name inside the module
            module = module.rpartition(".")[0]
        yield module or "__init__"


def calls_jit(source: str) -> bool:
    """Returns whether `jit` or `pmap` is taken from jax, as an attribute or by an import."""
    names = ("jit", "pmap")
    attributes = (node.attr for node in nodes(source) if isinstance(node, ast.Attribute))
    return any(attribute in names for attribute in attributes) or any(
        name in [f"jax.{jit}" for jit in names] for name in imports(source)
    )


def faults(sources: Mapping[str, str]) -> Iterator[str]:
    """Yields one line for each module without a rank, wrong import, and wrong jit or flax."""
    for name, source in sources.items():
        if name not in RANKS:
            yield f"{name} is not in ORDER"
            continue
        package = name.partition(".")[0]
        for other in dict.fromkeys(package_imports(source)):
            other_package = other.partition(".")[0]
            if RANKS[other] > RANKS[name]:
                yield f"{name} imports {other}, which is not below it"
            elif name in COMMANDS and other in COMMANDS and other != name:
                yield f"{name} imports {other}, which is a command too"
            elif package in KNOW_NO_MODEL and other_package in NETWORKS:
                yield f"{name} imports {other}, but {package} knows a model only as a Protocol"
        if package not in COMPILES and calls_jit(source):
            yield f"{name} compiles, but jax.jit is for {', '.join(COMPILES[:4])} and commands"
        if package != FLAX_PACKAGE and any(
            imported.partition(".")[0] == "flax" for imported in imports(source)
        ):
            yield f"{name} imports flax, which is for {FLAX_PACKAGE}"


def test_every_import_points_down():
    assert list(faults(read_sources())) == []


def test_every_listed_module_exists():
    assert sorted(set(RANKS) - set(read_sources())) == []


def test_the_top_of_the_package_is_small():
    top = [name for name in read_sources() if (PACKAGE / f"{name}.py").exists()]
    assert "train" in top and len(top) <= TOP_LEVEL_LIMIT, top


def test_the_sources_were_read():
    """The other tests would pass on an empty folder."""
    sources = read_sources()
    assert sum(len(set(package_imports(source))) for source in sources.values()) > 60
    compiling = {name for name, source in sources.items() if calls_jit(source)}
    assert {"evals.programs", "training.program"} <= compiling
    assert any(name.startswith("flax") for name in imports(sources["models.gemma"]))


@pytest.mark.parametrize(
    ("name", "line", "fault"),
    [
        (
            "types",
            "from pg_ground.vocab import PAD",
            "types imports vocab, which is not below it",
        ),
        (
            "boxes",
            "from pg_ground.rewards import device_rewards",
            "boxes imports rewards.device_rewards, which is not below it",
        ),
        (
            "boxes",
            "import pg_ground.training.optimizers",
            "boxes imports training.optimizers, which is not below it",
        ),
        (
            "rl.update",
            "from pg_ground.models.paligemma import PaliGemma",
            "rl.update imports models.paligemma, which is not below it",
        ),
        (
            "rl.update",
            "from pg_ground.models import PaliGemma",
            "rl.update imports models, which is not below it",
        ),
        (
            "rewards.workers",
            "import pg_ground.checkpoints.weights",
            "rewards.workers imports checkpoints.weights, "
            "but rewards knows a model only as a Protocol",
        ),
        (
            "rl.rollout",
            "from pg_ground import evals",
            "rl.rollout imports evals, which is not below it",
        ),
        (
            "rl.loss",
            "from pg_ground.rl.update import accumulate",
            "rl.loss imports rl.update, which is not below it",
        ),
        (
            "rl.loss",
            "from pg_ground import rl",
            "rl.loss imports rl, which is not below it",
        ),
        (
            "data.sources",
            "from pg_ground.data import examples",
            "data.sources imports data.examples, which is not below it",
        ),
        (
            "evals.runner",
            "from pg_ground import cli",
            "evals.runner imports cli, which is not below it",
        ),
        (
            "training.loop",
            "from pg_ground.evaluate import main",
            "training.loop imports evaluate, which is not below it",
        ),
        (
            "evaluate",
            "from pg_ground.train import main",
            "evaluate imports train, which is a command too",
        ),
        (
            "models.gemma",
            "from pg_ground import load",
            "models.gemma imports __init__, which is not below it",
        ),
        (
            "data.batches",
            "import jax\njax.jit(len)",
            "data.batches compiles, "
            "but jax.jit is for training, evals, aot, reporting and commands",
        ),
        (
            "rl.update",
            "from jax import jit",
            "rl.update compiles, but jax.jit is for training, evals, aot, reporting and commands",
        ),
        (
            "rl.update",
            "import flax.linen as nn",
            "rl.update imports flax, which is for models",
        ),
        ("train", "from flax import linen", "train imports flax, which is for models"),
        ("rl.ppo", "", "rl.ppo is not in ORDER"),
    ],
)
def test_a_planted_fault_is_reported(name, line, fault):
    """The fault is planted at the top of a module, then inside a function."""
    sources = read_sources()
    for planted in (line, "def late():\n    " + line.replace("\n", "\n    ") if line else ""):
        source = sources.get(name, "") + "\n" + planted
        assert fault in set(faults(sources | {name: source}))


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("config", "from pg_ground import types, vocab"),
        ("rl.update", "from pg_ground.rl import advantages, rollout"),
        ("models", "import pg_ground.models.paligemma"),
        ("train", "from pg_ground import boxes, cli, data, rl"),
        ("train", "from pg_ground.models import PaliGemma, paligemma"),
    ],
)
def test_an_import_that_points_down_is_no_fault(name, line):
    assert list(faults({name: line})) == []


DESIGN = (PACKAGE.parent / "docs" / "design.md").read_text(encoding="utf-8")


def test_the_design_names_tests_that_exist():
    """The table of seams names the test of each seam."""
    named = re.findall(r"`(test_\w+\.py)::(\w+)`", DESIGN)
    assert len(named) > 8
    for file, test in named:
        assert f"def {test}(" in (Path(__file__).parent / file).read_text("utf-8"), (
            f"{file}::{test}"
        )


def test_the_design_lists_the_packages_in_order():
    listed = re.findall(r"^\| (`.*?) \|", DESIGN, re.MULTILINE)
    names = [name for cell in listed for name in re.findall(r"`(\w+)`", cell) if name in TOP_NAMES]
    assert names == TOP_NAMES

"""Compiles the recipes and the targets of docs/tpu.md for their TPU slices, without a TPU.

python benchmarks/tpu.py [--only=recipes|targets|prefix] [--names=pg1_3b_224_v5e_8,…] [--json=O]

Prints three tables: every recipe of configs/tpu.py; the targets, whose figures docs/tpu.md quotes;
and a shared prefix beside a repeated one. The repeated prefix is a supervised step on as many
questions as there are completions. A program takes about fifteen seconds.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pg_ground import cli
from pg_ground.aot.tpu_specs import CHIPS, GIB, parse_topology
from pg_ground.reporting.tables import Table, ascii_table
from pg_ground.types import UserError

ROOT = Path(__file__).parents[1]

LEAN = '--config.mesh.compiler_options=("xla_tpu_scheduler_percent_shared_memory_limit=30",)'
"""With this option the scheduler overlaps less and needs less memory."""

COLUMNS = [
    "",
    "topology",
    "program",
    "GiB a chip",
    "fits",
    "by arithmetic",
    "TFLOP",
    "link GB",
    "s at best",
    "bound by",
    "MFU",
]


class Compilation(NamedTuple):
    """One run of the compile command."""

    name: str
    config: str
    topology: str
    programs: str
    flags: tuple[str, ...] = ()


def paligemma_update(
    model: str, topology: str, prompts: int, *flags: str, name: str = "", tokens: int = 64
) -> Compilation:
    """Returns the update of a model of configs/paligemma.py, with 8 completions per prompt."""
    sizes = (
        f"--config.grpo.batch_size={prompts}",
        "--config.grpo.grad_accum_steps=1",
        f"--config.grpo.max_new_tokens={tokens}",
        "--config.data.prompt_length=32",
        f"--config.data.suffix_length={tokens}",
        "--config.model.logits_block=2",
    )
    return Compilation(
        name or f"{model}, {prompts} prompts",
        f"configs/paligemma.py:{model}",
        topology,
        "update",
        (*sizes, *flags),
    )


TARGETS = (
    paligemma_update("pg1_3b_224_full", "v5e:2x4", 64),
    paligemma_update(
        "pg1_3b_224_full", "v5e:2x4", 64, LEAN, name="pg1_3b_224_full, 64 prompts, lean"
    ),
    paligemma_update("pg1_3b_224_full", "v5e:2x4", 256),
    paligemma_update("pg1_3b_448_full", "v5e:2x4", 128),
    paligemma_update("pg1_3b_896_full", "v5e:2x4", 32),
    paligemma_update("pg1_3b_224_full", "v5e:2x2", 64),
    paligemma_update("pg1_3b_224", "v5e:1x1", 8),
    paligemma_update("pg2_3b_224_full", "v5e:2x4", 64),
    paligemma_update(
        "pg2_3b_224_full", "v5e:2x4", 64, LEAN, name="pg2_3b_224_full, 64 prompts, lean"
    ),
    paligemma_update("pg2_10b_224_full", "v5e:4x4", 32),
    paligemma_update("pg2_10b_224_full", "v5p:2x2x2", 64),
    paligemma_update("pg1_3b_224_full", "v5e:16x16", 256, "--config.mesh.replica=4"),
)


def prefix_compilations(tokens: int) -> tuple[Compilation, Compilation]:
    """Returns a shared and a repeated prefix for 256 completions of `tokens` tokens."""
    name = f"shared, {tokens} tokens"
    shared = paligemma_update("pg1_3b_224_full", "v5e:2x4", 32, name=name, tokens=tokens)
    supervised = (
        *(flag for flag in shared.flags if "grpo" not in flag),
        '--config.stages=("sft",)',
        "--config.sft.batch_size=256",
        "--config.sft.grad_accum_steps=1",
    )
    config = "configs/tasks.py:grounding+pg1_3b_224_full"
    repeated = Compilation(f"repeated, {tokens} tokens", config, shared.topology, "sft", supervised)
    return shared, repeated


def compile_document(name: str, config: str, topology: str, *flags: str) -> dict[str, Any]:
    """Returns the JSON document of the compile command.

    Raises:
      UserError: the command wrote no document.
    """
    with tempfile.TemporaryDirectory() as folder:
        document = Path(folder) / "o.json"
        command = [
            sys.executable,
            "-m",
            "pg_ground.compile",
            f"--config={config}",
            f"--topology={topology}",
            f"--json={document}",
            *flags,
        ]
        finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if not document.exists():
            message = (finished.stderr or finished.stdout).strip().splitlines()[-1]
            raise UserError(f"{name}: {message}")
        return json.loads(document.read_text())


def table_row(compilation: Compilation, name: str, program: dict[str, Any]) -> list[str]:
    """Returns the cells of one program."""
    limit = CHIPS[parse_topology(compilation.topology)[0]].hbm_bytes
    size = program["hbm_bytes"]
    estimate = program["hbm_bytes_by_arithmetic"]
    link_bytes = sum(collective["bytes"] for collective in program["collectives"].values())
    return [
        compilation.name,
        compilation.topology,
        name,
        f"{size / GIB:.2f} of {limit / GIB:.2f}",
        "yes" if size <= limit else "NO",
        f"{estimate / GIB:.2f} ({estimate / size - 1:+.0%})",
        f"{program['flops'] / 1e12:.1f}",
        f"{link_bytes / 1e9:.1f}",
        f"{program['step_s']:.3f}",
        program["bound_by"],
        f"{program['mfu']:.0%}",
    ]


def main(argv: Sequence[str]) -> None:
    flags = cli.parse_script_flags(argv, {"only": "", "names": "", "json": ""})
    names = flags["names"].split(",") if flags["names"] else []
    recipes = cli.run_recipe(ROOT / "configs" / "tpu.py").RECIPES
    tables = {
        "recipes": [
            Compilation(name, f"configs/tpu.py:{name}", recipe.topology, "rollout,update")
            for name, recipe in recipes.items()
        ],
        "targets": list(TARGETS),
        "prefix": [*prefix_compilations(64), *prefix_compilations(8)],
    }
    document: dict[str, Any] = {}
    for title, compilations in tables.items():
        if flags["only"] not in ("", title):
            continue
        rows: list[list[str]] = []
        for compilation in compilations:
            if names and compilation.name not in names:
                continue
            programs = compile_document(
                compilation.name,
                compilation.config,
                compilation.topology,
                f"--programs={compilation.programs}",
                *compilation.flags,
            )["programs"]
            document[f"{title}/{compilation.name}, {compilation.topology}"] = programs
            for name, program in programs.items():
                rows.append(table_row(compilation, name, program))
                print(rows[-1], file=sys.stderr, flush=True)
        print(ascii_table(Table(title, COLUMNS, rows, "")), flush=True)
    if flags["json"]:
        Path(flags["json"]).write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    cli.run_script(main)

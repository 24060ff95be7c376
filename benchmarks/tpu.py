"""What the recipes and the targets of docs/tpu.md need of a TPU slice, compiled here, where there is none.

python benchmarks/tpu.py [--only=recipes|targets|prefix] [--json=O]

Prints three tables: every recipe of configs/tpu.py; settings whose figures docs/tpu.md quotes; a shared prefix against a repeated
one, which is a supervised step on as many questions as there are completions. About fifteen seconds a program.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from pg_ground import cli
from pg_ground.aot.tpu_specs import CHIPS, GIB, parse_topology
from pg_ground.reporting.tables import Table, ascii_table
from pg_ground.types import UserError

ROOT = Path(__file__).parents[1]

LEAN = '--config.mesh.compiler_options=("xla_tpu_scheduler_percent_shared_memory_limit=30",)'
"""Lets the scheduler overlap less and hold less."""


class Row(NamedTuple):
    """One compilation."""

    name: str
    config: str
    topology: str
    programs: str
    flags: tuple[str, ...] = ()


def paligemma(
    model: str, topology: str, prompts: int, *flags: str, name: str = "", tokens: int = 64
) -> Row:
    """Returns the update of a model of configs/paligemma.py with so many prompts, 8 completions of `tokens` tokens each."""
    sizes = (
        *(
            f"--config.grpo.batch_size={prompts}",
            "--config.grpo.grad_accum_steps=1",
            f"--config.grpo.max_new_tokens={tokens}",
        ),
        *(
            "--config.data.prompt_length=32",
            f"--config.data.suffix_length={tokens}",
            "--config.model.logits_block=2",
        ),
    )
    label = name or f"{model}, {prompts} prompts"
    return Row(label, f"configs/paligemma.py:{model}", topology, "update", (*sizes, *flags))


TARGETS = (
    paligemma("pg1_3b_224_full", "v5e:2x4", 64),
    paligemma("pg1_3b_224_full", "v5e:2x4", 64, LEAN, name="pg1_3b_224_full, 64 prompts, lean"),
    paligemma("pg1_3b_224_full", "v5e:2x4", 256),
    paligemma("pg1_3b_448_full", "v5e:2x4", 128),
    paligemma("pg1_3b_896_full", "v5e:2x4", 32),
    paligemma("pg1_3b_224_full", "v5e:2x2", 64),
    paligemma("pg1_3b_224", "v5e:1x1", 8),
    paligemma("pg2_3b_224_full", "v5e:2x4", 64),
    paligemma("pg2_3b_224_full", "v5e:2x4", 64, LEAN, name="pg2_3b_224_full, 64 prompts, lean"),
    paligemma("pg2_10b_224_full", "v5e:4x4", 32),
    paligemma("pg2_10b_224_full", "v5p:2x2x2", 64),
    paligemma("pg1_3b_224_full", "v5e:16x16", 256, "--config.mesh.replica=4"),
)


def prefix_rows(tokens: int) -> tuple[Row, Row]:
    """Returns a shared prefix and a repeated one for the same 256 completions of `tokens` tokens."""
    shared = paligemma(
        "pg1_3b_224_full", "v5e:2x4", 32, name=f"shared, {tokens} tokens", tokens=tokens
    )
    flags = tuple(flag for flag in shared.flags if "grpo" not in flag)
    supervised = (
        '--config.stages=("sft",)',
        "--config.sft.batch_size=256",
        "--config.sft.grad_accum_steps=1",
    )
    config = "configs/tasks.py:grounding+pg1_3b_224_full"
    return shared, Row(
        f"repeated, {tokens} tokens", config, shared.topology, "sft", (*flags, *supervised)
    )


def compiled(row: Row) -> dict[str, Any]:
    """Returns what `compile --json` says of each program of a row; a row whose figures are not there has a message instead."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "o.json"
        flags = [
            f"--config={row.config}",
            f"--topology={row.topology}",
            *row.flags,
            f"--json={out}",
        ]
        flags += [f"--programs={row.programs}"] if row.programs else []
        done = subprocess.run(
            [sys.executable, "-m", "pg_ground.compile", *flags],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        if not out.exists():
            raise UserError(f"{row.name}: {(done.stderr or done.stdout).strip().splitlines()[-1]}")
        return json.loads(out.read_text())["programs"]


def cells(row: Row, program: str, found: dict[str, Any]) -> list[str]:
    """Returns a line of a table."""
    limit = CHIPS[parse_topology(row.topology)[0]].hbm_bytes
    by_arithmetic, size = found["hbm_bytes_by_arithmetic"], found["hbm_bytes"]
    return [
        row.name,
        row.topology,
        program,
        f"{size / GIB:.2f} of {limit / GIB:.2f}",
        "yes" if size <= limit else "NO",
        f"{by_arithmetic / GIB:.2f} ({by_arithmetic / size - 1:+.0%})",
        f"{found['flops'] / 1e12:.1f}",
        f"{sum(c['bytes'] for c in found['collectives'].values()) / 1e9:.1f}",
        f"{found['step_s']:.3f}",
        found["bound_by"],
        f"{found['mfu']:.0%}",
    ]


HEADS = [
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


def main() -> None:
    own = cli.parse_script_flags(sys.argv[1:], {"only": "", "json": ""})
    recipes = cli.run_recipe(ROOT / "configs" / "tpu.py").RECIPES
    tables = {
        "recipes": [
            Row(name, f"configs/tpu.py:{name}", recipe.topology, "rollout,update")
            for name, recipe in recipes.items()
        ],
        "targets": list(TARGETS),
        "prefix": [row for tokens in (64, 8) for row in prefix_rows(tokens)],
    }
    everything: dict[str, Any] = {}
    for title, rows in tables.items():
        if own["only"] in ("", title):
            lines = []
            for row in rows:
                found = compiled(row)
                everything[f"{title}/{row.name}, {row.topology}"] = found
                lines += [cells(row, program, numbers) for program, numbers in found.items()]
                print(*lines[-len(found) :], sep="\n", file=sys.stderr, flush=True)
            print(ascii_table(Table(title, HEADS, lines, "")), flush=True)
    if own["json"]:
        Path(own["json"]).write_text(json.dumps(everything, indent=1) + "\n")


if __name__ == "__main__":
    main()

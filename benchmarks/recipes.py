"""Compiles the recipes for published datasets for their TPU slices, and adds up their hours.

python benchmarks/recipes.py [--files=refcoco,…] [--names=pg2_3b_448_v5e_8,…] [--json=FOLDER]

Prints one table for each config file: whether the largest program fits, the seconds of a step, the
hours of each stage and the chip-hours. All seconds are at best: no step has been timed. --json
keeps the documents of the compile command in FOLDER, and reads the documents that are there. A
recipe takes about a minute.
"""

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tpu import compile_document

from pg_ground import cli, config
from pg_ground.aot.estimates import estimate_run
from pg_ground.aot.tpu_specs import CHIPS, GIB, H100, device_count, parse_topology
from pg_ground.config import Config
from pg_ground.evals.benchmarks import find_benchmark
from pg_ground.rehearsal.costs import run_costs
from pg_ground.reporting.tables import Table, ascii_table

ROOT = Path(__file__).parents[1]

FILES = ("refcoco", "pixmo_points", "detection", "gui")

COLUMNS = [
    *("recipe", "slice", "prompts", "GiB a chip", "fits"),
    *("SFT s", "sampling s", "update s", "SFT h", "GRPO h", "evaluations h", "chip-hours"),
]


def published_questions(run_config: Config) -> dict[str, int]:
    """Returns the number of held-out questions by source, where it is published."""
    counts = {
        name: find_benchmark(benchmark, "").question_count
        for name, benchmark in run_config.eval.benchmarks.items()
    }
    return {name: count for name, count in counts.items() if count}


def table_row(name: str, topology: str, run_config: Config, document: dict[str, Any]) -> list[str]:
    """Returns the cells of one recipe."""
    programs = document["programs"]
    size = max(program["hbm_bytes"] for program in programs.values())
    chip = CHIPS[parse_topology(topology)[0]] if topology else H100
    limit = chip.hbm_bytes
    devices = device_count(topology) if topology else 1
    costs = run_costs(run_config, devices, document, published_questions(run_config))
    return [
        name,
        topology or "one H100",
        str(run_config.grpo.batch_size),
        f"{size / GIB:.1f} of {limit / GIB:.1f}",
        "yes" if size <= limit else "NO",
        *(f"{programs[key]['step_s']:.2f}" if key in programs else "–" for key in
          ("sft", "rollout", "update")),
        *(f"{costs.hours[part]:.1f}" if part in costs.hours else "–" for part in
          ("sft", "grpo", "evaluations")),
        f"{costs.total_hours * costs.chips:.0f}",
    ]  # fmt: skip


def load_recipe(file: str) -> Any:
    return cli.run_recipe(ROOT / "configs" / f"{file}.py")


def compiled(file: str, name: str, topology: str, folder: Path) -> dict[str, Any]:
    """Returns the document of the compile command, and keeps it in `folder`.

    No topology is one H100, which is not compiled for: arithmetic gives the numbers.
    """
    if not topology:
        return estimate_run(config.parse(load_recipe(file).get_config(name)), H100)
    path = folder / f"{file}.{name}.json"
    if not path.exists():
        document = compile_document(name, f"configs/{file}.py:{name}", topology)
        path.write_text(json.dumps(document, indent=1) + "\n")
    return json.loads(path.read_text())


def main(argv: Sequence[str]) -> None:
    flags = cli.parse_script_flags(argv, {"files": ",".join(FILES), "names": "", "json": ""})
    names = flags["names"].split(",") if flags["names"] else []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(flags["json"] or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for file in flags["files"].split(","):
            recipes = load_recipe(file)
            rows = []
            for name, recipe in recipes.RECIPES.items():
                if not names or name in names:
                    run_config = config.parse(recipes.get_config(name))
                    document = compiled(file, name, recipe.topology, folder)
                    rows.append(table_row(name, recipe.topology, run_config, document))
                    print(rows[-1], file=sys.stderr, flush=True)
            print(ascii_table(Table(f"configs/{file}.py", COLUMNS, rows, "")), flush=True)


if __name__ == "__main__":
    cli.run_script(main)

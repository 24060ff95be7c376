"""python -m pg_ground: the commands there are."""

import ast
from pathlib import Path

COMMANDS = (
    "train",
    "evaluate",
    "report",
    "predict",
    "look",
    "prefetch",
    "pack",
    "convert",
    "compile",
    "bench",
)


def main() -> None:
    """Prints each command with the first paragraph of its module."""
    for name in COMMANDS:
        source = Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8")
        summary = (ast.get_docstring(ast.parse(source)) or "").split("\n\n")[0]
        print(f"python -m pg_ground.{name}\n    {' '.join(summary.split())}")


if __name__ == "__main__":
    main()

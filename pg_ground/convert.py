"""A checkpoint in another format: big_vision's `.npz`, a Hugging Face directory, or an orbax directory.

python -m pg_ground.convert SRC DST [--dtype=bfloat16]

SRC is any checkpoint that `pg_ground.load` reads: an `.npz`, a Hugging Face directory, a run's working directory or one of its
checkpoints (adapters are merged), or an orbax directory. DST says what is written: NAME.npz, NAME.orbax, or else a Hugging Face
directory, which also gets the tokenizer's files where SRC has any. `--dtype` is float32, bfloat16 or float16; without it every
tensor keeps its own. It is written beside DST and moved there when whole.
"""

from collections.abc import Sequence
from pathlib import Path

from pg_ground import cli
from pg_ground.checkpoints.conversion import DTYPES, convert
from pg_ground.types import UserError


def main(argv: Sequence[str]) -> None:
    places, flags = cli.parse_places(argv, {"dtype": ""})
    if len(places) != 2:
        raise UserError(
            f"{len(places)} paths are given, but python -m pg_ground.convert SRC DST takes two"
        )
    if flags["dtype"] not in ("", *DTYPES):
        raise UserError(f"--dtype={flags['dtype']}: it must be one of {', '.join(DTYPES)}")
    source, target = map(Path, places)
    convert(source, target, flags["dtype"])
    print(target)


if __name__ == "__main__":
    cli.run(main)

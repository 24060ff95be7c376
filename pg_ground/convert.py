"""Converts a checkpoint: big_vision .npz, Hugging Face directory, orbax directory.

SRC is a checkpoint that `pg_ground.load` reads: an .npz, a Hugging Face directory, the working
directory of a run, one checkpoint of a run, or an orbax directory. LoRA adapters are merged.

DST selects the format: NAME.npz, NAME.orbax, or else a Hugging Face directory. transformers'
AutoProcessor and AutoModelForImageTextToText load that directory, with the tokenizer of SRC. DST is
written under another name and renamed when it is complete.
"""

from absl import flags

from pg_ground import cli
from pg_ground.assets.hub_download import local_checkpoint
from pg_ground.checkpoints.conversion import DTYPES, convert
from pg_ground.types import UserError, local_path


def define_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string(
        "dtype",
        "",
        f"{', '.join(DTYPES)}. Every tensor keeps its dtype if the flag is absent.",
        flag_values=values,
    )
    cli.define_path(
        values, "tokenizer", "A sentencepiece model for DST, in place of the tokenizer of SRC."
    )


COMMAND = cli.Command(
    name="convert",
    description=__doc__,
    needs="two paths: SRC and DST",
    example="runs/quickstart quickstart.npz --dtype=bfloat16",
    define_flags=define_flags,
    arguments=("SRC", "DST"),
    takes_config=False,
)


def main(args: cli.Arguments) -> None:
    if args.flags.dtype not in ("", *DTYPES):
        raise UserError(f"--dtype={args.flags.dtype}: it must be one of {', '.join(DTYPES)}")
    source, target = args.positional
    source, target = local_checkpoint(source, "SRC"), local_path(target, "DST")
    convert(source, target, args.flags.dtype, args.flags.tokenizer)
    print(target)


if __name__ == "__main__":
    cli.run(COMMAND, main)

"""Converts a checkpoint: big_vision .npz, Hugging Face directory, orbax directory.

SRC is a checkpoint that `pg_ground.load` reads: an .npz, a Hugging Face directory, the working
directory of a run, one checkpoint of a run, or an orbax directory. LoRA adapters are merged.

An .npz does not state the query scale and the soft-caps. If no published model has its sizes, they
come from --sizes=CONFIG.json, or from --query_scale, --attn_softcap and --final_softcap.

DST selects the format: NAME.npz, NAME.orbax, or else a Hugging Face directory. transformers'
AutoProcessor and AutoModelForImageTextToText load that directory, with the tokenizer of SRC. Its
README.md is a model card: the stages of the run, its rewards and its held-out metrics. A reader
never sees a part of DST on this machine: it is renamed when it is complete.

--verify=N compares DST, a Hugging Face directory, with SRC: transformers answers questions about N
drawn images from DST, and each token of each answer must be the token that SRC answers here. If DST
exists already, it is compared and not written. --verify_data=FOLDER adds N images of a folder, and
--verify_data=FILE.py:NAME adds N questions of the held-out sources of a config. transformers is an
extra: pip install 'pg-ground[verify]'.

--push=ORG/NAME also uploads that directory to the Hugging Face Hub.
"""

from pathlib import Path

from absl import flags

from pg_ground import cli
from pg_ground.checkpoints.conversion import DTYPES, convert
from pg_ground.checkpoints.scales import Scales
from pg_ground.config import Config
from pg_ground.evals import verification
from pg_ground.reporting.model_card import model_card
from pg_ground.storage.downloads import checkpoint_path
from pg_ground.storage.paths import FilePath, to_path
from pg_ground.storage.uploads import create_repository, push
from pg_ground.types import UserError


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
    cli.define_path(
        values,
        "sizes",
        "A config.json (of a Hugging Face directory or a run) or a model.json that states what an "
        ".npz does not: query scale and soft-caps.",
    )
    for name, text in (
        ("query_scale", "The factor of queries before the dot product with keys, if SRC is .npz."),
        ("attn_softcap", "The soft-cap of attention, if SRC is .npz; 0 for none."),
        ("final_softcap", "The soft-cap of logits, if SRC is .npz; 0 for none."),
    ):
        flags.DEFINE_float(name, None, text, flag_values=values)
    flags.DEFINE_integer(
        "verify",
        0,
        "Number of images about which transformers must answer from DST as SRC answers here.",
        flag_values=values,
    )
    flags.DEFINE_string(
        "verify_data",
        "",
        "FILE.py:NAME, whose eval.sources ask as many questions more, or a folder of images.",
        flag_values=values,
    )
    flags.DEFINE_string(
        "push", "", "ORG/NAME: uploads DST to the Hugging Face Hub.", flag_values=values
    )
    flags.DEFINE_boolean(
        "private", True, "Whether --push makes a private model.", flag_values=values
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
    source, target = checkpoint_path(source, "SRC"), to_path(target, "DST")
    scales = Scales(*(args.flags[name].value for name in Scales._fields))
    sizes = to_path(args.flags.sizes, "--sizes") if args.flags.sizes else None
    repo = args.flags.push
    if not repo and args.flags["private"].present:
        raise UserError("--private says whether --push makes a private model: --push is absent")
    check_verify(args.flags.verify, target)
    data = verification_data(args.flags.verify_data, args.flags.verify)
    if repo:
        check_push(repo, target)
    is_directory = target.suffix not in (".npz", ".orbax")
    card = model_card(source, repo, args.positional[0], target.name) if is_directory else ""
    if repo:
        create_repository(repo, args.flags.private)
    if not (args.flags.verify and target.exists()):
        convert(source, target, args.flags.dtype, args.flags.tokenizer, card, scales, sizes)
        print(target)
    if args.flags.verify:
        line = verification.verify(
            source, target, args.flags.verify, args.flags.tokenizer, scales, sizes, data
        )
        print(line)
    if repo:
        assert isinstance(target, Path)  # `check_push` says so
        print(push(target, repo, f"{source.name}, exported by pg_ground"))


def check_verify(count: int, target: FilePath) -> None:
    """Raises UserError if --verify is set and cannot be carried out."""
    if count < 0:
        raise UserError(f"--verify={count}: it is a number of images, 0 for none")
    if count and not _is_local_directory(target):
        raise UserError(
            f"--verify={count} compares a Hugging Face directory, but DST is {target}: choose a "
            "folder of this machine"
        )
    if count:
        verification.check_installed()


def verification_data(value: str, count: int) -> Config | FilePath | None:
    """Returns the config or the folder that --verify_data names.

    Raises:
      UserError: it is neither, or --verify is absent.
    """
    if not value:
        return None
    if not count:
        raise UserError(f"--verify_data={value}: --verify=N is absent, the number of questions")
    if value.partition(":")[0].endswith(".py"):
        return cli.parse_config([f"--config={value}"])
    folder = to_path(value, "--verify_data")
    if not folder.is_dir():
        raise UserError(f"--verify_data={value} is no folder, and no FILE.py or FILE.py:NAME")
    return folder


def check_push(repo: str, target: FilePath) -> None:
    """Raises UserError if `target` cannot be uploaded to the Hub."""
    if not _is_local_directory(target):
        raise UserError(
            f"--push={repo} uploads a Hugging Face directory, but DST is {target}: choose a folder "
            "of this machine"
        )
    if target.exists():
        raise UserError(f"{target} exists already: remove it, or choose another name")


def _is_local_directory(target: FilePath) -> bool:
    return isinstance(target, Path) and target.suffix not in (".npz", ".orbax")


if __name__ == "__main__":
    cli.run(COMMAND, main)

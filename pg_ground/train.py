"""Trains PaliGemma: supervised fine-tuning, then GRPO, in one working directory.

The working directory gets config.json, metrics.jsonl, checkpoints/, tb/, samples/ and report.html.
The same command on the same directory continues from the newest checkpoint, bit for bit.

--dry_run trains nothing and writes nothing. It samples one batch from the policy in --workdir, or
from the initial policy, and prints every completion with its rewards.

On a TPU pod, or on several machines, start the same command with --distributed on every host.
"""

from absl import flags

from pg_ground import cli
from pg_ground.parallel import multiprocess, sharding
from pg_ground.reporting.timeline import process_start
from pg_ground.storage.paths import to_path
from pg_ground.training.dry_run import dry_run
from pg_ground.training.loop import train
from pg_ground.types import UserError


def define_flags(values: flags.FlagValues) -> None:
    cli.define_path(values, "workdir", "Working directory of the run. It is made if needed.")
    flags.DEFINE_boolean(
        "dry_run", False, "Show the rewards of one batch, and train nothing.", flag_values=values
    )
    flags.DEFINE_list(
        "accept", [], "Settings that may differ from the run in --workdir.", flag_values=values
    )
    cli.define_distributed(values)


COMMAND = cli.Command(
    name="train",
    description=__doc__,
    needs="--config=FILE and --workdir=DIR (or --dry_run)",
    example="--config=configs/quickstart.py --workdir=runs/quickstart --config.grpo.steps=500",
    define_flags=define_flags,
    required=("config",),
    distributed=True,
    after_interrupt="the same command continues from the newest checkpoint",
)


def main(args: cli.Arguments) -> None:
    workdir = args.flags.workdir
    if args.flags.dry_run and args.flags.distributed:
        raise UserError("--dry_run is for one process: remove --distributed")
    if not workdir and not args.flags.dry_run:
        raise UserError("--workdir=DIR is needed, or --dry_run")
    sharding.set_cpu_devices(args.config.mesh)
    sharding.enable_compilation_cache(args.config.mesh)
    args.start_processes({"--workdir": workdir})
    if args.flags.dry_run:
        print(dry_run(args.config, to_path(workdir, "--workdir") if workdir else None))
    else:
        folder = to_path(workdir, "--workdir")
        report = train(args.config, folder, args.flags.accept, process_start())
        multiprocess.print_once(str(report))


if __name__ == "__main__":
    cli.run(COMMAND, main)

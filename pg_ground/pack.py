"""Packs the records of a config into array_record files, with the images inside.

Pods read these files fast. Each source becomes OUT/NAME-00000-of-00016.array_record and so on. The
records keep their order and their fields. The encoded bytes of the image replace its file name or
its URL. Sources that read the same records share the files.

In a config, the source is then uri="arrayrecord:OUT/NAME@16.array_record", with the same paths, and
gives the same batches. The command prints one JSON object with the new uri and the number of usable
records of each source. A record without a usable image keeps its place as a bad record. It is
counted by the kind of its fault.
"""

import json

from absl import flags

from pg_ground import cli
from pg_ground.data.packing import pack
from pg_ground.data.sources import with_dir
from pg_ground.storage.paths import to_path
from pg_ground.types import UserError


def define_flags(values: flags.FlagValues) -> None:
    cli.define_path(values, "out", "Directory for the files: a path or a gs:// address.", None)
    flags.DEFINE_integer("num_shards", 16, "Files of each source.", flag_values=values)


COMMAND = cli.Command(
    name="pack",
    description=__doc__,
    needs="--config=FILE and --out=DIR",
    example="--config=configs/photos.py --out=packed/photos --num_shards=16",
    define_flags=define_flags,
    required=("config", "out"),
)


def main(args: cli.Arguments) -> None:
    if not 1 <= args.flags.num_shards <= 99_999:
        raise UserError(f"--num_shards={args.flags.num_shards}: it must be from 1 to 99999")
    config = args.config
    sections = [
        {name: with_dir(source, config.data.dir) for name, source in sources.items()}
        for sources in config.sources_by_section.values()
    ]
    directory = to_path(args.flags.out, "--out")
    try:
        packed = pack(sections, config.data.fetch, directory, args.flags.num_shards)
    except ImportError as error:  # etils names the package for the file system
        raise UserError(f"--out={args.flags.out}: {error}") from None
    print(json.dumps(packed, indent=1))


if __name__ == "__main__":
    cli.run(COMMAND, main)

"""The records of every source of a config in array_record files, images within: what a pod streams fast.

python -m pg_ground.pack --config=F --out=DIR [--num_shards=16]

Writes DIR/NAME-00000-of-00016.array_record and so on for each source, with its records as they are, but for the image, whose
encoded bytes take the place of a file name or an address. In the config the source is then
uri="arrayrecord:DIR/NAME@16.array_record", with the same paths. Prints one JSON object: the new uri and the number of records of
each source. A record without a usable image is left out and counted.
"""

import json
from collections.abc import Sequence

from pg_ground import cli
from pg_ground.data.packing import pack
from pg_ground.data.records import to_path
from pg_ground.types import UserError


def main(argv: Sequence[str]) -> None:
    config, flags = cli.parse(argv, {"out": cli.REQUIRED, "num_shards": 16})
    if not 1 <= flags["num_shards"] <= 99_999:
        raise UserError(f"--num_shards={flags['num_shards']}: it must be from 1 to 99999")
    sections = (config.sft.sources, config.grpo.sources, config.eval.sources)
    packed = pack(sections, config.data.fetch, to_path(flags["out"]), flags["num_shards"])
    print(json.dumps(packed, indent=1))


if __name__ == "__main__":
    cli.run(main)

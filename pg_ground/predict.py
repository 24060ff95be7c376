"""One image and one prompt to boxes and points: JSON on stdout, and the picture.

python -m pg_ground.predict --params=P --image=I --prompt="detect red circle" [--out=O.png] [--tokenizer=M] [--max_new_tokens=64]

P is a big_vision .npz, a Hugging Face directory, or a run. M is found in the latter two where they have one. One prompt may ask
for several things: --prompt="detect cat ; dog".
"""

import json
from collections.abc import Sequence
from pathlib import Path

from pg_ground import cli
from pg_ground.evals.prediction import predict_file
from pg_ground.reporting import drawing
from pg_ground.reporting.files import write_atomically
from pg_ground.types import UserError


def main(argv: Sequence[str]) -> None:
    required = cli.REQUIRED
    own = {
        "params": required,
        "image": required,
        "prompt": required,
        "out": "",
        "tokenizer": "",
        "max_new_tokens": 64,
    }
    flags = cli.parse_own(argv, own)
    if flags["max_new_tokens"] < 1:
        raise UserError(f"--max_new_tokens={flags['max_new_tokens']}: it must be above 0")
    found, image = predict_file(
        Path(flags["params"]),
        Path(flags["image"]),
        flags["prompt"],
        flags["tokenizer"],
        flags["max_new_tokens"],
    )
    print(json.dumps(found), flush=True)
    if flags["out"]:
        picture = drawing.draw_answer(
            image, (image.shape[1], image.shape[0]), found["boxes"], found["points"]
        )
        write_atomically(Path(flags["out"]), drawing.png_bytes(picture))


if __name__ == "__main__":
    cli.run(main)

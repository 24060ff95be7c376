"""Answers one prompt about one image, as JSON and as a picture.

--params is a big_vision .npz, a Hugging Face directory, or a run. The tokenizer is read from the
directory or the run if it has one. One prompt may name several things: --prompt="detect cat ; dog".
The JSON on stdout has text, boxes and points, in pixels of the image.
"""

import json

from absl import flags

from pg_ground import cli
from pg_ground.evals.prediction import predict_file
from pg_ground.reporting import drawing
from pg_ground.storage.files import write_atomically
from pg_ground.storage.paths import to_path
from pg_ground.types import UserError


def define_flags(values: flags.FlagValues) -> None:
    cli.define_path(
        values,
        "params",
        "The policy: .npz, Hugging Face directory, ORG/NAME on the Hub, or run.",
        None,
    )
    cli.define_path(values, "image", "The image: a file that PIL reads.", None)
    flags.DEFINE_string("prompt", None, 'The prompt: "detect red circle".', flag_values=values)
    cli.define_path(values, "out", "File for the picture with the answer drawn on it.")
    cli.define_path(values, "tokenizer", "A sentencepiece model, if --params has none.")
    flags.DEFINE_integer("max_new_tokens", 64, "Longest answer.", flag_values=values)


COMMAND = cli.Command(
    name="predict",
    description=__doc__,
    needs="--params=PATH, --image=FILE and --prompt=TEXT",
    example='--params=runs/quickstart --image=a.jpg --prompt="detect circle" --out=out.png',
    define_flags=define_flags,
    required=("params", "image", "prompt"),
    takes_config=False,
)


def main(args: cli.Arguments) -> None:
    if args.flags.max_new_tokens < 1:
        raise UserError(f"--max_new_tokens={args.flags.max_new_tokens}: it must be above 0")
    answer, image = predict_file(
        args.flags.params,
        args.flags.image,
        args.flags.prompt,
        args.flags.tokenizer,
        args.flags.max_new_tokens,
    )
    print(json.dumps(answer), flush=True)
    if args.flags.out:
        size = (image.shape[1], image.shape[0])
        picture = drawing.draw_answer(image, size, answer["boxes"], answer["points"])
        write_atomically(to_path(args.flags.out, "--out"), drawing.png_bytes(picture))


if __name__ == "__main__":
    cli.run(COMMAND, main)

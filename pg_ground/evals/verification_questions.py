"""The questions of `convert --verify`: drawn images, and images of the user."""

from collections.abc import Sequence

from pg_ground.config import Config
from pg_ground.data.datasets import Examples, open_examples
from pg_ground.data.images import load_image
from pg_ground.data.records import BadRecord
from pg_ground.data.synthetic import COLOURS, FORMS, Scenes
from pg_ground.evals.transformers_answers import Question
from pg_ground.storage.paths import FilePath
from pg_ground.types import UserError

PROMPTS = ("detect {0}", "detect {0} ; {1}", "segment {0}", "{0}")

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


def make_questions(
    count: int, image_size: int, data: Config | FilePath | None = None
) -> list[Question]:
    """Returns `count` drawn questions, and up to as many about the user's images.

    Args:
      image_size: pixels of the model's images.
      data: a config, whose held-out sources ask in turn; or a folder of images, which get the
        prompts of drawn scenes.

    Raises:
      UserError: there is no image that can be read.
    """
    drawn = draw_questions(count, image_size)
    if data is None:
        return drawn
    if isinstance(data, Config):
        return drawn + _source_questions(data, count, image_size)
    return drawn + _folder_questions(data, drawn)


def draw_questions(count: int, image_size: int) -> list[Question]:
    """Returns `count` drawn scenes with a prompt each, the same every time.

    Two of three images are not square, and all are larger than the model's images. So a wrong
    resize or crop shows.
    """
    side = _side(image_size)
    scenes = Scenes("heldout", side, colours=len(COLOURS), forms=len(FORMS))
    questions = []
    for i in range(count):
        image = scenes[i]["image"]
        height, width = ((side, side), (side * 3 // 4, side), (side, side * 2 // 3))[i % 3]
        names = (scenes[i]["phrase"], scenes[i + count]["phrase"])
        prompt = PROMPTS[i % len(PROMPTS)].format(*names)
        questions.append(Question(image[:height, :width], prompt))
    return questions


def _side(image_size: int) -> int:
    """Returns a side that is larger than the model's images."""
    return min(image_size * 3 // 2 + 16, 1024)


def _source_questions(config: Config, count: int, image_size: int) -> list[Question]:
    """Returns the first questions of each held-out source, in turn."""
    sources = [
        open_examples(f"eval/{name}", source, config.data, _side(image_size))
        for name, source in config.eval.sources.items()
    ]
    if not sources:
        raise UserError("--verify_data: the config has no eval.sources, which ask the questions")
    longest = max(map(len, sources))
    pairs = ((source, i) for i in range(longest) for source in sources if i < len(source))
    questions: list[Question] = []
    faults: list[BadRecord] = []
    for source, i in pairs:
        if len(questions) == count or len(faults) == 1000:
            break
        try:
            questions.append(_question(source, i))
        except BadRecord as error:
            faults.append(error)
    if not questions:
        raise UserError(f"--verify_data: no record of eval.sources can be read: {faults[0]!s:.200}")
    return questions


def _question(source: Examples, index: int) -> Question:
    example = source[index]
    return Question(example.image, example.prompt)


def _folder_questions(folder: FilePath, drawn: Sequence[Question]) -> list[Question]:
    """Returns the first images of a folder with the prompts of drawn questions."""
    files = sorted(
        path.name for path in folder.iterdir() if path.name.lower().endswith(IMAGE_ENDINGS)
    )
    if not files:
        raise UserError(
            f"--verify_data={folder} has no image: names end in {', '.join(IMAGE_ENDINGS)}"
        )
    try:
        return [
            Question(load_image(name, folder), question.prompt)
            for name, question in zip(files, drawn, strict=False)
        ]
    except BadRecord as error:
        raise UserError(f"--verify_data={folder}: {error}") from None

"""The questions and completions of a batch as text, for text rewards."""

from collections.abc import Sequence

from pg_ground.rewards.text_example import TextExample
from pg_ground.tokenizer import Tokenizer
from pg_ground.types import BOXES, POINTS, Batch, Rollout

TARGET_NAMES = {BOXES: "boxes", POINTS: "points"}


def texts_of(
    batch: Batch, rollout: Rollout, tokenizer: Tokenizer, targets: Sequence[str] = ()
) -> tuple[list[str], list[TextExample]]:
    """Returns every completion of a batch on the host as text, prompt by prompt, and the
    question of each completion.

    Args:
      targets: as in `text_question`.
    """
    completions: list[str] = []
    examples: list[TextExample] = []
    for row in range(len(batch.prompt)):
        question = text_question(batch, row, tokenizer, targets)
        for tokens, mask in zip(rollout.tokens[row], rollout.mask[row], strict=True):
            completions.append(tokenizer.decode(tokens.tolist()))
            examples.append(question._replace(length=int(mask.sum())))
    return completions, examples


def text_question(
    batch: Batch, row: int, tokenizer: Tokenizer, targets: Sequence[str] = ()
) -> TextExample:
    """Returns a question of a batch on the host, as a text reward sees it. Its `length` is 0.

    Args:
      targets: `Source.target` of each source of the stage, in the config's order. Without it, the
        objects of a question that is answered in text are not known.
    """
    width, height = (int(side) for side in batch.size[row])
    gold = batch.gold
    source = int(batch.source[row])
    target = TARGET_NAMES.get(int(gold.target[row]), "text")
    asked = targets[source] if targets else target
    objects = asked if asked != "text" else ""
    names = [tokenizer.decode(ids[ids != 0].tolist()).strip() for ids in gold.names[row]]
    asks_points = objects == "points" or not (objects or gold.boxes.valid[row].any())
    slots = gold.points if asks_points else gold.boxes
    labels = slots.label[row][slots.valid[row]]
    boxes = gold.boxes.yxyx[row][gold.boxes.valid[row]]
    points = gold.points.yx[row][gold.points.valid[row]]
    return TextExample(
        prompt=tokenizer.decode(batch.prompt[row][batch.prompt_mask[row]].tolist()).strip(),
        gold=tokenizer.decode(batch.suffix[row][batch.suffix_mask[row]].tolist()),
        boxes=tuple(
            (float(x1 * width), float(y1 * height), float(x2 * width), float(y2 * height))
            for y1, x1, y2, x2 in boxes
        ),
        points=tuple((float(x * width), float(y * height)) for y, x in points),
        labels=tuple(names[label] if 0 <= label < len(names) else "" for label in labels),
        size=(width, height),
        target=target,
        source=str(source),
        index=int(batch.index[row]),
        length=0,
        objects=objects,
    )

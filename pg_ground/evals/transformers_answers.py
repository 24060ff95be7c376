"""Greedy answers of transformers to questions about images, from a Hugging Face directory.

torch and transformers are an extra, so functions import them. `processor(…)` and `generate(…)` are
called as a user calls them.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from pg_ground.storage.paths import FilePath
from pg_ground.types import UserError


class Question(NamedTuple):
    """An image and a prompt, for example "detect cat"."""

    image: UInt8[np.ndarray, "H W 3"]
    prompt: str


class HubAnswer(NamedTuple):
    """The inputs that a processor made of a question, and the greedy answer."""

    ids: list[int]
    """`input_ids`: image tokens, BOS, prompt, newline."""
    token_types: list[int] | None
    """0 in the prefix; None if the processor returned no `token_type_ids`."""
    pixels: Float[np.ndarray, "h w 3"]
    tokens: list[int]
    """Ends with EOS, unless the answer has the largest length."""
    text: str
    """The text of `tokens` without special tokens."""
    logps: Float[np.ndarray, " T"]
    """Natural log-probability of each token among the tokens of the vocabulary."""
    margins: Float[np.ndarray, " T"]
    """Difference of the two highest logits."""
    seconds: list[int]
    """The token with the second highest logit at each position."""


class HubAnswers(NamedTuple):
    """The answers of a directory, and the ids that its tokenizer gives to special tokens."""

    answers: list[HubAnswer]
    special_ids: list[int]


def greedy_answers(
    folder: FilePath,
    questions: Sequence[Question],
    vocab_size: int,
    max_new_tokens: int,
    special_tokens: Sequence[str],
) -> HubAnswers:
    """Returns the answers of the model in `folder`, computed in float32 on the CPU.

    Args:
      vocab_size: number of tokens without the filler rows. `logps` are among these.
      special_tokens: texts of the tokens for `special_ids`.

    Raises:
      UserError: transformers cannot load the directory, or cannot answer a question.
    """
    import torch
    import transformers

    try:
        processor = transformers.AutoProcessor.from_pretrained(folder)
        model = transformers.AutoModelForImageTextToText.from_pretrained(
            folder, dtype=torch.float32
        ).eval()
        special_ids = processor.tokenizer.convert_tokens_to_ids(list(special_tokens))
        answers = [
            _answer(processor, model, question, vocab_size, max_new_tokens)
            for question in questions
        ]
    except Exception as error:  # transformers raises errors of every kind for a wrong file
        text = " ".join(str(error).split())
        kind = type(error).__name__
        message = f"{folder}: transformers {transformers.__version__} cannot answer from it: "
        raise UserError(f"{message}{kind}: {text:.200}") from None
    return HubAnswers(answers, special_ids)


def _answer(
    processor: Any, model: Any, question: Question, vocab_size: int, max_new_tokens: int
) -> HubAnswer:
    import torch

    image = np.array(question.image)
    inputs = processor(images=image, text=f"<image>{question.prompt}", return_tensors="pt")
    generated = model.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    ids = inputs["input_ids"][0].tolist()
    tokens = generated.sequences[0, len(ids) :]
    logits = torch.stack(generated.logits)[:, 0]
    highest = logits.topk(2)
    logps = logits.gather(1, tokens[:, None])[:, 0] - logits[:, :vocab_size].logsumexp(1)
    types = inputs.get("token_type_ids")
    return HubAnswer(
        ids=ids,
        token_types=None if types is None else types[0].tolist(),
        pixels=inputs["pixel_values"][0].numpy().transpose(1, 2, 0),
        tokens=tokens.tolist(),
        text=processor.decode(tokens, skip_special_tokens=True),
        logps=logps.numpy(),
        margins=(highest.values[:, 0] - highest.values[:, 1]).numpy(),
        seconds=highest.indices[:, 1].tolist(),
    )

"""Compares an exported Hugging Face directory with the checkpoint that it was exported from.

transformers answers questions about images from the directory, through its own processor and
`generate`. This package answers the same questions with the weights of the checkpoint. Both compute
in float32 on the CPU, with the weights rounded to the dtype of the directory. Greedy answers must
then be equal token by token. In bfloat16 many logits would be ties, and rounding would decide.
"""

import gc
import importlib.util
import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from pg_ground.checkpoints import weights
from pg_ground.checkpoints.conversion import written_model
from pg_ground.checkpoints.hugging_face_config import preprocessor_config, read_config_file
from pg_ground.checkpoints.scales import Scales
from pg_ground.config import Config, Model
from pg_ground.data.images import resize
from pg_ground.evals.transformers_answers import HubAnswer, HubAnswers, Question, greedy_answers
from pg_ground.evals.verification_questions import make_questions
from pg_ground.models import PaliGemma
from pg_ground.params import unflatten
from pg_ground.rl.rollout import sample
from pg_ground.storage.downloads import tokenizer_file
from pg_ground.storage.paths import FilePath
from pg_ground.tokenizer import Tokenizer, check_vocab_size
from pg_ground.tokenizer import load as load_tokenizer
from pg_ground.types import Array, Params, Rollout, UserError
from pg_ground.vocab import LOC_TOKENS, SEG_TOKENS

logger = logging.getLogger(__name__)

MAX_NEW_TOKENS = 32

GREY_LEVEL = 1 / 127.5
"""One of 255 grey levels, in pixel values from -1 to 1. Libraries round a resized pixel up or
down."""

TIE = 2e-3
"""Logits of 43 differ by 5e-4 at most between the two libraries in float32. Below this margin,
rounding selects the token."""

LOGP_TOLERANCE = 0.01
"""Largest difference (nats) of a token's log-probability. A soft-cap changes no greedy token, but
it changes log-probabilities."""

FEW_TOKENS = 4

SPECIAL_TOKENS = (
    "<image>",
    *(f"<loc{i:04d}>" for i in range(LOC_TOKENS)),
    *(f"<seg{i:03d}>" for i in range(SEG_TOKENS)),
    "<pad>",
    "<eos>",
    "<bos>",
    "\n",
)


def check_installed() -> None:
    """Raises UserError if torch or transformers is not installed."""
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"--verify needs {' and '.join(missing)}: pip install 'pg-ground[verify]', or leave "
            "out --verify"
        )


class OurAnswer(NamedTuple):
    """The greedy answer of this package to a question."""

    tokens: list[int]
    logps: Float[np.ndarray, " T"]


class Comparison(NamedTuple):
    """One question's answers, compared."""

    equal_tokens: int
    """Number of tokens before the first difference."""
    is_equal: bool
    is_tie: bool
    """True if rounding selects the first token that differs."""
    logp_difference: float
    """Largest difference (nats) among the equal tokens."""


def verify(
    source: FilePath,
    folder: FilePath,
    count: int,
    tokenizer: str = "",
    scales: Scales = Scales(),  # noqa: B008 (it cannot be changed)
    sizes: FilePath | None = None,
    data: Config | FilePath | None = None,
) -> str:
    """Returns one line that says how many answers of transformers equal the answers of `source`.

    Args:
      source: the checkpoint from which `folder` was exported. It can be `folder` itself: swapped
        tensors and wrong settings of `config.json` do not show then.
      folder: a Hugging Face directory.
      count: number of drawn images and prompts.
      tokenizer, scales, sizes: the arguments of `convert`.
      data: a config or a folder of images, about which up to `count` more questions are asked.

    Raises:
      UserError: an answer differs, an input differs, or a file cannot be read. The text has the
        first difference and its likely cause.
    """
    check_installed()
    checkpoint = weights.open_checkpoint(source, keep_final_softcap=True)
    model = replace(written_model(source, folder, checkpoint, scales, sizes), dtype="float32")
    source_tokenizer = _tokenizer(source, tokenizer, model.text.vocab_size)
    questions = make_questions(count, model.image_size, data)
    hub = _hub_answers(folder, model, questions)
    faults = _input_faults(model, source_tokenizer, questions, hub) + _config_faults(folder, model)
    gc.collect()  # the weights of transformers are freed before ours are read
    params = _params(checkpoint, weights.open_checkpoint(folder), faults)
    answers = _our_answers(PaliGemma(model), params, source_tokenizer, questions, hub.answers)
    compared = [_compare(*pair) for pair in zip(hub.answers, answers, strict=True)]
    worst = max(each.logp_difference for each in compared)
    is_wrong = not all(each.is_equal or each.is_tie for each in compared)
    if is_wrong or worst > LOGP_TOLERANCE:
        faults += _tensor_faults(checkpoint, folder)
    if is_wrong:
        raise UserError(
            _difference(folder, source_tokenizer, questions, hub, answers, compared, faults)
        )
    summary = _summary(hub.answers, compared)
    if worst > LOGP_TOLERANCE:
        difference = f"log-probabilities differ by {worst:.2g} nats"
        raise UserError(f"{folder}: {summary}, but {difference}. {_cause(faults)}")
    faults += _text_faults(source_tokenizer, hub.answers)
    if faults:
        raise UserError(f"{folder}: {summary}, but {faults[0]}")
    _warn_of_few_tokens(folder, hub.answers)
    return summary


def _hub_answers(folder: FilePath, model: Model, questions: Sequence[Question]) -> HubAnswers:
    """Returns the answers of transformers.

    Raises:
      UserError: transformers cannot answer. The text has a wrong setting of the directory, if any.
    """
    try:
        return greedy_answers(
            folder, questions, model.text.vocab_size, MAX_NEW_TOKENS, SPECIAL_TOKENS
        )
    except UserError as error:
        faults = _config_faults(folder, model) + _preprocessor_faults(folder, model)
        raise UserError(f"{error}. {_cause(faults)}" if faults else str(error)) from None


def _warn_of_few_tokens(folder: FilePath, answers: Sequence[HubAnswer]) -> None:
    if len({token for answer in answers for token in answer.tokens}) >= FEW_TOKENS:
        return
    logger.warning(
        "%s: these answers have fewer than %d different tokens, so they say little: compare "
        "trained weights, or more questions",
        folder,
        FEW_TOKENS,
    )


def _tokenizer(source: FilePath, tokenizer: str, vocab_size: int) -> Tokenizer:
    """Returns the sentencepiece model that `convert` would write."""
    path = tokenizer or weights.tokenizer_path(source)
    if path is None:
        raise UserError(
            f"{source} has no tokenizer.model, and --verify needs one: --tokenizer=FILE names it"
        )
    loaded = load_tokenizer(tokenizer_file(path, "--tokenizer"))
    check_vocab_size(loaded, vocab_size)
    return loaded


def _params(
    checkpoint: weights.Checkpoint, exported: weights.Checkpoint, faults: Sequence[str]
) -> Params:
    """Returns the parameters of `checkpoint` in float32 on the CPU, rounded as the exported ones
    are.

    Raises:
      UserError: the two checkpoints have other sizes.
    """
    for name, leaf in checkpoint.abstract.items():
        other = exported.abstract.get(name)
        if other is None or other.shape != leaf.shape:
            shape = "no such parameter" if other is None else f"the shape {other.shape}"
            raise UserError(
                f"DST is no export of SRC: {name} has the shape {leaf.shape} in SRC, and DST has "
                f"{shape}" + (f". {_cause(faults)}" if faults else "")
            )
    host = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    rounded = {
        name: jax.ShapeDtypeStruct(leaf.shape, exported.abstract[name].dtype, sharding=host)
        for name, leaf in checkpoint.abstract.items()
    }
    arrays = checkpoint.read(rounded)
    # Each rounded array is freed before the next is cast.
    return unflatten({name: arrays.pop(name).astype(jnp.float32) for name in list(arrays)})


def _our_answers(
    model: PaliGemma,
    params: Params,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    hub: Sequence[HubAnswer],
) -> list[OurAnswer]:
    """Returns the greedy answers of this package.

    Prompts are padded to one length, so one program answers all questions. If a library rounds a
    pixel to the next grey level, both libraries read the pixels of transformers.
    """
    prompts = [tokenizer.prefix(question.prompt) for question in questions]
    length = max(map(len, prompts))
    answers = []
    for question, prompt, answer in zip(questions, prompts, hub, strict=True):
        pixels = _pixels(question, model.config.image_size)
        if _pixel_difference(pixels, answer.pixels) <= 1.01 * GREY_LEVEL:
            pixels = answer.pixels
        ids = np.zeros(length, np.int32)
        ids[: len(prompt)] = prompt
        mask = np.arange(length) < len(prompt)
        rollout = _sample(model, params, pixels[None], ids[None], mask[None])
        is_token = np.asarray(rollout.mask[0, 0])
        tokens = np.asarray(rollout.tokens[0, 0])[is_token].tolist()
        answers.append(OurAnswer(tokens, np.asarray(rollout.logps[0, 0])[is_token]))
    return answers


@partial(jax.jit, static_argnames="model")
def _sample(
    model: PaliGemma,
    params: Params,
    image: Float[Array, "1 h w 3"],
    prompt: Int[Array, "1 L"],
    prompt_mask: Bool[Array, "1 L"],
) -> Rollout:
    # `generate` suppresses no token, so nothing is suppressed here either.
    return sample(
        model,
        params,
        image,
        prompt,
        prompt_mask,
        jax.random.key(0),
        group_size=1,
        max_new_tokens=MAX_NEW_TOKENS,
        temperature=0.0,
        suppress_tokens=(),
    )


def _pixels(question: Question, image_size: int) -> Float[np.ndarray, "h w 3"]:
    return resize(question.image, image_size).astype(np.float32) / 127.5 - 1


def _pixel_difference(
    image: Float[np.ndarray, "h w 3"], other: Float[np.ndarray, "a b 3"]
) -> float:
    """Returns the largest difference of two images, infinite if their sizes differ."""
    return float(np.abs(image - other).max()) if image.shape == other.shape else float("inf")


def _compare(hub: HubAnswer, ours: OurAnswer) -> Comparison:
    """Returns where two answers to one question differ."""
    pairs = list(zip(hub.tokens, ours.tokens, strict=False))
    equal = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
    is_equal = hub.tokens == ours.tokens
    is_tie = equal < len(pairs) and hub.margins[equal] < TIE
    is_tie = bool(is_tie and hub.seconds[equal] == ours.tokens[equal])
    differences = np.abs(hub.logps[:equal] - ours.logps[:equal])
    return Comparison(equal, is_equal, is_tie, float(differences.max(initial=0.0)))


def _summary(hub: Sequence[HubAnswer], compared: Sequence[Comparison]) -> str:
    """Returns the counts of equal answers and tokens, and by how much they are equal."""
    equal = sum(each.is_equal for each in compared)
    tokens = [
        token
        for answer, each in zip(hub, compared, strict=True)
        for token in answer.tokens[: each.equal_tokens]
    ]
    margins = [
        answer.margins[: each.equal_tokens] for answer, each in zip(hub, compared, strict=True)
    ]
    margin = np.concatenate(margins).min(initial=np.inf)
    worst = max(each.logp_difference for each in compared)
    ties = sum(each.is_tie for each in compared)
    text = (
        f"{equal} of {len(compared)} answers equal, {len(tokens)} tokens ({len(set(tokens))} "
        f"different; smallest margin of a token {margin:.2g}, largest difference of a "
        f"log-probability {worst:.1g})"
    )
    return text + (f"; {ties} equal up to a tie, where rounding decides" if ties else "")


def _difference(
    folder: FilePath,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    hub: HubAnswers,
    ours: Sequence[OurAnswer],
    compared: Sequence[Comparison],
    faults: Sequence[str],
) -> str:
    """Returns the first difference with both texts, the position and the likely cause."""
    i = next(i for i, each in enumerate(compared) if not (each.is_equal or each.is_tie))
    position = compared[i].equal_tokens
    pieces = []
    for tokens in (hub.answers[i].tokens, ours[i].tokens):
        is_end = position >= len(tokens)
        pieces.append("the end" if is_end else f"{_piece(tokenizer, tokens[position])!r:.40}")
    equal = sum(each.is_equal or each.is_tie for each in compared)
    return (
        f"{folder}: {equal} of {len(compared)} answers equal. The first difference is token "
        f"{position + 1} of the answer to {questions[i].prompt!r:.60} (question {i + 1}): "
        f"{pieces[0]} in transformers, {pieces[1]} here. Texts: {hub.answers[i].text!r:.70} and "
        f"{tokenizer.decode(ours[i].tokens)!r:.70}. {_cause(faults)}"
    )


def _piece(tokenizer: Tokenizer, token: int) -> str:
    if token >= tokenizer.vocab.size:
        return f"token {token}, which is a filler row"
    return tokenizer.pieces.IdToPiece(token)


def _cause(faults: Sequence[str]) -> str:
    if faults:
        return f"Likely cause: {faults[0]}"
    return (
        "Likely cause: the attention mask or the code of this version of transformers, because "
        "tokenizer, inputs, config.json and tensors are equal"
    )


# Causes. Each function returns sentences, the most basic fault first.


def _input_faults(
    model: Model, tokenizer: Tokenizer, questions: Sequence[Question], hub: HubAnswers
) -> list[str]:
    """Returns what is wrong with the tokenizer and the inputs that the processor makes."""
    faults = _special_token_faults(tokenizer, hub.special_ids)
    for question, answer in zip(questions, hub.answers, strict=True):
        faults += _prompt_faults(model, tokenizer, question, answer)
        faults += _pixel_faults(question, answer, model.image_size)
    return faults


def _special_token_faults(tokenizer: Tokenizer, special_ids: Sequence[int]) -> list[str]:
    vocab = tokenizer.vocab
    expected = [vocab.size, *range(vocab.loc0, vocab.size)]
    expected += [tokenizer.pieces.pad_id(), tokenizer.pieces.eos_id(), tokenizer.pieces.bos_id()]
    expected += [tokenizer.pieces.PieceToId("\n")]
    for text, number, right in zip(SPECIAL_TOKENS, special_ids, expected, strict=True):
        if number != right:
            return [
                f"the tokenizer has {text!r} at id {number}, but the model has it at {right}: "
                "tokenizer.model or tokenizer.json is another one"
            ]
    return []


def _prompt_faults(
    model: Model, tokenizer: Tokenizer, question: Question, answer: HubAnswer
) -> list[str]:
    patches = (model.image_size // model.vision.patch_size) ** 2
    image_id = tokenizer.vocab.size
    images = answer.ids.count(image_id)
    prompt = [token for token in answer.ids if token != image_id]
    expected = tokenizer.prefix(question.prompt)
    faults = []
    if images != patches:
        faults.append(
            f"the processor writes {images} image tokens, but the model has {patches} patches: "
            "image_seq_length of preprocessor_config.json"
        )
    if prompt != expected:
        reason = "tokenizer or processor_class"
        if prompt == expected[:-1]:
            reason = "the newline after the prompt is missing"
        elif prompt == expected[1:]:
            reason = "BOS before the prompt is missing"
        faults.append(
            f"the processor makes the ids {_ids(prompt)} of {question.prompt!r:.40}, but "
            f"training makes {_ids(expected)}: {reason}"
        )
    if answer.token_types is None or any(answer.token_types):
        faults.append(
            "the processor returns no token_type_ids of 0, so the prefix has a causal mask: pass "
            "token_type_ids=zeros_like(input_ids) to generate"
        )
    return faults


def _ids(ids: Sequence[int]) -> str:
    return f"{', '.join(map(str, ids)):.60}"


def _pixel_faults(question: Question, answer: HubAnswer, image_size: int) -> list[str]:
    pixels = _pixels(question, image_size)
    if answer.pixels.shape != pixels.shape:
        height, width = answer.pixels.shape[:2]
        return [
            f"the processor makes images of {height} × {width} pixels, but the model has "
            f"{image_size} × {image_size}: size of preprocessor_config.json"
        ]
    difference = _pixel_difference(pixels, answer.pixels) / GREY_LEVEL
    if difference <= 1.01:
        return []
    return [
        f"the processor's pixels differ from ours by up to {difference:.3g} grey levels: "
        "image_mean, image_std, rescale_factor, resample or a crop in preprocessor_config.json"
    ]


def _config_faults(folder: FilePath, model: Model) -> list[str]:
    """Returns settings of `config.json` that differ from the model's."""
    try:
        hub = read_config_file(folder / "config.json")
    except UserError as error:
        return [str(error)]
    text = model.text
    pairs = {
        "vision_config.num_attention_heads": (hub.vision_heads, model.vision.num_heads),
        "num_attention_heads": (hub.heads, text.num_heads),
        "num_key_value_heads": (hub.kv_heads, text.num_kv_heads),
        "query scale (query_pre_attn_scalar)": (hub.query_scale, text.attention_scale),
        "attn_logit_softcapping": (hub.attn_softcap, text.attn_softcap),
        "final_logit_softcapping": (hub.final_softcap, text.final_softcap),
        "image_token_index": (hub.vocab_size, text.vocab_size),
    }
    faults = [
        f"config.json states {name} {value:.6g}, but the model has {right:.6g}"
        for name, (value, right) in pairs.items()
        if value is not None and abs(value - right) > 1e-6 * abs(right)
    ]
    return faults + _window_faults(folder, model)


def _window_faults(folder: FilePath, model: Model) -> list[str]:
    """Returns a sentence if a sliding window is shorter than prefix and answer.

    A Gemma 2 without `layer_types` has a window in every second layer.
    """
    text = json.loads((folder / "config.json").read_text(encoding="utf-8"))["text_config"]
    if text.get("model_type") != "gemma2":
        return []
    window = text.get("sliding_window", 4096)
    patches = (model.image_size // model.vision.patch_size) ** 2
    is_sliding = "sliding_attention" in text.get("layer_types", ["sliding_attention"])
    if not is_sliding or window is None or window > patches + MAX_NEW_TOKENS:
        return []
    return [
        f"config.json states a sliding_window of {window} tokens, but PaliGemma 2 has full "
        f"attention over {patches} patches, prompt and answer: layer_types"
    ]


def _preprocessor_faults(folder: FilePath, model: Model) -> list[str]:
    """Returns settings of `preprocessor_config.json` that `convert` writes otherwise."""
    path = folder / "preprocessor_config.json"
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return [f"{path.name} cannot be read: {error!s:.100}"]
    return [
        f"{path.name} states {name} {settings.get(name)!r:.60}, but the model needs {value!r:.60}"
        for name, value in preprocessor_config(model).items()
        if settings.get(name) != value
    ]


def _tensor_faults(checkpoint: weights.Checkpoint, folder: FilePath) -> list[str]:
    """Returns a sentence with the parameters whose values differ between checkpoint and folder."""
    exported = weights.open_checkpoint(folder)
    dtypes = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        for name, leaf in exported.abstract.items()
    }
    expected, stored = checkpoint.read(dtypes), exported.read(dtypes)
    names = [name for name in expected if not np.array_equal(expected[name], stored[name])]
    if not names:
        return []
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return [f"the tensors of {', '.join(names[:3])}{more} differ from the checkpoint's"]


def _text_faults(tokenizer: Tokenizer, answers: Sequence[HubAnswer]) -> list[str]:
    """Returns a sentence if transformers decodes equal tokens to another text."""
    for answer in answers:
        text = tokenizer.decode(answer.tokens)
        if answer.text != text:
            return [
                f"the processor decodes equal tokens as {answer.text!r:.70}, but they are "
                f"{text!r:.70}: the tokenizer's special tokens, which skip_special_tokens removes"
            ]
    return []

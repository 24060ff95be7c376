"""The compiled functions of an evaluation: they answer, score, reward and decode masks."""

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import jax
from jax.stages import Wrapped
from jaxtyping import Bool, Float, PRNGKeyArray

from pg_ground import config
from pg_ground.checkpoints import vqvae_file
from pg_ground.models import PaliGemma, vqvae
from pg_ground.rewards import answer_reader, device_rewards
from pg_ground.rewards.answer_reader import DecodeMasks
from pg_ground.rewards.reward_functions import load_device_rewards, weighted_rewards
from pg_ground.rl.rollout import sample
from pg_ground.storage.paths import FilePath, to_path
from pg_ground.types import Answer, Array, Batch, Params, Rewards, Rollout
from pg_ground.vocab import Vocab


class Completions(NamedTuple):
    """G completions of each of B prompts, and what was read from their token ids."""

    rollout: Rollout
    malformed: Bool[Array, "B G"]
    """True if the completion is not an answer of the kind that the question asks for."""
    unfinished: Bool[Array, "B G"]
    """True if the completion does not end in EOS."""
    confidence: Float[Array, "B G K"]
    """Confidence in [0, 1] of each box, in the order in which the completion writes its boxes."""


class EvalPrograms(NamedTuple):
    """The compiled functions of an evaluation."""

    answer: Wrapped
    """(params, batch, temperature, key, group_size=1) → `Completions`. Temperature 0 is greedy."""
    suffix_nll: Wrapped
    """(params, batch) → minus the log-probability (nats) of each ground-truth suffix, f32[B]."""
    reward: Wrapped
    """(batch with one question, its rollout, scores f32[1,G] of text rewards by name) → `Rewards`
    f32[1,G]."""
    decode_masks: Wrapped | None
    """Mask codes i32[N,16] → mask logits f32[N,64,64]. None if `eval.vqvae` is not set."""


def make_eval_programs(
    model: PaliGemma,
    vocab: Vocab,
    settings: config.Eval,
    grpo: config.Grpo,
) -> EvalPrograms:
    """Returns the programs of an evaluation. Each program compiles on its first call.

    Args:
      grpo: the benchmark `environment` reports its rewards and their weighted sum.
    """
    decode_masks = (
        make_mask_decoder(to_path(settings.vqvae, "config.eval.vqvae")) if settings.vqvae else None
    )
    return EvalPrograms(
        _make_answer(model, vocab, settings.max_new_tokens),
        _make_suffix_nll(model),
        _make_reward(vocab, grpo, decode_masks),
        decode_masks,
    )


def _make_answer(model: PaliGemma, vocab: Vocab, max_new_tokens: int) -> Wrapped:
    def answer(
        params: Params,
        batch: Batch,
        temperature: Float[Array, ""],
        key: PRNGKeyArray,
        group_size: int = 1,
    ) -> Completions:
        inputs = (batch.image, batch.prompt, batch.prompt_mask)
        rollout = sample(model, params, *inputs, key, group_size, max_new_tokens, temperature)
        parsed = _parse(rollout, batch, vocab)
        confidence = answer_reader.confidence(rollout.tokens, rollout.mask, rollout.logps, vocab)
        return Completions(rollout, ~parsed.grammatical, ~parsed.finished, confidence)

    return jax.jit(answer, static_argnames="group_size")


def _make_suffix_nll(model: PaliGemma) -> Wrapped:
    def suffix_nll(params: Params, batch: Batch) -> Float[Array, " B"]:
        prompt = (batch.image, batch.prompt, batch.prompt_mask)
        suffix = (batch.suffix[:, None], batch.suffix_mask[:, None])
        return -model.completion_logps(params, *prompt, *suffix)[0].sum(axis=(1, 2))

    return jax.jit(suffix_nll)


def _make_reward(vocab: Vocab, grpo: config.Grpo, decode_masks: DecodeMasks | None) -> Wrapped:
    weights = {name: _final_weight(weight) for name, weight in grpo.all_rewards.items()}

    def reward(batch: Batch, rollout: Rollout, text_scores: Mapping[str, Array]) -> Rewards:
        # Rewards are loaded here, because other benchmarks need none.
        functions = load_device_rewards(grpo)
        parsed = _parse(rollout, batch, vocab, decode_masks)
        settings, weighted = grpo.reward_settings, weighted_rewards(grpo)
        return device_rewards.score(
            parsed, batch, weights, settings, functions, text_scores, weighted
        )

    return jax.jit(reward)


def _parse(
    rollout: Rollout, batch: Batch, vocab: Vocab, decode_masks: DecodeMasks | None = None
) -> Answer:
    gold = batch.gold
    return answer_reader.read_answer(
        rollout.tokens,
        rollout.mask,
        gold.target,
        gold.names,
        vocab,
        decode_masks,
        gold.masks.shape[-1],
    )


def make_mask_decoder(path: FilePath) -> Wrapped:
    """Returns the compiled decoder of mask codes, with the VQ-VAE weights of `path`."""
    return jax.jit(partial(vqvae.decode, vqvae_file.load(path)))


def _final_weight(weight: config.Weight) -> float:
    """Returns the weight of a reward after its schedule has ended."""
    return weight[1] if isinstance(weight, tuple) else weight

"""The rollout worker generates completions on the devices.

It scores them on the devices and in the worker processes of text rewards.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from pg_ground.config import Grpo
from pg_ground.parallel import sharding
from pg_ground.reporting import progress
from pg_ground.rewards import answer_reader, device_rewards
from pg_ground.rewards.answer_reader import DecodeMasks
from pg_ground.rewards.reward_functions import load_device_rewards, weighted_rewards
from pg_ground.rewards.text_questions import texts_of
from pg_ground.rewards.workers import PendingScores, RewardWorkers
from pg_ground.rl import scored_rollouts
from pg_ground.rl.scored_rollouts import ScoredRollouts
from pg_ground.rl.update import split, unsplit
from pg_ground.tokenizer import Tokenizer
from pg_ground.training.timing import StepTimer
from pg_ground.types import Array, Batch, JsonDict, Params, Rollout

FRESH_GROUPS_KEY = 2**20
PARTS_KEY = 2**20 + 1
UPDATE_KEY = 2**20 + 2
"""Numbers to fold into a step's key: for fresh groups, for parts of a batch and for the update.

The key of token t is folded with t, so these numbers are larger than any t.
"""


class Generated(NamedTuple):
    """Completions of a batch before they are scored."""

    batch: Batch
    rollout: Rollout
    batch_parts: list[Batch]
    rollout_parts: list[Rollout]
    """The parts of `batch` and `rollout`, in the order in which the devices compute them."""


class RolloutWorker:
    """Generates and scores `group_size` completions of each prompt.

    Each program is compiled once.
    """

    def __init__(
        self,
        settings: Grpo,
        mesh: Mesh,
        generate: Callable[..., Rollout],
        frozen: Params,
        tokenizer: Tokenizer,
        reward_workers: RewardWorkers,
        has_greedy: bool,
        decode_masks: DecodeMasks | None = None,
    ):
        """Args:
        generate: the jitted rollout program, `(params, frozen, batch, key) → Rollout`.
        frozen: the frozen parameters as sampling reads them.
        has_greedy: whether the last completion of each group is greedy and gives the baseline.
        decode_masks: decodes the codes of masks for rewards; None reads no masks.
        """
        self._settings = settings
        self._mesh = mesh
        self._generate = generate
        self._frozen = frozen
        self._tokenizer = tokenizer
        self._reward_workers = reward_workers
        self._targets = [source.target for source in settings.sources.values()]
        self._score = jax.jit(make_score(settings, tokenizer, has_greedy, decode_masks))
        self._refill = jax.jit(scored_rollouts.refill)
        self._count_without_spread = jax.jit(
            lambda scored: (~scored_rollouts.has_spread(scored)).sum()
        )
        parts = settings.rollout_parts
        self._select_part = jax.jit(
            lambda batch, i: jax.tree.map(lambda leaf: leaf[i], split(batch, parts)),
            out_shardings=sharding.batch_sharding(mesh),
        )
        self._join_parts = jax.jit(
            lambda rollouts: jax.tree.map(lambda *rows: unsplit(jnp.stack(rows)), *rollouts)
        )

    def reward_errors(self) -> dict[str, int]:
        """Returns the number of errors of each text reward so far."""
        return self._reward_workers.errors()

    def reward_state(self) -> JsonDict:
        """Returns the counts of the text rewards, for a checkpoint."""
        return self._reward_workers.get_state()

    def generate(self, params: Params, batch: Batch, key: jax.Array, timer: StepTimer) -> Generated:
        """Dispatches the completions of a batch."""
        with progress.phase("rollout"):
            return self._generate_parts(params, batch, key, timer)

    def _generate_parts(
        self, params: Params, batch: Batch, key: jax.Array, timer: StepTimer
    ) -> Generated:
        count = self._settings.rollout_parts
        if count == 1:
            rollout = self._generate(params, self._frozen, batch, key)
            return Generated(batch, timer.lap("rollout", rollout), [batch], [rollout])
        batches = [self._select_part(batch, i) for i in range(count)]
        parts_key = jax.random.fold_in(key, PARTS_KEY)
        rollouts = [
            self._generate(params, self._frozen, part, jax.random.fold_in(parts_key, i))
            for i, part in enumerate(batches)
        ]
        rollout = timer.lap("rollout", self._join_parts(tuple(rollouts)))
        return Generated(batch, rollout, batches, rollouts)

    def score(
        self, generated: Generated, weights: Mapping[str, float], timer: StepTimer
    ) -> ScoredRollouts:
        """Returns the completions with their rewards.

        The workers score the text of the first part while the devices generate the second one.

        Args:
          weights: weight of each reward at this step.

        Raises:
          UserError: a text reward failed on more completions than `reward_workers.error_share`
            allows.
        """
        with progress.phase("score"):
            text_scores = self._text_scores(generated)
            traced_weights = {name: jnp.float32(weight) for name, weight in weights.items()}
            scored = self._score(generated.rollout, generated.batch, text_scores, traced_weights)
            self._reward_workers.check()
            return timer.lap("score", scored)

    def _text_scores(self, generated: Generated) -> Mapping[str, Array]:
        """Returns the scores of all text rewards as global arrays f32[B, G]."""
        if not self._reward_workers.names:
            return {}
        pending = [
            self._submit(batch, rollout)
            for batch, rollout in zip(generated.batch_parts, generated.rollout_parts, strict=True)
        ]
        results = [part.result().scores for part in pending]
        shape = (len(pending), -1, generated.rollout.tokens.shape[1])
        local_scores = {
            name: unsplit(np.stack([scores[name] for scores in results]).reshape(shape))
            for name in self._reward_workers.names
        }
        return sharding.put_batch(self._mesh, local_scores)

    def _submit(self, batch: Batch, rollout: Rollout) -> PendingScores:
        """Waits for the rows of this process and sends their texts to the workers."""
        local_batch, local_rollout = sharding.fetch_local_rows(self._mesh, (batch, rollout))
        completions, examples = texts_of(local_batch, local_rollout, self._tokenizer, self._targets)
        return self._reward_workers.submit(completions, examples)

    def refill(
        self,
        scored: ScoredRollouts,
        fresh_groups: Callable[[jax.Array], ScoredRollouts],
        key: jax.Array,
        timer: StepTimer,
    ) -> tuple[ScoredRollouts, dict[str, float]]:
        """Returns rollouts whose groups without spread are replaced by fresh groups (DAPO's dynamic
        sampling), and metrics.

        Metrics: the share of groups that had no spread at first, and the number of replaced groups.
        Both are absent if `dynamic_sampling` is 0.

        Args:
          fresh_groups: generates and scores the next batch with a key.
        """
        if not self._settings.dynamic_sampling:
            return scored, {}
        first_count = count = int(self._count_without_spread(scored))
        fresh_key = jax.random.fold_in(key, FRESH_GROUPS_KEY)
        for attempt in range(1, self._settings.dynamic_sampling + 1):
            if not count:
                break
            fresh = fresh_groups(jax.random.fold_in(fresh_key, attempt))
            scored = timer.lap("score", self._refill(scored, fresh))
            count = int(self._count_without_spread(scored))
        groups = len(scored.batch.prompt)
        return scored, {
            "group/without_spread": first_count / groups,
            "group/resampled": float(first_count - count),
        }


def make_score(
    settings: Grpo,
    tokenizer: Tokenizer,
    has_greedy: bool,
    decode_masks: DecodeMasks | None = None,
) -> Callable[..., ScoredRollouts]:
    """Returns the pure function `(rollout, batch, text_scores, weights) → ScoredRollouts`."""
    rewards = load_device_rewards(settings)
    weighted = weighted_rewards(settings)

    @jax.named_scope("score")
    def score(
        rollout: Rollout,
        batch: Batch,
        text_scores: Mapping[str, Array],
        weights: Mapping[str, Array],
    ) -> ScoredRollouts:
        gold = batch.gold
        answer = answer_reader.read_answer(
            rollout.tokens,
            rollout.mask,
            gold.target,
            gold.names,
            tokenizer.vocab,
            decode_masks,
            gold.masks.shape[-1],
        )
        scores = device_rewards.score(
            answer, batch, weights, settings.reward_settings, rewards, text_scores, weighted
        )
        if has_greedy:
            return scored_rollouts.split_off_greedy(rollout, answer, scores, batch)
        return ScoredRollouts(batch, rollout, answer, scores, None)

    return score

"""The first half of a reinforced step: groups of completions, drawn by the devices and judged there and by workers for text."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from pg_ground.config import Config, Grpo, RewardSettings
from pg_ground.models import PaliGemma
from pg_ground.parallel import sharding
from pg_ground.rewards import device_rewards
from pg_ground.rewards.text_rewards import TEXT_REWARDS, TextExample
from pg_ground.rewards.workers import Pending, RewardWorkers, load_reward
from pg_ground.rl import scored_rollouts, update
from pg_ground.rl.scored_rollouts import ScoredRollouts
from pg_ground.tokenizer import Tokenizer
from pg_ground.training import programs
from pg_ground.training.recorder import Stopwatch
from pg_ground.types import BOXES, POINTS, Answer, Batch, Rollout, UserError

AGAIN, PARTS, LOTS = 2**20, 2**20 + 1, 2**20 + 2
"""What a step's key is folded with for fresh groups, parts of a batch and the lots of an update: no token's number."""

TARGET_NAMES = {BOXES: "boxes", POINTS: "points"}


def make_reward_workers(c: Grpo) -> RewardWorkers:
    """Returns the workers for the rewards of text that `c` names; none are started yet.

    Raises:
      UserError: a reward that does not exist or cannot be loaded.
    """
    users = [name for name in c.rewards if ".py:" in name and load_reward(name).kind == "text"]
    return RewardWorkers(
        {name: name for name in (*c.text_rewards, *users)}, TEXT_REWARDS, c.reward_workers
    )


def load_device_rewards(c: Grpo) -> dict[str, device_rewards.Reward]:
    """Returns the rewards on token ids that `c` names: the package's own, and those of a user's files.

    Raises:
      UserError: one of them does not exist or cannot be loaded, is a reward of text too, or none of all rewards has a weight.
    """
    twice = sorted(set(c.rewards) & set(c.text_rewards))
    if twice:
        raise UserError(
            f"{twice[0]} is in config.grpo.rewards and in text_rewards: name it in one of them"
        )
    found = {}
    for name in c.rewards:
        if ".py:" in name:
            given = load_reward(name)
            if given.kind == "device":
                found[name] = _guarded(name, given.function)
        else:
            found[name] = device_rewards.by_name(name)
    if not weighted(c):
        raise UserError(
            f"config.grpo.rewards and text_rewards are {c.all_rewards}: at least one needs a weight other than 0"
        )
    return found


def _guarded(name: str, function: Callable[..., Any]) -> device_rewards.Reward:
    """Returns a user's reward whose faults are those of its file; what is not finite does not apply."""

    def reward(answer: Answer, batch: Batch, settings: RewardSettings) -> jax.Array:
        try:
            found = jnp.asarray(function(answer, batch, settings), jnp.float32)
        except (
            Exception
        ) as error:  # the file is a program of the user's: whatever it raises is theirs to read
            raise UserError(f"the reward {name} failed: {type(error).__name__}: {error}") from error
        if found.shape != answer.finished.shape:
            raise UserError(
                f"the reward {name} has shape {list(found.shape)}: it must be [B, G], {list(answer.finished.shape)}"
            )
        return jnp.where(jnp.isfinite(found), found, jnp.nan)

    return reward


def weighted(c: Grpo) -> frozenset[str]:
    """Returns the rewards that have a weight at some step, and so a say in what is learned."""
    return frozenset(
        name for name, w in c.all_rewards.items() if (any(w[:2]) if isinstance(w, tuple) else w)
    )


class RolloutWorker:
    """Draws `group_size` completions of each prompt and judges them. Programs are compiled once, whatever is asked of them."""

    def __init__(
        self,
        config: Config,
        model: PaliGemma,
        mesh: Mesh,
        frozen: Any,
        tokenizer: Tokenizer,
        workers: RewardWorkers,
    ):
        c = config.grpo
        self._c, self._mesh, self._frozen, self._tokenizer, self._workers = (
            c,
            mesh,
            frozen,
            tokenizer,
            workers,
        )
        counted, named, greedy = (
            weighted(c),
            load_device_rewards(c),
            len(programs.temperatures(c)) > c.group_size,
        )

        def judge(
            rollout: Rollout,
            batch: Batch,
            told: dict[str, jax.Array],
            weights: dict[str, jax.Array],
        ) -> ScoredRollouts:
            gold = batch.gold
            answer = device_rewards.read_answer(
                rollout.tokens, rollout.mask, gold.target, gold.names, tokenizer.vocab
            )
            judged = device_rewards.score(
                answer, batch, weights, c.reward_settings, named, told, counted
            )
            if greedy:
                return scored_rollouts.split_off_greedy(rollout, answer, judged, batch)
            return ScoredRollouts(batch, rollout, answer, judged, None)

        def put_together(parts: tuple[Any, ...]) -> Any:
            return jax.tree.map(lambda *rows: update.unsplit(jnp.stack(rows)), *parts)

        def part(batch: Batch, i: int) -> Batch:
            return jax.tree.map(lambda leaf: leaf[i], update.split(batch, c.rollout_parts))

        self._roll = programs.compiled(programs.rollout(config, model), config, mesh)
        self._judge, self._refill = jax.jit(judge), jax.jit(scored_rollouts.refill)
        self._lacking = jax.jit(lambda sampled: (~scored_rollouts.has_spread(sampled)).sum())
        self._part = jax.jit(part, out_shardings=sharding.batch_sharding(mesh))
        self._put_together = jax.jit(put_together)

    def __call__(
        self,
        params: Any,
        next_batch: Callable[[], Batch],
        key: jax.Array,
        weights: Mapping[str, float],
        watch: Stopwatch,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> tuple[ScoredRollouts, dict[str, float]]:
        """Returns judged groups; with `dynamic_sampling`, the share of them that lacked spread at first, and how many were replaced.

        Args:
          weights: of the rewards at this step.
          meanwhile: called while the devices sample.
        """
        sampled = self.once(params, watch.lap("data", next_batch()), key, weights, watch, meanwhile)
        if not self._c.dynamic_sampling:
            return sampled, {}
        first = lacking = int(self._lacking(sampled))
        for again in range(1, self._c.dynamic_sampling + 1):
            if not lacking:
                break
            batch, own_key = (
                watch.lap("data", next_batch()),
                jax.random.fold_in(jax.random.fold_in(key, AGAIN), again),
            )
            fresh = self.once(params, batch, own_key, weights, watch, meanwhile)
            sampled = watch.lap("score", self._refill(sampled, fresh))
            lacking = int(self._lacking(sampled))
        return sampled, {
            "group/without_spread": first / len(sampled.batch.prompt),
            "group/resampled": float(first - lacking),
        }

    def once(
        self,
        params: Any,
        batch: Batch,
        key: jax.Array,
        weights: Mapping[str, float],
        watch: Stopwatch,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> ScoredRollouts:
        """Returns judged groups for the prompts of one batch, whatever their spread.

        Raises:
          UserError: a reward of text failed on more completions than it may.
        """
        count = self._c.rollout_parts
        if count == 1:
            parts, keys = [batch], [key]
        else:
            parts = [self._part(batch, i) for i in range(count)]
            keys = [jax.random.fold_in(jax.random.fold_in(key, PARTS), i) for i in range(count)]
        rollouts = [
            self._roll(params, self._frozen, part, own)
            for part, own in zip(parts, keys, strict=True)
        ]
        rollout = watch.lap(
            "rollout", rollouts[0] if count == 1 else self._put_together(tuple(rollouts))
        )
        meanwhile()
        told = self._told(
            parts, rollouts
        )  # the first part is judged while the devices sample the second
        scores = {
            name: np.stack([part.result().scores[name] for part in told])
            for name in self._workers.names
        }
        shape = (count, -1, rollout.tokens.shape[1])
        mine = {name: update.unsplit(values.reshape(shape)) for name, values in scores.items()}
        texts = sharding.put_batch(self._mesh, mine)
        judged = self._judge(
            rollout, batch, texts, {name: jnp.float32(weight) for name, weight in weights.items()}
        )
        self._workers.check()
        return watch.lap("score", judged)

    def _told(self, parts: list[Batch], rollouts: list[Rollout]) -> list[Pending]:
        """Returns what the judges of text will say about each part's rows on this process, handed over when they are there."""
        if not self._workers.names:
            return []
        return [
            self._workers.submit(*texts_of(batch, rollout, self._tokenizer))
            for batch, rollout in (
                sharding.fetch_local_rows(self._mesh, both)
                for both in zip(parts, rollouts, strict=True)
            )
        ]


def texts_of(
    batch: Batch, rollout: Rollout, tokenizer: Tokenizer
) -> tuple[list[str], list[TextExample]]:
    """Returns every completion as text, prompt by prompt, and beside each the question it answers."""
    completions, examples = [], []
    for row in range(len(batch.prompt)):
        question = question_of(batch, row, tokenizer)
        for tokens, mask in zip(rollout.tokens[row], rollout.mask[row], strict=True):
            completions.append(tokenizer.decode(tokens.tolist()))
            examples.append(question._replace(length=int(mask.sum())))
    return completions, examples


def question_of(batch: Batch, row: int, tokenizer: Tokenizer) -> TextExample:
    """Returns a question of a batch (on the host) as a text reward sees it, with length 0."""
    width, height = (int(side) for side in batch.size[row])
    gold = batch.gold
    names = [tokenizer.decode(ids[ids != 0].tolist()).strip() for ids in gold.names[row]]
    target = TARGET_NAMES.get(int(gold.target[row]), "text")
    boxes, points = gold.boxes, gold.points
    labels = (
        points.label[row][points.valid[row]]
        if target == "points"
        else boxes.label[row][boxes.valid[row]]
    )
    return TextExample(
        prompt=tokenizer.decode(batch.prompt[row][batch.prompt_mask[row]].tolist()).strip(),
        gold=tokenizer.decode(batch.suffix[row][batch.suffix_mask[row]].tolist()),
        boxes=tuple((float(x1 * width), float(y1 * height), float(x2 * width), float(y2 * height))
                    for y1, x1, y2, x2 in boxes.yxyx[row][boxes.valid[row]]),
        points=tuple((float(x * width), float(y * height)) for y, x in points.yx[row][points.valid[row]]),
        labels=tuple(names[label] if 0 <= label < len(names) else "" for label in labels),
        size=(width, height),
        target=target,
        source=str(int(batch.source[row])),
        index=int(batch.index[row]),
        length=0,
    )  # fmt: skip

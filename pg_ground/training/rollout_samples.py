"""Pictures of rollouts: the first prompts of a step with gold and sampled answers."""

from collections.abc import Sequence
from typing import Any

from jax.sharding import Mesh

from pg_ground.parallel import sharding
from pg_ground.reporting import rollout_pictures
from pg_ground.rl.scored_rollouts import ScoredRollouts
from pg_ground.tokenizer import Tokenizer
from pg_ground.training.stage import RolloutSamples
from pg_ground.types import Array, JsonDict


def draw_samples(
    scored: ScoredRollouts,
    advantages: Array,
    mesh: Mesh,
    tokenizer: Tokenizer,
    sources: Sequence[str],
    count: int,
) -> RolloutSamples:
    """Returns the first `count` prompts of this process's rows, drawn and as records."""
    local, local_advantages = sharding.fetch_local_rows(mesh, (scored, advantages))
    batch = local.batch
    panels: list[Any] = []
    records: list[JsonDict] = []
    for row in range(min(count, len(batch.prompt))):
        prompt = tokenizer.decode(batch.prompt[row][batch.prompt_mask[row]].tolist()).strip()
        texts = [tokenizer.decode(tokens.tolist()) for tokens in local.rollout.tokens[row]]
        gold = tokenizer.decode(batch.suffix[row].tolist())
        names = [tokenizer.decode(ids.tolist()).strip() for ids in batch.gold.names[row]]
        panel = rollout_pictures.draw_rollout(
            batch, local.answer, local.rewards, row, prompt, texts, gold=gold
        )
        panels.append(panel)
        record = rollout_pictures.rollout_record(
            batch, local.answer, local.rewards, local_advantages.mean(axis=-1), row, prompt, texts,
            gold, names,
        )  # fmt: skip
        source = {"source": sources[int(batch.source[row])], "index": int(batch.index[row])}
        records.append(source | record)
    return RolloutSamples(rollout_pictures.sheet(panels), records)

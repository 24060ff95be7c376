"""The quickstart with another algorithm.

python -m pg_ground.train --config=configs/algorithms.py:dapo --workdir=runs/dapo

The argument names a row of `pg_ground.rl.algorithms.ALGORITHMS`. A row chooses the advantage, the
ratio, the objective, the aggregation of the loss and the KL estimator, and cites its paper. A new
row works here at once. A flag replaces a choice or an option of the row:
`--config.grpo.loss_agg_mode=token_mean --config.grpo.clip_high=0.28`.

`BESIDE` below has the settings that a paper uses outside of its loss.

Hardware, time and results are those of the quickstart. `benchmarks/algorithms.py` runs ten rows
side by side.
"""

from ml_collections import ConfigDict

from . import quickstart

BESIDE = {
    # Dynamic sampling. A truncated completion leaves the loss and has a negative reward.
    "dapo": {
        "dynamic_sampling": 3,
        "mask_truncated_completions": True,
        "max_new_tokens": 12,
        "rewards": {"overlong": 0.5},
    },
    # The KL to the reference policy is subtracted from the reward.
    "rloo": {"kl_coef": 0.01},
    "remax": {"kl_coef": 0.01},
    "reinforce_plus_plus": {"kl_coef": 0.001},
    # The ratio is exactly 1 in the first update on a rollout. Clips and kl_cov act from the second.
    "gspo": {"minibatches": 2},
    "luspo": {"minibatches": 2},
    "kl_cov": {"minibatches": 2},
    "clip_cov": {"minibatches": 2},
    "reinforce_plus_plus_baseline": {"kl_coef": 0.001},
}
"""Settings of `config.grpo` that a paper uses outside of its loss, by algorithm."""


def get_config(algorithm: str = "grpo") -> ConfigDict:
    """Returns the settings of the quickstart with a row of `ALGORITHMS`."""
    c = quickstart.get_config().unlock()
    c.grpo.algorithm = algorithm
    c.grpo.update(BESIDE.get(algorithm, {}))
    return c.lock()

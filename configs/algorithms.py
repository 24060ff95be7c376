"""The quickstart with another algorithm: one row of pg_ground.rl.loss.ALGORITHMS, by name.

python -m pg_ground.train --config=configs/algorithms.py:dapo --workdir=runs/dapo

A row says which advantage, ratio, objective, average and KL make the loss, and cites its paper; add one there and it is here. Any
of its choices can be replaced, by name or number: `--config.grpo.average=token_mean --config.grpo.clip_high=0.28`. What belongs
to an algorithm and is no part of its loss is set below.

Hardware, time and results are the quickstart's: `benchmarks/algorithms.py` runs ten rows side by side.
"""

from ml_collections import ConfigDict

from . import quickstart

BESIDE = {
    # dynamic sampling, and a completion that runs out of room leaves the loss and costs
    "dapo": {
        "dynamic_sampling": 3,
        "mask_truncated_completions": True,
        "max_new_tokens": 12,
        "rewards": {"overlong": 0.5},
    },
    # the distance to the reference is taken off the reward
    "rloo": {"kl_coef": 0.01},
    "remax": {"kl_coef": 0.01},
    "reinforce_plus_plus": {"kl_coef": 0.001},
    # clips of whole completions, and what kl_cov holds back, only bind when a rollout is learned from in several steps
    "gspo": {"minibatches": 2},
    "luspo": {"minibatches": 2},
    "kl_cov": {"minibatches": 2},
    "clip_cov": {"minibatches": 2},
    "reinforce_plus_plus_baseline": {"kl_coef": 0.001},
}
"""By algorithm: settings of `config.grpo` that its paper has beside the loss."""


def get_config(algorithm: str = "grpo") -> ConfigDict:
    c = quickstart.get_config().unlock()
    c.grpo.algorithm = algorithm
    c.grpo.update(BESIDE.get(algorithm, {}))
    return c.lock()

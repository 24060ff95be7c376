"""Algorithms as rows: advantage × ratio × objective × loss aggregation × KL, each row with its
paper.

`config.grpo.algorithm` names a row of `ALGORITHMS`, or a row of a user's file
(`path/to/file.py:row`). The other settings of `config.grpo` that `SETTINGS` lists replace one
choice of the row.
"""

import inspect
import math
import runpy
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pg_ground.rl import advantages
from pg_ground.rl.advantages import ADVANTAGES, Advantage
from pg_ground.rl.importance_sampling import IMPORTANCE_SAMPLING_MODES, Correction
from pg_ground.rl.kl import KL_ESTIMATORS, KlEstimator, k1, k2, k3_corrected
from pg_ground.rl.objectives import (
    LOSS_AGG_MODES,
    OBJECTIVES,
    RATIOS,
    LossAggregation,
    Objective,
    Ratio,
    cispo,
    gmpo,
    per_sequence,
    per_token,
    policy_gradient,
    ppo_clip,
    sapo,
    seq_mean_token_mean,
    seq_mean_token_sum,
    seq_mean_token_sum_norm,
    token_mean,
    vespo,
    whole_sequence,
)  # fmt: skip
from pg_ground.rl.options import Declaration, Option, declaration, options_of
from pg_ground.rl.token_selection import TOKEN_SELECTIONS, Selection, clip_cov, kl_cov, top_entropy
from pg_ground.types import UserError, nearest

CHOICES: dict[str, Mapping[str, Any]] = {
    "advantage": ADVANTAGES,
    "ratio": RATIOS,
    "objective": OBJECTIVES,
    "loss_agg_mode": LOSS_AGG_MODES,
    "kl_estimator": KL_ESTIMATORS,
    "token_selection": TOKEN_SELECTIONS,
    "importance_sampling_mode": IMPORTANCE_SAMPLING_MODES,
}
"""The components that each field of a row can be, by name."""

KlCoef = Annotated[
    float,
    Option("weight of KL(policy || reference policy); 0 needs no reference policy", minimum=0),
]
KlInReward = Annotated[
    bool,
    Option(
        "whether the KL is subtracted from the completion's reward instead of added to the loss"
    ),
]
EntropyCoef = Annotated[float, Option("weight of the entropy bonus", minimum=0)]
OffPolicyKl = Annotated[
    float,
    Option(
        "nats per token above which completions with a negative advantage are dropped", minimum=0
    ),
]
MaskTruncated = Annotated[
    bool, Option("whether completions that are cut off at max_new_tokens leave the loss")
]


class Algorithm(NamedTuple):
    """One row of `ALGORITHMS`: the components of the policy loss and their options."""

    advantage: Advantage = advantages.standardised
    ratio: Ratio = per_token
    objective: Objective = ppo_clip
    loss_agg_mode: LossAggregation = seq_mean_token_mean
    options: Mapping[str, Any] = {}
    """Options of the components that differ from the component's default, by name."""
    kl_coef: KlCoef = 0.0
    kl_estimator: KlEstimator = k3_corrected
    kl_in_reward: KlInReward = False
    entropy_coef: EntropyCoef = 0.0
    token_selection: Selection | None = None
    importance_sampling_mode: Correction | None = None
    off_policy_kl: OffPolicyKl = math.inf
    """Bound on the mean of log π_old − log π for completions with a negative advantage (arXiv
    2512.02556)."""
    mask_truncated_completions: MaskTruncated = False
    """Truncated completions leave the loss, but stay in the statistics of their group (DAPO,
    arXiv 2503.14476)."""

    def override(self, **changes: object) -> "Algorithm":
        """Returns the row with other components or options.

        Options of the row that are not named stay.
        """
        fields = {name: value for name, value in changes.items() if name in self._fields}
        options = {name: value for name, value in changes.items() if name not in self._fields}
        return self._replace(**fields, options=dict(self.options) | options)

    def options_for(self, field: str) -> dict[str, Any]:
        """Returns the options of this row that the component in `field` reads, as keyword
        arguments."""
        readable = options_of(getattr(self, field))
        return {name: value for name, value in self.options.items() if name in readable}

    def option(self, name: str) -> Any:
        """Returns the value of an option in this row; None if no component of the row reads it."""
        for field in CHOICES:
            declared = options_of(getattr(self, field)).get(name)
            if declared is not None:
                return self.options.get(name, declared.default)
        return None


GRPO = Algorithm()

ALGORITHMS: dict[str, Algorithm] = {
    # Shao et al., "DeepSeekMath", arXiv 2402.03300
    "grpo": GRPO._replace(kl_coef=0.04),
    # Liu et al., "Understanding R1-Zero-Like Training", arXiv 2503.20783: no std, no length in the
    # average
    "dr_grpo": GRPO._replace(advantage=advantages.centred, loss_agg_mode=seq_mean_token_sum_norm),
    # Yu et al., "DAPO", arXiv 2503.14476: clip-higher and token average.
    # Its other parts are grpo.dynamic_sampling and the reward "overlong".
    "dapo": GRPO._replace(loss_agg_mode=token_mean, options={"clip_high": 0.28}),
    # "Part I: Tricks or Traps?", arXiv 2508.08221 (Lite PPO): group mean, batch std, token average
    "lite_ppo": GRPO._replace(advantage=advantages.batch_scaled, loss_agg_mode=token_mean),
    # "INTELLECT-2", arXiv 2505.07291: two-sided clip
    "two_sided": GRPO._replace(loss_agg_mode=token_mean, options={"ratio_cap": 4.0}),
    # Ye et al., "Mastering Complex Control in MOBA Games", arXiv 1912.09729: dual clip with
    # RLLaVA's cap
    "dual_clip": GRPO._replace(loss_agg_mode=token_mean, options={"ratio_cap": 3.0}),
    # Zheng et al., "GSPO", arXiv 2507.18071
    "gspo": GRPO._replace(ratio=per_sequence, options={"clip_low": 3e-4, "clip_high": 4e-4}),
    # "Length-unbiased sequence policy optimization", arXiv 2602.05261
    "luspo": GRPO._replace(ratio=per_sequence, loss_agg_mode=seq_mean_token_sum),
    # Zhao et al., "GMPO", arXiv 2507.20673
    "gmpo": GRPO._replace(objective=gmpo),
    # "MiniMax-M1", arXiv 2506.13585, with the cap of ScaleRL, arXiv 2510.13786
    "cispo": GRPO._replace(objective=cispo, loss_agg_mode=token_mean),
    # "SAPO", arXiv 2511.20347
    "sapo": GRPO._replace(objective=sapo),
    # "VESPO", arXiv 2602.10693
    "vespo": GRPO._replace(ratio=whole_sequence, objective=vespo, loss_agg_mode=token_mean),
    # Ahmadian et al., "Back to Basics", arXiv 2402.14740
    "rloo": GRPO._replace(
        advantage=advantages.leave_one_out, ratio=whole_sequence, kl_in_reward=True, kl_estimator=k1
    ),
    # Li et al., "ReMax", arXiv 2310.10505: the greedy completion is the baseline
    "remax": GRPO._replace(
        advantage=advantages.greedy_baseline, loss_agg_mode=token_mean,
        kl_in_reward=True, kl_estimator=k1,
    ),
    # Hu, "REINFORCE++", arXiv 2501.03262. The KL of the whole completion is subtracted, not of the
    # remaining tokens.
    "reinforce_plus_plus": GRPO._replace(
        advantage=advantages.whitened, loss_agg_mode=token_mean, kl_in_reward=True, kl_estimator=k1
    ),
    "reinforce_plus_plus_baseline": GRPO._replace(
        advantage=advantages.centred_and_whitened, loss_agg_mode=token_mean, kl_estimator=k2
    ),
    # Hao et al., "OPO", arXiv 2505.23585: exactly on-policy
    "opo": GRPO._replace(
        advantage=advantages.length_weighted, objective=policy_gradient, loss_agg_mode=token_mean
    ),
    # Chu et al., "GPG", arXiv 2504.02546
    "gpg": GRPO._replace(
        advantage=advantages.upweighted, objective=policy_gradient, loss_agg_mode=token_mean
    ),
    # "Optimizing Language Models for Inference Time Objectives", arXiv 2503.19595: the group's best
    # completion counts
    "pass_at_k": GRPO._replace(advantage=advantages.best_of_group),
    # "GDPO", arXiv 2601.05242: rewards are normalised one by one
    "gdpo": GRPO._replace(advantage=advantages.normalised_then_summed),
    # Wang et al., "Beyond the 80/20 Rule", arXiv 2506.01939
    "top_entropy": GRPO._replace(
        loss_agg_mode=token_mean, token_selection=top_entropy, options={"clip_high": 0.28}
    ),
    # Cui et al., "The Entropy Mechanism", arXiv 2505.22617: no clip
    "clip_cov": GRPO._replace(
        loss_agg_mode=token_mean, token_selection=clip_cov,
        options={"clip_low": math.inf, "clip_high": math.inf},
    ),
    "kl_cov": GRPO._replace(
        loss_agg_mode=token_mean, token_selection=kl_cov,
        options={"clip_low": math.inf, "clip_high": math.inf},
    ),
}  # fmt: skip


class Setting(NamedTuple):
    """One setting of `config.grpo` that replaces a choice of the row."""

    type: type
    help: str
    minimum: int | float = -math.inf
    maximum: int | float = math.inf


def row_options() -> dict[str, Declaration]:
    """Returns the options that are fields of the row itself, by name."""
    hints = typing.get_type_hints(Algorithm, include_extras=True)
    defaults = Algorithm._field_defaults
    return {
        name: declaration(hint, defaults[name])
        for name, hint in hints.items()
        if typing.get_origin(hint) is typing.Annotated
    }


def readers() -> dict[str, dict[str, list[str]]]:
    """Returns for each option of a component the field and the components that read it."""
    table: dict[str, dict[str, list[str]]] = {}
    for field, components in CHOICES.items():
        for component_name, component in components.items():
            for option in options_of(component):
                table.setdefault(option, {}).setdefault(field, []).append(component_name)
    return table


def make_settings() -> dict[str, Setting]:
    """Returns the settings that `config.grpo` has for an algorithm's choices and options, by
    name."""
    settings = {}
    for field, components in CHOICES.items():
        names = ", ".join(components)
        settings[field] = Setting(str, f"in place of the row's {field}; one of {names}")
    declarations: dict[str, list[Declaration]] = {
        name: [declared] for name, declared in row_options().items()
    }
    for components in CHOICES.values():
        for component in components.values():
            for name, declared in options_of(component).items():
                declarations.setdefault(name, []).append(declared)
    for name, declared_by in declarations.items():
        helps = list(dict.fromkeys(declared.option.help for declared in declared_by))
        settings[name] = Setting(
            declared_by[0].type,
            "; or ".join(helps),
            min(declared.option.minimum for declared in declared_by),
            max(declared.option.maximum for declared in declared_by),
        )
    return settings


SETTINGS: Mapping[str, Setting] = make_settings()
"""Derived from the declarations of the components.

None in `config.grpo` means the row's own choice.
"""


def make_algorithm(name: str, overrides: Mapping[str, Any]) -> Algorithm:
    """Returns the row that `name` names, with `overrides` in place of its own choices.

    Args:
      name: a row of `ALGORITHMS`, or `path/to/file.py:row`.
      overrides: values of `SETTINGS` by name.

    Raises:
      UserError: there is no such row or choice, an option is out of range, or no component of the
        row reads it.
    """
    row = load_algorithm(name) if ".py:" in name else _lookup("algorithm", name, ALGORITHMS)
    in_row = row_options()
    changes: dict[str, Any] = {}
    options: dict[str, Any] = {}
    for setting, value in overrides.items():
        if setting in CHOICES:
            changes[setting] = _lookup(setting, value, CHOICES[setting])
        elif setting in in_row:
            changes[setting] = value
        else:
            options[setting] = value
    replaced = [field for field in CHOICES if field in changes]
    own_options = _without_unread(row, row._replace(**changes)) if replaced else dict(row.options)
    row = row._replace(**changes, options=own_options | options)
    for option in options:
        _check_read(row, name, option)
    _check_ranges(row)
    _check_choices(row)
    return row


RENAMED_CHOICES: Mapping[str, str] = {
    "over_greedy": "greedy_baseline",
    "clipped": "ppo_clip",
    "capped_weight": "cispo",
    "soft_gate": "sapo",
    "smooth_weight": "vespo",
    "geometric": "gmpo",
    "over_sequences": "seq_mean_token_mean",
    "over_tokens": "token_mean",
    "summed_sequences": "seq_mean_token_sum",
    "over_budget": "seq_mean_token_sum_norm",
}
"""Old names of components and their new names, for one release."""


def _lookup(setting: str, name: str, table: Mapping[str, Any]) -> Any:
    if RENAMED_CHOICES.get(name) in table:
        raise UserError(f"config.grpo.{setting} {name!r} is now {RENAMED_CHOICES[name]!r}")
    if name not in table:
        raise UserError(f"config.grpo.{setting} {name!r} does not exist: {nearest(name, table)}")
    return table[name]


def _without_unread(row: Algorithm, changed: Algorithm) -> dict[str, Any]:
    """Returns the options of `row` that belong to components that `changed` still has."""
    same = [field for field in CHOICES if getattr(row, field) is getattr(changed, field)]
    readable = {name for field in same for name in options_of(getattr(row, field))}
    return {name: value for name, value in row.options.items() if name in readable}


def _check_read(row: Algorithm, name: str, option: str) -> None:
    """Raises UserError if no component of the row reads the option."""
    if any(option in options_of(getattr(row, field)) for field in CHOICES):
        return
    table = readers()[option]
    choices = " or ".join(
        f"{field} is one of {', '.join(components)}" for field, components in table.items()
    )
    raise UserError(f"config.grpo.{option} has no effect on {name}: it is read if {choices}")


def _check_ranges(row: Algorithm) -> None:
    """Raises UserError for an option outside the range that its component declares."""
    for field in CHOICES:
        component = getattr(row, field)
        for name, declared in options_of(component).items():
            value = row.options.get(name, declared.default)
            low, high = declared.option.minimum, declared.option.maximum
            is_bounded = low > -math.inf or high < math.inf  # a user's option need not be a number
            if is_bounded and not low <= value <= high:
                bounds = f"at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
                raise UserError(
                    f"config.grpo.{name} is {value:g}: {component.__name__} needs a value {bounds}"
                )


def _check_choices(row: Algorithm) -> None:
    """Raises UserError for components that cancel each other."""
    floor = row.option("importance_sampling_floor")
    cap = row.option("importance_sampling_cap")
    if row.importance_sampling_mode is not None and row.objective is vespo:
        raise UserError(
            "config.grpo.importance_sampling_mode multiplies the loss, but the objective vespo has "
            "its own weight: choose one of the two"
        )
    if floor is not None and cap is not None and floor > cap:
        raise UserError("config.grpo.importance_sampling_floor is above importance_sampling_cap")


def load_algorithm(spec: str) -> Algorithm:
    """Returns the row that `path/to/file.py:row` names.

    Raises:
      UserError: there is no such file or name, the file does not run, or the value is not an
        `Algorithm`.
    """
    path, _, name = spec.rpartition(":")
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"config.grpo.algorithm {spec}: there is no file {file}")
    try:
        names = runpy.run_path(str(file))
    except (Exception, SystemExit) as error:  # a user's program can raise anything
        raise UserError(
            f"config.grpo.algorithm {spec}: the file does not run: {type(error).__name__}: {error}"
        ) from None
    if name not in names:
        public = [other for other, value in names.items() if isinstance(value, Algorithm)]
        raise UserError(
            f"config.grpo.algorithm {spec}: {file} has no {name}: {nearest(name, public)}"
        )
    row = names[name]
    if not isinstance(row, Algorithm):
        raise UserError(
            f"config.grpo.algorithm {spec} is a {type(row).__name__}: it must be a "
            f"pg_ground.rl.algorithms.Algorithm, for example ALGORITHMS['grpo']._replace(...)"
        )
    _check_functions(spec, row)
    _check_options(spec, row)
    return row


PARAMETERS: dict[str, int] = {
    "advantage": 1,
    "ratio": 2,
    "objective": 4,
    "loss_agg_mode": 1,
    "kl_estimator": 2,
    "token_selection": 1,
    "importance_sampling_mode": 2,
}
"""Number of positional parameters of the components in each field."""


def _check_functions(spec: str, row: Algorithm) -> None:
    """Raises UserError if a component of a user's row takes another number of arguments than its
    field needs."""
    for field, count in PARAMETERS.items():
        component: Callable[..., Any] | None = getattr(row, field)
        if component is None:
            continue
        parameters = inspect.signature(component).parameters.values()
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        positional = [parameter for parameter in parameters if parameter.kind in kinds]
        if len(positional) != count:
            raise UserError(
                f"config.grpo.algorithm {spec}: {field} takes {len(positional)} positional "
                f"arguments, but the loss passes {count}"
            )


def _check_options(spec: str, row: Algorithm) -> None:
    """Raises UserError if no component reads an option of a user's row, or if an option has
    neither a default nor a value."""
    declared: dict[str, Declaration] = {}
    for field in CHOICES:
        declared |= options_of(getattr(row, field))
    for name in row.options:
        if name not in declared:
            raise UserError(
                f"config.grpo.algorithm {spec}: no component of the row reads the option {name}: "
                f"{nearest(name, declared)}"
            )
    for name, declared_option in declared.items():
        if declared_option.default is inspect.Parameter.empty and name not in row.options:
            raise UserError(
                f"config.grpo.algorithm {spec}: the option {name} has no default: set it in "
                "options={…}"
            )

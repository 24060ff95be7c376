"""Options of the algorithm's components, declared once: as keyword-only parameters of the component
that reads them.

A component is a function such as `objectives.ppo_clip`. Its keyword-only parameters are its
options:

    def ppo_clip(log_ratio, logps, advantages, mask, *, clip_low: ClipLow = 0.2, ...)

The annotation carries an `Option`: the help text and the range. `pg_ground.config` derives the
settings of `config.grpo` from these declarations, and `algorithms.make_algorithm` refuses an option
that no component of the chosen algorithm reads.
"""

import functools
import inspect
import math
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Option:
    """The help text and the closed range of an option."""

    help: str
    minimum: int | float = -math.inf
    maximum: int | float = math.inf


@dataclass(frozen=True)
class Declaration:
    """One option as it is declared: its type, its default and its description."""

    type: Any
    default: Any
    option: Option


def declaration(annotation: object, default: object) -> Declaration:
    """Returns the declaration that `Annotated[type, Option(...)]` with this default makes."""
    kind, option = typing.get_args(annotation)[:2]
    return Declaration(kind, default, option)


@functools.cache
def options_of(component: Callable[..., Any] | None) -> dict[str, Declaration]:
    """Returns the options of a component by name.

    Returns an empty dict for None, the absent component.

    A keyword-only parameter without an `Option` (of a user's own component) is an option with a
    default and no setting.
    """
    if component is None:
        return {}
    hints = typing.get_type_hints(component, include_extras=True)
    declarations = {}
    for name, parameter in inspect.signature(component).parameters.items():
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
            continue
        hint = hints.get(name)
        if typing.get_origin(hint) is typing.Annotated:
            declarations[name] = declaration(hint, parameter.default)
        else:
            declarations[name] = Declaration(hint, parameter.default, Option(""))
    return declarations

"""A reward of the user's own: found by its name, called, checked."""

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from openo3_jax.errors import InputError
from openo3_jax.rewards.score import Rewards

# (records, completions, share of training done) -> one value per completion
Reward = Callable[[Sequence, Sequence[str], float], Rewards]


def load(name: str) -> Reward:
    """`module:function`, imported from the working directory too. Raises: InputError if there is no such thing."""
    module, colon, function = name.partition(":")
    if not colon:
        raise InputError(f"--reward {name!r}; expected module:function, such as my_rewards:score")
    if os.getcwd() not in sys.path:  # an installed program has its own folder there, not the user's
        sys.path.append(os.getcwd())
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, ValueError, AttributeError) as error:  # ValueError: no name of a module
        raise InputError(f"--reward {name!r}: {error}; the module must be importable from here") from error
    if not callable(found):
        raise InputError(f"--reward {name!r} is {type(found).__name__}; expected a function of records and completions")
    return make_reward(found)


def make_reward(function: Callable[..., Sequence[float] | Rewards]) -> Reward:
    """A function of records and completions as a reward: it gives one number each, or `Rewards` with terms of its own.

    Where it has a parameter `progress`, it is given the share of training done, in (0, 1].
    Raises (when called): InputError for other than one number for each completion.
    """
    annealed = _takes_progress(function)

    def reward(records: Sequence, completions: Sequence[str], progress: float) -> Rewards:
        found = function(records, completions, **({"progress": progress} if annealed else {}))
        if not isinstance(found, Rewards):
            return Rewards(terms={}, applies={}, total=_values(found, len(records), "reward"))
        if found.terms.keys() != found.applies.keys():
            raise InputError(
                f"reward: terms {', '.join(found.terms) or '-'} but applies {', '.join(found.applies) or '-'}; "
                "expected both for each term"
            )
        return Rewards(
            terms=_columns(found.terms, len(records), "term"),
            applies={name: flags > 0 for name, flags in _columns(found.applies, len(records), "applies of").items()},
            total=_values(found.total, len(records), "reward"),
        )

    return reward


def _takes_progress(function: Callable) -> bool:
    try:
        return "progress" in inspect.signature(function).parameters
    except ValueError:  # of some functions in C nothing is known
        return False


def _columns(columns: Mapping[str, Any], number: int, what: str) -> dict[str, Float[np.ndarray, " rollouts"]]:
    return {name: _values(values, number, f"reward: {what} {name}") for name, values in columns.items()}


def _values(values: Any, number: int, what: str) -> Float[np.ndarray, " rollouts"]:
    try:
        found = np.asarray(values, np.float32)
    except (TypeError, ValueError):
        raise InputError(f"{what}: gave {type(values).__name__}; expected one number for each completion") from None
    if found.shape != (number,):
        raise InputError(f"{what}: gave shape {found.shape} for {number} completions; expected one number each")
    return found

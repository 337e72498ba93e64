"""The metric that decides which checkpoint is the best, and when to give up."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from openo3_jax.config import RunConfig


class Best:
    """Follows `settings.best` through the steps in which it is measured.

    `is_new`: the last value was better than all before. `is_over`: `settings.patience` values in a row were not.
    """

    def __init__(self, settings: RunConfig, past: Iterable[Mapping[str, Any]] = ()):
        self._settings = settings
        self._highest = -math.inf
        self._without = 0
        self.is_new = False
        for values in past:
            self(values)
        self.is_new = False

    def __call__(self, values: Mapping[str, Any]) -> float | None:
        """The score of a step, higher is better; None where the metric was not measured."""
        value = None if self._settings.best is None else values.get(self._settings.best)
        if value is None or not math.isfinite(value):
            self.is_new = False
            return None
        score = value if self._settings.best_is == "highest" else -value
        self.is_new = score > self._highest
        self._highest = max(score, self._highest)
        self._without = 0 if self.is_new else self._without + 1
        return score

    @property
    def is_over(self) -> bool:
        return 0 < self._settings.patience <= self._without

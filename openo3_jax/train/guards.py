"""Bad numbers: an update that is not finite is never made, its batch is kept for replay; sudden rises are marked."""

import collections
import math
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from openo3_jax import hosts
from openo3_jax.config import GSPOConfig, SFTConfig
from openo3_jax.errors import InputError
from openo3_jax.train import replay, runlog
from openo3_jax.train.state import TrainState

MAX_DUMPS = 3  # of a run: each holds the weights
MAX_IN_ROW = 10  # updates left out one after the other, before the run is stopped all the same

WINDOW = 50  # steps that a spike is compared with
FEWEST = 10  # of them
SPIKE = 8.0  # median absolute deviations above the median
MAD_FLOOR = 0.01  # of the median: a curve that is almost flat has no spikes within a few percent


class Guard:
    """Called after every update with the state, its batch and what was measured.

    The step leaves the state as it was where loss or gradient are not finite; this dumps weights and batch to
    `dumps/`, and stops the run or lets it go on, as `config.run.nonfinite` says.
    """

    def __init__(self, stage: str, config: SFTConfig | GSPOConfig, out: Path, log: runlog.RunLog):
        self._stage = stage
        self._config = config
        self._out = out
        self._log = log
        self._in_row = 0

    def __call__(self, state: TrainState, batch: Any, step: int, values: Mapping[str, float]) -> bool:
        """Whether the update was made. Raises: InputError if it was not and the run is to stop."""
        if is_finite(values):
            self._in_row = 0
            return True
        self._in_row += 1
        found = f"loss {values['loss']:g}, gradient norm {values['grad_norm']:g}"
        kept = self._dump(state, batch, step, values)
        said = f"{self._stage}: step {step + 1} has {found}; its update was not made{kept}"
        if self._config.run.nonfinite == "stop":
            raise InputError(f"{said}; lower optimizer.learning_rate, or go on with --resume --run.nonfinite skip")
        if self._in_row > MAX_IN_ROW:
            raise InputError(f"{said}; so were the {MAX_IN_ROW} updates before it: lower optimizer.learning_rate")
        self._log.say(said)
        return False

    def _dump(self, state: TrainState, batch: Any, step: int, values: Mapping[str, float]) -> str:
        dumps = self._out / replay.DUMPS

        def choose() -> str | None:
            if dumps.is_dir() and len(list(dumps.iterdir())) >= MAX_DUMPS:
                return None
            names = (f"step-{step + 1}-{i}" for i in range(self._config.batch_size + 1))
            return next(name for name in names if not (dumps / name).exists())

        name = hosts.first(choose)
        if name is None:
            return f" ({MAX_DUMPS} batches are kept already in {dumps})"
        replay.write_dump(dumps / name, self._stage, self._config, state.params, batch, step, values)
        return f"; openo3 replay {dumps / name} runs it again"


def is_finite(values: Mapping[str, float]) -> bool:
    """The condition under which a step changes its state."""
    return math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])


class Spikes:
    """Marks values that stand far above the last ones: `guard/<name>_spike`, 1.0 or 0.0 for each watched metric."""

    def __init__(self, stage: str, past: Iterable[Mapping[str, Any]] = ()):
        self._names = {f"{stage}/{name}": name for name in ("loss", "grad_norm")}
        self._past = {name: collections.deque(maxlen=WINDOW) for name in self._names}
        for values in past:
            self._add(values)

    def __call__(self, values: Mapping[str, float]) -> dict[str, float]:
        marks = {f"guard/{short}_spike": float(self._is_spike(name, values)) for name, short in self._names.items()}
        self._add(values)
        return marks

    def _is_spike(self, name: str, values: Mapping[str, float]) -> bool:
        past, value = self._past[name], values.get(name)
        if value is None or not math.isfinite(value) or len(past) < FEWEST:
            return False
        middle = statistics.median(past)
        deviation = statistics.median(abs(one - middle) for one in past)
        return value > middle + SPIKE * max(deviation, MAD_FLOOR * abs(middle))

    def _add(self, values: Mapping[str, Any]) -> None:
        for name, past in self._past.items():
            if (value := values.get(name)) is not None and math.isfinite(value):
                past.append(value)

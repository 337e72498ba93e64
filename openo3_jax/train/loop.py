"""The order of events of a run, and nothing else: advance, write, look, save."""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol, runtime_checkable

from rich import console

from openo3_jax.errors import InputError
from openo3_jax.policy import Policy
from openo3_jax.train import checkpoint, metrics, run
from openo3_jax.train.state import TrainState

Evaluator = Callable[[Policy, int], Mapping[str, float]]  # (policy, steps done) -> metrics; {} where none are due
StopRule = Callable[[int, Mapping[str, float]], bool]  # (steps done, metrics) -> True ends the run


@runtime_checkable
class Stage(Protocol):
    """One of the two stages: what a step is, and what of it stands in the progress line."""

    name: str
    headline: str  # a metric

    def __call__(self, state: TrainState, step: int) -> tuple[TrainState, dict[str, float]]:
        """Make step `step` (from 0): the state after it, and what was measured."""


def train(
    stage: Stage,
    state: TrainState,
    policy: Policy,
    *,
    out: Path,
    steps: int,
    evaluate: Evaluator | None = None,
    stop: StopRule | None = None,
) -> Policy:
    """Make `steps` steps, or fewer if `stop` says so; write metrics as they come and a checkpoint at the end.

    `policy` lends the evaluator and the result what is not in the state; its weights are not used.
    Raises: InputError for a loss that is not finite.
    """
    with metrics.JsonlWriter(out / run.METRICS) as writer, metrics.Progress(stage.name, steps) as progress:
        for done in range(1, steps + 1):
            started_s = time.monotonic()
            state, values = stage(state, done - 1)
            values["time/total_s"] = time.monotonic() - started_s
            if evaluate is not None:
                values |= evaluate(dataclasses.replace(policy, params=state.params), done)
            writer.write(done, values)
            note = f"{stage.headline} {values.get(stage.headline, math.nan):.3f}"
            progress.update(done, note)
            loss = values.get(f"{stage.name}/loss", 0.0)
            if not math.isfinite(loss):
                raise InputError(f"{stage.name}: the loss is {loss} at step {done}; lower optimizer.learning_rate")
            if stop is not None and stop(done, values):
                break
    checkpoint.save(out / run.CHECKPOINTS, state)
    say = console.Console(stderr=True).print
    say(f"{stage.name}: {done} steps, {note}, saved in {out}", soft_wrap=True)
    return dataclasses.replace(policy, params=state.params)

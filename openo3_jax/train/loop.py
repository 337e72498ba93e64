"""The order of events of a run, and nothing else: advance, look, write, save, stop."""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from openo3_jax.config import GSPOConfig, SFTConfig
from openo3_jax.errors import InputError, Stopped
from openo3_jax.policy import Policy
from openo3_jax.train import checkpoint, metrics, run, signals
from openo3_jax.train.runlog import RunLog
from openo3_jax.train.state import TrainState

Evaluator = Callable[[Policy, int], Mapping[str, float]]  # (policy, steps done) -> metrics; {} where none are due
StopRule = Callable[[int, Mapping[str, float]], bool]  # (steps done, metrics) -> True ends the run


@runtime_checkable
class Stage(Protocol):
    """One of the two stages: what a step is, what of it stands in the progress line, and what must survive a kill."""

    name: str
    headline: str  # a metric

    def __call__(self, state: TrainState, step: int) -> tuple[TrainState, dict[str, float]]:
        """Make step `step` (from 0): the state after it, and what was measured."""

    def memory(self, step: int) -> dict[str, Any]:
        """What goes on with `step` must know beside the state, as JSON has it."""


@dataclasses.dataclass(frozen=True)
class Run:
    """Where a run writes, what its checkpoints say of it, and how many steps were made when it was stopped."""

    out: Path
    config: SFTConfig | GSPOConfig
    about: Mapping[str, Any]
    log: RunLog
    start: int = 0


def train(
    stage: Stage,
    state: TrainState,
    policy: Policy,
    this: Run,
    *,
    evaluate: Evaluator | None = None,
    stop: StopRule | None = None,
) -> Policy:
    """Make the steps that are left, or fewer if `stop` says so; write metrics and checkpoints as they come.

    `policy` lends the evaluator and the result what is not in the state; its weights are not used.
    Raises: InputError where the guards of the stage do, or if the last checkpoint cannot be written; Stopped after a
    signal, with the state saved.
    """
    out, settings, steps = this.out, this.config.run, this.config.steps
    done, note = this.start, "as it was"
    with (
        metrics.JsonlWriter(out / run.METRICS) as writer,
        metrics.Progress(stage.name, steps) as progress,
        checkpoint.Checkpoints(out / run.CHECKPOINTS, keep_last=settings.keep_last, say=this.log.say) as checkpoints,
        signals.StopSignals(this.log.say) as caught,
    ):
        for done in range(this.start + 1, steps + 1):
            started_s = time.monotonic()
            state, values = stage(state, done - 1)
            values["time/total_s"] = time.monotonic() - started_s
            if evaluate is not None:
                values |= evaluate(dataclasses.replace(policy, params=state.params), done)
            writer.write(done, values)
            note = f"{stage.headline} {values.get(stage.headline, math.nan):.3f}"
            progress.update(done, note)
            is_last = done == steps or (stop is not None and stop(done, values))
            if is_last or caught.name is not None or done % settings.save_every == 0:
                checkpoints.save(state, checkpoint.Record(done, this.about, stage.memory(done), None))
            if is_last or caught.name is not None:
                break
        checkpoints.wait()
        if checkpoints.failure is not None:
            raise InputError(checkpoints.failure)
        if caught.name is not None and not is_last:
            raise Stopped(f"{caught.name}: {done} of {steps} steps are saved in {out}; go on with --resume")
    this.log.say(f"{stage.name}: {done} steps, {note}, saved in {out}")
    return dataclasses.replace(policy, params=state.params)

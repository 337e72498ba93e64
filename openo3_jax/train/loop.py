"""The order of events of a run, and nothing else: advance, look, write, save, stop."""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from openo3_jax import hosts
from openo3_jax.config import GSPOConfig, RunConfig, SFTConfig
from openo3_jax.errors import InputError, Stopped
from openo3_jax.policy import Policy
from openo3_jax.train import best as best_lib
from openo3_jax.train import checkpoint, guards, journal, machine, metrics, profiling, run, signals, watchdog
from openo3_jax.train.runlog import RunLog
from openo3_jax.train.state import TrainState, trained_policy

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
    profile: profiling.Steps | None = None  # steps to trace


def check_best(settings: RunConfig, evaluate: Evaluator | None) -> None:
    """Before anything is written. Raises: InputError for a best metric that nothing would measure."""
    if evaluate is None and settings.best is not None and settings.best.startswith("eval/"):
        raise InputError(
            f"run.best={settings.best}: an evaluator measures it, and this run has none; expected a metric of the run, "
            "such as reward/total, or sft/loss with run.best_is=lowest, or pass evaluate= in Python"
        )


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

    `policy` lends the evaluator and the result what is not in the state; its weights are not used. The evaluator gets
    weights in the dtype of computation, the result those that are trained.
    Raises: InputError where the guards of the stage do, or if the last checkpoint cannot be written; Stopped after a
    signal, with the state saved.
    """
    out, settings, steps, say = this.out, this.config.run, this.config.steps, this.log.say
    past = metrics.read_lines(out / run.METRICS)
    spikes, best = guards.Spikes(stage.name, past), best_lib.Best(settings, past)
    done, is_last, is_told, signal = this.start, best.is_over or this.start >= steps, False, None
    values = {name: value for name, value in past[-1].items() if value is not None} if past else {}
    with (
        _open_journal(stage, this) as book,
        checkpoint.Checkpoints(out / run.CHECKPOINTS, keep_last=settings.keep_last, say=say) as checkpoints,
        profiling.Tracer(out / run.PROFILE, this.profile) as tracer,
        machine.Machine(this.log.note) as computer,
        watchdog.Watchdog(settings.stuck_after_s, this.log.warn) as dog,
        signals.StopSignals(say) as caught,
        hosts.until_lost(),
    ):
        while not is_last and not is_told:
            done += 1
            dog.beat(f"making step {done}")
            started_s = time.monotonic()
            with tracer.step(done):
                state, values = stage(state, done - 1)
            values["time/total_s"] = time.monotonic() - started_s
            if evaluate is not None:
                dog.beat(f"evaluating after step {done}")
                values |= evaluate(trained_policy(policy, state, this.config.compute_dtype), done)
            score = best(values)
            values |= spikes(values) | computer.values()
            book.write(done, values)
            is_last = done == steps or best.is_over or (stop is not None and stop(done, values))
            # Asked once: a later signal waits for the next step. Any process's signal counts, the first one's verdicts.
            told = hosts.gather([caught.name, bool(is_last), best.is_new])
            signal, (_, is_last, is_new) = next(filter(None, (one[0] for one in told)), None), told[0]
            is_told = signal is not None
            if is_last or is_told or is_new or done % settings.save_every == 0:
                dog.beat(f"saving step {done}")
                checkpoints.save(state, checkpoint.Record(done, this.about, stage.memory(done), score))
        dog.beat("writing the last checkpoint")
        checkpoints.wait()
        for failure in filter(None, hosts.gather(checkpoints.failure)):
            raise InputError(failure)
        if not is_last:
            raise Stopped(f"{signal}: {done} of {steps} steps are saved in {out}; go on with --resume")
    say(f"{stage.name}: {done} steps, {stage.headline} {values.get(stage.headline, math.nan):.4g}, saved in {out}")
    return trained_policy(policy, state)


def _open_journal(stage: Stage, this: Run) -> journal.Journal | journal.Silence:
    if not hosts.is_first():
        return journal.Silence()
    return journal.Journal(this.out, stage.name, stage.headline, this.config, this.log, start=this.start)

"""Records of stage two -> encoded prompts, step by step, of like length, read while the step before is trained on."""

import functools
import os
from collections.abc import Sequence
from typing import NamedTuple

from openo3_jax.config import GSPOConfig
from openo3_jax.data import annotations, loader, plan, prompts, samples, tokens, workers
from openo3_jax.data.bad_records import BadRecords
from openo3_jax.types import Sample


class Prompt(NamedTuple):
    """One record, ready for the model and for the rewards; its pictures are here once, whatever the group."""

    index: int  # in the file of records
    record: annotations.Record  # with the sizes that rewards need
    sample: Sample


class BadPrompt(NamedTuple):
    """A record that could not be used this time, and why."""

    index: int
    error: str


class StepPrompts(NamedTuple):
    good: list[Prompt]
    bad: list[BadPrompt]


class Prompts:
    """Step (from 0) -> its prompts, a pure function of data, seed and step. A context manager: it owns the decoders.

    The prompts of a step are of like length, by chance within a class of lengths, as the samples of stage one are. A
    record that cannot be used is left out of its step and reported.
    """

    def __init__(
        self,
        records: Sequence[annotations.Record],
        root: str | os.PathLike,
        processor: tokens.Processor,
        config: GSPOConfig,
        wording: prompts.Prompts,
    ):
        self._config = config
        self._samples = samples.Samples(
            records,
            root,
            "rl",
            processor,
            wording,
            BadRecords(records, max_fraction=1.0),  # reported, for the trainer to judge
            config=config.video,
            loss_on="assistant",
            num_workers=workers.count(config.workers),
        )
        rules = loader.Rules(config.seed, config.steps, config.batch_size, rows_multiple=1, max_row_tokens=0)
        weights = plan.record_weights(records, config.weights)
        self._plans = loader.Plans(self._samples, rules, weights, processor.config.vision)
        self._load = loader.Loader(self._samples, self._plans, rules, self._report)

    def __enter__(self) -> "Prompts":
        return self

    def __exit__(self, *error: object) -> None:
        self._samples.__exit__(*error)

    def __call__(self, step: int) -> StepPrompts:
        return self._load(step)

    def state(self, step: int) -> loader.IteratorState:
        """What a checkpoint keeps to go on with `step`, with any number of workers."""
        return loader.state_at(step, self._plans, self._config.seed, self._data)

    def step_of(self, state: loader.IteratorState) -> int:
        """The step to go on with. Raises: InputError for the state of other data, or of another order."""
        return loader.step_of(state, self._plans, self._config.seed, self._data)

    @functools.cached_property
    def _data(self) -> str:
        return plan.data_hash([], self._samples.data_hash, self._config.batch_size, self._config.weights)

    def _report(self, ready: loader.Ready) -> StepPrompts:
        reasons, good, bad = self._samples.bad.reasons, [], []
        for index in (index for row in ready.plan.rows for index in row):
            example = ready.samples[index]
            if example is None:
                bad.append(BadPrompt(index, reasons[index]))
            else:
                good.append(Prompt(index, example.record, example.sample))
        return StepPrompts(good, bad)

"""Records of stage two -> encoded prompts, step by step, of like length, read while the step before is trained on."""

import functools
import os
from collections.abc import Sequence
from typing import NamedTuple

from openo3_jax.config import GSPOConfig
from openo3_jax.data import annotations, loader, packing, plan, prompts, samples, tokens, workers
from openo3_jax.data.bad_records import BadRecords
from openo3_jax.types import RowShare, Sample


class Prompt(NamedTuple):
    """One record, ready for the model and for the rewards; its pictures are here once, whatever the group.

    Of several processes those read it whose devices need it; the others know its size.
    """

    index: int  # in the file of records
    record: annotations.Record | None  # with the sizes that rewards need; None until a process that read it tells
    sample: Sample | None  # None where others have read it
    size: packing.Size | None = None  # the room that it was planned to take; None: that of the sample
    is_own: bool = True  # this process scores its completions

    @property
    def room(self) -> packing.Placed:
        return self.size or self.sample


class BadPrompt(NamedTuple):
    """A record that could not be used this time, and why."""

    index: int
    error: str


class StepPrompts(NamedTuple):
    """The prompts of a step, each in its place; None for one that this process could not use, which is among `bad`."""

    places: list[Prompt | None]
    bad: list[BadPrompt]

    @property
    def good(self) -> list[Prompt]:
        return [prompt for prompt in self.places if prompt is not None]


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
        *,
        share: RowShare = RowShare(),  # noqa: B008 (a named tuple)
    ):
        self._config = config
        self._share = share
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
        self._load = loader.Loader(self._samples, self._plans, rules, self._report, self._mine)

    def __enter__(self) -> "Prompts":
        return self

    def __exit__(self, *error: object) -> None:
        self._samples.__exit__(*error)

    def __call__(self, step: int) -> StepPrompts:
        return self._load(step)

    def planned(self, step: int) -> str:
        """A digest of what all processes must have planned alike, before devices wait for each other."""
        places = _indices(self._plans.batch(step))
        return plan.data_hash([], places, self._samples.sizes(places))

    def state(self, step: int) -> loader.IteratorState:
        """What a checkpoint keeps to go on with `step`, with any number of workers."""
        return loader.state_at(step, self._plans, self._config.seed, self._data)

    def step_of(self, state: loader.IteratorState) -> int:
        """The step to go on with. Raises: InputError for the state of other data, or of another order."""
        return loader.step_of(state, self._plans, self._config.seed, self._data)

    @functools.cached_property
    def _data(self) -> str:
        return plan.data_hash([], self._samples.data_hash, self._config.batch_size, self._config.weights)

    def note_bad(self, bad: Sequence[BadPrompt]) -> None:
        """What another process could not use is not tried again here."""
        for one in bad:
            self._samples.bad.add(one.index, one.error)

    def _is_read(self, place: int) -> bool:
        """Whether this process's devices sample for the prompt in this place, or are trained on it."""
        per_update = self._config.batch_size // self._config.minibatches
        rows = (place, self._config.batch_size), (place % per_update, per_update)
        return any(self._share.part(row, num) in self._share.held for row, num in rows)

    def _mine(self, batch: loader.BatchPlan) -> list[int]:
        return [index for place, index in enumerate(_indices(batch)) if self._is_read(place)]

    def _report(self, ready: loader.Ready) -> StepPrompts:
        reasons, places, bad = self._samples.bad.reasons, [], []
        for place, index in enumerate(_indices(ready.plan)):
            example = ready.samples.get(index)
            if example is None and (index in ready.samples or index in reasons):
                bad.append(BadPrompt(index, reasons[index]))
                places.append(None)
                continue
            is_own = self._share.part(place, self._config.batch_size) in self._share.owned
            record, sample = (None, None) if example is None else (example.record, example.sample)
            places.append(Prompt(index, record, sample, self._samples.sizes([index])[0], is_own))
        return StepPrompts(places, bad)


def _indices(batch: loader.BatchPlan) -> list[int]:
    return [index for row in batch.rows for index in row]

"""Records -> batches of stage one, read ahead: a batch is a pure function of data, seed and step."""

import dataclasses
import functools
import os
from collections.abc import Sequence

from openo3_jax import tasks
from openo3_jax.config import SFTConfig
from openo3_jax.data import annotations, loader, packing, plan, prompts, samples, tokens, workers
from openo3_jax.data.bad_records import BadRecords
from openo3_jax.errors import InputError
from openo3_jax.types import Batch


class Samples(samples.Samples):
    """`samples.Samples` with the settings of stage one; `bad_file` names the records that cannot be used."""

    def __init__(
        self,
        records: Sequence[annotations.Record],
        root: str | os.PathLike,
        stage: tasks.Stage,
        processor: tokens.Processor,
        config: SFTConfig,
        wording: prompts.Prompts,
        *,
        bad_file: str | os.PathLike | None = None,
    ):
        super().__init__(
            records,
            root,
            stage,
            processor,
            wording,
            BadRecords(records, config.max_bad_fraction, bad_file),
            config=config.video,
            loss_on=config.loss_on,
            num_workers=workers.count(config.workers),
        )
        self.weights = plan.record_weights(records, config.weights)


class SFTBatches:
    """Step -> packed batch as numpy arrays, made ahead of time. A batch is a pure function of data, seed and step.

    `rows_multiple`: rows are split over this many devices. Process `process[0]` of `process[1]` gets its share of the
    rows; all have the same shape. The shapes are chosen from the first window of records; a batch that fits none of
    them has one of its own, in coarse steps. A record that cannot be used leaves its place empty.
    """

    def __init__(
        self,
        samples: Samples,
        processor: tokens.Processor,
        config: SFTConfig,
        *,
        rows_multiple: int,
        process: tuple[int, int] = (0, 1),
    ):
        self._samples = samples
        self._processor = processor
        self._config = config
        self._process = process
        if rows_multiple % process[1]:
            raise InputError(
                f"sft: {process[1]} processes cannot share rows in multiples of {rows_multiple} equally; expected a "
                "mesh with as many devices in every process"
            )
        rules = loader.Rules(config.seed, config.steps, config.batch_size, rows_multiple, config.max_row_tokens)
        self._plans = loader.Plans(samples, rules, samples.weights, processor.config.vision)
        self._load = loader.Loader(samples, self._plans, rules, self._pack, process=process)
        self.padding = plan.Padding()  # of the batches made so far, also of those that wait

    def __call__(self, step: int) -> Batch:
        return self._load(step)

    @property
    def epochs(self) -> plan.Epochs:
        return self._plans.epochs

    @property
    def shapes(self) -> list[packing.Bucket]:
        """The static shapes, one for each class of like lengths."""
        return self._plans.shapes

    def sizes(self, step: int) -> list[packing.Size]:
        """The room that each sample of a step takes, in all processes."""
        return self._samples.sizes([index for row in self._plans.batch(step).rows for index in row])

    def state(self, step: int) -> loader.IteratorState:
        """What a checkpoint keeps to go on with `step`, with any number of workers and processes."""
        return loader.state_at(step, self._plans, self._config.seed, self._data)

    def step_of(self, state: loader.IteratorState) -> int:
        """The step to go on with. Raises: InputError for the state of other data, or of another order."""
        return loader.step_of(state, self._plans, self._config.seed, self._data)

    @functools.cached_property
    def _data(self) -> str:
        return plan.data_hash([], self._samples.data_hash, self._config.batch_size, self._config.weights)

    def _pack(self, ready: loader.Ready) -> Batch:
        sizes = self._samples.sizes([index for row in ready.plan.rows for index in row])
        self.padding = self.padding.add(sizes, ready.plan.shape)
        rows = [[self._placed(index, ready) for index in row] for row in ready.plan.share(self._process)]
        return packing.make_batch(
            rows,
            dataclasses.replace(ready.plan.shape, rows=len(rows)),
            self._processor.config,
            loss_on=self._config.loss_on,
            pad_id=self._processor.pad_id,
        )

    def _placed(self, index: int, ready: loader.Ready) -> packing.Placed:
        example = ready.samples[index]
        return self._samples.sizes([index])[0] if example is None else example.sample

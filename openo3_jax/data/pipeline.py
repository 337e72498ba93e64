"""Records -> batches of stage one, read ahead: a batch is a pure function of data, seed and step."""

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence

from openo3_jax import tasks
from openo3_jax.config import SFTConfig
from openo3_jax.data import annotations, loader, packing, plan, prompts, samples, tokens, workers
from openo3_jax.data.bad_records import BadRecords
from openo3_jax.types import Batch, RowShare


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

    `rows_multiple`: rows are split over this many devices. Of several processes each gets its `share` of the rows. The
    shapes are chosen from the first window of records; a batch that fits none of them has one of its own, in coarse
    steps. A record that cannot be used leaves its place empty.
    """

    def __init__(
        self,
        samples: Samples,
        processor: tokens.Processor,
        config: SFTConfig,
        *,
        rows_multiple: int,
        share: RowShare = RowShare(),  # noqa: B008 (a named tuple)
    ):
        self._samples = samples
        self._processor = processor
        self._config = config
        self._share = share
        assert rows_multiple % share.parts == 0, (rows_multiple, share)
        rules = loader.Rules(config.seed, config.steps, config.batch_size, rows_multiple, config.max_row_tokens)
        self._plans = loader.Plans(samples, rules, samples.weights, processor.config.vision)
        self._load = loader.Loader(samples, self._plans, rules, self._pack, self._mine)

    def __call__(self, step: int) -> Batch:
        return self._load(step)

    @property
    def epochs(self) -> plan.Epochs:
        return self._plans.epochs

    @property
    def shapes(self) -> list[packing.Bucket]:
        """The static shapes, one for each class of like lengths."""
        return self._plans.shapes

    def bad(self, step: int) -> dict[int, str]:
        """Records of a step that this process could not use, and why, by index."""
        bad = self._samples.bad.reasons
        return {index: bad[index] for row in self._plans.batch(step).rows for index in row if index in bad}

    def note_bad(self, reasons: Mapping[int, str]) -> None:
        """Count what other processes could not use. Raises: InputError if too many are bad."""
        for index, reason in reasons.items():
            self._samples.bad.add(index, reason)

    def sizes(self, step: int) -> list[packing.Size]:
        """The room that each sample of a step takes, in all processes."""
        return self._samples.sizes([index for row in self._plans.batch(step).rows for index in row])

    def planned(self, step: int) -> str:
        """A digest of what all processes must have planned alike, before devices wait for each other."""
        batch = self._plans.batch(step)
        return plan.data_hash([], batch.rows, dataclasses.asdict(batch.shape))

    def state(self, step: int) -> loader.IteratorState:
        """What a checkpoint keeps to go on with `step`, with any number of workers and processes."""
        return loader.state_at(step, self._plans, self._config.seed, self._data)

    def step_of(self, state: loader.IteratorState) -> int:
        """The step to go on with. Raises: InputError for the state of other data, or of another order."""
        return loader.step_of(state, self._plans, self._config.seed, self._data)

    def measures(self, step: int) -> dict[str, float]:
        """What to log of a step's batch: its shape, the shares of its slots that hold nothing, empty places.

        Samples count as planned: the slots of one that could not be read are not padding, its place is an empty one.
        """
        batch, bad = self._plans.batch(step), self._samples.bad.reasons
        padding = plan.Padding().add(self.sizes(step), batch.shape)
        values = {
            "rows": batch.shape.rows,
            "row_tokens": batch.shape.seq,
            "row_patches": batch.shape.patches,
            "token_waste": padding.token_waste,
            "patch_waste": padding.patch_waste,
            "empty_places": sum(index in bad for row in batch.rows for index in row),
        }
        return {name: float(value) for name, value in values.items()}

    @functools.cached_property
    def _data(self) -> str:
        return plan.data_hash([], self._samples.data_hash, self._config.batch_size, self._config.weights)

    def _mine(self, batch: loader.BatchPlan) -> list[int]:
        return [index for row in batch.share(self._share) for index in row]

    def _pack(self, ready: loader.Ready) -> Batch:
        rows = [[self._placed(index, ready) for index in row] for row in ready.plan.share(self._share)]
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

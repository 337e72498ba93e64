"""Records -> batches of stage one. Which records a step sees is a pure function of (seed, step)."""

import functools
import os
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64

from openo3_jax import tasks
from openo3_jax.config import SFTConfig
from openo3_jax.data import annotations, packing, prompts, tokens, transforms, video
from openo3_jax.types import Batch, Sample

LOOK_AHEAD_STEPS = 8  # batches that decide the first static shape
CACHE_BYTES = 4 * 1024**3  # of encoded samples kept between epochs


def records_of_step(num_records: int, batch_size: int, seed: int, step: int) -> Int64[np.ndarray, " batch"]:
    """Indices of the records of step `step` (from 0): epochs of shuffled records, one after the other.

    Example: with 3 records and batches of 2, steps 0, 1, 2 see two whole epochs, each record twice.
    """
    places = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs, within = places // num_records, places % num_records
    order = {epoch: np.random.default_rng([seed, epoch]).permutation(num_records) for epoch in np.unique(epochs)}
    return np.array([order[epoch][i] for epoch, i in zip(epochs, within, strict=True)], np.int64)


class Samples:
    """Record index -> encoded sample, read from the media on first use and kept while there is room.

    A context manager: leaving it ends the decoding process.
    """

    def __init__(
        self,
        records: Sequence[annotations.Record],
        root: str | os.PathLike,
        stage: tasks.Stage,
        processor: tokens.Processor,
        config: SFTConfig,
        wording: prompts.Prompts,
    ):
        self._records = records
        self._root = root
        self._stage = stage
        self._processor = processor
        self._video = config.video
        self._wording = wording
        self._decoder = video.Decoder()
        self._kept: dict[int, Sample] = {}
        self._kept_bytes = 0

    def __enter__(self) -> "Samples":
        return self

    def __exit__(self, *_: object) -> None:
        self._decoder.close()

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Sample:
        if index in self._kept:
            return self._kept[index]
        prepared = transforms.prepare(
            self._records[index],
            self._root,
            self._stage,
            config=self._video,
            wording=self._wording,
            read=self._decoder.read,
        )
        sample = self._processor.encode(prepared.messages)
        if self._kept_bytes + sample.patches.nbytes <= CACHE_BYTES:
            self._kept[index] = sample
            self._kept_bytes += sample.patches.nbytes
        return sample


class SFTBatches:
    """Step -> packed batch, as numpy arrays.

    The static shape is that of the first `LOOK_AHEAD_STEPS` batches and only ever grows, so few programs are compiled.
    """

    def __init__(self, samples: Samples, processor: tokens.Processor, config: SFTConfig, *, rows_multiple: int):
        self._samples = samples
        self._processor = processor
        self._config = config
        self._rows_multiple = rows_multiple  # rows are split over this many devices
        self._bucket: packing.Bucket | None = None

    def __call__(self, step: int) -> Batch:
        if self._bucket is None:
            ahead = range(step, min(step + LOOK_AHEAD_STEPS, self._config.steps))
            self._bucket = functools.reduce(packing.union, (self._need(self._rows(ahead_step)) for ahead_step in ahead))
        rows = self._rows(step)
        self._bucket = packing.union(self._bucket, self._need(rows))
        model, pad_id = self._processor.config, self._processor.pad_id
        return packing.make_batch(rows, self._bucket, model, loss_on=self._config.loss_on, pad_id=pad_id)

    def _rows(self, step: int) -> list[list[Sample]]:
        config = self._config
        indices = records_of_step(len(self._samples), config.batch_size, config.seed, step)
        chosen = [self._samples[int(i)] for i in indices]
        alone = [i for i, sample in enumerate(chosen) if len(sample.tokens) > config.max_row_tokens]
        together = [i for i in range(len(chosen)) if i not in alone]
        packed = packing.pack_rows([chosen[i] for i in together], config.max_row_tokens)
        return [[chosen[i]] for i in alone] + [[chosen[together[i]] for i in row] for row in packed]

    def _need(self, rows: list[list[Sample]]) -> packing.Bucket:
        model = self._processor.config
        num_rows = -(-len(rows) // self._rows_multiple) * self._rows_multiple
        return packing.bucket_for(
            rows, model.vision, num_rows=num_rows, loss_on=self._config.loss_on, image_token_id=model.image_token_id
        )

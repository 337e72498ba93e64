"""Records of stage two -> encoded prompts, step by step, read while the step before is trained on."""

import os
from collections.abc import Sequence
from concurrent import futures
from typing import NamedTuple

from openo3_jax.config import GSPOConfig
from openo3_jax.data import annotations, pipeline, prompts, tokens, transforms, video
from openo3_jax.errors import InputError
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
    """Step (from 0) -> its prompts, a pure function of the seed and the step. A context manager: it owns a decoder.

    A record whose media cannot be read is left out of its step and reported.
    """

    def __init__(
        self,
        records: Sequence[annotations.Record],
        root: str | os.PathLike,
        processor: tokens.Processor,
        config: GSPOConfig,
        wording: prompts.Prompts,
    ):
        self._records = records
        self._root = root
        self._processor = processor
        self._config = config
        self._wording = wording
        self._decoder = video.Decoder()
        self._thread = futures.ThreadPoolExecutor(max_workers=1, thread_name_prefix="prompts")
        self._ahead: dict[int, futures.Future[StepPrompts]] = {}

    def __enter__(self) -> "Prompts":
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(cancel_futures=True)
        self._decoder.close()

    def __call__(self, step: int) -> StepPrompts:
        ready = self._ahead.get(step) or self._thread.submit(self._read, step)
        self._ahead = {step + 1: self._thread.submit(self._read, step + 1)} if step + 1 < self._config.steps else {}
        return ready.result()

    def _read(self, step: int) -> StepPrompts:
        config = self._config
        good, bad = [], []
        for index in pipeline.records_of_step(len(self._records), config.batch_size, config.seed, step).tolist():
            try:
                prepared = transforms.prepare(
                    self._records[index],
                    self._root,
                    "rl",
                    config=config.video,
                    wording=self._wording,
                    read=self._decoder.read,
                )
                sample = self._processor.encode(prepared.messages)
            except InputError as error:
                bad.append(BadPrompt(index, str(error)))
            else:
                good.append(Prompt(index, prepared.reward_record, sample))
        return StepPrompts(good, bad)

"""Calls -> predictions: batched over one policy, resumable, a call that cannot be asked is recorded and passed."""

import collections
import concurrent.futures
import dataclasses
import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax

from openo3_jax import types
from openo3_jax.config import SamplingConfig, VideoConfig
from openo3_jax.data import conversations, video
from openo3_jax.errors import InputError
from openo3_jax.evals import edits, items, store
from openo3_jax.policy import Policy
from openo3_jax.train import metrics, state

KEPT_CLIPS = 2  # decoded clips that are kept for the calls that follow


class Prompt(NamedTuple):
    """A conversation, ready for the model. Sizes as in `items.Prediction`."""

    sample: types.Sample
    shown_hw: tuple[int, int] | None
    source_hw: tuple[int, int] | None


class Reply(NamedTuple):
    """The samples drawn for one prompt."""

    texts: tuple[str, ...]
    logp: tuple[float, ...]
    finished: tuple[bool, ...]


@runtime_checkable
class Answerer(Protocol):
    """Whoever answers: a policy with its settings (`PolicyAnswerer`), or an oracle in a test."""

    def prompt(self, conversation: items.Conversation) -> Prompt:
        """Open the media. Raises InputError for what cannot be asked."""

    def reply(self, prompts: Sequence[Prompt], seeds: Sequence[int]) -> list[Reply]:
        """Answer a batch, one seed each. May raise JaxRuntimeError where the device cannot hold it."""

    @property
    def settings(self) -> Mapping[str, object]:
        """What an answer depends on beside the conversation and the seed."""


class PolicyAnswerer:
    """A policy as an `Answerer`. A context manager: it owns a decoding process and the last few clips.

    `rows`: prompts in a batch; a smaller one is filled up, so that it is no new shape (one alone is not: that is how
    a batch that did not fit is tried again).
    """

    def __init__(self, policy: Policy, config: SamplingConfig, *, rows: int):
        self._policy, self._config, self._rows = policy, config, rows
        self._decoder = video.Decoder()
        self._clips: collections.OrderedDict[tuple[Any, ...], video.Video] = collections.OrderedDict()

    def __enter__(self) -> "PolicyAnswerer":
        return self

    def __exit__(self, *_: object) -> None:
        self._decoder.close()

    @property
    def settings(self) -> Mapping[str, object]:
        policy = self._policy
        return {
            "sampling": dataclasses.asdict(self._config),
            "video": dataclasses.asdict(policy.video),
            "video_mode": policy.video_mode,
            "dtype": str(jax.tree.leaves(policy.params)[0].dtype),
            "weights": self._weights,
        }

    @functools.cached_property
    def _weights(self) -> str:
        """The same model elsewhere has the same, other weights under the same name do not."""
        return f"{state.checksum(self._policy.params):08x}"

    def prompt(self, conversation: items.Conversation) -> Prompt:
        """As in `Answerer`. Beside the usual items there are crops and parts of clips, and regions painted over.

        `{"type": "crop", "video": path, "time_s": s, "box": xyxy px}` is the part of the frame nearest in time,
        stretched to the frame's size. `{"type": "video", "video": path, "hidden": [{"time_s", "box"}, ..]}` has these
        regions of its frames grey. Boxes are in px of the frames shown. A video with `"part_s": [start, end]` is shown
        between these seconds only, and its times count from the first.
        """
        policy, shown = self._policy, []

        def resolve(item: Mapping[str, Any]) -> Mapping[str, Any]:
            if item["type"] == "crop":
                return {"type": "image", "image": edits.crop(self._clip(item["video"], policy.video), item)}
            return item

        def read(path: str | os.PathLike, config: VideoConfig) -> video.Video:
            wanted = clips[len(shown)]
            shown.append(self._clip(path, config, tuple(wanted.get("part_s", ()))))
            return edits.hide(shown[-1], wanted.get("hidden", ()))

        resolved = [
            message
            if isinstance(message["content"], str)
            else {**message, "content": [resolve(item) for item in message["content"]]}
            for message in conversation
        ]
        said = [message["content"] for message in resolved if not isinstance(message["content"], str)]
        clips = [item for content in said for item in content if item["type"] == "video"]
        messages = conversations.load_conversation(
            resolved,
            **policy.processor.image_sizing._asdict(),
            config=policy.video,
            video_mode=policy.video_mode,
            read=read,
        )
        sample = policy.processor.encode(messages)
        if not shown:
            return Prompt(sample, None, None)
        height, width = shown[0].frames.shape[1:3]
        return Prompt(sample, (int(height), int(width)), tuple(shown[0].source_hw))

    def _clip(self, path: str | os.PathLike, config: VideoConfig, part_s: tuple[float, ...] = ()) -> video.Video:
        key = os.path.realpath(path), config, part_s
        if key not in self._clips:
            read = self._decoder.read_part if part_s else self._decoder.read
            self._clips[key] = read(path, config, *part_s)
            while len(self._clips) > KEPT_CLIPS:
                self._clips.popitem(last=False)
        return self._clips[key]

    def fill(self, values: Sequence[Any]) -> list[Any]:
        """As many as a batch has rows, the last one repeated; one alone stays alone."""
        return [*values, *[values[-1]] * (self._rows - len(values) if len(values) > 1 else 0)]

    def reply(self, prompts: Sequence[Prompt], seeds: Sequence[int]) -> list[Reply]:
        samples = self.fill([prompt.sample for prompt in prompts])
        out = self._policy.continue_samples(samples, self._config, self.fill(seeds))
        return [
            Reply(tuple(texts), tuple(float(logp.sum()) for logp in logps), tuple(finished))
            for texts, logps, finished in zip(out.texts, out.logp, out.finished, strict=True)
        ][: len(prompts)]


def predict(
    answerer: Answerer,
    calls: Sequence[items.Call],
    predictions: store.Predictions,
    *,
    seed: int = 0,
    batch_size: int = 8,
    what: str = "eval",
) -> None:
    """Answer every call that `predictions` does not hold yet, a batch at a time, and add the answers to it.

    Clips are decoded while the batch before is answered. A call whose media or text cannot be used, or that alone
    does not fit the device, gets a prediction with its `error`. Raises InputError where a call was asked before with
    another prompt or other settings.
    """
    settings = answerer.settings
    hashes = {call.key: items.hash_of([call.conversation, settings]) for call in calls}
    open_calls = [call for call in calls if not predictions.check(call, hashes[call.key])]

    def outcome(call: items.Call, **found: object) -> items.Prediction:
        own_seed = items.seed_of(seed, call.key)
        return items.Prediction(*call.key, hashes[call.key], own_seed, store.project_commit(), **found)

    def answer(batch: Sequence[tuple[items.Call, Prompt]]) -> list[items.Prediction]:
        seeds = [items.seed_of(seed, call.key) for call, _ in batch]
        try:
            replies = answerer.reply([prompt for _, prompt in batch], seeds)
        except jax.errors.JaxRuntimeError as error:
            if len(batch) > 1:  # one by one: only those that do not fit alone are lost
                return [prediction for one in batch for prediction in answer([one])]
            return [outcome(batch[0][0], error=" ".join(str(error).split())[:300])]
        return [
            outcome(call, **reply._asdict(), shown_hw=prompt.shown_hw, source_hw=prompt.source_hw)
            for (call, prompt), reply in zip(batch, replies, strict=True)
        ]

    done, failed = 0, 0
    with metrics.Progress(what, len(open_calls)) as progress, concurrent.futures.ThreadPoolExecutor(1) as thread:
        waiting = iter(open_calls)
        ahead = thread.submit(_take, answerer, waiting, batch_size)
        while True:
            batch, errors = ahead.result()
            if not batch and not errors:
                break
            ahead = thread.submit(_take, answerer, waiting, batch_size)
            predictions.add(outcome(call, error=error) for call, error in errors)
            found = answer(batch) if batch else []
            predictions.add(found)
            done += len(batch) + len(errors)
            failed += len(errors) + sum(prediction.error is not None for prediction in found)
            progress.update(done, f"{failed} failed")


def _take(
    answerer: Answerer, waiting: Iterator[items.Call], count: int
) -> tuple[list[tuple[items.Call, Prompt]], list[tuple[items.Call, str]]]:
    """The next `count` calls that can be asked, and those in between that cannot, with the reason."""
    batch, errors = [], []
    for call in waiting:
        try:
            batch.append((call, answerer.prompt(call.conversation)))
        except InputError as error:
            errors.append((call, str(error)))
        if len(batch) == count:
            break
    return batch, errors

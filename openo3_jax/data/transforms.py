"""A record and the data root -> the messages of one training sample, and what the rewards need to know of it.

Source: Open-o3-Video src/r1-v/src/open_r1/sft_multi_task.py:239-372, trainer/grpo_trainer.py:461-538.
"""

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from openo3_jax import tags, tasks, types
from openo3_jax.config import VideoConfig
from openo3_jax.data import annotations, conversations, images, media, prompts, store, video

# A file and a size -> pixels of that size, and height and width in px before.
PictureReader = Callable[[str | os.PathLike, images.Size], tuple[np.ndarray, tuple[int, int]]]


@dataclasses.dataclass(frozen=True)
class Prepared:
    """One record, ready for the tokenizer.

    `messages`: system (where there is one) and user, and in SFT the assistant's.
    `image_size`: [width, height] in px that the record's boxes refer to: of the original picture for visual QA,
    of the frames shown for a clip. `image_size_refine`: [width, height] in px of what is shown.
    `duration_s`: length of the clip, None for a picture.
    """

    record: annotations.Record
    messages: list[conversations.Message]
    image_size: list[annotations.Number]
    image_size_refine: list[int]
    duration_s: float | None

    @property
    def reward_record(self) -> annotations.Record:
        """The record with `image_size` and `image_size_refine` as the rewards read them."""
        sizes = {"image_size": self.image_size, "image_size_refine": self.image_size_refine}
        return {**self.record, **sizes}


@runtime_checkable
class Media(Protocol):
    """Where the pixels of records come from; every method raises InputError for what cannot be read."""

    def clip(self, record: annotations.Record) -> video.Video: ...

    def picture(self, record: annotations.Record) -> tuple[np.ndarray, tuple[int, int]]:
        """A visual QA picture, resized, and its height and width in px before."""

    def key_frame(
        self, record: annotations.Record, frame: annotations.KeyFrame, size_hw: tuple[int, int]
    ) -> np.ndarray:
        """An annotated frame of the record's clip, resized to `size_hw` px."""


@dataclasses.dataclass(frozen=True)
class Files:
    """Media in the released layout, read by `read` and `read_picture`."""

    root: str | os.PathLike
    stage: tasks.Stage
    config: VideoConfig
    read: video.Reader
    read_picture: PictureReader = images.fit_picture

    def clip(self, record: annotations.Record) -> video.Video:
        return self.read(media.find_media(self.root, record, self.stage), self.config)

    def picture(self, record: annotations.Record) -> tuple[np.ndarray, tuple[int, int]]:
        return self.read_picture(media.find_media(self.root, record, self.stage), images.Area())

    def key_frame(
        self, record: annotations.Record, frame: annotations.KeyFrame, size_hw: tuple[int, int]
    ) -> np.ndarray:
        return self.read_picture(media.find_key_frame(self.root, record, frame, self.stage), size_hw)[0]


def prepare(
    record: annotations.Record,
    root: str | os.PathLike,
    stage: tasks.Stage,
    *,
    config: VideoConfig,
    wording: prompts.Prompts,
    read: video.Reader = video.read_video,
) -> Prepared:
    """`assemble` with the media under `root`.

    Raises: InputError for media that are missing, outside the root or unreadable, and as `assemble` does.
    """
    return assemble(record, Files(root, stage, config, read), stage, config=config, wording=wording)


def assemble(
    record: annotations.Record, source: Media, stage: tasks.Stage, *, config: VideoConfig, wording: prompts.Prompts
) -> Prepared:
    """Frames or picture, question, and in SFT the answer with its boxes in px of what is shown.

    Raises: InputError as `source` does, and in SFT for a `<box>[..]</box>` of the texts that does not hold four
    numbers.
    """
    if record["task"] == tasks.VISUAL:
        return _assemble_picture(record, source, stage, wording)
    clip = source.clip(record)
    shown = _uniform(clip)
    if record["task"] == tasks.TEMPORAL_SPATIAL and config.key_frames != "none":
        keys = [_key_shown(frame, record, source, clip, stage) for frame in record["key_frames"]]
        shown = _insert_released(shown, keys, stage) if config.key_frames == "released" else _insert(shown, keys)
    if config.key_frames == "released":
        lines = _released_items(shown, clip, record["task"], stage)
    else:
        lines = _items(shown, clip)
    width, height = clip.size_wh
    scale = (float(width), float(height)) if record["task"] == tasks.TEMPORAL_SPATIAL else None
    messages = _messages(record, lines, stage, wording, scale)
    return Prepared(record, messages, [width, height], [width, height], clip.duration_s)


def prepare_all(
    records: Sequence[annotations.Record],
    root: str | os.PathLike,
    stage: tasks.Stage,
    *,
    config: VideoConfig,
    wording: prompts.Prompts,
) -> list[Prepared]:
    """`prepare` for a few records with one decoding process; a clip that several of them share is decoded once.

    `root` may be a prepared set. Raises: InputError as `prepare` does.
    """
    if store.is_prepared(root):
        stored = store.Stored(root, stage, config)
        return [assemble(r, stored.media(r), stage, config=config, wording=wording) for r in records]
    with video.Decoder() as decoder:
        read = video.make_reader(decoder)
        return [prepare(r, root, stage, config=config, wording=wording, read=read) for r in records]


def _assemble_picture(
    record: annotations.Record, source: Media, stage: tasks.Stage, wording: prompts.Prompts
) -> Prepared:
    pixels, source_hw = source.picture(record)
    height, width = pixels.shape[:2]
    old_size = list(record.get("image_size") or source_hw[::-1])
    scale = width / old_size[0], height / old_size[1]
    shown = conversations.picture_item(types.Picture(pixels[None]))
    messages = _messages(record, [shown], stage, wording, scale)
    return Prepared(record, messages, old_size, [width, height], None)


# ---- frames and key frames ----


class _Shown(NamedTuple):
    """A frame of the prompt: its picture, its time in seconds, and its label where the reference's differs."""

    picture: types.Picture
    time_s: float
    label: str


def _uniform(clip: video.Video) -> list[_Shown]:
    times_s = clip.times_s.tolist()
    return [
        _Shown(types.Picture(frame[None]), t, str(round(t, 1))) for frame, t in zip(clip.frames, times_s, strict=True)
    ]


def _key_shown(
    frame: annotations.KeyFrame,
    record: annotations.Record,
    source: Media,
    clip: video.Video,
    stage: tasks.Stage,
) -> _Shown:
    """A key frame at the clip's frame size; the reference labels it with the raw time in SFT, rounded in RL."""
    width, height = clip.size_wh
    picture = types.Picture(source.key_frame(record, frame, (height, width))[None])
    label = str(frame["time"]) if stage == "sft" else str(round(frame["time"]))
    return _Shown(picture, float(frame["time"]), label)


def _insert(uniform: Sequence[_Shown], keys: Sequence[_Shown]) -> list[_Shown]:
    """All frames in the order of their times; of two with the same time the key frame comes first."""
    return sorted([*keys, *uniform], key=lambda shown: shown.time_s)


def _insert_released(uniform: Sequence[_Shown], keys: Sequence[_Shown], stage: tasks.Stage) -> list[_Shown]:
    """Key frames as the reference inserts them: before the first uniform frame whose whole second reaches them.

    One that no uniform frame reaches is lost. RL compares rounded times.

    Source: sft_multi_task.py:321-348, grpo_trainer.py:503-532.
    """
    merged, waiting = [], list(keys)
    for frame in uniform:
        while waiting and int(frame.time_s) >= (waiting[0].time_s if stage == "sft" else round(waiting[0].time_s)):
            merged.append(waiting.pop(0))
        merged.append(frame)
    return merged


def _items(shown: Sequence[_Shown], clip: video.Video) -> list[conversations.Item]:
    pixels = np.concatenate([frame.picture.pixels for frame in shown])
    times_s = np.array([frame.time_s for frame in shown])
    return conversations.clip_items(dataclasses.replace(clip, frames=pixels, times_s=times_s))


def _released_items(
    shown: Sequence[_Shown], clip: video.Video, task: str, stage: tasks.Stage
) -> list[conversations.Item]:
    """The reference's lines: SFT writes no unit where there are no key frames, no length where there are.

    Source: sft_multi_task.py:331-372, grpo_trainer.py:478-538.
    """
    is_annotated = task == tasks.TEMPORAL_SPATIAL
    unit = "s" if stage == "rl" or is_annotated else ""
    items = []
    for number, frame in enumerate(shown, 1):
        items += [
            conversations.text_item(f"Frame {number} at {frame.label}{unit}: "),
            conversations.picture_item(frame.picture),
            conversations.text_item("\n"),
        ]
    has_length = stage == "rl" or not is_annotated
    return [*items, conversations.text_item(prompts.render_total(clip.duration_s))] if has_length else items


# ---- messages ----


def _messages(
    record: annotations.Record,
    media_items: Sequence[conversations.Item],
    stage: tasks.Stage,
    wording: prompts.Prompts,
    scale: tuple[float, float] | None,
) -> list[conversations.Message]:
    """System, user and in SFT assistant; `scale` (x, y) takes the boxes of SFT texts to px of what is shown.

    Source: sft_multi_task.py:56-204, 239-250, 267-279.
    """

    def rewrite(text: str) -> str:
        if stage == "rl" or scale is None:
            return text
        x, y = scale
        return tags.rewrite_boxes(text, lambda box: [box[0] * x, box[1] * y, box[2] * x, box[3] * y])

    prompt = wording.of(stage, record["task"])
    question = conversations.text_item(prompt.ask(rewrite(record["question"])))
    user = conversations.join_texts([*media_items, question])
    messages = [{"role": "user", "content": user}]
    if prompt.system:
        messages.insert(0, {"role": "system", "content": [conversations.text_item(prompt.system)]})
    if stage == "sft":
        said = tags.render_think_answer(rewrite(record["reasoning_process"]), rewrite(record["answer"]))
        messages.append({"role": "assistant", "content": [conversations.text_item(said)]})
    return messages

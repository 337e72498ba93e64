"""Chat messages with paths and pixels, as transformers writes them -> messages with `types.Picture`s, sized."""

import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from PIL import Image

from openo3_jax import types
from openo3_jax.config import VideoConfig
from openo3_jax.data import images, prompts, video
from openo3_jax.errors import InputError

Item = dict[str, Any]  # {"type": "text", "text": str} or {"type": "picture", "picture": types.Picture}
Message = dict[str, Any]  # {"role": str, "content": list[Item]}
VideoMode = Literal["frames", "native"]

ROLES = ("system", "user", "assistant")
_ITEM_TYPES: Mapping[str, tuple[type, ...]] = {
    "text": (str,),
    "image": (str, os.PathLike, Image.Image, np.ndarray),
    "video": (str, os.PathLike),
}


def text_item(text: str) -> Item:
    return {"type": "text", "text": text}


def picture_item(picture: types.Picture) -> Item:
    return {"type": "picture", "picture": picture}


def load_conversation(
    conversation: Sequence[Mapping[str, Any]],
    *,
    min_pixels: int,
    max_pixels: int,
    config: VideoConfig,
    video_mode: VideoMode = "frames",
    read: video.Reader = video.read_video,
) -> list[Message]:
    """Open what the messages point at; texts stay as they are, adjacent ones are joined.

    An image (path, Pillow image or uint8 [height, width, 3]) gets an area of min_pixels..max_pixels px. A video
    (path) becomes one line per frame and its length, or with `video_mode="native"` one picture of all frames.
    `read` decodes; `video.make_reader` makes one that uses one process and decodes each clip once.

    Raises: InputError with message and item index for another structure, and for media that cannot be read.
    """
    check_conversation(conversation)

    def load(item: Mapping[str, Any]) -> list[Item]:
        if item["type"] == "text":
            return [text_item(item["text"])]
        if item["type"] == "image":
            return [picture_item(load_image(item["image"], min_pixels=min_pixels, max_pixels=max_pixels))]
        clip = read(item["video"], config)
        return [picture_item(to_native(clip))] if video_mode == "native" else clip_items(clip)

    return [
        {"role": message["role"], "content": join_texts([new for item in _items(message) for new in load(item)])}
        for message in conversation
    ]


def check_conversation(conversation: Any) -> None:
    """A list of messages, each with a role and content: a text, or a list of text, image and video items.

    Raises: InputError with message and item index for anything else.
    """
    if not isinstance(conversation, Sequence) or isinstance(conversation, str) or not conversation:
        got = "an empty list" if conversation == [] else type(conversation).__name__
        raise InputError(f"conversation: got {got}; expected a list of messages")
    for i, message in enumerate(conversation):
        where = f"message {i}"
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            got = sorted(message) if isinstance(message, Mapping) else type(message).__name__
            raise InputError(f"{where}: got {got}; expected a dict with role and content")
        if message["role"] not in ROLES:
            raise InputError(f"{where}: role={message['role']!r}; expected one of {', '.join(ROLES)}")
        content = message["content"]
        if not isinstance(content, str | list | tuple):
            got = type(content).__name__
            raise InputError(f"{where}: content is {got}; expected a text or a list of items")
        for j, item in enumerate(_items(message)):
            _check_item(item, f"{where}, item {j}")


def _check_item(item: Any, where: str) -> None:
    if not isinstance(item, Mapping) or item.get("type") not in tuple(_ITEM_TYPES):
        got = item.get("type") if isinstance(item, Mapping) else type(item).__name__
        raise InputError(f"{where}: type={got!r}; expected one of {', '.join(_ITEM_TYPES)}")
    kind = item["type"]
    if not isinstance(item.get(kind), _ITEM_TYPES[kind]):
        got = type(item[kind]).__name__ if kind in item else "nothing"
        expected = " or ".join(allowed.__name__ for allowed in _ITEM_TYPES[kind])
        raise InputError(f"{where}: {kind} is {got}; expected {expected}")


def _items(message: Mapping[str, Any]) -> Sequence[Any]:
    content = message["content"]
    return [text_item(content)] if isinstance(content, str) else content


def load_image(
    source: str | os.PathLike | Image.Image | np.ndarray, *, min_pixels: int, max_pixels: int
) -> types.Picture:
    """A still of min_pixels..max_pixels px, its sides multiples of 28 px.

    Raises: InputError, with the path if there is one, for what is not a picture or over 200 times as long as wide.
    """
    return types.Picture(images.fit_picture(source, images.Area(min_pixels, max_pixels, "transformers"))[0][None])


def clip_items(clip: video.Video) -> list[Item]:
    """For each frame its number and time, the frame, a newline; then how long the clip is."""
    items = []
    for i, time_s in enumerate(clip.times_s.tolist()):
        picture = picture_item(types.Picture(clip.frames[i : i + 1]))
        items += [text_item(prompts.render_frame(i + 1, time_s)), picture, text_item("\n")]
    return [*items, text_item(prompts.render_total(clip.duration_s))]


def to_native(clip: video.Video) -> types.Picture:
    """All frames as one picture; a temporal patch is two frames, 2 / (frames / duration) seconds.

    Source: Open-o3-Video eval/models/model_vllm.py:39-90.
    """
    return types.Picture(clip.frames, seconds_per_grid=2 * clip.duration_s / len(clip.frames))


def join_texts(items: Sequence[Item]) -> list[Item]:
    """Adjacent texts as one item."""
    joined: list[Item] = []
    for item in items:
        if joined and item["type"] == joined[-1]["type"] == "text":
            joined[-1] = text_item(joined[-1]["text"] + item["text"])
        else:
            joined.append(item)
    return joined

"""What a benchmark asks and what came back: items, their calls, predictions. Vocabulary of this package."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from openo3_jax.errors import InputError

Conversation = Sequence[Mapping[str, Any]]
Key = tuple[str, str]  # an item's id and the name of one of its calls


@dataclasses.dataclass(frozen=True)
class Item:
    """One line of a benchmark.

    `calls`: name -> what is asked; the calls of an item are independent of each other. `truth`: what its scorer
    reads. `groups`: dimension -> value, for the tables by duration, domain and so on.
    """

    id: str
    calls: Mapping[str, Conversation]
    truth: Any
    groups: Mapping[str, str]


class Call(NamedTuple):
    """One question to the model."""

    item: str
    name: str
    conversation: Conversation

    @property
    def key(self) -> Key:
        return self.item, self.name


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What the model said to one call, sample by sample, or why it could not be asked.

    `logp`: nats of each whole sample; `finished`: False where the limit cut it. `shown_hw`: height and width in px of
    the frames that the model saw, `source_hw` of the clip's own; None without a clip.
    """

    item: str
    call: str
    prompt_hash: str
    seed: int
    commit: str
    texts: tuple[str, ...] = ()
    logp: tuple[float, ...] = ()
    finished: tuple[bool, ...] = ()
    shown_hw: tuple[int, int] | None = None
    source_hw: tuple[int, int] | None = None
    error: str | None = None

    @property
    def key(self) -> Key:
        return self.item, self.call

    @property
    def text(self) -> str:
        """The first sample; "" where the call failed."""
        return self.texts[0] if self.texts else ""


def calls_of(items: Sequence[Item]) -> list[Call]:
    """Item after item, so that calls about one clip follow each other. Raises InputError for an id that comes twice."""
    seen: set[str] = set()
    for item in items:
        if item.id in seen:
            raise InputError(f"item {item.id!r} comes twice; expected ids that differ")
        seen.add(item.id)
    return [Call(item.id, name, asked) for item in items for name, asked in item.calls.items()]


def ask(
    text: str, *, video: str | os.PathLike | None = None, images: Sequence[Any] = (), system: str = ""
) -> Conversation:
    """System message (if any), then the user's: clip, pictures, words."""
    content = [{"type": "video", "video": video}] if video is not None else []
    content += [{"type": "image", "image": image} for image in images]
    user = {"role": "user", "content": [*content, {"type": "text", "text": text}]}
    return [{"role": "system", "content": system}, user] if system else [user]


def clip_of(conversation: Conversation) -> str | os.PathLike | None:
    """The first video of a conversation, None without one."""
    content = [
        item for message in conversation if not isinstance(message["content"], str) for item in message["content"]
    ]
    return next((item["video"] for item in content if item["type"] == "video"), None)


def hash_of(value: Any) -> str:
    """16 hexadecimal digits that tell apart conversations and settings; of media files the names count."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=_describe).encode()).hexdigest()[:16]


def _describe(value: Any) -> Any:
    if isinstance(value, os.PathLike):
        return Path(value).name
    if isinstance(value, Image.Image):
        return [value.size, hashlib.sha256(value.tobytes()).hexdigest()]
    assert isinstance(value, np.ndarray), type(value)
    return [value.shape, hashlib.sha256(value.tobytes()).hexdigest()]


def seed_of(seed: int, key: Key) -> int:
    """The seed of one call, the same wherever it stands in a batch or a run; below 2^31."""
    return int(hashlib.sha256(json.dumps([seed, *key]).encode()).hexdigest()[:8], 16) >> 1

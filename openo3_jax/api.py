"""The facade: what `openo3_jax` offers in code, from where it is made, and `score` with media to derive sizes from."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from openo3_jax import tasks
from openo3_jax.config import VideoConfig
from openo3_jax.data import images, media, video
from openo3_jax.errors import InputError
from openo3_jax.policy import Generations, Policy, load_pretrained
from openo3_jax.rewards import parse
from openo3_jax.rewards import score as score_lib
from openo3_jax.rewards.rules import RewardRules
from openo3_jax.rewards.score import Rewards
from openo3_jax.tiny import init_tiny
from openo3_jax.train.state import TrainState, make_state
from openo3_jax.train.steps import make_gspo_step, make_sft_step
from openo3_jax.types import Rollouts

__all__ = [
    "Generations",
    "MediaSizes",
    "Policy",
    "Rewards",
    "Rollouts",
    "TrainState",
    "init_tiny",
    "load_pretrained",
    "make_gspo_step",
    "make_sft_step",
    "make_state",
    "score",
]


def score(
    records: Sequence[Any],
    completions: Sequence[Any],
    *,
    progress: parse.Progress = 1.0,
    rules: str | RewardRules = "paper",
    root: str | os.PathLike | None = None,
) -> Rewards:
    """Score every completion against its STGR-RL record; see `rewards.score.score` for the rules and the result.

    `root`: the data root in the released layout, from whose media `image_size` and `image_size_refine` are derived
    for records that lack them.

    Raises: InputError for a record that cannot be used, or whose sizes are neither given nor found.
    """
    if root is None:
        return score_lib.score(records, completions, progress=progress, rules=rules)
    with MediaSizes(root) as sizes:
        return score_lib.score(records, completions, progress=progress, rules=rules, sizes=sizes)


class MediaSizes:
    """A record -> the sizes its rewards need, [width, height] in px, read from its picture or clip under `root`.

    A clip's size is that of the frames shown under the reference's settings, `VideoConfig()`; each file is read
    once. A context manager: leaving it ends the decoding process.
    """

    def __init__(self, root: str | os.PathLike):
        self._root = root
        self._decoder = video.Decoder()
        self._known: dict[str, dict[str, list[int]]] = {}

    def __enter__(self) -> "MediaSizes":
        return self

    def __exit__(self, *_: object) -> None:
        self._decoder.close()

    def __call__(self, record: Mapping[str, Any]) -> dict[str, list[int]]:
        """Only the sizes that the record has not. Raises InputError for a missing field or media that cannot be read.

        Source: Open-o3-Video src/r1-v/src/open_r1/trainer/grpo_trainer.py:461.
        """
        is_picture = record["task"] == tasks.VISUAL
        for field in ("source", "image_path" if is_picture else "video_path"):
            if not isinstance(record.get(field), str):
                raise InputError(
                    f"{field}={record.get(field)!r}; expected a text, to find the media under {self._root}"
                )
        path = os.fspath(media.find_media(self._root, record, "rl"))
        if path not in self._known:
            self._known[path] = _picture_sizes(path) if is_picture else self._clip_sizes(path)
        return {field: size for field, size in self._known[path].items() if record.get(field) is None}

    def _clip_sizes(self, path: str) -> dict[str, list[int]]:
        size = list(self._decoder.probe(path, VideoConfig()).size_wh)
        return {"image_size": size, "image_size_refine": size}


def _picture_sizes(path: str) -> dict[str, list[int]]:
    shown, source_hw = images.probe_picture(path, images.Area())
    return {"image_size": list(source_hw[::-1]), "image_size_refine": list(shown.shape[1::-1])}

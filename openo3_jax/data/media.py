"""A record and the data root -> the path of its video, picture or key frame, never outside the root.

Source: Open-o3-Video src/r1-v/src/open_r1/sft_multi_task.py:61-177, 315-317 and trainer/grpo_trainer.py:412-435,
496-501; directories as in the README's "Data Preparation".
"""

import os
import pathlib
from collections.abc import Sequence

from openo3_jax import tasks
from openo3_jax.data.annotations import KeyFrame, Record
from openo3_jax.errors import InputError

# Directories under videos/, in the order they are tried; two where copies of the data differ.
_PLM = ("stgr/plm/videos",)
_GROUNDING = ("stgr/temporal_grounding/videos",)
_ESPRESSO = ("videoespresso/videos", "")
_KEY_FRAMES = {
    _PLM: ("stgr/plm/kfs",),
    _GROUNDING: ("stgr/temporal_grounding/kfs",),
    _ESPRESSO: ("videoespresso/kfs", ""),
}
# RL chooses by what the source contains, first match first.
_RL_SOURCES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("videoespresso_train_video", _ESPRESSO),
    ("timerft", ("timerft",)),
    ("gqa", ("gqa",)),
    ("STR_plm", _PLM),
    ("STR", _GROUNDING),
    ("TVG", ("tvg_r1",)),
    ("videor1", ("videor1",)),
)
_SFT_TASKS: dict[str, tuple[str, ...]] = {
    tasks.VISUAL: ("treevgr", "treevgr/images"),
    tasks.TEMPORAL: ("tvg_r1",),
    tasks.GENERAL_MCQ: ("videor1",),
    tasks.GENERAL_FREE_FORM: ("videor1",),
}


def find_media(root: str | os.PathLike, record: Record, stage: tasks.Stage) -> pathlib.Path:
    """The record's video, or its picture for visual QA.

    Raises: InputError for a path that leaves the root, a source that no directory is known for, and a missing
    file, with every path tried.
    """
    field = media_field(record)
    return _find(root, directories(record, stage), record[field], field)


def media_field(record: Record) -> str:
    """The field that names the record's video or picture."""
    return "image_path" if record["task"] == tasks.VISUAL else "video_path"


def is_first_choice(root: str | os.PathLike, record: Record, stage: tasks.Stage, path: str) -> bool:
    """Whether `path`, which `find_media` gave, lies where the reference looks for it."""
    return path == os.path.join(root, "videos", directories(record, stage)[0], record[media_field(record)])


def find_key_frame(root: str | os.PathLike, record: Record, key_frame: KeyFrame, stage: tasks.Stage) -> pathlib.Path:
    """The picture of one annotated frame of the record's clip.

    Raises: InputError as `find_media` does.
    """
    return _find(root, key_frame_directories(record, stage), key_frame["path"], "key_frames.path")


def key_frame_directories(record: Record, stage: tasks.Stage) -> tuple[str, ...]:
    """Directories under videos/ for the key frames of the record, likewise. Raises: InputError if none is known."""
    places = directories(record, stage)
    if places not in _KEY_FRAMES:
        raise InputError(
            f"source={record['source']!r}: no directory of key frames is known for it; "
            "expected a source that contains STR, or videoespresso_train_video"
        )
    return _KEY_FRAMES[places]


def directories(record: Record, stage: tasks.Stage) -> tuple[str, ...]:
    """Directories under videos/ in which the record's video or picture is looked for, in this order."""
    source = record["source"]
    if stage == "sft":
        if record["task"] == tasks.TEMPORAL_SPATIAL:
            return _PLM if source == "STR_plm_rdcap" else _GROUNDING
        return _SFT_TASKS[record["task"]]
    for part, places in _RL_SOURCES:
        if part in source:
            return places
    known = ", ".join(part for part, _ in _RL_SOURCES)
    raise InputError(f"source={source!r}: no media directory is known for it; expected one that contains {known}")


def find_inside(root: str | os.PathLike, name: str, field: str) -> pathlib.Path:
    """The file `name` under `root`; `field` says where the name came from. Raises: InputError as `find_media` does."""
    return _find(root, [""], name, field, above="")


def _find(
    root: str | os.PathLike, directories: Sequence[str], name: str, field: str, above: str = "videos"
) -> pathlib.Path:
    parts = name.replace("\\", "/").split("/")
    if not name or "\0" in name or name.startswith(("/", "\\")) or ".." in parts or parts[0][1:2] == ":":
        raise InputError(f"{field}={name!r}: expected a path relative to the data root, without '..'")
    inside = os.path.realpath(root)
    tried = []
    for directory in directories:
        path = os.path.join(root, above, directory, name)
        if os.path.isfile(path):
            real = os.path.realpath(path)
            if os.path.commonpath([inside, real]) != inside:
                raise InputError(f"{path}: is a link to {real}, outside the data root {inside}; copy the file in")
            return pathlib.Path(path)
        tried.append(path)
    raise InputError(f"{field}={name!r}: no such file; tried {', '.join(tried)}")

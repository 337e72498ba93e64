"""A prepared data set on disk: what lies where, and records with their pixels read back from it."""

import dataclasses
import functools
import hashlib
import io
import json
import os
import pathlib
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import numpy as np
from PIL import Image

from openo3_jax import tasks
from openo3_jax.config import VideoConfig
from openo3_jax.data import annotations, files
from openo3_jax.data.video import Video
from openo3_jax.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

Frames = Literal["jpeg", "raw"]

MANIFEST = "manifest.json"
SIZES = "sizes-{stage}.jsonl"  # a line for each record, what is known without its pixels
LIMITS = ("deadline_s", "max_side_px")  # settings that only bound the decoding: no pixel or time depends on them
_UNSTORED = (*LIMITS, "key_frames")  # nor what is on disk: key frames are chosen from among what is stored


class Damage(NamedTuple):
    """A file of a prepared set that is not as it was written; fields as those of `check.Finding`."""

    level: str  # "problem"
    stage: tasks.Stage
    path: str
    what: str


class Sizes(NamedTuple):
    """What is known of a record's media without its pixels; fields as in `stgr_dataset.make_features`."""

    shape_hw: tuple[int, int]
    source_hw: tuple[int, int]
    times_s: "Sequence[float]"
    duration_s: float


def is_prepared(root: str | os.PathLike) -> bool:
    """Whether a manifest of ours is there. Raises: InputError for one that is no JSON, whosesoever it is."""
    return os.path.isfile(os.path.join(root, MANIFEST)) and _is_ours(_load_manifest(root))


def record_key(record: annotations.Record) -> str:
    """Names a record by what it says."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:24]


def stored_settings(config: VideoConfig) -> dict[str, Any]:
    """The settings that pixels and times on disk depend on."""
    return {name: value for name, value in dataclasses.asdict(config).items() if name not in _UNSTORED}


class Stored:
    """The records of one stage of a prepared set. Any number of threads may read.

    Raises: InputError if the set was prepared with other settings, or has no such stage.
    """

    def __init__(self, root: str | os.PathLike, stage: tasks.Stage, config: VideoConfig):
        self._root = pathlib.Path(root)
        manifest = fitting_manifest(root, stage, config)
        self._frames: Frames = manifest["frames"]
        self._directory = self._root / manifest["stages"][stage]["directory"]
        self._index: dict[str, int] = {}
        self._sizes: list[Sizes] = []
        for _, values in files.read_jsonl(self._root / SIZES.format(stage=stage)):
            self._index.setdefault(values.pop("key"), len(self._sizes))
            self._sizes.append(Sizes(**values))

    @functools.cached_property
    def _examples(self) -> Any:
        import tensorflow_datasets as tfds  # here: it takes seconds to import

        from openo3_jax.data import stgr_dataset

        return tfds.builder_from_directory(os.fspath(self._directory)).as_data_source(stgr_dataset.SPLIT)

    def media(self, record: annotations.Record) -> "OneRecord":
        """Pixels, times and sizes of a record. Raises: InputError for a record that the set does not hold."""
        number = self._find(record)
        pictures = self._examples[number]["pictures"]
        return OneRecord(self._sizes[number], [self._decode(picture, number) for picture in pictures])

    def hollow(self, record: annotations.Record) -> "OneRecord":
        """Times and sizes of a record, and black pixels without memory. Raises: as `media` does."""
        sizes = self._sizes[self._find(record)]
        black = np.broadcast_to(np.uint8(0), (*sizes.shape_hw, 3))
        num = max(1, len(sizes.times_s)) + len(record.get("key_frames") or [])
        return OneRecord(sizes, [black] * num)

    def _find(self, record: annotations.Record) -> int:
        number = self._index.get(record_key(record))
        if number is None:
            raise InputError(
                f"{self._root}: holds no such record ({record['source']}: {record['question'][:60]!r}); prepare again"
            )
        return number

    def _decode(self, content: bytes, number: int) -> np.ndarray:
        height, width = self._sizes[number].shape_hw
        if self._frames == "raw":
            return np.frombuffer(content, np.uint8).reshape(height, width, 3)
        with Image.open(io.BytesIO(content)) as picture:
            return np.asarray(picture.convert("RGB"))


@dataclasses.dataclass(frozen=True)
class OneRecord:
    """The media of one record, read already; a `transforms.Media` for that record."""

    sizes: Sizes
    pictures: "Sequence[np.ndarray]"  # frames, then key frames; or the picture

    def clip(self, record: annotations.Record) -> Video:
        times_s = np.asarray(self.sizes.times_s, np.float64)
        frames = self.pictures[: len(times_s)]
        is_hollow = frames[0].strides == (0, 0, 0)
        stacked = np.broadcast_to(np.uint8(0), (len(frames), *frames[0].shape)) if is_hollow else np.stack(frames)
        return Video(stacked, times_s, self.sizes.duration_s, tuple(self.sizes.source_hw))

    def picture(self, record: annotations.Record) -> tuple[np.ndarray, tuple[int, int]]:
        return self.pictures[0], tuple(self.sizes.source_hw)

    def key_frame(
        self, record: annotations.Record, frame: annotations.KeyFrame, size_hw: tuple[int, int]
    ) -> np.ndarray:
        return self.pictures[len(self.sizes.times_s) + record["key_frames"].index(frame)]


def fitting_manifest(root: str | os.PathLike, stage: tasks.Stage, config: VideoConfig) -> dict[str, Any]:
    """As `read_manifest`. Raises: InputError also if the set was prepared with other settings, or has no such stage."""
    manifest = read_manifest(root)
    other = {k: v for k, v in stored_settings(config).items() if manifest["video"].get(k) != v}
    if other:
        said = ", ".join(f"{name}={manifest['video'].get(name)!r}, not {value!r}" for name, value in other.items())
        raise InputError(f"{root}: was prepared with {said}; prepare it again, or use its settings")
    if stage not in manifest["stages"]:
        raise InputError(f"{root}: has no {stage} stage; prepare a root that has {annotations.STAGE_FILES[stage]}")
    return manifest


def read_manifest(root: str | os.PathLike) -> dict[str, Any]:
    """What a prepared set says of itself. Raises: InputError unless it is as `prepare` has written it."""
    manifest = _load_manifest(root)
    if not _is_ours(manifest) or not _is_whole(manifest):
        raise InputError(f"{root}/{MANIFEST}: is not as `openo3 data prepare` writes it; prepare again")
    return manifest


def _load_manifest(root: str | os.PathLike) -> Any:
    try:
        return json.loads(pathlib.Path(root, MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"{root}/{MANIFEST}: cannot be read ({error}); expected that of a prepared set: prepare again, or remove it"
        ) from None


def _is_ours(manifest: Any) -> bool:
    return isinstance(manifest, dict) and {"frames", "video", "stages"} <= manifest.keys()


def _is_whole(manifest: dict[str, Any]) -> bool:
    stages = manifest["stages"]
    return (
        manifest["frames"] in get_args(Frames)
        and isinstance(manifest["video"], dict)
        and isinstance(stages, dict)
        and all(map(_is_stage, stages.values()))
    )


def _is_stage(stage: Any) -> bool:
    return (
        isinstance(stage, dict)
        and isinstance(stage.get("directory"), str)
        and isinstance(stage.get("files"), list)
        and all(isinstance(file, dict) and isinstance(file.get("path"), str) for file in stage["files"])
    )


def verify(root: str | os.PathLike) -> list[Damage]:
    """The files of a prepared set that are missing or differ from its manifest."""
    damaged = []
    for stage, made in read_manifest(root)["stages"].items():
        for file in made["files"]:
            path = os.path.join(root, file["path"])
            if not os.path.isfile(path):
                damaged.append(Damage("problem", stage, path, "is missing; prepare again"))
            elif describe_file(root, file["path"]) != file:
                what = f"is damaged, its SHA-256 is not that of {MANIFEST}; prepare again"
                damaged.append(Damage("problem", stage, path, what))
    return damaged


def describe_file(root: str | os.PathLike, path: str) -> dict[str, Any]:
    """Path within the root, size and hash, as the manifest lists them."""
    full = os.path.join(root, path)
    with open(full, "rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"path": path, "bytes": os.path.getsize(full), "sha256": digest}

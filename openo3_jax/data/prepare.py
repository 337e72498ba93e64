"""A data root -> an ArrayRecord set whose frames are chosen, resized and stored, so that training reads no video.

An interrupted preparation goes on where it stopped: records are written in parts, each whole or not at all.
"""

import io
import itertools
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from openo3_jax import model_files, tasks
from openo3_jax.config import VideoConfig
from openo3_jax.data import annotations, plan, stgr_dataset, store, transforms, workers
from openo3_jax.data.bad_records import BadRecords
from openo3_jax.data.video import Decoder
from openo3_jax.errors import InputError

PART_RECORDS = 128
JPEG_QUALITY = 95
BAD_SAMPLES = "bad_samples.jsonl"
_PARTS = ".parts"  # of a preparation under way

Advance = Callable[[int, int], None]  # records done, of how many
Prepared = dict[str, Any] | None  # an example of `stgr_dataset.make_features`; None for a record that cannot be used


def prepare_root(
    root: str | os.PathLike,
    out: str | os.PathLike,
    *,
    frames: store.Frames,
    config: VideoConfig,
    jobs: int,
    max_bad_fraction: float,
    advance: Advance = lambda done, total: None,
) -> dict[str, Any]:
    """Write both stages of `root` (those it has) into `out`; returns the manifest.

    `out` holds stgr/{cot,rl}/ (TFDS), json_data/ with the records that could be used, in the order of the set,
    sizes-*.jsonl, bad_samples.jsonl and, at the end, manifest.json: settings, counts and hashes.

    Raises: InputError for bad records, for an `out` that holds something else or was begun with other settings, and
    if more than `max_bad_fraction` of the records of a stage cannot be used.
    """
    root, out = pathlib.Path(root), pathlib.Path(out)
    stages = {s: annotations.load_stage(root, s) for s in annotations.STAGE_FILES if _has_stage(root, s)}
    if not 0 <= max_bad_fraction < 1:
        raise InputError(f"max_bad_fraction={max_bad_fraction:g}; expected a share in [0, 1)")
    if not stages:
        raise InputError(f"{root}: no json_data/STGR-SFT.json or STGR-RL.json; expected a data root as released")
    _begin(out, {"frames": frames, "video": store.stored_settings(config)})
    total, done = sum(map(len, stages.values())), itertools.count(1)
    manifest: dict[str, Any] = {"frames": frames, "video": store.stored_settings(config), "stages": {}}
    (out / BAD_SAMPLES).unlink(missing_ok=True)
    with workers.Decoders(jobs) as decoders:
        for stage, records in stages.items():
            bad = BadRecords(records, max_bad_fraction, out / BAD_SAMPLES)
            encode = _Encoder(root, stage, records, config, frames, bad)
            parts = []
            for start in range(0, len(records), PART_RECORDS):
                indices = range(start, min(start + PART_RECORDS, len(records)))
                parts.append(_write_part(out, encode, decoders, indices, lambda: advance(next(done), total)))
            manifest["stages"][stage] = _finish_stage(out, stage, records, parts, bad)
    (out / store.MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(out / _PARTS)
    return manifest


def _has_stage(root: pathlib.Path, stage: tasks.Stage) -> bool:
    return os.path.exists(annotations.stage_file(root, stage))


def _begin(out: pathlib.Path, settings: dict[str, Any]) -> None:
    """Make `out`, or find that it holds a preparation with the same settings that was interrupted."""
    file = out / _PARTS / "settings.json"
    if file.is_file():
        if json.loads(file.read_text()) != settings:
            raise InputError(f"{out}: was begun with other settings; remove it, or choose another place")
        return
    model_files.check_new(out)
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(settings))


class _Encoder:
    """Index of a record -> its example, read by a decoder."""

    def __init__(
        self,
        root: pathlib.Path,
        stage: tasks.Stage,
        records: Sequence[annotations.Record],
        config: VideoConfig,
        frames: store.Frames,
        bad: BadRecords,
    ):
        self.stage = stage
        self.records = records
        self.bad = bad
        self._root = root
        self._config = config
        self._frames = frames

    def __call__(self, decoder: Decoder, index: int) -> Prepared:
        record = self.records[index]
        files = transforms.Files(self._root, self.stage, self._config, decoder.read, decoder.picture)
        try:
            return self._picture(record, files) if record["task"] == tasks.VISUAL else self._clip(record, files)
        except InputError as error:
            self.bad.add(index, str(error))
            return None

    def key(self, indices: Sequence[int]) -> str:
        """Names what a part holds."""
        settings = self._frames, store.stored_settings(self._config)
        return plan.data_hash([self.records[index] for index in indices], settings)

    def _picture(self, record: annotations.Record, files: transforms.Files) -> dict[str, Any]:
        pixels, source_hw = files.picture(record)
        return self._example(record, [pixels], source_hw, [], 0.0)

    def _clip(self, record: annotations.Record, files: transforms.Files) -> dict[str, Any]:
        clip = files.clip(record)
        size_hw = clip.frames.shape[1], clip.frames.shape[2]
        frames = record["key_frames"] if record["task"] == tasks.TEMPORAL_SPATIAL else []
        keys = [files.key_frame(record, frame, size_hw) for frame in frames]
        return self._example(record, [*clip.frames, *keys], clip.source_hw, clip.times_s.tolist(), clip.duration_s)

    def _example(
        self,
        record: annotations.Record,
        pictures: Sequence[np.ndarray],
        source_hw: tuple[int, int],
        times_s: list[float],
        duration_s: float,
    ) -> dict[str, Any]:
        return {
            "record": json.dumps(record, ensure_ascii=False),
            "pictures": [_to_bytes(picture, self._frames) for picture in pictures],
            "shape_hw": [int(side) for side in pictures[0].shape[:2]],
            "source_hw": [int(side) for side in source_hw],
            "times_s": times_s,
            "duration_s": duration_s,
        }


def _to_bytes(pixels: np.ndarray, frames: store.Frames) -> bytes:
    if frames == "raw":
        return pixels.tobytes()
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(file, "JPEG", quality=JPEG_QUALITY)
    return file.getvalue()


def _write_part(
    out: pathlib.Path,
    encode: _Encoder,
    decoders: workers.Decoders,
    indices: range,
    advance: Callable[[], None],
) -> pathlib.Path:
    """One part and, beside it, its `.json`: sizes of the records it holds and reasons for those it does not.

    A part that is there already is kept.
    """
    path = out / _PARTS / f"{encode.stage}-{indices.start:07d}-{encode.key(indices)}.array_record"
    if path.with_suffix(".json").is_file():
        for index, reason in json.loads(path.with_suffix(".json").read_text())["bad"].items():
            encode.bad.add(int(index), reason)
        for _ in indices:
            advance()
        return path
    sizes = []
    with stgr_dataset.PartWriter(f"{path}.new") as writer:
        for index, example in zip(indices, decoders.map(encode, indices), strict=True):
            if example is not None:
                writer.write(example)
                known = {name: example[name] for name in store.Sizes._fields}
                sizes.append({"key": store.record_key(encode.records[index]), **known})
            advance()
    reasons = encode.bad.reasons
    told = {"sizes": sizes, "bad": {index: reasons[index] for index in indices if index in reasons}}
    os.replace(f"{path}.new", path)
    path.with_suffix(".json.new").write_text(json.dumps(told))
    os.replace(path.with_suffix(".json.new"), path.with_suffix(".json"))
    return path


def _finish_stage(
    out: pathlib.Path,
    stage: tasks.Stage,
    records: Sequence[annotations.Record],
    parts: Sequence[pathlib.Path],
    bad: BadRecords,
) -> dict[str, Any]:
    """Hand the parts to TFDS, write records and sizes; returns the stage's entry of the manifest."""
    told = [json.loads(part.with_suffix(".json").read_text())["sizes"] for part in parts]
    whole = [stgr_dataset.Part(os.fspath(p), len(sizes)) for p, sizes in zip(parts, told, strict=True) if sizes]
    if not whole:
        raise InputError(f"{out}: no record of the {stage} stage can be used; see {out / BAD_SAMPLES}")
    builder = stgr_dataset.Stgr(config=stgr_dataset.CONFIGS[stage], data_dir=os.fspath(out), parts=whole)
    if builder.data_path.exists():  # of a run that was interrupted later
        shutil.rmtree(builder.data_path)
    builder.download_and_prepare(download_dir=os.fspath(out / _PARTS))
    lines = [json.dumps(line) + "\n" for sizes in told for line in sizes]
    (out / store.SIZES.format(stage=stage)).write_text("".join(lines), encoding="utf-8")
    good = [record for index, record in enumerate(records) if index not in bad.reasons]
    file = pathlib.Path(annotations.stage_file(out, stage))
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(good, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    directory = os.path.relpath(builder.data_path, out)
    names = [*sorted(os.path.join(directory, name) for name in os.listdir(builder.data_path))]
    names += [store.SIZES.format(stage=stage), os.path.relpath(file, out)]
    return {
        "directory": directory,
        "records": len(good),
        "left_out": len(bad),
        "data": plan.data_hash(good),
        "files": [store.describe_file(out, name) for name in names],
    }

"""JSONL of questions about videos and pictures, with spans and boxes -> a data root in the released layout.

docs/data.md describes a line.
"""

import io
import json
import os
import pathlib
import re
import shutil
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from PIL import Image

from openo3_jax import model_files, tags, tasks
from openo3_jax.config import VideoConfig
from openo3_jax.data import annotations, files, images, media
from openo3_jax.data.video import Decoder
from openo3_jax.errors import InputError

_KEY_FRAME_SETTINGS = VideoConfig(min_pixels=28 * 28, max_pixels=1280 * 28 * 28)  # key frames keep about their size
_FIELDS = {
    "question": str,
    "answer": str,
    "video": str,
    "image": str,
    "span": list,
    "options": list,
    "boxes": list,
    "box_units": str,
    "reasoning": str,
    "id": (str, int),
}
# Words that make the source of a record, so that its media are looked for where they are put.
_SOURCES = {
    ("sft", tasks.VISUAL): "TreeVGR_{name}",
    ("sft", tasks.TEMPORAL_SPATIAL): "STR_{name}",
    ("sft", tasks.TEMPORAL): "TVG_{name}",
    ("sft", tasks.GENERAL_MCQ): "videor1_{name}",
    ("sft", tasks.GENERAL_FREE_FORM): "videor1_{name}",
    ("rl", tasks.VISUAL): "gqa_{name}",
    ("rl", tasks.TEMPORAL_SPATIAL): "STR_{name}",
    ("rl", tasks.TEMPORAL): "timerft_{name}",
    ("rl", tasks.TEMPORAL_MCQ): "TVG_{name}",
    ("rl", tasks.GENERAL_MCQ): "videor1_{name}",
    ("rl", tasks.GENERAL_FREE_FORM): "videor1_{name}",
}


class Box(NamedTuple):
    """`xyxy_frac`: shares of the frame; `time_s` is None for a picture."""

    name: str
    xyxy_frac: list[float]
    time_s: float | None


def convert_file(file: str | os.PathLike, out: str | os.PathLike, *, media_root: str | os.PathLike, name: str) -> str:
    """Write the data root `out`; returns what was made, in words. After an error nothing of it is left.

    `name`: a part of sources and of a directory. Raises: InputError with file and line for what is missing, of another
    type or outside its media.
    """
    out = pathlib.Path(out)
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise InputError(f"name={name!r}: expected letters, digits, '_', '-' and '.', such as own")
    with model_files.new_directory(out) as staging:
        records = _write_records(file, staging, pathlib.Path(media_root), name)
    return "\n".join(
        f"{stage}: {len(done)} records in {annotations.stage_file(out, stage)}" for stage, done in records.items()
    )


def _write_records(
    file: str | os.PathLike, out: pathlib.Path, media_root: pathlib.Path, name: str
) -> dict[tasks.Stage, list[dict[str, Any]]]:
    records: dict[tasks.Stage, list[dict[str, Any]]] = {"sft": [], "rl": []}
    with Decoder() as decoder:
        for number, line in files.read_jsonl(file):
            item = _Item(line, media_root, f"{file}:{number}", decoder)
            for stage, done in records.items():
                record = item.record(stage, name)
                if record is not None:
                    item.place(out, record, stage)
                    done.append(record)
    for stage, done in records.items():
        path = pathlib.Path(annotations.stage_file(out, stage))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(done, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    return records


class _Item:
    """One line, checked."""

    def __init__(self, line: Any, media_root: pathlib.Path, where: str, decoder: Decoder):
        self._where = where
        self._decoder = decoder
        self._check_fields(line)
        self._line: Mapping[str, Any] = line
        self._is_picture = "image" in line
        field = "image" if self._is_picture else "video"
        try:
            self._source = media.find_inside(media_root, line[field], field)
            if self._is_picture:
                self._size_wh = images.load_picture(self._source).shape[1::-1]
            else:
                found = decoder.inspect(self._source, VideoConfig())
                self._size_wh, self._duration_s = found.source_hw[::-1], found.duration_s
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
        self._boxes = [self._box(box) for box in line.get("boxes") or []]
        self._boxes.sort(key=lambda box: box.time_s or 0.0)
        self._span = self._read_span()
        self._letter = self._read_letter()

    @property
    def task(self) -> tasks.Task:
        if self._is_picture:
            return tasks.VISUAL
        if self._span is not None:
            return tasks.TEMPORAL_MCQ if self._letter else tasks.TEMPORAL
        if self._boxes:
            return tasks.TEMPORAL_SPATIAL
        return tasks.GENERAL_MCQ if self._letter else tasks.GENERAL_FREE_FORM

    def record(self, stage: tasks.Stage, name: str) -> dict[str, Any] | None:
        """The record of a stage; None for a task that the stage has not, and in RL for a picture without boxes."""
        task = self.task
        if task not in tasks.STAGE_TASKS[stage] or (stage == "rl" and self._is_picture and not self._boxes):
            return None
        path = f"{name}/{self._line['image' if self._is_picture else 'video']}"
        record = {
            "id": self._line.get("id", self._where),
            "task": task,
            "source": _SOURCES[stage, task].format(name=name),
        }
        record["image_path" if self._is_picture else "video_path"] = path
        record |= {"question": self._question(), "answer": self._answer(stage)}
        if self._is_picture:
            record["image_size"] = list(self._size_wh)
        if task == tasks.TEMPORAL_SPATIAL:
            record |= self._key_frames(path)
        if stage == "sft":
            record["reasoning_process"] = self._line.get("reasoning") or self._reasoning()
        return record

    def place(self, out: pathlib.Path, record: dict[str, Any], stage: tasks.Stage) -> None:
        """Copy the record's video or picture where it is looked for, and cut its key frames out of the video."""
        target = out / "videos" / media.directories(record, stage)[0] / record[media.media_field(record)]
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            shutil.copyfile(self._source, target)
        frames = record.get("key_frames") or []
        missing = [f for f in frames if not (self._key_path(out, record, f, stage)).exists()]
        if missing:
            pictures = self._decoder.frames_at(self._source, [f["time"] for f in missing], _KEY_FRAME_SETTINGS)
            for frame, pixels in zip(missing, pictures, strict=True):
                path = self._key_path(out, record, frame, stage)
                path.parent.mkdir(parents=True, exist_ok=True)
                file = io.BytesIO()
                Image.fromarray(pixels).save(file, "JPEG", quality=95)
                path.write_bytes(file.getvalue())

    def _key_path(self, out: pathlib.Path, record: dict[str, Any], frame: dict, stage: tasks.Stage) -> pathlib.Path:
        return out / "videos" / media.key_frame_directories(record, stage)[0] / frame["path"]

    # ---- a line's fields ----

    def _check_fields(self, line: Any) -> None:
        if not isinstance(line, dict):
            raise InputError(f"{self._where}: is a {type(line).__name__}; expected an object with named fields")
        for field, value in line.items():
            if field not in _FIELDS:
                raise InputError(f"{self._where}: field {field!r} is not known; expected some of {', '.join(_FIELDS)}")
            if not isinstance(value, _FIELDS[field]):
                raise InputError(f"{self._where}: {field}={value!r:.60} is of the wrong type; see docs/data.md")
        for field in ("question", "answer"):
            if not line.get(field, "").strip():
                raise InputError(f"{self._where}: {field} is missing; expected a text")
        if ("image" in line) == ("video" in line):
            raise InputError(f"{self._where}: expected either video or image, a path")

    def _box(self, box: Any) -> Box:
        has_time = not self._is_picture
        is_box = (
            isinstance(box, dict)
            and isinstance(box.get("name"), str)
            and _is_numbers(box.get("box"), 4)
            and (not has_time or _is_numbers([box.get("time")], 1))
        )
        if not is_box:
            form = "{name, box: [x1, y1, x2, y2]" + (", time: seconds}" if has_time else "}")
            raise InputError(f"{self._where}: boxes: got {json.dumps(box)[:80]}; expected {form}")
        units = self._line.get("box_units", "frac")
        if units not in ("frac", "px"):
            raise InputError(f"{self._where}: box_units={units!r}; expected frac (shares of the frame) or px")
        width, height = (1, 1) if units == "frac" else self._size_wh
        x1, y1, x2, y2 = box["box"]
        if not (0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height):
            raise InputError(
                f"{self._where}: boxes: {box['box']} leaves the frame of {width} x {height} or is reversed"
            )
        if has_time and not 0 <= box["time"] <= self._duration_s:
            raise InputError(
                f"{self._where}: boxes: time {box['time']} s is outside the clip of {self._duration_s:.2f} s"
            )
        xyxy = [round(value, 4) for value in (x1 / width, y1 / height, x2 / width, y2 / height)]
        return Box(box["name"], xyxy, float(box["time"]) if has_time else None)

    def _read_span(self) -> tuple[float, float] | None:
        span = self._line.get("span")
        if span is None:
            return None
        if self._is_picture or not _is_numbers(span, 2) or not 0 <= span[0] < span[1] <= self._duration_s:
            raise InputError(f"{self._where}: span={span}; expected [start, end] in seconds inside the clip")
        return float(span[0]), float(span[1])

    def _read_letter(self) -> str | None:
        """The letter of the right option; the answer is that letter, or the option's text."""
        options = self._line.get("options")
        if options is None:
            return None
        letters = [chr(ord("A") + i) for i in range(len(options))]
        answer = self._line["answer"]
        right = [letter for letter, text in zip(letters, options, strict=True) if answer in (letter, text)]
        if len(right) != 1 or not all(isinstance(option, str) for option in options):
            raise InputError(f"{self._where}: answer={answer!r} is no letter or text of the options {options}")
        return right[0]

    # ---- a record's texts ----

    def _question(self) -> str:
        options = self._line.get("options") or []
        return "\n".join([self._line["question"], *(f"{chr(ord('A') + i)}. {o}" for i, o in enumerate(options))])

    def _answer(self, stage: tasks.Stage) -> str:
        if self._is_picture:
            return "".join(self._picture_claim(box) for box in self._boxes) or self._line["answer"]
        if self.task == tasks.TEMPORAL:
            return tags.render_span(*self._span) if stage == "sft" else str(list(self._span))
        if self.task == tasks.TEMPORAL_MCQ:
            return f"{self._letter}\n{list(self._span)}"
        return self._letter or self._line["answer"]

    def _picture_claim(self, box: Box) -> str:
        width, height = self._size_wh
        x1, y1, x2, y2 = box.xyxy_frac
        px = [round(x1 * width), round(y1 * height), round(x2 * width), round(y2 * height)]
        return f"<obj>{box.name}</obj>{tags.render_box(px)}"

    def _reasoning(self) -> str:
        """The evidence, where the line has no reasoning of its own."""
        if self._is_picture and self._boxes:
            return "I see " + ", ".join(self._picture_claim(box) for box in self._boxes) + "."
        if self.task == tasks.TEMPORAL:
            start, end = (tags.render_time(time_s) for time_s in self._span)
            return f"It begins at {start} and ends at {end}."
        if self._boxes and self.task == tasks.TEMPORAL_SPATIAL:
            return "I see " + ", ".join(tags.render_claim(b.name, b.xyxy_frac, b.time_s) for b in self._boxes) + "."
        return f"The {'picture' if self._is_picture else 'video'} shows it: {self._line['answer']}."

    def _key_frames(self, path: str) -> dict[str, Any]:
        times_s = sorted({box.time_s for box in self._boxes})
        frames = [{"idx": i, "time": t, "path": f"{path}_{t}.jpg"} for i, t in enumerate(times_s)]
        items: dict[str, dict[str, list[list[float]]]] = {str(i): {} for i in range(len(times_s))}
        for box in self._boxes:
            items[str(times_s.index(box.time_s))].setdefault(box.name, []).append(box.xyxy_frac)
        return {"key_frames": frames, "key_items": items}


def _is_numbers(value: Any, count: int) -> bool:
    is_list = isinstance(value, Sequence) and not isinstance(value, str) and len(value) == count
    return is_list and all(isinstance(v, int | float) and not isinstance(v, bool) for v in value)

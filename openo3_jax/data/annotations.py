"""The released JSON files -> checked records. Plain `json`: Arrow would merge the keys of all `key_items` into one."""

import json
import math
import os
from collections.abc import Mapping
from typing import Any, NotRequired, TypedDict

from openo3_jax import tasks
from openo3_jax.errors import InputError

Number = int | float  # JSON has both
STAGE_FILES: Mapping[tasks.Stage, str] = {"sft": "STGR-SFT.json", "rl": "STGR-RL.json"}


class KeyFrame(TypedDict):
    """An annotated frame of a clip: its key in `key_items`, its time in seconds, its picture file."""

    idx: int
    time: Number
    path: str


class Record(TypedDict):
    """One question of the released files, field names as released; fields not named here are kept.

    `answer`: text; "[start, end]" in seconds (RL temporal QA); "<letter>" and "[start, end]" on two lines (temporal
    MCQ); a letter (MCQ); `<obj>..</obj><box>[x1,y1,x2,y2]</box>` in px of the original picture (visual QA).
    `key_frames` are sorted by time. `key_items` maps str(idx) to object names to boxes, xyxy as fractions of the
    frame, without empty (null) entries.

    Source: Open-o3-Video src/r1-v/src/open_r1/sft_multi_task.py:56-204, data_loader.py:27-45.
    """

    task: str
    source: str
    question: str
    answer: str
    id: NotRequired[str | int]
    video_path: NotRequired[str]  # every task but visual QA
    image_path: NotRequired[str]  # visual QA
    image_size: NotRequired[list[Number] | None]  # [width, height] in px of the original picture
    reasoning_process: NotRequired[str]  # SFT
    key_frames: NotRequired[list[KeyFrame] | None]  # temporal-spatial QA
    key_items: NotRequired[dict[str, dict[str, list[list[Number]]]] | None]  # temporal-spatial QA in RL


def load_stage(root: str | os.PathLike, stage: tasks.Stage) -> list[Record]:
    """All records of `{root}/json_data/STGR-SFT.json` or `STGR-RL.json`.

    Raises: InputError as `load_records` does.
    """
    return load_records(stage_file(root, stage), stage)


def stage_file(root: str | os.PathLike, stage: tasks.Stage) -> str:
    """Where the records of a stage stand under a data root."""
    return os.path.join(root, "json_data", STAGE_FILES[stage])


def load_records(path: str | os.PathLike, stage: tasks.Stage) -> list[Record]:
    """All records of a released file, which is one JSON list.

    Raises: InputError with file, index, field and reason for the first bad record, and how many there are.
    """
    records, problems = check_records(path, stage)
    if problems:
        more = f" (and {len(problems) - 1} more bad records)" if len(problems) > 1 else ""
        raise InputError(f"{problems[0]}{more}")
    return records


def check_records(path: str | os.PathLike, stage: tasks.Stage) -> tuple[list[Record], list[InputError]]:
    """The good records of a released file and, for each bad one, what is wrong with it.

    Raises: InputError for a file that is missing, not JSON, or not one list.
    """
    name = os.fspath(path)
    records: list[Record] = []
    problems: list[InputError] = []
    for index, value in enumerate(load_list(name)):
        try:
            records.append(check_record(value, stage, where=f"{name}:{index}"))
        except InputError as problem:
            problems.append(problem)
    return records, problems


def load_list(path: str | os.PathLike) -> list[Any]:
    """The entries of a released file, unchecked. Raises: InputError if it is missing, not JSON, or not one list."""
    name = os.fspath(path)
    try:
        with open(name, encoding="utf-8") as file:
            values = json.load(file)
    except OSError as error:
        raise InputError(f"{name}: cannot be read ({error.strerror}); expected a JSON file of records") from None
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, or nested beyond reason
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise InputError(f"{name}: is not JSON ({reason}); expected one list of records") from None
    if not isinstance(values, list):
        raise InputError(f"{name}: holds a {type(values).__name__}; expected one list of records")
    return values


def check_record(value: Any, stage: tasks.Stage, *, where: str) -> Record:
    """A copy of one record with key frames in time order and nulls dropped from `key_items`. Checked again it stays so.

    Example: a key frame list with times [9.2, 3.0] comes back with times [3.0, 9.2].

    Raises: InputError that begins with `where` and names the field: one that is missing or of another type, an
    unknown task, or a task that `stage` has not.
    """
    if not isinstance(value, dict):
        raise InputError(f"{where}: is a {type(value).__name__}; expected a record with named fields")
    task = value.get("task")
    if task not in tasks.TASKS:
        raise InputError(f"{where}: task={task!r} is unknown; expected one of {', '.join(tasks.TASKS)}")
    if task not in tasks.STAGE_TASKS[stage]:
        raise InputError(f"{where}: task={task!r} does not occur in the {stage} stage; move the record")
    media = "image_path" if task == tasks.VISUAL else "video_path"
    texts = ["source", "question", "answer", media, *(["reasoning_process"] if stage == "sft" else [])]
    for field in texts:
        _expect(isinstance(value.get(field), str) and value[field].strip(), where, value, field, "a text")
    if value.get("id") is not None:
        _expect(isinstance(value["id"], str | int), where, value, "id", "a text or a whole number")
    if value.get("image_size") is not None:
        size = value["image_size"]
        is_size = _is_numbers(size, 2) and min(size) > 0
        _expect(is_size, where, value, "image_size", "[width, height] in px")
    record = dict(value)
    if value.get("key_frames") is not None or task == tasks.TEMPORAL_SPATIAL:
        record["key_frames"] = _check_key_frames(value, where)
    if value.get("key_items") is not None:
        record["key_items"] = _check_key_items(value, where)
    if task == tasks.TEMPORAL_SPATIAL and stage == "rl":
        _expect(bool(record["key_frames"]), where, value, "key_frames", "at least one key frame")
        _expect("key_items" in value, where, value, "key_items", "boxes by key frame, or null")
        if not value["key_items"]:  # null in released rows: there is nothing to compare boxes with
            return record | {"key_items": {}}
        absent = [f["idx"] for f in record["key_frames"] if str(f["idx"]) not in record["key_items"]]
        _expect(not absent, where, value, "key_items", f"an entry for the key frames with idx {absent}")
    return record


def _expect(holds: Any, where: str, record: Mapping[str, Any], field: str, expected: str) -> None:
    if not holds:
        got = json.dumps(record[field])[:120] if field in record else "nothing"
        raise InputError(f"{where}: {field}: got {got}; expected {expected}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf


def _is_numbers(value: Any, count: int) -> bool:
    return isinstance(value, list) and len(value) == count and all(map(_is_number, value))


def _check_key_frames(record: Mapping[str, Any], where: str) -> list[KeyFrame]:
    frames = record.get("key_frames")
    expected = "a list of {idx: whole number, time: seconds >= 0, path: text}"
    _expect(isinstance(frames, list), where, record, "key_frames", expected)
    for frame in frames:
        is_frame = (
            isinstance(frame, dict)
            and isinstance(frame.get("idx"), int)
            and not isinstance(frame["idx"], bool)
            and _is_number(frame.get("time"))
            and frame["time"] >= 0
            and isinstance(frame.get("path"), str)
            and bool(frame["path"])
        )
        _expect(is_frame, where, record, "key_frames", expected)
    return sorted(frames, key=lambda frame: frame["time"])


def _check_key_items(record: Mapping[str, Any], where: str) -> dict[str, dict[str, list[list[Number]]]]:
    items = record.get("key_items")
    expected = "{idx: {object name: [[x1, y1, x2, y2], ..]}}, boxes as fractions of the frame"
    _expect(isinstance(items, dict), where, record, "key_items", expected)
    checked = {}
    for idx, objects in items.items():
        if objects is None:
            continue
        _expect(isinstance(objects, dict), where, record, "key_items", expected)
        checked[idx] = {name: boxes for name, boxes in objects.items() if boxes is not None}
        for boxes in checked[idx].values():
            is_boxes = isinstance(boxes, list) and all(_is_numbers(box, 4) for box in boxes)
            _expect(is_boxes, where, record, "key_items", expected)
    return checked

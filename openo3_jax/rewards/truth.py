"""Record -> ground truth of a reward, checked: what is missing is refused, what is malformed is marked."""

import ast
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from openo3_jax import tags, tasks
from openo3_jax.errors import InputError
from openo3_jax.rewards.arrays import Truth
from openo3_jax.rewards.words import Stemmer

Record = Mapping[str, Any]
# A record that lacks sizes -> the sizes it lacks, [width, height] px by field name.
SizeFinder = Callable[[Record], Mapping[str, Sequence[int]]]

_SIZE_FIELDS = {
    tasks.TEMPORAL_SPATIAL: ("image_size",),
    tasks.VISUAL: ("image_size", "image_size_refine"),
}


class Gold(NamedTuple):
    """One record, read: arrays of numbers, and the vocabularies in which a completion's words get theirs."""

    truth: Truth
    task: tasks.Task
    option: str  # the right option, as it should stand in the answer
    area_px: float  # of the picture the model saw; nan where no term needs it
    last_s: tags.Number  # the clip is at least this long
    word_ids: Mapping[str, int]
    name_ids: Mapping[str, int]


def missing_sizes(record: Record) -> tuple[str, ...]:
    """Fields among `image_size` and `image_size_refine` that a term of the record's task needs and it lacks."""
    return tuple(field for field in _SIZE_FIELDS.get(record.get("task"), ()) if record.get(field) is None)


def normal_name(name: str) -> str:
    """How object names are compared: lower case, runs of white space as one space."""
    return " ".join(name.lower().split())


def read_record(record: Any, index: int, stemmer: Stemmer, sizes: SizeFinder | None = None) -> Gold:
    """Read what rewards need of an STGR-RL record; `index` names it in errors.

    A value that should be an option, word, number, span or box and is not leaves its mark (`has_answer`, `has_span`,
    `has_box`, `has_frames`, `has_items`) in the result; the term that needs it will not apply.

    Raises: InputError for a missing field or a wrong type, with index and field.
    """
    where = f"record {index}"
    if not isinstance(record, _MAPPING):
        raise InputError(f"{where}: got {type(record).__name__}; expected a dict of an STGR record")
    task = _field(record, where, "task", str, "a task name")
    if task not in tasks.TASKS:
        raise InputError(f"{where}: task={task!r}; expected one of {', '.join(tasks.TASKS)}")
    answer = _field(record, where, "answer", str, "a string")
    lacking = missing_sizes(record)
    if lacking and sizes is not None:
        try:
            record = {**record, **sizes(record)}
        except InputError as error:
            raise InputError(f"{where}: {error}") from error

    option, words, span, box = "", (), None, None
    frames, original_hw, size_hw = _NO_FRAMES, _NO_SIZE, _NO_SIZE
    match task:
        case tasks.GENERAL_MCQ:
            option = answer.strip()
        case tasks.TEMPORAL_MCQ:
            option, _, span_line = answer.partition("\n")
            option, span = option.strip(), _read_span(span_line.partition("\n")[0])
        case tasks.TEMPORAL:
            span = _read_span(answer)
        case tasks.VISUAL:
            original_hw, size_hw = (_read_size(record, where, field) for field in _SIZE_FIELDS[task])
            box = _read_answer_box(answer)
        case tasks.TEMPORAL_SPATIAL:
            size_hw = _read_size(record, where, "image_size")
            frames = _read_frames(record, where)
    if task in (tasks.TEMPORAL_SPATIAL, tasks.GENERAL_FREE_FORM):
        words = stemmer.words(answer)
    word_ids = {word: number for number, word in enumerate(dict.fromkeys(words))} if words else _NO_IDS
    names = [normal_name(name) for name in frames.object_names]
    name_ids = {name: number for number, name in enumerate(dict.fromkeys(names))} if names else _NO_IDS
    truth = Truth(
        task=tasks.TASKS.index(task),
        words=[word_ids[word] for word in words] if words else (),
        span_s=span or (math.nan, math.nan),
        has_span=span is not None,
        has_answer=bool(option or words),
        answer_box=box or (math.nan,) * 4,
        original_hw=original_hw,
        size_hw=size_hw,
        has_box=box is not None,
        frame_times_s=frames.times_s,
        frame_valid=(True,) * len(frames.times_s),
        frame_has_items=frames.has_items,
        has_frames=len(frames.times_s) > 0 and all(map(math.isfinite, frames.times_s)),
        has_items=frames.boxes_ok,
        object_frame=frames.object_frame,
        object_names=[name_ids[name] for name in names] if names else (),
        gold_boxes=frames.boxes,
        gold_box_object=frames.box_object,
    )
    duration_s = record.get("video_duration")
    known_s = [time_s for time_s in (duration_s, *frames.times_s, *(span or ())) if _is_number(time_s)]
    area_px = math.nan if size_hw is _NO_SIZE else float(size_hw[0] * size_hw[1])
    return Gold(truth, task, option, area_px, max(known_s, default=0.0), word_ids, name_ids)


class _Frames(NamedTuple):
    times_s: Sequence[float]
    has_items: Sequence[bool]
    boxes_ok: bool
    object_frame: Sequence[int]
    object_names: Sequence[str]
    boxes: Sequence[tags.Box]
    box_object: Sequence[int]


_MAPPING, _SEQUENCE = (dict, Mapping), (list, tuple, Sequence)  # abstract classes last: their check is slow
_NO_IDS: Mapping[str, int] = {}
_NO_SIZE = (1.0, 1.0)
_NO_FRAMES = _Frames((), (), True, (), (), (), ())


def _read_frames(record: Record, where: str) -> _Frames:
    """Key frames with their objects; `None` entries, which Arrow adds to `key_items`, count as absent.

    Source: src/r1-v/src/open_r1/trainer/grpo_trainer.py:440-450; src/r1-v/src/open_r1/reward_func.py:337-346.
    """
    key_frames = _field(record, where, "key_frames", list, "a list of {idx, time, path}")
    key_items = _field(record, where, "key_items", _MAPPING, "a dict of frame -> object -> boxes")
    times_s, has_items, object_frame, object_names, fractions, box_object = [], [], [], [], [], []
    boxes_ok = True
    for number, frame in enumerate(key_frames):
        at = f"{where}: key_frames[{number}]"
        if not isinstance(frame, _MAPPING):
            raise InputError(f"{at} is {type(frame).__name__}; expected {{idx, time, path}}")
        idx = _field(frame, at, "idx", (int, str), "a whole number")
        time_s = _field(frame, at, "time", (int, float), "seconds")
        times_s.append(float(time_s) if _is_number(time_s) else math.nan)
        items = key_items.get(str(idx))
        has_items.append(items is not None)
        if items is None:
            continue
        if not isinstance(items, _MAPPING):
            raise InputError(f"{where}: key_items[{idx!r}] is {type(items).__name__}; expected object -> boxes")
        for name, boxes in items.items():
            if boxes is None:
                continue
            if not isinstance(boxes, list):
                raise InputError(f"{where}: key_items[{idx!r}][{name!r}] is no list; expected [[x1,y1,x2,y2], ..]")
            object_frame.append(number)
            object_names.append(str(name))
            for box in boxes:
                if not _is_box(box):
                    boxes_ok = False
                    continue
                box_object.append(len(object_frame) - 1)
                fractions.append(tuple(map(float, box)))
    return _Frames(times_s, has_items, boxes_ok, object_frame, object_names, fractions, box_object)


def _read_span(text: str) -> tuple[float, float] | None:
    """`[start, end]` in seconds, a list or a tuple of two finite numbers, start first; None for anything else.

    Source: src/r1-v/src/open_r1/reward_func.py:117-118.
    """
    try:
        value = json.loads(text)  # most are JSON, which is read ten times faster
    except (ValueError, RecursionError):
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # what literal_eval documents
            return None
    if not isinstance(value, list | tuple) or len(value) != 2 or not all(map(_is_number, value)):
        return None
    start_s, end_s = map(float, value)
    return (start_s, end_s) if start_s < end_s else None


def _read_answer_box(answer: str) -> tuple[float, ...] | None:
    """The first box of a visual answer, px of the original picture; None where there is none or it has no area."""
    content = tags.first_box_content(answer)
    try:
        box = json.loads(content) if content is not None else None
    except (ValueError, RecursionError):
        return None
    if not _is_box(box):
        return None
    x1, y1, x2, y2 = map(float, box)
    return (x1, y1, x2, y2) if x1 < x2 and y1 < y2 else None


def _read_size(record: Record, where: str, field: str) -> tuple[float, float]:
    """[width, height] px of the record -> (height, width)."""
    size = record.get(field)
    if size is None:
        raise InputError(f"{where}: {field} is missing; give [width, height] px, or the media root to find it")
    if not isinstance(size, _SEQUENCE) or len(size) != 2 or not all(map(_is_number, size)) or min(size) <= 0:
        raise InputError(f"{where}: {field}={size!r}; expected [width, height] in px")
    return float(size[1]), float(size[0])


def _field(record: Record, where: str, field: str, kind: Any, expected: str) -> Any:
    if field not in record:
        raise InputError(f"{where}: field {field!r} is missing; expected {expected}")
    value = record[field]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise InputError(f"{where}: {field} is {type(value).__name__}; expected {expected}")
    return value


def _is_box(value: object) -> bool:
    return isinstance(value, list) and len(value) == 4 and all(map(_is_number, value))


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and -1e300 < value < 1e300  # no bool, no nan, no overflow on the way

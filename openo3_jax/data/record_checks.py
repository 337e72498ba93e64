"""A record and what its media turned out to be -> flaws of its times, boxes and answer, and the mended record.

No media here: `check.py` looks at the files.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from openo3_jax import tags, tasks
from openo3_jax.data.annotations import Number, Record
from openo3_jax.errors import InputError

SLACK_S = 0.1  # beyond the end of a clip; annotations are rounded to tenths of a second
SLACK_FRAC = 1e-3  # beyond the edge of a frame; boxes are rounded to three decimals
_LETTER = re.compile(r"[A-Z]")
_SPAN = re.compile(r"From <t>(\d+(?:\.\d*)?)</t>s? to <t>(\d+(?:\.\d*)?)</t>s")
_TEXTS = ("question", "reasoning_process", "answer")


class Facts(NamedTuple):
    """What the media of a record turned out to be; None where they could not be read."""

    duration_s: float | None = None  # of the clip
    size_wh: tuple[int, int] | None = None  # of the picture, in px


class Flaw(NamedTuple):
    """`field` of a record and what is wrong with it. A note (`is_note`) is odd but harmless."""

    field: str
    what: str
    is_note: bool = False


def find_flaws(raw: Mapping[str, Any], record: Record, stage: tasks.Stage, facts: Facts) -> list[Flaw]:
    """Flaws of `raw`, which `annotations.check_record` turned into `record`."""
    return [
        *_oddities(raw, record),
        *_key_frames(raw, facts),
        *_key_items(record),
        *_picture_size(record, facts),
        *_text_boxes(record, stage, facts),
        *_answer(record, stage, facts),
    ]


def mend(record: Record, facts: Facts, unreadable: Sequence[str]) -> tuple[Record, list[str]]:
    """A copy without the flaws that have one remedy, and what was changed.

    Key frames outside the clip, or whose pictures are among the `unreadable` paths, go with their boxes; boxes are cut
    off at the edge of the frame; image_size becomes that of the picture. `check_record` has sorted the key frames.
    """
    mended: dict[str, Any] = {**record}
    changes = []
    kept = [
        frame
        for frame in record.get("key_frames") or []
        if frame["path"] not in unreadable and _is_inside(frame["time"], facts.duration_s)
    ]
    if len(kept) < len(record.get("key_frames") or []):
        gone = [str(frame["idx"]) for frame in record["key_frames"] if frame not in kept]
        mended["key_frames"] = kept
        changes.append(f"key_frames: idx {', '.join(gone)} removed")
        if mended.get("key_items"):
            mended["key_items"] = {idx: items for idx, items in mended["key_items"].items() if idx not in gone}
    if mended.get("key_items"):
        cut = {idx: {n: _cut_boxes(b) for n, b in items.items()} for idx, items in mended["key_items"].items()}
        cut = {idx: {name: boxes for name, boxes in items.items() if boxes} for idx, items in cut.items()}
        if cut != mended["key_items"]:
            mended["key_items"] = cut
            changes.append("key_items: boxes cut off at the edge of the frame")
    if record.get("image_size") and facts.size_wh and list(record["image_size"]) != list(facts.size_wh):
        mended["image_size"] = list(facts.size_wh)
        changes.append(f"image_size: {record['image_size']} -> {list(facts.size_wh)}")
    return mended, changes


def read_span(answer: str, stage: tasks.Stage) -> tuple[float, float] | None:
    """[start, end] in seconds of a temporal answer as the stage writes it, None where there is none."""
    if stage == "sft":
        found = _SPAN.search(answer)
        return (float(found[1]), float(found[2])) if found else None
    try:
        span = json.loads(answer)
    except (ValueError, RecursionError):
        return None
    is_span = isinstance(span, list) and len(span) == 2 and all(isinstance(v, int | float) for v in span)
    return (float(span[0]), float(span[1])) if is_span else None


def boxes_of(text: str) -> list[tuple[float, ...]]:
    """Every `<box>[x1,y1,x2,y2]</box>` of a text. Raises: InputError for one that does not hold four numbers."""
    boxes: list[tuple[float, ...]] = []

    def collect(box: Sequence[float]) -> Sequence[float]:
        boxes.append(tuple(box))
        return box

    tags.rewrite_boxes(text, collect)
    return boxes


def _oddities(raw: Mapping[str, Any], record: Record) -> Iterator[Flaw]:
    """What the released files are known for."""
    if record["source"] == "videor1_free_from":
        yield Flaw("source", "spelled videor1_free_from, as released", is_note=True)
    if "key_items" in raw and record["task"] == tasks.TEMPORAL_SPATIAL:
        if not raw["key_items"]:
            yield Flaw("key_items", "null, as released, or empty: no boxes to compare with", is_note=True)
        elif raw["key_items"] != record["key_items"]:
            yield Flaw("key_items", "null entries, as left by Arrow, are left out", is_note=True)


def _key_frames(raw: Mapping[str, Any], facts: Facts) -> Iterator[Flaw]:
    times_s = [frame["time"] for frame in raw.get("key_frames") or []]
    if times_s != sorted(times_s):
        yield Flaw("key_frames", f"not in the order of their times: {times_s}")
    for time_s in times_s:
        if not _is_inside(time_s, facts.duration_s):
            yield Flaw(
                "key_frames", f"time {time_s:g} s is after the end of the clip, which lasts {facts.duration_s:.2f} s"
            )


def _is_inside(time_s: Number, duration_s: float | None) -> bool:
    return duration_s is None or time_s <= duration_s + SLACK_S


def _key_items(record: Record) -> Iterator[Flaw]:
    for idx, items in (record.get("key_items") or {}).items():
        for name, boxes in items.items():
            for box in boxes:
                if problem := _box_problem(box, (1, 1)):
                    yield Flaw("key_items", f"{idx}: {name}: {problem}")


def _box_problem(box: Sequence[Number], size_wh: tuple[Number, Number], slack: float = SLACK_FRAC) -> str | None:
    x1, y1, x2, y2 = box
    shown = [round(value, 4) for value in box]
    if x1 >= x2 or y1 >= y2:
        return f"box {shown} is empty or reversed; expected [x1, y1, x2, y2]"
    (width, height), over = size_wh, slack * max(size_wh)
    if min(x1, y1) < -over or x2 > width + over or y2 > height + over:
        return f"box {shown} leaves the frame of {width:g} x {height:g}"
    return None


def _cut_boxes(boxes: Sequence[Sequence[Number]]) -> list[list[Number]]:
    cut = [[min(max(value, 0), 1) for value in box] for box in boxes]
    return [box for box in cut if box[0] < box[2] and box[1] < box[3]]


def _picture_size(record: Record, facts: Facts) -> Iterator[Flaw]:
    stated = record.get("image_size")
    if record["task"] == tasks.VISUAL and stated and facts.size_wh and list(stated) != list(facts.size_wh):
        yield Flaw("image_size", f"{stated}, but the picture has {list(facts.size_wh)} px (width, height)")


def _text_boxes(record: Record, stage: tasks.Stage, facts: Facts) -> Iterator[Flaw]:
    """Boxes of the texts that training rewrites: fractions for temporal-spatial QA, px for visual QA."""
    if record["task"] == tasks.VISUAL:
        size_wh = facts.size_wh
    elif record["task"] == tasks.TEMPORAL_SPATIAL and stage == "sft":
        size_wh = (1, 1)
    else:
        return
    for field in _TEXTS:
        try:
            boxes = boxes_of(record.get(field) or "")
        except InputError as error:
            yield Flaw(field, str(error))
            continue
        problems = [_box_problem(box, size_wh) for box in boxes] if size_wh else []
        yield from (Flaw(field, problem) for problem in problems if problem)


def _answer(record: Record, stage: tasks.Stage, facts: Facts) -> Iterator[Flaw]:
    answer, task = record["answer"].strip(), record["task"]
    letter, _, rest = answer.partition("\n")
    if task in (tasks.GENERAL_MCQ, tasks.TEMPORAL_MCQ) and not _LETTER.fullmatch(letter.strip()):
        yield Flaw("answer", f"{letter[:40]!r} is no option letter")
    if task in (tasks.TEMPORAL, tasks.TEMPORAL_MCQ):
        span = read_span(rest if task == tasks.TEMPORAL_MCQ else answer, stage)
        form = "From <t>1.0</t>s to <t>2.5</t>s" if stage == "sft" else "[1.0, 2.5]"
        if span is None:
            yield Flaw("answer", f"{answer[:60]!r} holds no span; expected {form}")
        elif not 0 <= span[0] < span[1]:
            yield Flaw("answer", f"span [{span[0]:g}, {span[1]:g}] is empty or reversed")
        elif not _is_inside(span[1], facts.duration_s):
            yield Flaw("answer", f"span ends at {span[1]:g} s, after the clip's {facts.duration_s:.2f} s")
    if task == tasks.VISUAL and stage == "rl" and "<box>[" not in answer:
        yield Flaw("answer", f"{answer[:60]!r} holds no <box>[x1,y1,x2,y2]</box>")

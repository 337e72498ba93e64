"""Records and the lengths of their clips -> how answers are distributed, and what guessing without looking scores.

A model can score well on a set by knowing it: where spans lie, where boxes lie, which letter is right. The figures say
how far that goes. Guesses are learnt from one half of the records and scored on the other.
"""

import collections
import hashlib
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from openo3_jax import config_json, geometry, tags, tasks
from openo3_jax.config import VideoConfig
from openo3_jax.data import annotations, media, record_checks, store, workers
from openo3_jax.data.annotations import Record
from openo3_jax.data.video import Decoder
from openo3_jax.errors import InputError

Advance = Callable[[int, int], None]
Values = Float[np.ndarray, " _"]

_OPTION = re.compile(r"^\s*\(?([A-Z])[.):]\s*(.+?)\s*$", re.MULTILINE)
_GRID = np.linspace(0.0, 1.0, 21)  # of starts, ends and corners that a guess may have


class Guess(NamedTuple):
    """What a guesser without eyes scores, in [0, 1], on the half of the records that it was not made from."""

    task: str
    guess: str
    measure: str
    score: float
    num_records: int


class Statistics(NamedTuple):
    """Of one stage. Times are shares of the clip, boxes shares of the frame; a value for each span or box."""

    stage: tasks.Stage
    counts: Mapping[tuple[str, str], int]  # records by source and task
    num_without_clip: int  # clips whose length could not be read
    clip_s: Values
    span_centre: Values
    span_length: Values
    key_time: Values
    box_x: Values  # of the centre
    box_y: Values
    box_area: Values
    key_frames: Values  # for each record that has some
    boxes: Values  # likewise
    claims: Values  # in the reasoning of each record of SFT
    answer_words: Values
    names: Mapping[str, int]  # objects by how often they are named
    letters: Mapping[str, int]  # of right options
    guesses: Sequence[Guess]


def compute_root(
    root: str | os.PathLike, *, jobs: int, advance: Advance = lambda done, total: None
) -> list[Statistics]:
    """The statistics of each stage that `root` has. Raises: InputError if it has none, or for bad records."""
    stages = [stage for stage in annotations.STAGE_FILES if os.path.exists(annotations.stage_file(root, stage))]
    if not stages:
        raise InputError(f"{root}: no json_data/STGR-SFT.json or STGR-RL.json; expected a data root as released")
    records = {stage: annotations.load_stage(root, stage) for stage in stages}
    lengths = clip_lengths(root, records, jobs=jobs, advance=advance)
    return [compute(stage, records[stage], lengths[stage]) for stage in stages]


def render(statistics: Sequence[Statistics]) -> str:
    """The guesses and the letters, in words."""
    lines = []
    for one in statistics:
        lines.append(f"{one.stage}: {sum(one.counts.values())} records; what guessing without looking scores:")
        lines += [f"  {g.task}: {g.guess}: {g.measure} {g.score:.3f} ({g.num_records} records)" for g in one.guesses]
        letters = ", ".join(f"{letter} {count}" for letter, count in sorted(one.letters.items()))
        lines += [f"  right options: {letters}"] if letters else []
    return "\n".join(lines)


def clip_lengths(
    root: str | os.PathLike,
    records: Mapping[tasks.Stage, Sequence[Record]],
    *,
    jobs: int,
    advance: Advance = lambda done, total: None,
) -> dict[tasks.Stage, list[float | None]]:
    """Seconds of each record's clip, as its container says; None for a picture and for what cannot be read.

    Each file is looked at once, whichever stages have it.
    """
    if store.is_prepared(root):
        return {stage: _stored_lengths(root, stage, own) for stage, own in records.items()}
    paths = {stage: [_find(root, record, stage) for record in own] for stage, own in records.items()}
    files = sorted({path for own in paths.values() for path in own if path is not None})

    def measure(decoder: Decoder, path: str) -> float | None:
        try:
            return decoder.probe(path, VideoConfig()).duration_s
        except InputError:
            return None

    known: dict[str | None, float | None] = {}
    with workers.Decoders(jobs) as decoders:
        for path, seconds in zip(files, decoders.map(measure, files), strict=True):
            known[path] = seconds
            advance(len(known), len(files))
    return {stage: [known.get(path) for path in own] for stage, own in paths.items()}


def _stored_lengths(root: str | os.PathLike, stage: tasks.Stage, records: Sequence[Record]) -> list[float | None]:
    video = store.read_manifest(root)["video"]
    stored = store.Stored(root, stage, config_json.from_json(VideoConfig, video, f"{root}/{store.MANIFEST}: video"))
    return [stored.hollow(record).sizes.duration_s or None for record in records]


def _find(root: str | os.PathLike, record: Record, stage: tasks.Stage) -> str | None:
    if record["task"] == tasks.VISUAL:
        return None
    try:
        return os.fspath(media.find_media(root, record, stage))
    except InputError:
        return None


def compute(stage: tasks.Stage, records: Sequence[Record], clip_s: Sequence[float | None]) -> Statistics:
    """The statistics of one stage; `clip_s` as `clip_lengths` gives it."""
    spans = [span_share(record, stage, length) for record, length in zip(records, clip_s, strict=True)]
    known = np.array([span for span in spans if span is not None]).reshape(-1, 2)
    boxes_of = [boxes_share(record) for record in records]
    boxes = np.array([box for own in boxes_of for box in own]).reshape(-1, 4)
    keys = [
        frame["time"] / length
        for record, length in zip(records, clip_s, strict=True)
        for frame in record.get("key_frames") or []
        if length
    ]
    sizes = boxes[:, 2:] - boxes[:, :2]
    is_clip = [record["task"] != tasks.VISUAL for record in records]
    return Statistics(
        stage=stage,
        counts=collections.Counter((record["source"], record["task"]) for record in records),
        num_without_clip=sum(clip and length is None for clip, length in zip(is_clip, clip_s, strict=True)),
        clip_s=_values(length for length in clip_s if length is not None),
        span_centre=known.mean(1),
        span_length=known[:, 1] - known[:, 0],
        key_time=_values(keys),
        box_x=boxes[:, ::2].mean(1),
        box_y=boxes[:, 1::2].mean(1),
        box_area=sizes[:, 0] * sizes[:, 1],
        key_frames=_values(len(record["key_frames"]) for record in records if record.get("key_frames")),
        boxes=_values(len(own) for own in boxes_of if own),
        claims=_values(len(tags.parse_claims(r["reasoning_process"])) for r in records if "reasoning_process" in r),
        answer_words=_values(len(record["answer"].split()) for record in records),
        names=_names(records),
        letters=collections.Counter(letter for record in records if (letter := right_letter(record))),
        guesses=make_guesses(records, spans, boxes_of),
    )


def _values(values: Iterable[float]) -> Values:
    return np.array([float(value) for value in values])


def span_share(record: Record, stage: tasks.Stage, clip_s: float | None) -> tuple[float, float] | None:
    """[start, end] of a temporal answer as shares of the clip, cut off at its end; None where there is none."""
    if record["task"] not in (tasks.TEMPORAL, tasks.TEMPORAL_MCQ) or not clip_s:
        return None
    answer = record["answer"].strip()
    text = answer.partition("\n")[2] if record["task"] == tasks.TEMPORAL_MCQ else answer
    span = record_checks.read_span(text, stage)
    return None if span is None else (min(span[0] / clip_s, 1.0), min(span[1] / clip_s, 1.0))


def boxes_share(record: Record) -> list[tuple[float, float, float, float]]:
    """The true boxes of a record, xyxy as shares of the frame: of its key frames, or of a visual QA answer."""
    found = [box for items in (record.get("key_items") or {}).values() for boxes in items.values() for box in boxes]
    if record["task"] == tasks.VISUAL:
        if not record.get("image_size"):
            return []
        width, height = record["image_size"]
        try:
            found = [[x1 / width, y1 / height, x2 / width, y2 / height] for x1, y1, x2, y2 in _answer_boxes(record)]
        except InputError:
            return []
    return [tuple(min(max(float(value), 0.0), 1.0) for value in box) for box in found]


def _answer_boxes(record: Record) -> list[tuple[float, ...]]:
    return record_checks.boxes_of(record["answer"])


def _names(records: Sequence[Record]) -> Mapping[str, int]:
    """Objects of key frames, and of the claims of answers and reasoning."""
    names: collections.Counter[str] = collections.Counter()
    for record in records:
        for items in (record.get("key_items") or {}).values():
            names.update(name.strip().lower() for name in items)
        for text in (record["answer"], record.get("reasoning_process") or ""):
            names.update(name.strip().lower() for name in re.findall(r"<obj>([^<]{1,80})</obj>", text))
    return names


def right_letter(record: Record) -> str | None:
    """The letter of a multiple-choice answer."""
    if record["task"] not in (tasks.GENERAL_MCQ, tasks.TEMPORAL_MCQ):
        return None
    letter = record["answer"].strip()[:1]
    return letter if letter.isupper() and letter.isascii() else None


# ---- guessing without looking ----


def make_guesses(
    records: Sequence[Record],
    spans: Sequence[tuple[float, float] | None],
    boxes: Sequence[Sequence[tuple[float, float, float, float]]],
) -> list[Guess]:
    """Scores of guessers that are learnt from half of the questions and asked about the other half."""
    learns = np.array([_is_learnt(record) for record in records], bool)
    guesses = []
    for task in tasks.TASKS:
        of_task = np.array([record["task"] == task for record in records], bool)
        known, asked = np.flatnonzero(of_task & learns), np.flatnonzero(of_task & ~learns)
        if not len(known) or not len(asked):
            continue
        if task in (tasks.GENERAL_MCQ, tasks.TEMPORAL_MCQ):
            guesses += _guess_letters(task, [records[i] for i in known], [records[i] for i in asked])
        if task in (tasks.TEMPORAL, tasks.TEMPORAL_MCQ):
            guesses += _guess_span(task, [spans[i] for i in known], [spans[i] for i in asked])
        if task in (tasks.VISUAL, tasks.TEMPORAL_SPATIAL):
            guesses += _guess_box(task, [boxes[i] for i in known], [boxes[i] for i in asked])
        if task in (tasks.GENERAL_FREE_FORM, tasks.TEMPORAL_SPATIAL):
            guesses += _guess_answer(task, [records[i] for i in known], [records[i] for i in asked])
    return guesses


def _is_learnt(record: Record) -> bool:
    """Half of the media, whatever the order of the records: no clip is in both halves."""
    name = record.get("video_path") or record.get("image_path") or ""
    return hashlib.sha256(name.encode()).digest()[0] % 2 == 0


def _guess_letters(task: str, known: Sequence[Record], asked: Sequence[Record]) -> list[Guess]:
    letters = [right_letter(record) for record in asked]
    usual = collections.Counter(filter(None, map(right_letter, known))).most_common(1)
    if not usual:
        return []
    liked: collections.Counter[str] = collections.Counter()
    seen: collections.Counter[str] = collections.Counter()
    for record in known:
        options = options_of(record)
        seen.update(options.values())
        liked.update([options[letter]] if (letter := right_letter(record)) in options else [])

    def by_option(record: Record) -> str:
        """The option that is right most often of the times it is offered."""
        options = options_of(record)
        rates = {letter: liked[text] / seen[text] for letter, text in options.items() if seen[text]}
        return max(rates, key=lambda letter: rates[letter]) if rates else usual[0][0]

    def share(answers: Sequence[str]) -> float:
        return float(np.mean([answer == letter for answer, letter in zip(answers, letters, strict=True)]))

    return [
        Guess(task, f"always {usual[0][0]}", "accuracy", share([usual[0][0]] * len(asked)), len(asked)),
        Guess(task, "the option that is usually right", "accuracy", share([by_option(r) for r in asked]), len(asked)),
    ]


def options_of(record: Record) -> dict[str, str]:
    """Letter -> text of the options in a question, lower case."""
    return {letter: text.lower() for letter, text in _OPTION.findall(record["question"])}


def _guess_span(task: str, known: Sequence[tuple | None], asked: Sequence[tuple | None]) -> list[Guess]:
    """The one span, in shares of the clip, that overlaps best with the known ones."""
    known, asked = [span for span in known if span], [span for span in asked if span]
    if not known or not asked:
        return []
    choices = np.array([(start, end) for start in _GRID for end in _GRID if start < end])
    scores = geometry.span_iou(choices[:, None], np.array(known)[None]).mean(1)
    best = choices[int(scores.argmax())]
    return [
        Guess(task, f"always {best[0]:.0%} to {best[1]:.0%} of the clip", "tIoU", _mean_iou(best, asked), len(asked)),
        Guess(task, "always the whole clip", "tIoU", _mean_iou(np.array([0.0, 1.0]), asked), len(asked)),
    ]


def _mean_iou(span: np.ndarray, asked: Sequence[tuple]) -> float:
    return float(geometry.span_iou(span[None], np.array(asked)).mean())


def _guess_box(task: str, known: Sequence[Sequence[tuple]], asked: Sequence[Sequence[tuple]]) -> list[Guess]:
    """The one box, in shares of the frame, that overlaps best with the known ones, each record's best counting."""
    true = np.array([box for own in known for box in own])
    asked = [own for own in asked if own]
    if not len(true) or not asked:
        return []
    corners = _GRID[::2]
    sides = np.array([(a, b) for a in corners for b in corners if a < b])
    choices = np.concatenate([np.repeat(sides, len(sides), 0), np.tile(sides, (len(sides), 1))], 1)[:, [0, 2, 1, 3]]
    sample = true[:: max(1, len(true) // 500)]
    best = choices[int(geometry.box_iou(choices[:, None], sample[None]).mean(1).argmax())]
    middle = np.array([0.25, 0.25, 0.75, 0.75])

    def score(box: np.ndarray) -> float:
        return float(np.mean([geometry.box_iou(box[None], np.array(own)).max() for own in asked]))

    where = ", ".join(f"{value:.0%}" for value in best)
    return [
        Guess(task, f"always the box {where} of the frame", "IoU", score(best), len(asked)),
        Guess(task, "always the middle quarter", "IoU", score(middle), len(asked)),
    ]


def _guess_answer(task: str, known: Sequence[Record], asked: Sequence[Record]) -> list[Guess]:
    """The usual answer to questions that begin with the same two words, else the usual answer."""
    usual: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for record in known:
        for key in (_opening(record), ""):
            usual[key][_plain(record["answer"])] += 1
    said = [usual[key if (key := _opening(record)) in usual else ""].most_common(1)[0][0] for record in asked]
    right = [answer == _plain(record["answer"]) for answer, record in zip(said, asked, strict=True)]
    name = "the usual answer to questions that begin so"
    return [Guess(task, name, "same words", float(np.mean(right)), len(asked))]


def _opening(record: Record) -> str:
    return " ".join(record["question"].lower().split()[:2])


def _plain(answer: str) -> str:
    return " ".join(re.findall(r"\w+", answer.lower()))

"""Answers to held-out records of the training format, beside what the records themselves know: what, when and where."""

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from openo3_jax import geometry, tags, tasks
from openo3_jax.errors import InputError
from openo3_jax.evals import answers, metrics
from openo3_jax.rewards import truth, words

Record = Mapping[str, Any]
COLUMNS = ("format", "acc", "tiou", "viou")
NEAR_S = 0.5  # a claim speaks of a key frame that is at most so far from the moment it cites
_GRID, _FINER = 12, 6  # cells of a side that the best constant box is searched on; how much finer around the best
_BLOCKS = 100  # parts of that search, for memory

_OPTION = re.compile(r"^([A-Z])\. (.+)$", re.MULTILINE)


def judge(records: Sequence[Record], texts: Sequence[str]) -> Float[np.ndarray, "records 4"]:
    """`COLUMNS` of each answer in [0, 1]; `nan` where the task does not ask for it.

    format: see `metrics.is_well_formed`. acc: the option, or the words of an open answer. tiou: of the span answered.
    viou: of a picture the box answered; of a clip, over its key frames, the box that the reasoning claims for the
    object at the time nearest to the frame's, 0 without a claim of that name within `NEAR_S`.

    `records` as rewards take them (`transforms.Prepared.reward_record`). Raises: InputError as `rewards.score` does.
    """
    rows = [_judge_one(*one) for one in zip(records, _golds(records), texts, strict=True)]
    return np.array(rows, np.float64).reshape(len(rows), len(COLUMNS))


def means(columns: Float[np.ndarray, "records 4"]) -> Float[np.ndarray, "records 5"]:
    """What `metrics.mam`, `metrics.mlgm` and the bootstraps take; here both chains are one."""
    _, acc, tiou, viou = columns.T
    return np.stack([acc, tiou, tiou, viou, viou], axis=1)


def constant_span(records: Sequence[Record]) -> float:
    """Mean tIoU of the one span that is best for all of `records`: what can be had without looking, and more.

    Raises: InputError where no record asks for a span.
    """
    spans_s = _spans(records)
    # Between true starts tIoU is convex in the start, so a true one is best; likewise the end.
    starts_s, ends_s = (np.unique(edges) for edges in spans_s.T)
    every = np.stack(np.broadcast_arrays(starts_s[:, None], ends_s), axis=-1)
    return max(float(geometry.span_iou(some[:, None], spans_s).mean(axis=1).max()) for some in every)


def constant_box(records: Sequence[Record]) -> float:
    """Mean vIoU by `judge` of the one box, as fractions of the picture, that is best for all of `records`.

    A clip's answer claims it for every object of every key frame; moments and names are given. Searched on a grid of
    1/12, then around the best box in steps of 1/72. Raises: InputError where no record asks for a box.
    """
    asked = _boxes(records)
    edges = np.arange(_GRID + 1) / _GRID
    sides = [(low, high) for low in edges for high in edges if low < high]
    coarse = np.array([(x1, y1, x2, y2) for x1, x2 in sides for y1, y2 in sides])
    shifts = np.arange(1 - _FINER, _FINER) / (_GRID * _FINER)
    fine = asked.best(coarse)[0] + np.array(list(itertools.product(shifts, repeat=4)))
    return asked.best(fine.clip(0.0, 1.0))[1]


def _golds(records: Sequence[Record]) -> list[truth.Gold]:
    stemmer = words.Stemmer()
    return [truth.read_record(record, i, stemmer) for i, record in enumerate(records)]


def _spans(records: Sequence[Record]) -> Float[np.ndarray, "spans 2"]:
    """Every span asked for, in seconds."""
    found = [gold.truth.span_s for gold in _golds(records) if gold.truth.has_span]
    if not found:
        raise InputError(f"records: none of {len(records)} asks for a span; expected temporal QA among them")
    return np.array(found, np.float64)


class _Asked(NamedTuple):
    """The boxes asked for, as fractions of their picture, and what each object counts in the mean over questions."""

    boxes: Float[np.ndarray, "objects boxes 4"]  # padded with nan
    weights: Float[np.ndarray, " objects"]

    def vious(self, said: Float[np.ndarray, "answers 4"]) -> Float[np.ndarray, " answers"]:
        """Mean vIoU of each answer, which is one box for every object."""
        each = np.tile(self.boxes, (len(said), 1, 1)), np.repeat(said, len(self.boxes), axis=0)
        return metrics.box_ious(*each).reshape(len(said), -1) @ self.weights

    def best(self, said: Float[np.ndarray, "answers 4"]) -> tuple[Float[np.ndarray, "4"], float]:
        """The answer that earns most, and what it earns."""
        earned = np.concatenate([self.vious(some) for some in np.array_split(said, _BLOCKS)])
        return said[earned.argmax()], float(earned.max())


def _boxes(records: Sequence[Record]) -> _Asked:
    """Every box asked for. Each question counts once, and each of its objects alike."""
    found = [objects for objects in map(_true_boxes, _golds(records)) if objects]
    if not found:
        raise InputError(
            f"records: none of {len(records)} asks for a box; expected visual or temporal-spatial QA among them"
        )
    every = [boxes for objects in found for boxes in objects]
    padded = np.full((len(every), max(map(len, every)), 4), math.nan)
    for row, boxes in zip(padded, every, strict=True):
        row[: len(boxes)] = boxes
    return _Asked(padded, np.array([1 / len(objects) for objects in found for _ in objects]) / len(found))


def _true_boxes(gold: truth.Gold) -> list[Float[np.ndarray, "boxes 4"]]:
    """Fractions of the picture: the box of a visual answer, or those of each object of each key frame."""
    of = gold.truth
    if of.has_box:
        return [geometry.boxes_to_frac(np.array([of.answer_box]), np.array(of.original_hw))]
    if not of.has_frames:
        return []
    boxes = np.array(of.gold_boxes, np.float64).reshape(-1, 4)
    return [boxes[np.array(of.gold_box_object) == number] for number in range(len(of.object_frame))]


def _judge_one(record: Record, gold: truth.Gold, text: str) -> list[float]:
    acc = tiou = viou = math.nan
    answer = answers.final_text(text)
    if gold.option:
        options = dict(_OPTION.findall(record["question"]))
        acc = float(answers.parse_letter(answer.rpartition("Option:")[2], options) == gold.option)
    elif gold.task in (tasks.GENERAL_FREE_FORM, tasks.TEMPORAL_SPATIAL):
        acc = float(answers.matches_open(text, record["answer"]))
    if gold.truth.has_span:
        span = answers.parse_span(answer.partition("\n")[0])
        tiou = float(metrics.tiou(np.array(span or (math.nan, math.nan)), np.array(gold.truth.span_s)))
    if gold.truth.has_box:
        scale = np.tile(np.divide(gold.truth.size_hw[::-1], gold.truth.original_hw[::-1]), 2)
        box = np.array(tags.parse_first_box(answer) or (math.nan,) * 4)
        viou = metrics.viou(metrics.box_ious(box[None, None], np.array([gold.truth.answer_box]) * scale))
    elif gold.truth.has_frames:
        viou = _claimed_iou(gold, tags.parse_claims(tags.think_text(text) or ""))
    return [float(metrics.is_well_formed(text)), acc, tiou, viou]


def _claimed_iou(gold: truth.Gold, claims: Sequence[tags.Claim]) -> float:
    """Mean over objects of key frames of the IoU that the claim nearest in time has; of several boxes the best pair."""
    size_px = np.tile(gold.truth.size_hw[::-1], 2)
    ious = []
    for frame, name, boxes in zip(gold.truth.object_frame, gold.truth.object_names, _true_boxes(gold), strict=True):
        time_s = gold.truth.frame_times_s[frame]
        near = [
            claim
            for claim in claims
            if claim.time_s is not None
            and abs(claim.time_s - time_s) <= NEAR_S
            and gold.name_ids.get(truth.normal_name(claim.name)) == name
        ]
        nearest = min(near, key=lambda claim: abs(claim.time_s - time_s), default=None)
        said = np.array([b for b in (nearest.boxes or ()) if b is not None] if nearest else []).reshape(-1, 4)
        overlaps = metrics.box_ious(np.broadcast_to(said, (len(boxes), *said.shape)), boxes * size_px)
        ious.append(overlaps.max(initial=0.0))
    return metrics.viou(np.array(ious))

"""Answers to held-out records of the training format, beside what the records themselves know: what, when and where."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from openo3_jax import geometry, tags, tasks
from openo3_jax.errors import InputError
from openo3_jax.evals import answers, metrics
from openo3_jax.rewards import truth, words

Record = Mapping[str, Any]
COLUMNS = ("format", "acc", "tiou", "viou")
NEAR_S = 0.5  # a claim speaks of a key frame that is at most so far from the moment it cites

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


def constant_span(records: Sequence[Record], *, step_s: float = 0.25) -> float:
    """Mean tIoU of the one span that is best for all of `records`: what can be had without looking, and more.

    Raises: InputError where no record asks for a span.
    """
    spans_s = _spans(records)
    edges = np.arange(0.0, spans_s.max() + step_s, step_s)
    every = np.array([(start, end) for start in edges for end in edges if start < end])
    return float(geometry.span_iou(every[:, None], spans_s).mean(axis=1).max())


def constant_box(records: Sequence[Record], *, step: float = 1 / 12) -> float:
    """Mean IoU of the one box, as fractions of the picture, that is best for all of `records`, the moment given.

    Raises: InputError where no record asks for a box.
    """
    boxes = _boxes(records)
    edges = np.arange(0.0, 1.0 + step / 2, step)
    sides = [(low, high) for low in edges for high in edges if low < high]
    every = np.array([(x1, y1, x2, y2) for x1, x2 in sides for y1, y2 in sides])
    return max(float(geometry.box_iou(one, boxes).mean()) for one in every)


def _golds(records: Sequence[Record]) -> list[truth.Gold]:
    stemmer = words.Stemmer()
    return [truth.read_record(record, i, stemmer) for i, record in enumerate(records)]


def _spans(records: Sequence[Record]) -> Float[np.ndarray, "spans 2"]:
    """Every span asked for, in seconds."""
    found = [gold.truth.span_s for gold in _golds(records) if gold.truth.has_span]
    if not found:
        raise InputError(f"records: none of {len(records)} asks for a span; expected temporal QA among them")
    return np.array(found, np.float64)


def _boxes(records: Sequence[Record]) -> Float[np.ndarray, "boxes 4"]:
    """Every box asked for, as fractions of its picture."""
    found: list[Sequence[float]] = []
    for gold in (one.truth for one in _golds(records)):
        if gold.has_box:
            found.append(np.array(gold.answer_box) / np.tile(gold.original_hw[::-1], 2))
        found += gold.gold_boxes
    if not found:
        raise InputError(
            f"records: none of {len(records)} asks for a box; expected visual or temporal-spatial QA among them"
        )
    return np.array(found, np.float64)


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
        viou = float(geometry.box_iou(box, np.array(gold.truth.answer_box) * scale))
    elif gold.truth.has_frames:
        viou = _claimed_iou(gold, tags.parse_claims(tags.think_text(text) or ""))
    return [float(metrics.is_well_formed(text)), acc, tiou, viou]


def _claimed_iou(gold: truth.Gold, claims: Sequence[tags.Claim]) -> float:
    """Mean over objects of key frames of the IoU that the claim nearest in time has."""
    size_px = np.tile(gold.truth.size_hw[::-1], 2)
    ious = []
    for number, frame in enumerate(gold.truth.object_frame):
        time_s, name = gold.truth.frame_times_s[frame], gold.truth.object_names[number]
        boxes = [b for b, of in zip(gold.truth.gold_boxes, gold.truth.gold_box_object, strict=True) if of == number]
        near = [
            claim
            for claim in claims
            if claim.time_s is not None
            and abs(claim.time_s - time_s) <= NEAR_S
            and gold.name_ids.get(truth.normal_name(claim.name)) == name
        ]
        nearest = min(near, key=lambda claim: abs(claim.time_s - time_s), default=None)
        said = np.array([b for b in (nearest.boxes or ()) if b is not None] if nearest else []).reshape(-1, 1, 4)
        overlaps = geometry.box_iou(said, np.array(boxes) * size_px)
        ious.append(float(overlaps.max(initial=0.0)))
    return float(np.mean(ious)) if ious else math.nan

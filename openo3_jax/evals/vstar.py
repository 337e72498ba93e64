"""V-STaR: what, when and where along two chains; five independent calls per item, no answer carried over.

Chain 1 is what-when-where, chain 2 what-where-when. Source: Open-o3-Video eval/test/test_vstar_multi_images.py,
eval/test/eval_vstar.py; arXiv:2503.11495.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float64

from openo3_jax import geometry
from openo3_jax.errors import InputError
from openo3_jax.evals import answers, boxes, files, items, judge, metrics, scores, wording
from openo3_jax.evals.config import BoxesIn

WHAT, WHEN_1, WHERE_1, WHERE_2, WHEN_2 = CALLS = ("what", "when_1", "where_1", "where_2", "when_2")
R1_COLUMNS = tuple(f"r1@{threshold:g}_{chain}" for chain in metrics.CHAINS for threshold in metrics.R1_THRESHOLDS)
AP_COLUMNS = tuple(f"ap@{threshold:g}_{chain}" for chain in metrics.CHAINS for threshold in metrics.AP_THRESHOLDS)


def _headline(name: str) -> scores.Measure:
    return scores.Measure(name, metrics.MEANS, lambda means: metrics.headline(means)[name])


CHAIN_MEASURES = tuple(_headline(f"{kind}_{chain}") for chain in metrics.CHAINS for kind in ("am", "lgm"))
MEASURES = (
    *(scores.mean_of(name) for name in metrics.MEANS),
    *CHAIN_MEASURES,
    _headline("mam"),
    _headline("mlgm"),
    *(scores.mean_of(name) for name in (*R1_COLUMNS, *AP_COLUMNS)),
)
GROUP_MEASURES = (*(scores.mean_of(name) for name in metrics.MEANS), _headline("mam"), _headline("mlgm"))


@dataclasses.dataclass(frozen=True)
class Boxes:
    """True boxes and the second of each, in px of a picture of `size_wh` (width, height)."""

    seconds: tuple[float, ...]
    boxes_px: Float64[np.ndarray, "boxes 4"]
    size_wh: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Truth:
    """What is true of one item: its span in seconds, its boxes in px of the clip's own size."""

    question: str
    answer: str
    span_s: tuple[float, float]
    boxes: Boxes


def load(root: Path, words: wording.Wording) -> files.Loaded:
    """The items of `V_STaR_test.json`, clips in `videos/`. Raises InputError where there is no usable item."""
    rows = files.read_rows(root, "V_STaR_test.json", "*.json")
    numbered = [(place, {**row, "number": i}) for i, (place, row) in enumerate(rows)]
    return files.load_items(
        numbered, lambda row: make_item(row, files.find_clip(root, files.text_of(row, "vid")), words)
    )


def make_item(row: files.Row, clip: Path, words: wording.Wording) -> items.Item:
    """The five calls of one annotation. Raises InputError for a missing or malformed field."""
    truth = read_truth(row)
    duration_s = files.number_of(row, "frame_count") / max(files.number_of(row, "fps"), 1e-9)
    first, last = whole_seconds(truth.span_s)
    width, height = truth.boxes.size_wh
    said = ", ".join(f"[{','.join(f'{value:g}' for value in box)}]" for box in truth.boxes.boxes_px.tolist())
    when, where_1, where_2 = (
        files.text_of(row, field) for field in ("temporal_question", "spatial_question", "spatial_question_2")
    )
    return items.Item(
        id=f"{row['vid']}#{row['number']}",
        calls={
            WHAT: words["vstar_what"].ask(video=clip, question=truth.question),
            WHEN_1: words["vstar_when_1"].ask(video=clip, question=when, duration=f"{duration_s:.1f}"),
            WHERE_1: words["vstar_where_1"].ask(video=clip, question=where_1, first=first, last=last),
            WHERE_2: words["vstar_where_2"].ask(video=clip, question=where_2, count=len(truth.boxes.seconds)),
            WHEN_2: words["vstar_when_2"].ask(video=clip, question=when, boxes=said, width=width, height=height),
        },
        truth=truth,
        groups={"duration": metrics.duration_bucket(duration_s), **files.groups_of(row, "domain")},
    )


def read_truth(row: files.Row) -> Truth:
    """The annotation's own fields. Raises InputError naming the one that is wrong."""
    span = files.list_of(row, "timestamps")
    span = span[0] if len(span) == 1 and isinstance(span[0], list) else span
    if len(span) != 2:
        raise InputError(f"timestamps={row['timestamps']!r:.80}; expected [start, end] in seconds")
    marked = files.list_of(row, "bboxes")
    if not all(isinstance(box, Mapping) for box in marked):
        raise InputError("bboxes: expected objects with timestamp, xmin, ymin, xmax, ymax")
    corners = [[files.number_of(box, name) for name in ("xmin", "ymin", "xmax", "ymax")] for box in marked]
    return Truth(
        question=files.text_of(row, "question"),
        answer=files.text_of(row, "answer"),
        span_s=(
            files.number_of({"timestamps": span[0]}, "timestamps"),
            files.number_of({"timestamps": span[1]}, "timestamps"),
        ),
        boxes=Boxes(
            seconds=tuple(files.number_of(box, "timestamp") for box in marked),
            boxes_px=np.array(corners, np.float64).reshape(-1, 4),
            size_wh=(int(files.number_of(row, "width")), int(files.number_of(row, "height"))),
        ),
    )


def whole_seconds(span_s: tuple[float, float]) -> tuple[int, int]:
    """The whole seconds inside the span, first and last; the nearest one where it holds none."""
    first, last = math.ceil(span_s[0]), math.floor(span_s[1])
    middle = round(sum(span_s) / 2)
    return (first, last) if first <= last else (middle, middle)


# ---- predictions -> scores ----


def question_of(truth: Truth, prediction: items.Prediction) -> judge.Question:
    """What the judge is asked about the open answer."""
    return judge.Question(truth.question, truth.answer, answers.final_text(prediction.text))


def score(
    asked: Sequence[items.Item],
    said: Mapping[items.Key, items.Prediction],
    verdicts: Mapping[str, judge.Verdict],
    *,
    boxes_in: BoxesIn = "source",
) -> scores.Scores:
    """Every measure of every item.

    `boxes_in`: "source" takes the boxes said from px of the frames shown to px of the clip's own size, where the true
    ones are; "released" compares them as they are. An answer that cannot be read earns 0; a call that could not be
    asked, and an answer without a verdict, is left out (`nan`).
    """
    nothing = dict.fromkeys((*metrics.MEANS, *R1_COLUMNS, *AP_COLUMNS), math.nan)
    rows = [{**nothing, **_score_one(item, said, verdicts.get(item.id), boxes_in)} for item in asked]
    columns = {name: np.array([row[name] for row in rows], np.float64) for name in nothing}
    return scores.Scores(
        ids=tuple(item.id for item in asked),
        columns=columns,
        groups=tuple(item.groups for item in asked),
        notes=tuple(_notes(asked, said)),
    )


def _score_one(
    item: items.Item, said: Mapping[items.Key, items.Prediction], verdict: judge.Verdict | None, boxes_in: BoxesIn
) -> dict[str, float]:
    truth: Truth = item.truth
    found: dict[str, float] = {}
    found["acc"] = judge.correctness(verdict)
    for chain, when, where in ((1, WHEN_1, WHERE_1), (2, WHEN_2, WHERE_2)):
        prediction = said.get((item.id, when))
        if prediction is not None and prediction.error is None:
            span = answers.parse_span(prediction.text) or (math.nan, math.nan)
            overlap = float(metrics.tiou(np.array(span, np.float64), np.array(truth.span_s, np.float64)))
            found[f"tiou_{chain}"] = overlap
            found |= {f"r1@{at:g}_{chain}": float(overlap >= at) for at in metrics.R1_THRESHOLDS}
        prediction = said.get((item.id, where))
        if prediction is not None and prediction.error is None and truth.boxes.seconds:
            ious = ious_of(prediction, truth.boxes, boxes_in)
            found[f"viou_{chain}"] = metrics.viou(ious)
            shares = metrics.average_precision(ious)
            found |= {f"ap@{at:g}_{chain}": float(p) for at, p in zip(metrics.AP_THRESHOLDS, shares, strict=True)}
    return found


def ious_of(prediction: items.Prediction, truth: Boxes, boxes_in: BoxesIn) -> Float64[np.ndarray, " boxes"]:
    """For each true box the best IoU of the boxes said for its second, 0 where none is; `boxes_in` as in `score`."""
    said = boxes.at_seconds(boxes.parse_boxes(prediction.text), truth.seconds)
    if boxes_in == "source" and prediction.shown_hw is not None:
        width, height = truth.size_wh
        said_frac = geometry.boxes_to_frac(said, np.array(prediction.shown_hw))
        said = geometry.boxes_to_px(said_frac, np.array([height, width]))
    return metrics.box_ious(said, truth.boxes_px)


def joint_counts(found: scores.Scores) -> dict[str, int]:
    """Items with several parts right at once; see `metrics.joint_counts`. What was left out counts as not right."""
    columns = {name: np.nan_to_num(found.columns[name]) for name in metrics.MEANS}
    return metrics.joint_counts(
        columns["acc"] > 0,
        np.stack([columns["tiou_1"], columns["tiou_2"]], axis=1),
        np.stack([columns["viou_1"], columns["viou_2"]], axis=1),
    )


def _notes(asked: Sequence[items.Item], said: Mapping[items.Key, items.Prediction]) -> list[str]:
    texts = [said[item.id, name].texts for item in asked for name in CALLS if (item.id, name) in said]
    rate = metrics.format_rate([text for samples in texts for text in samples[:1]])
    notes = [f"answers in the taught form: {100 * rate:.1f} %"]
    no_boxes = sum(not item.truth.boxes.seconds for item in asked)
    if no_boxes:
        notes.append(f"{no_boxes} items have no boxes and are left out of viou and ap")
    return notes

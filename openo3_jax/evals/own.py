"""Any video QA set of one's own, as JSONL: answers, and where they are given, spans and boxes.

A line holds `id`, `video` and `question`, and at least one of `answer` (with `options` for a choice), `span` and
`boxes`. Example:

    {"id": "7", "video": "clips/7.mp4", "question": "What falls?", "answer": "A cup",
     "span": [3.0, 4.5], "when": "When does the cup fall?",
     "boxes": {"3": [[10, 20, 60, 80]]}, "size": [640, 360], "where": "Where is the cup?",
     "groups": {"domain": "kitchen"}}

`when` and `where` word the questions about span and boxes, else `question` does. Boxes are xyxy in px of a picture of
`size` [width, height], by second.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from openo3_jax import tags
from openo3_jax.errors import InputError
from openo3_jax.evals import answers, choice, files, grounding, items, judge, metrics, scores, vstar, wording
from openo3_jax.evals.config import BoxesIn

ANSWER, WHEN, WHERE = choice.CALL, grounding.CALL, "where"
MEASURES = (scores.mean_of("accuracy"), scores.mean_of("miou"), scores.mean_of("viou"))


@dataclasses.dataclass(frozen=True)
class Truth:
    """What a line states; None where it says nothing."""

    answer: choice.Truth | None
    span: tags.Span | None
    boxes: vstar.Boxes | None


def load(file: Path, words: wording.Wording) -> files.Loaded:
    """The items of a JSONL file; clips are found from its directory. Raises InputError where there is none."""

    def make(row: files.Row) -> items.Item:
        return make_item(row, files.find_clip(file.parent, files.text_of(row, "video")), words)

    return files.load_items(files.read_file(file), make)


def make_item(row: files.Row, clip: Path, words: wording.Wording) -> items.Item:
    """One call for each of answer, span and boxes. Raises InputError naming the field that is wrong."""
    key, question = files.text_of(row, "id"), files.text_of(row, "question")
    groups = row.get("groups", {})
    if not isinstance(groups, Mapping) or not all(isinstance(value, str) for value in groups.values()):
        raise InputError(f"groups={groups!r:.60}; expected texts by dimension")
    truth = Truth(
        answer=_answer(row, question) if row.get("answer") is not None else None,
        span=_span(row) if row.get("span") is not None else None,
        boxes=_boxes(row) if row.get("boxes") is not None else None,
    )
    calls = {}
    if truth.answer is not None:
        calls |= choice.make_item(key, clip, truth.answer, words, groups={}).calls
    if truth.span is not None:
        calls[WHEN] = words["grounding"].ask(video=clip, question=row.get("when") or question)
    if truth.boxes is not None:
        first, last = (f"{edge(truth.boxes.seconds):g}" for edge in (min, max))
        asked = row.get("where") or question
        calls[WHERE] = words["vstar_where_1"].ask(video=clip, question=asked, first=first, last=last)
    if not calls:
        raise InputError("has neither answer, span nor boxes; expected at least one")
    return items.Item(key, calls, truth, groups)


def _answer(row: files.Row, question: str) -> choice.Truth:
    answer = files.text_of(row, "answer")
    options = choice.options_of(files.list_of(row, "options")) if row.get("options") else {}
    return choice.Truth(question, options, choice.answer_letter(answer, options) if options else answer)


def _span(row: files.Row) -> tags.Span:
    span = [files.number_of({"span": value}, "span") for value in files.list_of(row, "span")]
    if len(span) != 2 or span[0] > span[1]:
        raise InputError(f"span={row['span']!r:.60}; expected [start, end] in seconds, the end not before the start")
    return tags.Span(*span)


def _boxes(row: files.Row) -> vstar.Boxes:
    size = [int(files.number_of({"size": value}, "size")) for value in files.list_of(row, "size")]
    said = row["boxes"]
    pairs = (
        [(second, box) for second, boxes in said.items() if isinstance(boxes, list) for box in boxes]
        if isinstance(said, Mapping)
        else []
    )
    corners = [tags.box_from_json(box) for _, box in pairs]
    if len(size) != 2 or min(size) < 1 or not pairs or not all(box and _has_area(box) for box in corners):
        raise InputError(
            'boxes: expected {"second": [[x1, y1, x2, y2], ..]} with x1 < x2 and y1 < y2, and size [width, height]'
        )
    seconds = tuple(files.number_of({"boxes": second}, "boxes") for second, _ in pairs)
    return vstar.Boxes(seconds, np.array(corners, np.float64), (size[0], size[1]))


def _has_area(box: tags.Box) -> bool:
    x1, y1, x2, y2 = box
    return all(map(math.isfinite, box)) and x1 < x2 and y1 < y2


def question_of(item: items.Item, said: Mapping[items.Key, items.Prediction]) -> judge.Question | None:
    """What a judge is asked about an open answer; None where the item has none, or its call failed."""
    truth, prediction = item.truth.answer, said.get((item.id, ANSWER))
    if truth is None or truth.options or prediction is None or prediction.error is not None:
        return None
    return judge.Question(truth.question, truth.answer, answers.final_text(prediction.text))


def score(
    asked: Sequence[items.Item],
    said: Mapping[items.Key, items.Prediction],
    verdicts: Mapping[str, judge.Verdict],
    *,
    boxes_in: BoxesIn = "source",
) -> scores.Scores:
    """Accuracy (options, or a judge's 2 and 3), tIoU and vIoU, each over the items that have it."""
    rows = []
    for item in asked:
        truth: Truth = item.truth
        found = dict.fromkeys(("accuracy", "miou", "viou"), math.nan)
        prediction = said.get((item.id, ANSWER))
        if truth.answer is not None and truth.answer.options:
            alone = dataclasses.replace(item, truth=truth.answer)
            found["accuracy"] = float(choice.score([alone], said).columns["accuracy"][0])
        elif truth.answer is not None and prediction is not None and prediction.error is None:
            found["accuracy"] = judge.correctness(verdicts.get(item.id))
        if truth.span is not None:
            alone = dataclasses.replace(item, truth=truth.span)
            found["miou"] = float(grounding.score([alone], said).columns["miou"][0])
        prediction = said.get((item.id, WHERE))
        if truth.boxes is not None and prediction is not None and prediction.error is None:
            found["viou"] = metrics.viou(vstar.ious_of(prediction, truth.boxes, boxes_in))
        rows.append(found)
    columns = {name: np.array([row[name] for row in rows], np.float64) for name in ("accuracy", "miou", "viou")}
    return scores.Scores(tuple(item.id for item in asked), columns, tuple(item.groups for item in asked))

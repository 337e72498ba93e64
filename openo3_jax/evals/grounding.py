"""When does it happen: one span per question, scored by its tIoU. TVGBench, and items of one's own."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from openo3_jax import tags
from openo3_jax.errors import InputError
from openo3_jax.evals import answers, files, items, metrics, scores, wording

CALL = "when"
R1_COLUMNS = tuple(f"r1@{threshold:g}" for threshold in metrics.R1_THRESHOLDS)
MEASURES = (scores.mean_of("miou"), *(scores.mean_of(name) for name in (*R1_COLUMNS, "no_span")))
_SPAN = re.compile(r"\s{0,4}(\d++(?:\.\d++)?)\s{0,4}-\s{0,4}(\d++(?:\.\d++)?)\s{0,4}")


def load_tvgbench(root: Path, words: wording.Wording) -> files.Loaded:
    """`tvgbench.json` of Time-R1 (arXiv:2503.13377): `path`, `question`, `answer` as `13.4-28.1`, in seconds.

    Where `start` and `end` cut a part out of a longer clip, that is shown, and `answer` counts from its start.
    """

    def make(numbered: files.Row) -> items.Item:
        row = numbered["row"]
        clip = {"type": "video", "video": files.find_clip(root, files.text_of(row, "path")), **_part(row)}
        asked = words["grounding"].show([clip], question=files.text_of(row, "question"))
        bins = row.get("bins")  # the first-person clips have no dataset_name
        named = {"dataset_name": bins.get("dataset"), **row} if isinstance(bins, dict) else row
        groups = files.groups_of(named, "dataset_name", "qsemtype")
        return items.Item(str(numbered["number"]), {CALL: asked}, parse_truth(files.text_of(row, "answer")), groups)

    rows = files.read_rows(root, "tvgbench.json", "annotations/tvgbench.json", "*.json")
    return files.load_items([(place, {"number": i, "row": row}) for i, (place, row) in enumerate(rows)], make)


def _part(row: files.Row) -> dict[str, list[float]]:
    """`part_s` of a clip, [start, end] in seconds; empty where it is shown whole. Raises InputError for half a part."""
    if row.get("start") is None and row.get("end") is None:
        return {}
    start_s, end_s = files.number_of(row, "start"), files.number_of(row, "end")
    if not 0 <= start_s < end_s:
        raise InputError(f"start={start_s:g}, end={end_s:g}; expected a part of the clip, in seconds")
    return {"part_s": [start_s, end_s]}


def parse_truth(text: str) -> tags.Span:
    """`13.4-28.1` -> a span in seconds. Raises InputError for anything else."""
    found = _SPAN.fullmatch(text)
    if found is None:
        raise InputError(f"answer={text!r:.60}; expected two times such as 13.4-28.1")
    return tags.Span(float(found[1]), float(found[2]))


def score(asked: Sequence[items.Item], said: Mapping[items.Key, items.Prediction]) -> scores.Scores:
    """tIoU and recall of each item; an answer without a readable span earns 0, a call that failed is left out."""
    rows = [_score_one(item.truth, said.get((item.id, CALL))) for item in asked]
    names = ("miou", *R1_COLUMNS, "no_span")
    columns = dict(zip(names, np.array(rows, np.float64).reshape(len(rows), len(names)).T, strict=True))
    texts = [prediction.text for prediction in said.values() if prediction.error is None]
    notes = (f"answers in the taught form: {100 * metrics.format_rate(texts):.1f} %",)
    return scores.Scores(tuple(item.id for item in asked), columns, tuple(item.groups for item in asked), notes)


def _score_one(truth: tags.Span, prediction: items.Prediction | None) -> list[float]:
    if prediction is None or prediction.error is not None:
        return [math.nan] * (2 + len(R1_COLUMNS))
    span = answers.parse_span(prediction.text)
    pair = np.array(span or (math.nan, math.nan), np.float64), np.array(truth, np.float64)
    overlap = float(metrics.tiou(*pair))
    return [overlap, *(float(overlap >= at) for at in metrics.R1_THRESHOLDS), float(span is None)]

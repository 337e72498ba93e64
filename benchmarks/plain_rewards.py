"""The released rewards the plain way: one completion per call, seven functions that each search the text again.

Written from the description of src/r1-v/src/open_r1/reward_func.py, in its structure: regular expressions, numpy IoU,
a `rouge_score` scorer built for each call. The yardstick of `benchmarks/rewards.py`, and an oracle in the tests.
"""

import ast
import json
import math
import re
from typing import Any

import numpy as np
from rouge_score import rouge_scorer

STR, VISUAL, TEMPORAL = "temporal-spatial free-form QA", "visual QA", "temporal QA"
TEMPORAL_MCQ, MCQ, FREE = "temporal QA (MCQ)", "General video QA MCQ", "General video QA Free-form"


def _think(text: str) -> str | None:
    match = re.search(r"<think>(.*?)</think>", text, re.DOTALL)
    return match.group(1).strip() if match else None


def _answer(text: str) -> str | None:
    match = re.search(r"<answer>\s*(.*?)\s*</answer>", text, re.DOTALL)
    return match.group(1).strip() if match else None


def _is_option(reply: str, option: str) -> float:
    return float(reply in (option, f"{option}.", f"({option})", f"[{option}]"))


def ans_acc(row: dict[str, Any]) -> float:
    reply = _answer(row["completion"]) or ""
    if row["task"] in (VISUAL, TEMPORAL):
        return 0.0
    if row["task"] == MCQ:
        return _is_option(reply, row["answer"].strip())
    if row["task"] == TEMPORAL_MCQ:
        parts = reply.split("Correct Option:")
        return _is_option(parts[1].strip(), row["answer"].split("\n")[0].strip()) if len(parts) > 1 else 0.0
    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    scores = scorer.score(row["answer"], reply)
    return float(np.clip(np.mean([score.fmeasure for score in scores.values()]), 0.0, 1.0))


def _span(row: dict[str, Any]) -> tuple[float, float]:
    text = row["answer"].split("\n")[1] if row["task"] == TEMPORAL_MCQ else row["answer"]
    start, end = ast.literal_eval(text)
    return float(start), float(end)


def ans_tiou(row: dict[str, Any]) -> float:
    if row["task"] not in (TEMPORAL, TEMPORAL_MCQ):
        return 0.0
    reply = _answer(row["completion"]) or ""
    match = re.search(r"<t>(\d+\.?\d*)</t>s to <t>(\d+\.?\d*)</t>s", reply)
    if not match:
        return 0.0
    start, end = map(float, match.groups())
    gold_start, gold_end = _span(row)
    overlap = max(0.0, min(end, gold_end) - max(start, gold_start))
    hull = max(end, gold_end) - min(start, gold_start)
    return overlap / hull if end >= start and 0 < hull < math.inf else 0.0


def _iou(box: Any, gold: Any) -> float:
    if not isinstance(box, list) or len(box) != 4:
        return 0.0
    try:
        a, b = np.array(box, dtype=np.float64), np.array(gold, dtype=np.float64)
    except (ValueError, TypeError):
        return 0.0
    if a.shape != (4,):
        return 0.0
    with np.errstate(all="ignore"):
        sides = np.clip(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0, None)
        inter = sides[0] * sides[1]
        union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter
        iou = inter / union if union > 0 else 0.0
    return float(iou) if np.isfinite(iou) else 0.0


def _visual_box(row: dict[str, Any]) -> list[float]:
    box = json.loads(re.search(r"<box>(\[.*?\])</box>", row["answer"]).group(1))
    x, y = (new / old for new, old in zip(row["image_size_refine"], row["image_size"], strict=True))
    return [box[0] * x, box[1] * y, box[2] * x, box[3] * y]


def ans_viou(row: dict[str, Any]) -> float:
    match = re.search(r"<box>(\[.*?\])</box>", _answer(row["completion"]) or "")
    if row["task"] != VISUAL or not match:
        return 0.0
    try:
        return _iou(json.loads(match.group(1)), _visual_box(row))
    except ValueError:
        return 0.0


def format_reward(row: dict[str, Any]) -> float:
    text, think = row["completion"], _think(row["completion"])
    if think is None or _answer(text) is None:
        return 0.0
    if any(text.count(f"<{tag}>") != text.count(f"</{tag}>") for tag in ("think", "answer")):
        return 0.0
    if any(think.count(f"<{tag}>") != think.count(f"</{tag}>") for tag in ("obj", "t", "box")):
        return 0.0
    each = all(think.count(f"<{tag}>") > 0 for tag in ("obj", "t", "box"))
    if row["task"] in (TEMPORAL, TEMPORAL_MCQ):
        return 1.0 if think.count("<t>") >= 2 else 0.5
    if row["task"] == STR:
        return 1.0 if each else 0.5
    if row["task"] == VISUAL:
        return 1.0 if each or re.search(r"<obj>(\w+)</obj><box>(\[.*?\])</box>", text) else 0.5
    return 1.0


def _times(row: dict[str, Any]) -> list[float]:
    try:
        return [float(time) for time in re.findall(r"<t>([\d.]+)</t>s", _think(row["completion"]) or "")]
    except ValueError:
        return []


def thk_temporal_segment(row: dict[str, Any]) -> float:
    if row["task"] not in (TEMPORAL, TEMPORAL_MCQ):
        return 0.0
    times = _times(row)
    start, end = _span(row)
    return sum(start <= time <= end for time in times) / len(times) if times else 0.0


def thk_temporal_point(row: dict[str, Any]) -> float:
    times = _times(row) if row["task"] == STR else []
    if not times:
        return 0.0
    progress = row["step_percent"]
    sigma = 4 * (1 - progress) if progress < 0.75 else 1.0
    frames = [frame["time"] for frame in row["key_frames"]]
    nearest = [min(abs(frame - time) for frame in frames) for time in times]
    return sum(math.exp(-(distance**2) / (2 * sigma**2)) for distance in nearest) / len(times)


def thk_spatial(row: dict[str, Any]) -> float:
    think = _think(row["completion"])
    if think is None or _answer(row["completion"]) is None or row["task"] not in (STR, VISUAL):
        return 0.0
    if row["task"] == VISUAL:
        best = 0.0
        for text in re.findall(r"<box>(\[.*?\])</box>", think):
            try:
                best = max(best, _iou(json.loads(text), _visual_box(row)))
            except ValueError:
                continue
        return best
    scores = []
    claims = re.findall(r"<obj>(.*?)</obj>((?:<box>\[.*?\]</box>)+)at<t>(.*?)</t>s", think, re.DOTALL)
    for _, run, time_text in claims:
        try:
            time = float(time_text.strip())
            boxes = [json.loads(box) for box in re.findall(r"\[.*?\]", run)]
        except ValueError:
            continue
        scores.append(_claim_score(row, time, boxes))
    return sum(scores) / len(scores) if scores else 0.0


def _claim_score(row: dict[str, Any], time: float, boxes: list) -> float:
    near = [frame for frame in row["key_frames"] if frame["time"] - time < 1.0]
    if not near:
        return 0.0
    frame = min(near, key=lambda frame: abs(frame["time"] - time))
    if frame["time"] == -1:
        return 0.0
    width, height = row["image_size"]
    best = 0.0
    for golds in row["key_items"][str(frame["idx"])].values():
        scaled = [[x1 * width, y1 * height, x2 * width, y2 * height] for x1, y1, x2, y2 in golds]
        overlaps = [max((_iou(box, gold) for box in boxes), default=0.0) for gold in scaled]
        best = max(best, float(np.mean(overlaps)) if overlaps else 0.0)
    return best


REWARDS = {
    "ans_acc": ans_acc,
    "ans_tiou": ans_tiou,
    "ans_viou": ans_viou,
    "thk_temporal_point": thk_temporal_point,
    "thk_temporal_segment": thk_temporal_segment,
    "thk_spatial": thk_spatial,
    "format": format_reward,
}


def score(row: dict[str, Any]) -> dict[str, float]:
    """The seven terms of one completion; the record holds it as `completion`, and `step_percent`."""
    return {name: reward(row) for name, reward in REWARDS.items()}

"""Why a completion scored what it did: every claim, time, span, box and option, in words."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from openo3_jax import geometry, tags, tasks
from openo3_jax.rewards import score, spatial, temporal
from openo3_jax.rewards.arrays import Prediction, Rows
from openo3_jax.rewards.parse import Parsed
from openo3_jax.rewards.rules import RewardRules, RuleNumbers
from openo3_jax.rewards.truth import Gold


@jax.jit
def _evidence(rows: Rows, rules: RuleNumbers) -> spatial.Evidence:
    return jax.vmap(lambda row: spatial.gather_evidence(row.prediction, row.truth, rules))(rows)


def evidence(parsed: Parsed, rules: RewardRules) -> list[spatial.Evidence]:
    """What became of each row's claims, numpy arrays in the order of the batch; entries beyond its claims are padding.

    `box_iou` has a row for each box of think and a column for each true box, in the order of the record.
    """
    found: list[Any] = [None] * len(parsed.golds)
    for bucket in parsed.buckets():
        with score.double_precision():
            arrays = jax.tree.map(np.asarray, _evidence(bucket.rows, rules.numbers()))
        for row, place in enumerate(bucket.places):
            found[place] = spatial.Evidence(*(field[row] for field in arrays))
    return found


def proximities(times_s: Sequence[float], parsed: Parsed, row: int, rules: RewardRules) -> list[float]:
    """Of each cited time to the row's nearest key frame, in [0, 1], as `thk_temporal_point` counts it."""
    frames_s = np.array(parsed.golds[row].truth.frame_times_s, np.float64)
    distance_s = np.abs(np.array(times_s, np.float64)[:, None] - frames_s).min(1)
    with score.double_precision():
        sigma_s = temporal.sigma_s(parsed.progress[[row]], rules.numbers())
        return np.asarray(temporal.proximity(distance_s, sigma_s)).tolist()


def explain(parsed: Parsed, completions: Sequence[str], rules: RewardRules) -> list[list[str]]:
    """Lines for each completion, in the order of the batch; the numbers are those of the score."""
    lines: list[list[str]] = [[] for _ in completions]
    with score.double_precision():
        sigmas = np.asarray(temporal.sigma_s(parsed.progress, rules.numbers()))
    for place, found in enumerate(evidence(parsed, rules)):
        prediction, gold = parsed.predictions[place], parsed.golds[place]
        lines[place] = [
            *_answer_lines(completions[place], prediction, gold),
            *_claim_lines(completions[place], prediction, gold, found, rules),
            *_time_lines(prediction, gold, float(sigmas[place]), rules),
            *_format_lines(prediction),
        ]
    return lines


def _answer_lines(text: str, prediction: Prediction, gold: Gold) -> list[str]:
    reply = tags.answer_text(text)
    if reply is None:
        return ["answer: there is no <answer>..</answer>"]
    lines = []
    if gold.option or gold.task == tasks.GENERAL_MCQ:
        verdict = "right" if 0 in prediction.options else "wrong or not in the form X, X., (X) or [X]"
        lines.append(f"option: expected {gold.option!r}; {verdict}")
    if gold.truth.has_span:
        expected = "{:g} to {:g} s".format(*gold.truth.span_s)
        span = tags.parse_span(reply)
        if span is None:
            lines.append(f"span: no '<t>start</t>s to <t>end</t>s' in the answer; expected {expected}")
        else:
            iou = float(geometry.span_iou(np.array(span), np.array(gold.truth.span_s)))
            lines.append(f"span: {span.start_s:g} to {span.end_s:g} s, expected {expected}, IoU {iou:.3f}")
    if gold.truth.has_box:
        sizes = np.array([gold.truth.original_hw, gold.truth.size_hw])
        expected = geometry.resize_boxes(np.array(gold.truth.answer_box, np.float64), *sizes)
        named = {"answer": [prediction.answer_box], "think": prediction.boxes}
        for place, boxes in named.items():
            for box in boxes:
                iou = _iou(box, expected)
                lines.append(f"box in {place}: {_box(box)} px, expected {_box(expected)}, IoU {iou:.3f}")
    if gold.task in (tasks.TEMPORAL_SPATIAL, tasks.GENERAL_FREE_FORM):
        known = sum(word >= 0 for word in prediction.words)
        lines.append(f"ROUGE: {prediction.num_words} words, {known} of them in the {len(gold.truth.words)} expected")
    return lines


def claim_fate(number: int, evidence: spatial.Evidence) -> str:
    """What a parsed claim earns, or why it is not counted."""
    if evidence.counted[number]:
        return f"earns {evidence.iou[number]:.3f}"
    return "earns nothing, for it was said before or its true box has earned already"


def time_fate(time_s: float | None, prediction: Prediction, rules: RewardRules) -> str | None:
    """Why a time in think does not count, None where it may; None or nan: it is not a number."""
    if time_s is None or np.isnan(time_s):
        return "not a number, " + ("voids all times" if rules.one_bad_time_voids else "is left out")
    is_void = rules.one_bad_time_voids and np.isnan(prediction.times_s).any()
    return "not counted, for another time is not a number" if is_void else None


def _claim_lines(
    text: str, prediction: Prediction, gold: Gold, evidence: spatial.Evidence, rules: RewardRules
) -> list[str]:
    if gold.task != tasks.TEMPORAL_SPATIAL:
        return []
    lines = []
    if prediction.num_objects and not (prediction.has_think and prediction.has_answer):
        lines.append("claims: no think or no answer, so thk_spatial is 0")
    names = {number: name for name, number in gold.name_ids.items()}
    first_box = 0
    for number, claim in enumerate(tags.parse_claims(tags.think_text(text) or "")):
        head = f"claim {number + 1}: {claim.name[:40]!r} at {claim.time_text.strip()[:20]} s"
        if claim.boxes is None or claim.time_s is None:
            fault = "the time is no number" if claim.time_s is None else "a box is no JSON list"
            lines.append(f"{head}: not parsed, {fault}")
            continue
        boxes = range(first_box, first_box + len(claim.boxes))
        first_box += len(claim.boxes)
        if not gold.truth.frame_times_s:
            lines.append(f"{head}: the record has no key frame")
            continue
        frame = int(evidence.frame[number])
        verdict = "passes" if evidence.cited[number] else "fails"
        lines.append(
            f"{head}: key frame at {gold.truth.frame_times_s[frame]:g} s, dt {evidence.delta_s[number]:+.3f} s, "
            f"{verdict} the gate ({_gate(rules)}), {claim_fate(number, evidence)}"
        )
        for box in boxes:
            for other, gold_object in enumerate(gold.truth.gold_box_object):
                if gold.truth.object_frame[gold_object] == frame:
                    name = names[gold.truth.object_names[gold_object]]
                    lines.append(f"  box {box - boxes.start + 1} with {name!r}: IoU {evidence.box_iou[box, other]:.3f}")
    return lines


def _time_lines(prediction: Prediction, gold: Gold, sigma_s: float, rules: RewardRules) -> list[str]:
    lines = []
    for time_s, repeats in zip(prediction.times_s, prediction.time_repeats, strict=True):
        fate = time_fate(time_s, prediction, rules)
        if fate is not None:
            lines.append(f"time: {fate}" if np.isnan(time_s) else f"time {time_s:g} s: {fate}")
        elif rules.repeats_once and repeats:
            lines.append(f"time {time_s:g} s: not counted, for it was cited before")
        elif gold.task == tasks.TEMPORAL_SPATIAL and gold.truth.frame_times_s:
            nearest = min(gold.truth.frame_times_s, key=lambda frame_s, time_s=time_s: abs(frame_s - time_s))
            with score.double_precision():
                near = float(temporal.proximity(np.float64([abs(time_s - nearest)]), np.float64([sigma_s]))[0])
            lines.append(
                f"time {time_s:g} s: nearest key frame {nearest:g} s, dt {time_s - nearest:+.3f} s, "
                f"sigma {sigma_s:.2f} s, proximity {near:.3f}"
            )
        elif gold.truth.has_span:
            start_s, end_s = gold.truth.span_s
            inside = "inside" if start_s <= time_s <= end_s else "outside"
            lines.append(f"time {time_s:g} s: {inside} {start_s:g} to {end_s:g} s")
    return lines


def _format_lines(prediction: Prediction) -> list[str]:
    faults = {
        "no <think>..</think>": not prediction.has_think,
        "no <answer>..</answer>": not prediction.has_answer,
        "tags are not closed as often as opened": not prediction.balanced,
    }
    return [f"format: {fault}" for fault, present in faults.items() if present]


def _gate(rules: RewardRules) -> str:
    return f"|dt| <= {rules.gate_s:g} s" if rules.gate == "both_sides" else f"-dt < {rules.gate_s:g} s"


def _iou(box: Sequence[float], gold: np.ndarray) -> float:
    with np.errstate(all="ignore"):  # boxes of a model may be infinite
        return float(geometry.box_iou(np.array(box), gold))


def _box(box: Sequence[float] | np.ndarray) -> str:
    return "none" if np.isnan(box).any() else "[" + ", ".join(f"{value:g}" for value in box) + "]"

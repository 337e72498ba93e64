"""Records with completions -> what each mention of a completion earned, the truth beside it, and the terms."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from openo3_jax import geometry, tags, tasks
from openo3_jax.rewards import explain, parse, score, spatial
from openo3_jax.rewards.rules import TERMS, RewardRules, get_rules
from openo3_jax.rewards.truth import Gold, SizeFinder

BoxFrac = tuple[float, float, float, float]  # xyxy, fractions of the picture


class TrueBox(NamedTuple):
    """`time_s`: of its key frame, None for a still."""

    name: str
    box_frac: BoxFrac
    time_s: float | None


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What is known of one mention: in words, and the true boxes to hold against its own."""

    lines: tuple[str, ...] = ()
    true_boxes: tuple[TrueBox, ...] = ()


@dataclasses.dataclass(frozen=True)
class Scored:
    """One completion against its record. `terms`: None where one does not apply. `shown_hw`: px, None if not known.

    `verdicts` follow `tags.parse_mentions` over the parts of the completion, one list per part.
    """

    terms: Mapping[str, float | None]
    total: float
    verdicts: tuple[tuple[Verdict, ...], ...]
    spans_s: tuple[tuple[float, float], ...]
    key_times_s: tuple[float, ...]
    shown_hw: tuple[float, float] | None


def score_rows(
    records: Sequence[Mapping[str, Any]],
    completions: Sequence[str],
    progress: parse.Progress,
    *,
    rules: str = "paper",
    sizes: SizeFinder | None = None,
) -> list[Scored]:
    """Score as `rewards.score` does and keep what the page shows. Raises: InputError as `parse` does."""
    chosen = get_rules(rules)
    parsed = parse.parse(records, completions, progress, sizes)
    rewards = score.score_parsed(parsed, chosen)
    found = explain.evidence(parsed, chosen)
    rows = []
    for row, text in enumerate(completions):
        gold = parsed.golds[row]
        judge = _Judge(parsed, row, found[row], chosen)
        rows.append(
            Scored(
                terms={t: float(rewards.terms[t][row]) if rewards.applies[t][row] else None for t in TERMS},
                total=float(rewards.total[row]),
                verdicts=tuple(judge.part(part.kind, text[part.start : part.end]) for part in tags.parts(text)),
                spans_s=((tuple(map(float, gold.truth.span_s)),) if gold.truth.has_span else ()),
                key_times_s=tuple(float(t) for t in gold.truth.frame_times_s if math.isfinite(t)),
                shown_hw=None if math.isnan(gold.area_px) else tuple(map(float, gold.truth.size_hw)),
            )
        )
    return rows


class _Judge:
    """One row: its mentions -> verdicts."""

    def __init__(self, parsed: parse.Parsed, row: int, evidence: spatial.Evidence, rules: RewardRules):
        self._parsed, self._row, self._rules = parsed, row, rules
        self._gold: Gold = parsed.golds[row]
        self._prediction = parsed.predictions[row]
        self._evidence = evidence

    def part(self, kind: str, text: str) -> tuple[Verdict, ...]:
        mentions = tags.parse_mentions(text)
        if kind == "outside":
            return tuple(Verdict(("outside of think and answer: earns nothing",)) for _ in mentions)
        if self._gold.task == tasks.VISUAL:
            return tuple(self._picture_boxes(mention) for mention in mentions)
        if kind == "answer":
            return tuple(self._in_answer(mention) for mention in mentions)
        first_box, verdicts = 0, []
        for mention in mentions:
            verdicts.append(self._in_think(mention, first_box))
            if mention.claim is not None and mention.boxes is not None and mention.times_s != (None,):
                first_box += len(mention.boxes)
        return tuple(verdicts)

    def _in_think(self, mention: tags.Mention, first_box: int) -> Verdict:
        truth = self._gold.truth
        if self._gold.task == tasks.TEMPORAL_SPATIAL:
            if not truth.frame_times_s:
                return Verdict(("the record has no key frame",))
            if mention.claim is not None:
                return self._claim(mention, first_box)
            return Verdict(self._nearness(mention.times_s))
        if truth.has_span:
            start_s, end_s = truth.span_s
            known = [(t, "inside" if start_s <= t <= end_s else "outside") for t in mention.times_s if t is not None]
            lines = (f"{t:g} s is {place} the true span, {start_s:g} to {end_s:g} s" for t, place in known)
            return Verdict((*lines, *self._fates(mention.times_s)))
        return Verdict()

    def _claim(self, mention: tags.Mention, first_box: int) -> Verdict:
        if mention.boxes is None or mention.times_s == (None,):
            fault = "its time is no number" if mention.times_s == (None,) else "a box is no JSON list"
            return Verdict((f"malformed, {fault}: earns nothing",))
        truth, evidence, number = self._gold.truth, self._evidence, mention.claim
        frame, names = int(evidence.frame[number]), {i: name for name, i in self._gold.name_ids.items()}
        in_frame = [
            (column, names[truth.object_names[owner]])
            for column, owner in enumerate(truth.gold_box_object)
            if truth.object_frame[owner] == frame
        ]
        frame_s = float(truth.frame_times_s[frame])
        passes = "passes" if evidence.cited[number] else "fails"
        gate = f"|dt| <= {self._rules.gate_s:g} s" if self._rules.gate == "both_sides" else "not too early"
        lines = [f"key frame at {frame_s:g} s, dt {evidence.delta_s[number]:+.2f} s: {passes} the gate ({gate})"]
        for box in range(first_box, first_box + len(mention.boxes)):
            best = max(in_frame, key=lambda one, box=box: evidence.box_iou[box, one[0]], default=None)
            if best is not None:
                place = f"box {box - first_box + 1}: " if len(mention.boxes) > 1 else ""
                lines.append(f"{place}IoU {evidence.box_iou[box, best[0]]:.3f} with {best[1]!r}")
        is_whole = self._prediction.has_think and self._prediction.has_answer
        fate = explain.claim_fate(number, evidence) if is_whole else "earns nothing without an answer"
        lines.append(f"thk_spatial: {fate}")
        lines += self._nearness(mention.times_s)
        true_boxes = tuple(
            TrueBox(name, tuple(map(float, truth.gold_boxes[column])), frame_s) for column, name in in_frame
        )
        return Verdict(tuple(lines), true_boxes)

    def _nearness(self, times_s: Sequence[float | None]) -> tuple[str, ...]:
        """How much each time earns for thk_temporal_point."""
        known = [t for t in times_s if t is not None and not math.isnan(t)]
        near = explain.proximities(known, self._parsed, self._row, self._rules) if known else []
        lines = (
            f"{t:g} s: proximity {value:.3f} to the nearest key frame" for t, value in zip(known, near, strict=True)
        )
        return (*lines, *self._fates(times_s))

    def _fates(self, times_s: Sequence[float | None]) -> tuple[str, ...]:
        """Why times do not count, each reason once."""
        fates = (explain.time_fate(t, self._prediction, self._rules) for t in times_s)
        return tuple(dict.fromkeys(fate for fate in fates if fate is not None))

    def _in_answer(self, mention: tags.Mention) -> Verdict:
        truth = self._gold.truth
        if truth.has_span and len(mention.times_s) == 2:
            iou = float(geometry.span_iou(np.array(mention.times_s, float), np.array(truth.span_s, float)))
            return Verdict(("temporal IoU {:.3f} with the true span, {:g} to {:g} s".format(iou, *truth.span_s),))
        return Verdict()

    def _picture_boxes(self, mention: tags.Mention) -> Verdict:
        truth = self._gold.truth
        if not truth.has_box:
            return Verdict(("the record has no true box",))
        gold = geometry.resize_boxes(np.array(truth.answer_box, float), *np.array([truth.original_hw, truth.size_hw]))
        with np.errstate(all="ignore"):  # boxes of a model may be infinite
            ious = [float(geometry.box_iou(np.array(box, float), gold)) for box in mention.boxes or () if box]
        box_frac = geometry.boxes_to_frac(gold, np.array(truth.size_hw, float))
        lines = tuple(f"IoU {iou:.3f} with the true box" for iou in ious)
        return Verdict(lines, (TrueBox("true box", tuple(map(float, box_frac)), None),))

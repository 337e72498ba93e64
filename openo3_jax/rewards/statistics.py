"""How evidence looks, whatever it earns: counts, sizes and repetitions over a batch, and alarms when they move."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from openo3_jax import tags, tasks
from openo3_jax.rewards.parse import Parsed

# Largest healthy value of each statistic, and how far it may move between two parts of a run.
LIMITS: Mapping[str, float] = {
    "boxes_per_answer": 12.0,
    "times_per_answer": 12.0,
    "box_area": 0.7,
    "repeated_times": 0.5,
    "repeated_claims": 0.3,
    "malformed_claims": 0.2,
    "clip_cited": 0.5,
    "format_broken": 0.3,
}
DRIFTS: Mapping[str, float] = {
    "boxes_per_answer": 2.0,
    "times_per_answer": 2.0,
    "box_area": 0.15,
    "repeated_times": 0.15,
    "repeated_claims": 0.1,
    "malformed_claims": 0.1,
    "clip_cited": 0.15,
    "format_broken": 0.1,
}


@dataclasses.dataclass(frozen=True)
class EvidenceStatistics:
    """Means over the answers that have such evidence at all; nan where none does."""

    boxes_per_answer: float
    times_per_answer: float
    box_area: float  # share of the picture, of well-formed boxes
    repeated_times: float  # share of times that stood before in the same answer
    repeated_claims: float
    malformed_claims: float  # share of `<obj>` that belong to no parsed claim (temporal-spatial)
    clip_cited: float  # seconds cited (each whole second once) over the seconds the clip is known to have
    format_broken: float  # share of answers without think and answer, or with unbalanced tags


def evidence_statistics(parsed: Parsed, places: Sequence[int] | None = None) -> EvidenceStatistics:
    """Statistics of a batch, or of some of its rows.

    A clip is known to last at least until its latest annotated or cited time; `video_duration` (s) of the record
    counts too.
    """
    places = range(len(parsed.golds)) if places is None else places
    rows = [(parsed.predictions[place], parsed.golds[place]) for place in places]
    timed = [(p, g) for p, g in rows if g.task.startswith("temporal")]
    boxed = [(p, g) for p, g in rows if not math.isnan(g.area_px)]
    spatial = [p for p, g in rows if g.task == tasks.TEMPORAL_SPATIAL]
    objects = sum(p.num_objects for p in spatial)
    return EvidenceStatistics(
        boxes_per_answer=_mean([len(p.boxes) for p, _ in boxed]),
        times_per_answer=_mean([len(p.times_s) for p, _ in timed]),
        box_area=_mean(box_shares(parsed, places)),
        repeated_times=_mean([repeat for p, _ in timed for repeat in p.time_repeats]),
        repeated_claims=_mean([repeat for p in spatial for repeat in p.claim_repeats]),
        malformed_claims=_share(sum(p.num_objects - sum(p.claim_valid) for p in spatial), objects),
        clip_cited=_mean([_cited(p.times_s, g.last_s) for p, g in timed if len(p.times_s)]),
        format_broken=_mean([not (p.has_think and p.has_answer and p.balanced) for p, _ in rows]),
    )


def box_shares(parsed: Parsed, places: Sequence[int] | None = None) -> list[float]:
    """What share of its picture each well-formed box covers, in [0, 1], where the picture's size is known."""
    places = range(len(parsed.golds)) if places is None else places
    rows = [(parsed.predictions[place], parsed.golds[place]) for place in places]
    with np.errstate(all="ignore"):
        return [
            min((x2 - x1) * (y2 - y1) / gold.area_px, 1.0)
            for prediction, gold in rows
            if not math.isnan(gold.area_px)
            for x1, y1, x2, y2 in prediction.boxes
            if x2 > x1 and y2 > y1 and all(map(math.isfinite, (x1, y1, x2, y2)))
        ]


def alarms(statistics: EvidenceStatistics) -> list[str]:
    """One line for each statistic beyond its limit."""
    return [
        f"{name} is {value:.2f}, more than {LIMITS[name]:g}"
        for name, value in dataclasses.asdict(statistics).items()
        if value > LIMITS[name]
    ]


def drift_alarms(before: EvidenceStatistics, after: EvidenceStatistics) -> list[str]:
    """One line for each statistic that moved, up or down, by more than it may."""
    first, last = dataclasses.asdict(before), dataclasses.asdict(after)
    return [
        f"{name} went from {first[name]:.2f} to {last[name]:.2f}"
        for name in first
        if abs(last[name] - first[name]) > DRIFTS[name]
    ]


def _cited(times_s: Sequence[float], last_s: tags.Number) -> float:
    seconds = {int(time_s) for time_s in times_s if math.isfinite(time_s) and time_s < 1e9}
    return min(len(seconds) / (int(max([last_s, *seconds])) + 1), 1.0)


def _mean(values: Sequence[Any]) -> float:
    return float(np.mean(values)) if len(values) else math.nan


def _share(part: int, whole: int) -> float:
    return part / whole if whole else math.nan

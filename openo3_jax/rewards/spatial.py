"""Where: boxes against boxes, and evidence against key frames, for one row, in px and float64."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from openo3_jax import geometry, tasks
from openo3_jax.rewards import temporal
from openo3_jax.rewards.arrays import Prediction, Truth
from openo3_jax.rewards.rules import RuleNumbers


class Evidence(NamedTuple):
    """What became of each claim of one row."""

    frame: Int[Array, " claims"]  # the key frame it was matched to; meaningless without any
    delta_s: Float[Array, " claims"]  # cited time minus the frame's
    cited: Bool[Array, " claims"]  # the claim is well formed and its frame passed the gate
    box_iou: Float[Array, "boxes gold_boxes"]  # every predicted box with every true one of any frame
    counted: Bool[Array, " claims"]  # not said before, nor on a box that has earned, where the rules ask
    iou: Float[Array, " claims"]  # what the claim earns; 0 unless cited and counted


def ans_viou(prediction: Prediction, truth: Truth) -> Float[Array, ""]:
    """IoU in [0, 1] of the answer's box and the true one; 0 without a box.

    Source: src/r1-v/src/open_r1/reward_func.py:184-237.
    """
    return geometry.box_iou(prediction.answer_box, _seen_box(truth))


def thk_spatial(prediction: Prediction, truth: Truth, evidence: Evidence, rules: RuleNumbers) -> Float[Array, ""]:
    """Mean of what the claims in think earn; for visual QA, the best box in think (`visual_thk_spatial`).

    0 unless both think and answer are there.
    Source: arXiv:2510.20579, Eq. 5; src/r1-v/src/open_r1/reward_func.py:475-605.
    """
    # r = sum over claims of v / number of times or claims
    score = evidence.iou.sum() / jnp.maximum(num_claims(prediction, rules), 1)
    frames = jnp.arange(len(truth.frame_valid), dtype=jnp.int32)
    is_cited = (evidence.cited[:, None] & (evidence.frame[:, None] == frames)).any(0)
    recall = is_cited.sum(dtype=float) / jnp.maximum(truth.frame_valid.sum(dtype=float), 1)
    score *= jnp.where(rules.key_frame_recall, recall, 1.0)
    best = _at_least(geometry.box_iou(prediction.boxes, _seen_box(truth)), rules).max()
    score = jnp.where(truth.task == tasks.TASKS.index(tasks.VISUAL), best, score)
    return jnp.where(prediction.has_think & prediction.has_answer, score, 0.0)


def gather_evidence(prediction: Prediction, truth: Truth, rules: RuleNumbers) -> Evidence:
    """Match every claim to a key frame, and its boxes to that frame's objects.

    An object without boxes, and a frame without objects, earn 0.
    Source: src/r1-v/src/open_r1/reward_func.py:337-386, 527-605.
    """
    frame, delta_s, passes = match_frames(prediction.claim_times_s, truth.frame_times_s, truth.frame_valid, rules)
    cited = passes & prediction.claim_valid
    num_claims, num_objects = len(prediction.claim_names), len(truth.object_names)

    box_iou = geometry.box_iou(prediction.boxes[:, None], geometry.boxes_to_px(truth.gold_boxes, truth.size_hw))
    # best[claim, gold box] = max over the claim's boxes of IoU
    box_claim = prediction.box_claim
    is_first = jnp.diff(box_claim, prepend=jnp.full(1, -1, box_claim.dtype)) != 0
    box_claim = jnp.where(rules.one_box_per_claim & ~is_first, -1, box_claim)
    best = jax.ops.segment_max(box_iou, _or_last(box_claim, num_claims), num_claims + 1)[:-1]
    best = _at_least(jnp.maximum(best, 0.0), rules)
    # object[claim, object] = max or mean over the object's boxes
    box_object = _or_last(truth.gold_box_object, num_objects)
    largest = jnp.maximum(jax.ops.segment_max(best.T, box_object, num_objects + 1)[:-1].T, 0.0)
    count = jax.ops.segment_sum(jnp.ones(len(box_object)), box_object, num_objects + 1)[:-1]
    mean = jax.ops.segment_sum(best.T, box_object, num_objects + 1)[:-1].T / jnp.maximum(count, 1.0)
    overlap = jnp.where(rules.object_mean, mean, largest)
    # v[claim] = 1[gate] max over the objects of its frame
    shown = (truth.object_frame >= 0) & (truth.object_frame == frame[:, None])
    shown &= ~rules.compare_names | (truth.object_names == prediction.claim_names[:, None])
    counted = ~(rules.repeats_once & prediction.claim_repeats)
    shown &= (cited & counted)[:, None]
    iou = jnp.where(shown, overlap, 0.0).max(1)
    is_meant = (truth.gold_box_object >= 0) & shown[:, truth.gold_box_object]  # [claims gold boxes]
    counted &= ~(rules.once_per_box & _is_taken(jnp.where(is_meant, best, 0.0), iou))
    return Evidence(frame, delta_s, cited, box_iou, counted, jnp.where(counted, iou, 0.0))


def _is_taken(best: Float[Array, "claims gold_boxes"], iou: Float[Array, " claims"]) -> Bool[Array, " claims"]:
    """An earlier claim has earned on the true box that this one fits best."""
    box, place = best.argmax(1), jnp.arange(len(iou), dtype=jnp.int32)
    return ((box[:, None] == box) & (place < place[:, None]) & (iou > 0)).any(1)


def match_frames(
    times_s: Float[Array, " claims"],
    frame_times_s: Float[Array, " frames"],
    frame_valid: Bool[Array, " frames"],
    rules: RuleNumbers,
) -> tuple[Int[Array, " claims"], Float[Array, " claims"], Bool[Array, " claims"]]:
    """The key frame of each cited time (the first of several at one distance), cited minus its time, and the gate.

    `nearest_then_gate` looks for the nearest of all frames; `gate_then_nearest` first drops those beyond the
    gate, so that a farther one may win, and cannot use a frame at -1 s, its sign for "none".
    Source: arXiv:2510.20579, Eq. 5; src/r1-v/src/open_r1/reward_func.py:548-575.
    """
    delta_s = times_s[:, None] - frame_times_s  # [claims frames]
    inside = temporal.within_gate(delta_s, rules) & frame_valid
    candidates = jnp.where(rules.gate_first & inside.any(1, keepdims=True), inside, frame_valid)
    frame = jnp.where(candidates, jnp.abs(delta_s), jnp.inf).argmin(1).astype(jnp.int32)
    passes = jnp.take_along_axis(inside, frame[:, None], 1)[:, 0]
    passes &= ~rules.gate_first | (frame_times_s[frame] != -1.0)
    return frame, jnp.take_along_axis(delta_s, frame[:, None], 1)[:, 0], passes


def cites_unannotated(evidence: Evidence, truth: Truth) -> Bool[Array, ""]:
    """A claim was matched to a key frame for which the record has no boxes: there is no truth to compare with."""
    return (evidence.cited & ~truth.frame_has_items[evidence.frame]).any()


def num_claims(prediction: Prediction, rules: RuleNumbers) -> Float[Array, ""]:
    """What thk_spatial is divided by: the parsable times in think, or the claims.

    With `repeats_once` repeated times or claims are left out; with `malformed_in_denominator` it is at least the
    number of `<obj>` (less the repeated claims).
    """
    is_repeat = rules.repeats_once & prediction.claim_valid & prediction.claim_repeats
    repeats = is_repeat.sum(dtype=float)
    is_time = prediction.time_valid & ~jnp.isnan(prediction.times_s)
    times = is_time.sum(dtype=float) + prediction.odd_time_claims.astype(float)
    claims = prediction.claim_valid.sum(dtype=float)
    number = jnp.where(rules.per_time, times, claims) - repeats
    attempts = prediction.num_objects.astype(float) - repeats
    return jnp.where(rules.malformed_in_denominator, jnp.maximum(number, attempts), number)


def _seen_box(truth: Truth) -> Float[Array, "4"]:
    """The answer's box in px of what the model saw. Source: src/r1-v/src/open_r1/reward_func.py:349-354."""
    return geometry.resize_boxes(truth.answer_box, truth.original_hw, truth.size_hw)


def _at_least(iou: Float[Array, "*boxes"], rules: RuleNumbers) -> Float[Array, "*boxes"]:
    return jnp.where(iou >= rules.min_iou, iou, 0.0)


def _or_last(segment: Int[Array, " entries"], last: int) -> Int[Array, " entries"]:
    """Entries of no segment (-1) go to one of their own, which is then dropped."""
    return jnp.where(segment >= 0, segment, last)

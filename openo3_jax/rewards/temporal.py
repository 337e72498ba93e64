"""When: predicted spans and times against the truth, for one row, in seconds and float64."""

import jax.numpy as jnp
from jaxtyping import Bool, Float

from openo3_jax import geometry
from openo3_jax.rewards.arrays import Prediction, Truth
from openo3_jax.rewards.rules import RuleNumbers
from openo3_jax.types import Array


def ans_tiou(prediction: Prediction, truth: Truth) -> Float[Array, ""]:
    """IoU in [0, 1] of the answer's span and the true one; 0 without a span.

    Source: src/r1-v/src/open_r1/reward_func.py:86-182.
    """
    return geometry.span_iou(prediction.span_s, truth.span_s)


def thk_temporal_segment(prediction: Prediction, truth: Truth, rules: RuleNumbers) -> Float[Array, ""]:
    """Share of the times in think that lie in the true span, ends included; 0 without a time.

    Source: src/r1-v/src/open_r1/reward_func.py:388-426.
    """
    # r = mean over times of 1[start <= t <= end]
    start_s, end_s = truth.span_s
    inside = (start_s <= prediction.times_s) & (prediction.times_s <= end_s)
    return _mean(inside.astype(float), _counted(prediction, rules))


def thk_temporal_point(
    prediction: Prediction, truth: Truth, progress: Float[Array, ""], rules: RuleNumbers
) -> Float[Array, ""]:
    """Mean proximity in [0, 1] of the times in think to their nearest key frames; 0 without a time.

    With `key_frame_recall`, times the share of key frames that a time within the gate cites.
    Source: src/r1-v/src/open_r1/reward_func.py:429-472; arXiv:2510.20579, Eq. 4.
    """
    counted = _counted(prediction, rules)
    delta_s = prediction.times_s[:, None] - truth.frame_times_s  # [times frames]
    distance_s = jnp.where(truth.frame_valid, jnp.abs(delta_s), jnp.inf).min(1)
    score = _mean(proximity(distance_s, sigma_s(progress, rules)), counted)
    cited = counted[:, None] & within_gate(delta_s, rules) & truth.frame_valid
    recall = cited.any(0).sum(dtype=float) / jnp.maximum(truth.frame_valid.sum(dtype=float), 1)
    return score * jnp.where(rules.key_frame_recall, recall, 1.0)


def sigma_s(progress: Float[Array, "*rows"], rules: RuleNumbers) -> Float[Array, "*rows"]:
    """Width of the proximity: narrows in a straight line as training goes on, then stays.

    Source: src/r1-v/src/open_r1/reward_func.py:440-446.
    """
    # sigma(p) = start + (end - start) min(p / p_end, 1)
    share = jnp.minimum(progress / rules.sigma_end_progress, 1.0)
    return rules.sigma_start_s + (rules.sigma_end_s - rules.sigma_start_s) * share


def proximity(distance_s: Float[Array, "*times"], sigma_s: Float[Array, "*#times"]) -> Float[Array, "*times"]:
    """1 at the key frame, falling as a Gaussian of its distance; 0 at infinity."""
    # exp(-d^2 / (2 sigma^2))
    return jnp.exp(-((distance_s / sigma_s) ** 2) / 2)


def within_gate(delta_s: Float[Array, "*pairs"], rules: RuleNumbers) -> Bool[Array, "*pairs"]:
    """Whether a cited time may be compared with a key frame; `delta_s` is cited minus annotated.

    Source: arXiv:2510.20579, Eq. 5 (both sides); src/r1-v/src/open_r1/reward_func.py:552-560 (early only).
    """
    return jnp.where(rules.gate_both_sides, jnp.abs(delta_s) <= rules.gate_s, -delta_s < rules.gate_s)


def _counted(prediction: Prediction, rules: RuleNumbers) -> Bool[Array, " times"]:
    """Times that enter a mean: none if one of them is no number, or all that are."""
    is_number = ~jnp.isnan(prediction.times_s)
    is_void = rules.one_bad_time_voids & (prediction.time_valid & ~is_number).any()
    is_repeat = rules.repeats_once & prediction.time_repeats
    return prediction.time_valid & is_number & ~is_void & ~is_repeat


def _mean(values: Float[Array, " times"], counted: Bool[Array, " times"]) -> Float[Array, ""]:
    return jnp.where(counted, values, 0.0).sum() / jnp.maximum(counted.sum(dtype=float), 1)

"""Whether a completion keeps to the grammar, for one row: 0, 0.5 or 1."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from openo3_jax import tasks
from openo3_jax.rewards.arrays import Prediction, Truth
from openo3_jax.rewards.rules import RuleNumbers


def format_score(prediction: Prediction, truth: Truth, rules: RuleNumbers) -> Float[Array, ""]:
    """0 without a think and an answer or with unbalanced tags; 1 with the evidence the task asks for; else 0.5.

    Evidence: nothing for the general tasks, two `<t>` in think for the temporal ones, an object with its box and,
    for the temporal-spatial task, its time. `adjacent` wants these to touch; `counts` wants each of `<obj>`, `<box>`
    and `<t>` once in think, for visual QA too. `parsed` is `adjacent`, and the times, or a claim with its box, are
    numbers.
    Source: src/r1-v/src/open_r1/reward_func.py:239-306.
    """
    is_visual = truth.task == tasks.TASKS.index(tasks.VISUAL)
    is_spatial = is_visual | (truth.task == tasks.TASKS.index(tasks.TEMPORAL_SPATIAL))
    is_temporal = (truth.task == tasks.TASKS.index(tasks.TEMPORAL)) | (
        truth.task == tasks.TASKS.index(tasks.TEMPORAL_MCQ)
    )
    adjacent = jnp.where(is_visual, prediction.adjacent_box, prediction.adjacent_claim)
    box_evidence = jnp.where(rules.format_adjacent, adjacent, prediction.has_each_tag)
    box_evidence |= rules.format_one_word_object & is_visual & prediction.one_word_object
    has_evidence = jnp.where(is_spatial, box_evidence, ~is_temporal | (prediction.num_time_tags >= 2))
    has_box = jnp.isfinite(prediction.boxes).all(-1).any()
    num_times = (prediction.time_valid & jnp.isfinite(prediction.times_s)).sum(dtype=jnp.int32)
    is_read = jnp.where(
        is_visual, has_box, jnp.where(is_spatial, prediction.claim_valid.any() & has_box, num_times >= 2)
    )
    has_evidence &= ~rules.format_parsed | ~(is_spatial | is_temporal) | is_read
    well_formed = prediction.has_think & prediction.has_answer & prediction.balanced
    return jnp.where(well_formed, jnp.where(has_evidence, 1.0, 0.5), 0.0)

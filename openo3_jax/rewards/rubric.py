"""Terms -> reward: which apply, their weighted sum, and advantages within a group."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from openo3_jax import tasks
from openo3_jax.config import AdvantageConfig
from openo3_jax.rewards import answer, format, spatial, temporal
from openo3_jax.rewards.arrays import Rows, Truth
from openo3_jax.rewards.rules import TERMS, RuleNumbers
from openo3_jax.types import Array


class Scores(NamedTuple):
    """Terms in the order of `rules.TERMS`; 0 where they do not apply. `total` is their weighted sum."""

    terms: Float[Array, "*rows terms"]
    applies: Bool[Array, "*rows terms"]
    total: Float[Array, "*rows"]


@jax.jit
def score_rows(rows: Rows, rules: RuleNumbers) -> Scores:
    """Every term of every row, float32; call it under `jax.enable_x64`, times need float64 before the gate.

    Rows do not see each other: any order, any mix of tasks, any sharding of the leading dimension. Rules are data:
    other rules, the same program.
    """
    scores = jax.vmap(lambda row: score_row(row, rules))(rows)
    return Scores(scores.terms.astype(jnp.float32), scores.applies, scores.total.astype(jnp.float32))


def score_row(row: Rows, rules: RuleNumbers) -> Scores:
    """The seven terms of one row and their sum.

    Source: arXiv:2510.20579, section 3.3; src/r1-v/src/open_r1/trainer/grpo_trainer.py:639-658.
    """
    prediction, truth, progress = row
    evidence = spatial.gather_evidence(prediction, truth, rules)
    values = {
        "ans_acc": answer.ans_acc(prediction, truth, rules),
        "ans_tiou": temporal.ans_tiou(prediction, truth),
        "ans_viou": spatial.ans_viou(prediction, truth),
        "thk_temporal_point": temporal.thk_temporal_point(prediction, truth, progress, rules),
        "thk_temporal_segment": temporal.thk_temporal_segment(prediction, truth, rules),
        "thk_spatial": spatial.thk_spatial(prediction, truth, evidence, rules),
        "format": format.format_score(prediction, truth, rules),
    }
    applies = term_applies(truth, evidence, rules)
    terms = jnp.where(applies, jnp.stack([values[term] for term in TERMS]), 0.0)
    return Scores(terms, applies, (jnp.asarray(rules.weights)[truth.task] * terms).sum())


def term_applies(truth: Truth, evidence: spatial.Evidence, rules: RuleNumbers) -> Bool[Array, " terms"]:
    """Which terms mean something: the task has them, and the ground truth they need is well formed."""
    is_task = {task: truth.task == index for index, task in enumerate(tasks.TASKS)}
    is_spatial, is_visual = is_task[tasks.TEMPORAL_SPATIAL], is_task[tasks.VISUAL]
    is_temporal = is_task[tasks.TEMPORAL] | is_task[tasks.TEMPORAL_MCQ]
    annotated = truth.has_frames & truth.has_items & ~spatial.cites_unannotated(evidence, truth)
    spans = is_task[tasks.TEMPORAL] | (is_task[tasks.TEMPORAL_MCQ] & rules.temporal_mcq_tiou)
    applies = {
        "ans_acc": ~is_visual & ~is_task[tasks.TEMPORAL] & truth.has_answer,
        "ans_tiou": spans & truth.has_span,
        "ans_viou": is_visual & truth.has_box,
        "thk_temporal_point": is_spatial & truth.has_frames,
        "thk_temporal_segment": is_temporal & truth.has_span,
        "thk_spatial": (is_spatial & annotated) | (is_visual & truth.has_box & rules.visual_thk_spatial),
        "format": jnp.ones_like(is_visual),
    }
    return jnp.stack([applies[term] for term in TERMS])


class Advantages(NamedTuple):
    """`keep` is False for rollouts to leave out of the loss."""

    advantage: Float[Array, "prompts group"]
    mean: Float[Array, " prompts"]
    std: Float[Array, " prompts"]
    keep: Bool[Array, "prompts group"]


def advantages(
    reward: Float[Array, "prompts group"], config: AdvantageConfig, valid: Bool[Array, "prompts group"] | None = None
) -> Advantages:
    """Each rollout's reward relative to its group's. 0 in a group of one or of equal rewards, and where not `valid`.

    What is not `valid` counts neither in its group nor in the loss.

    Source: src/r1-v/src/open_r1/trainer/grpo_trainer.py:675-681.
    """
    valid = jnp.ones(reward.shape, bool) if valid is None else valid
    number = valid.sum(1)
    mean = jnp.where(valid, reward, 0.0).sum(1) / jnp.maximum(number, 1)
    centred = jnp.where(valid, reward - mean[:, None], 0.0)
    # std = sqrt(sum (r - mean)^2 / (G - 1)), or / G
    std = jnp.sqrt((centred**2).sum(1) / jnp.maximum(number - config.unbiased, 1))
    is_equal = jnp.where(valid, reward, -jnp.inf).max(1) <= jnp.where(valid, reward, jnp.inf).min(1)
    # A = (r - mean) / (std + floor)
    if config.scale == "none":
        advantage = centred
    else:
        spread = std if config.scale == "group" else _deviation(reward, valid, config.unbiased)
        advantage = centred / (spread[..., None] + config.std_floor)
    advantage = jnp.where(is_equal[:, None], 0.0, advantage)
    return Advantages(advantage, mean, std, valid & ~(is_equal & config.drop_equal)[:, None])


def _deviation(reward: Float[Array, "prompts group"], valid: Bool[Array, "prompts group"], unbiased: bool) -> Array:
    """Standard deviation of all valid rewards of the batch."""
    number = valid.sum()
    mean = jnp.where(valid, reward, 0.0).sum() / jnp.maximum(number, 1)
    return jnp.sqrt(jnp.where(valid, (reward - mean) ** 2, 0.0).sum() / jnp.maximum(number - unbiased, 1))

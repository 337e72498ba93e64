"""The loss of stage two as functions of arrays: ratio, clip, divergence from the reference, reduction."""

from typing import Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from openo3_jax.config import GSPOConfig
from openo3_jax.types import Array

KL_CLAMP = 10.0  # of the log-ratio to the reference, before exp (grpo_trainer.py:635)

Ratio = Literal["sequence", "token"]
PerTarget = Float[Array, "rows num_targets"]
PerCompletion = Float[Array, "rows group"]


class PolicyLoss(NamedTuple):
    """`loss` is what is minimised; the rest are means over the kept tokens, for the log."""

    loss: Float[Array, ""]
    policy: Float[Array, ""]  # the loss without the divergence
    kl: Float[Array, ""]  # from the reference, nats per token
    ratio: Float[Array, ""]
    clip_fraction: Float[Array, ""]  # share of tokens whose ratio the clip holds back


def policy_loss(
    logp: PerTarget,
    old_logp: PerTarget,
    reference_logp: PerTarget | None,
    sampled_logp: PerTarget,
    completion: Int[Array, "rows num_targets"],
    advantage: PerCompletion,
    keep: Bool[Array, "rows group"],
    config: GSPOConfig,
) -> PolicyLoss:
    """The clipped surrogate with a penalty for leaving the reference; log-probabilities in nats, -1 is no completion.

    r = exp(mean_t(logp_t - old_t)) of a completion (GSPO, arXiv:2507.18071 eq. 7), or exp(logp_t - old_t) of a token
    (GRPO, arXiv:2402.03300 eq. 3);  l_t = -min(r A, clip(r, 1 - low, 1 + high) A) + beta kl_t.

    Without a reference the divergence is 0. Source of the defaults: grpo_trainer.py:635-706.
    """
    member = _members(completion, advantage.shape[1]) & keep[:, :, None]
    weight = jnp.ones_like(logp)
    if config.importance_cap is not None:
        drift = _at_level(old_logp - sampled_logp, member, config.ratio)
        weight = jnp.minimum(jnp.exp(drift), config.importance_cap)
    ratio = jnp.exp(_at_level(logp - old_logp, member, config.ratio))
    clipped = jnp.clip(ratio, 1 - config.clip_low, 1 + config.clip_high)
    gain = _spread(advantage, member)
    surrogate = jnp.minimum(ratio * gain, clipped * gain)
    kl = jnp.zeros_like(logp) if reference_logp is None else k3(logp, reference_logp)
    reduce = sequence_mean if config.reduction == "sequence_mean" else token_mean
    policy = reduce(-weight * surrogate, member)
    return PolicyLoss(
        loss=policy + config.kl_coef * reduce(kl, member),
        policy=policy,
        kl=token_mean(kl, member),
        ratio=token_mean(ratio, member),
        clip_fraction=token_mean((ratio * gain > clipped * gain).astype(logp.dtype), member),
    )


def k3(logp: PerTarget, reference_logp: PerTarget) -> PerTarget:
    """exp(x) - x - 1 of x = clip(reference - logp, -10, 10): an estimate of the divergence that is never negative.

    Source: grpo_trainer.py:635-636; http://joschu.net/blog/kl-approx.html.
    """
    x = jnp.clip(reference_logp - logp, -KL_CLAMP, KL_CLAMP)
    return jnp.exp(x) - x - 1


def sequence_mean(values: PerTarget, member: Bool[Array, "rows group num_targets"]) -> Float[Array, ""]:
    """Mean over completions of the mean over their tokens; completions without a token are no completions."""
    has_tokens = member.any(-1)
    return _mean_by_completion(values, member).sum() / jnp.maximum(has_tokens.sum(dtype=values.dtype), 1)


def token_mean(values: PerTarget, member: Bool[Array, "rows group num_targets"]) -> Float[Array, ""]:
    """Mean over all tokens: a long completion weighs more."""
    counted = member.any(1)
    return jnp.where(counted, values, 0.0).sum() / jnp.maximum(counted.sum(dtype=values.dtype), 1)


def _members(completion: Int[Array, "rows num_targets"], group: int) -> Bool[Array, "rows group num_targets"]:
    return completion[:, None, :] == jnp.arange(group)[:, None]


def _at_level(log_ratio: PerTarget, member: Bool[Array, "rows group num_targets"], level: Ratio) -> PerTarget:
    """Each token's own log-ratio, or the mean of its completion's."""
    if level == "token":
        return log_ratio
    return _spread(_mean_by_completion(log_ratio, member), member)


# Sums over masks instead of scatters: their gradients are such sums too, and come out the same every time.


def _mean_by_completion(values: PerTarget, member: Bool[Array, "rows group num_targets"]) -> PerCompletion:
    total = jnp.where(member, values[:, None, :], 0.0).sum(-1)
    return total / jnp.maximum(member.sum(-1, dtype=values.dtype), 1)


def _spread(values: PerCompletion, member: Bool[Array, "rows group num_targets"]) -> PerTarget:
    """A completion's value at each of its tokens, 0 elsewhere."""
    return jnp.where(member, values[:, :, None], 0.0).sum(1)

"""The train steps: pure, jitted once, donated. `(state, batch) -> (state, metrics)`."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from openo3_jax import mesh as mesh_lib
from openo3_jax.config import GSPOConfig, SFTConfig
from openo3_jax.models import attention, lora
from openo3_jax.train import losses, policy_loss
from openo3_jax.train import optimizer as optimizer_lib
from openo3_jax.train.state import TrainState
from openo3_jax.types import Array, Batch, Rollouts

Metrics = dict[str, Array]
Config = SFTConfig | GSPOConfig


@jax.named_scope("score")
def score_batch(graphdef: nnx.GraphDef, params: nnx.State, batch: Batch, config: Config) -> losses.TargetScores:
    """Log-probability and entropy of every target, in nats, computed as the config says."""
    model = nnx.merge(graphdef, jax.tree.map(lambda x: x.astype(config.compute_dtype), params))
    group = None
    if isinstance(config, GSPOConfig):  # bounds for kernels that want to plan their memory
        group = attention.Group(config.sampling.num_samples, config.sampling.max_new_tokens)
    hidden, _ = model.hidden(batch, remat=config.remat, group=group)
    return losses.target_scores(hidden, model.head, batch.target_slots, batch.targets, mesh=model.mesh)


def sft_loss(graphdef: nnx.GraphDef, params: nnx.State, batch: Batch, config: SFTConfig) -> Array:
    """Mean cross-entropy in nats per target token of the batch."""
    return losses.cross_entropy(score_batch(graphdef, params, batch, config).logp, batch.target_slots >= 0)


def make_sft_step(config: SFTConfig) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The jitted step of stage one. The state is donated: use the one it returns.

    Where loss or gradient are not finite the state comes back as it was.

    Metrics: `loss` (nats per target token), `grad_norm` (before clipping), `learning_rate`, `targets` (their number).
    """

    def sft_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        def loss_of(params: nnx.State) -> Array:
            return sft_loss(state.graphdef, lora.join(state.frozen, params), batch, config)

        loss, grads = jax.value_and_grad(loss_of)(state.params)
        state, metrics = _update(state, grads, loss, config)
        return state, {"loss": loss, **metrics, "targets": (batch.target_slots >= 0).sum()}

    return jax.jit(sft_step, donate_argnums=0)


def gspo_loss(
    graphdef: nnx.GraphDef, params: nnx.State, reference: nnx.State | None, rollouts: Rollouts, config: GSPOConfig
) -> tuple[Array, Metrics]:
    """The policy loss of the rollouts and what to log of it; no gradient reaches the reference.

    `params`: all weights. `reference`: with adapters and a divergence, None stands for the weights without them.
    """
    scores = score_batch(graphdef, params, rollouts.batch, config)
    base = graphdef
    if config.lora is not None and config.kl_coef > 0:
        base, frozen = lora.detach(graphdef, params)
        reference = frozen if reference is None else reference
    reference_logp = None if reference is None else score_batch(base, reference, rollouts.batch, config).logp
    parts = policy_loss.policy_loss(
        scores.logp,
        rollouts.old_logp,
        reference_logp,
        rollouts.sampled_logp,
        rollouts.completion,
        rollouts.advantage,
        rollouts.keep,
        config,
    )
    is_target = rollouts.completion >= 0
    number = jnp.maximum(is_target.sum(dtype=jnp.float32), 1)
    gap = jnp.abs(scores.logp - rollouts.sampled_logp)
    return parts.loss, {
        **parts._asdict(),
        "entropy": scores.entropy.sum() / number,
        "logp_gap_mean": jnp.where(is_target, gap, 0.0).sum() / number,
        "logp_gap_max": jnp.where(is_target, gap, 0.0).max(initial=0.0),
    }


def make_gspo_step(config: GSPOConfig) -> Callable[[TrainState, Rollouts], tuple[TrainState, Metrics]]:
    """The jitted update of stage two. The state is donated: use the one it returns; its reference never changes.

    Where loss or gradient are not finite the state comes back as it was.

    Metrics: `loss`, `policy` (loss without the divergence), `kl`, `ratio`, `clip_fraction`, `entropy`, and
    `logp_gap_mean`, `logp_gap_max` between the training forward and the sampler, nats; `grad_norm`, `learning_rate`.
    """

    def gspo_step(state: TrainState, rollouts: Rollouts) -> tuple[TrainState, Metrics]:
        def loss_of(params: nnx.State) -> tuple[Array, Metrics]:
            weights = lora.join(state.frozen, params)
            return gspo_loss(state.graphdef, weights, state.reference, rollouts, config)

        grads, parts = jax.grad(loss_of, has_aux=True)(state.params)
        state, metrics = _update(state, grads, parts["loss"], config)
        return state, {**parts, **metrics}

    return jax.jit(gspo_step, donate_argnums=0)


def make_score_step(config: GSPOConfig) -> Callable[[TrainState, Batch], Array]:
    """The jitted forward of training: log-probability of every target, nats, for `old_logp="recompute"`."""
    return jax.jit(lambda state, batch: score_batch(state.graphdef, state.weights, batch, config).logp)


@jax.named_scope("optimizer")
def _update(state: TrainState, grads: nnx.State, loss: Array, config: Config) -> tuple[TrainState, Metrics]:
    """One step of the optimizer if loss and gradient are finite; the new state lives where the old one did."""
    optimizer = optimizer_lib.make_optimizer(config.optimizer, config.updates)
    schedule = optimizer_lib.make_schedule(config.optimizer, config.updates)
    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    old = state.step, state.params, state.opt_state

    def apply(grads: nnx.State, step: Array, params: nnx.State, opt_state: Any) -> tuple[Array, nnx.State, Any]:
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return step + 1, optax.apply_updates(params, updates), opt_state

    def choose(grads: nnx.State, *old: Any) -> tuple[Array, nnx.State, Any]:
        return jax.tree.map(lambda new, before: jnp.where(finite, new, before), apply(grads, *old), old)

    def branch(grads: nnx.State, *old: Any) -> tuple[Array, nnx.State, Any]:
        return jax.lax.cond(finite, apply, lambda _, *old: old, grads, *old)

    # A choice by value copies both moments on a CPU, a branch on a GPU (docs/log.md).
    kept = jax.lax.platform_dependent(grads, *old, cpu=branch, default=choose)
    new = TrainState(*kept, state.reference, state.graphdef, state.frozen)
    mesh = nnx.merge(state.graphdef, state.weights).mesh
    metrics = {"grad_norm": norm, "learning_rate": jnp.asarray(schedule(state.step))}
    return jax.lax.with_sharding_constraint(new, mesh_lib.state_shardings(new, mesh)), metrics

"""The train steps: pure, jitted once, donated. `(state, batch) -> (state, metrics)`."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from openo3_jax import mesh as mesh_lib
from openo3_jax.config import SFTConfig
from openo3_jax.train import losses
from openo3_jax.train import optimizer as optimizer_lib
from openo3_jax.train.state import TrainState
from openo3_jax.types import Array, Batch

Metrics = dict[str, Array]


def sft_loss(graphdef: nnx.GraphDef, params: nnx.State, batch: Batch, *, compute_dtype: str, remat: bool) -> Array:
    """Mean cross-entropy in nats per target token of the batch."""
    model = nnx.merge(graphdef, jax.tree.map(lambda x: x.astype(compute_dtype), params))
    hidden, _ = model.hidden(batch, remat=remat)
    scores = losses.target_scores(hidden, model.head, batch.target_slots, batch.targets, mesh=model.mesh)
    return losses.cross_entropy(scores.logp, batch.target_slots >= 0)


def make_sft_step(config: SFTConfig) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The jitted step of stage one. The state is donated: use the one it returns.

    Metrics: `loss` (nats per target token), `grad_norm` (before clipping), `learning_rate`, `targets` (their number).
    """
    optimizer = optimizer_lib.make_optimizer(config.optimizer, config.steps)
    schedule = optimizer_lib.make_schedule(config.optimizer, config.steps)

    def sft_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        def loss_of(params: nnx.State) -> Array:
            return sft_loss(state.graphdef, params, batch, compute_dtype=config.compute_dtype, remat=config.remat)

        loss, grads = jax.value_and_grad(loss_of)(state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        metrics = {
            "loss": loss,
            "grad_norm": optax.tree.norm(grads),
            "learning_rate": jnp.asarray(schedule(state.step)),
            "targets": (batch.target_slots >= 0).sum(),
        }
        params = optax.apply_updates(state.params, updates)
        new = TrainState(state.step + 1, params, opt_state, state.graphdef)
        mesh = nnx.merge(state.graphdef, params).mesh
        return jax.lax.with_sharding_constraint(new, mesh_lib.state_shardings(new, mesh)), metrics

    return jax.jit(sft_step, donate_argnums=0)

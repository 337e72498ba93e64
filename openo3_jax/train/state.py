"""What training changes: weights, optimizer, step. A pytree; the model's definition travels as static metadata."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Int

from openo3_jax import mesh as mesh_lib
from openo3_jax.types import Array


@partial(jax.tree_util.register_dataclass, data_fields=["step", "params", "opt_state"], meta_fields=["graphdef"])
@dataclasses.dataclass(frozen=True)
class TrainState:
    """`params` are float32 and live where the mesh table says, the optimizer's moments beside them."""

    step: Int[Array, ""]
    params: nnx.State
    opt_state: Any
    graphdef: nnx.GraphDef


def init_state(
    graphdef: nnx.GraphDef, params: nnx.State, mesh: jax.sharding.Mesh, optimizer: optax.GradientTransformation
) -> TrainState:
    """A state at step 0 with its own float32 copy of `params`, so that donating it leaves the policy usable."""
    shardings = mesh_lib.weight_shardings(params, mesh)
    own = jax.jit(
        lambda tree: jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=True), tree), out_shardings=shardings
    )(params)
    abstract = jax.eval_shape(optimizer.init, own)
    opt_state = jax.jit(optimizer.init, out_shardings=_like_weights(abstract, own, mesh))(own)
    step = jax.device_put(jnp.int32(0), mesh_lib.sharding(mesh))
    return TrainState(step=step, params=own, opt_state=opt_state, graphdef=graphdef)


def _like_weights(abstract_opt_state: Any, params: nnx.State, mesh: jax.sharding.Mesh) -> Any:
    """Moments live where their weight lives; counters are replicated."""
    everywhere = mesh_lib.sharding(mesh)
    return optax.tree_utils.tree_map_params(
        lambda placeholder: None,
        lambda moment, weight: weight.sharding,
        abstract_opt_state,
        params,
        transform_non_params=lambda _: everywhere,
    )

"""What training changes: weights, optimizer, step. A pytree; the model's definition travels as static metadata."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from openo3_jax import mesh as mesh_lib
from openo3_jax.config import SFTConfig
from openo3_jax.policy import Policy
from openo3_jax.train import optimizer as optimizer_lib


@partial(jax.tree_util.register_dataclass, data_fields=["step", "params", "opt_state"], meta_fields=["graphdef"])
@dataclasses.dataclass(frozen=True)
class TrainState:
    """`params` are float32 and live where the mesh table says, the optimizer's moments beside them."""

    step: Any  # int32 scalar; Any, because jax also builds this tree of shardings and placeholders
    params: nnx.State
    opt_state: Any
    graphdef: nnx.GraphDef


def make_state(policy: Policy, config: SFTConfig) -> TrainState:
    """The state before the first step, with its own float32 copy of the weights: donating it leaves `policy` usable."""
    optimizer = optimizer_lib.make_optimizer(config.optimizer, config.steps)

    def make(params: nnx.State) -> TrainState:
        own = jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=True), params)
        return TrainState(step=jnp.int32(0), params=own, opt_state=optimizer.init(own), graphdef=policy.graphdef)

    places = mesh_lib.state_shardings(jax.eval_shape(make, policy.params), policy.mesh)
    return jax.jit(make, out_shardings=places)(policy.params)

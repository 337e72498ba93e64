"""What training changes, and what it must not: weights, optimizer, step; the frozen reference. A pytree."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from openo3_jax import mesh as mesh_lib
from openo3_jax.config import GSPOConfig, ModelConfig, SFTConfig
from openo3_jax.errors import InputError
from openo3_jax.policy import Policy
from openo3_jax.train import optimizer as optimizer_lib


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["step", "params", "opt_state", "reference"],
    meta_fields=["graphdef"],
)
@dataclasses.dataclass(frozen=True)
class TrainState:
    """`params` are float32 and live where the mesh table says, the optimizer's moments and the reference beside them.

    `reference`: the weights that stage two must not leave too far behind, in the dtype of computation; else None.
    """

    step: Any  # int32 scalar; Any, because jax also builds this tree of shardings and placeholders
    params: nnx.State
    opt_state: Any
    reference: Any
    graphdef: nnx.GraphDef


def make_state(policy: Policy, config: SFTConfig | GSPOConfig, *, reference: Policy | None = None) -> TrainState:
    """The state before the first step, with its own float32 copy of the weights: donating it leaves `policy` usable.

    In stage two with a divergence (`kl_coef` > 0) it keeps the weights of `reference`, None for those of `policy`.
    Raises: InputError for a reference of another shape.
    """
    has_reference = isinstance(config, GSPOConfig) and config.kl_coef > 0
    if reference is not None and reference.config != policy.config:
        raise InputError(
            f"{reference.directory}: the reference is another model than {policy.directory} "
            f"({_difference(reference.config, policy.config)}); expected the same sizes"
        )
    optimizer = optimizer_lib.make_optimizer(config.optimizer, config.updates)

    def make(params: nnx.State, anchor: nnx.State) -> TrainState:
        own = jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=True), params)
        kept = jax.tree.map(lambda x: jnp.array(x, config.compute_dtype, copy=True), anchor) if has_reference else None
        return TrainState(jnp.int32(0), own, optimizer.init(own), kept, policy.graphdef)

    arguments = policy.params, (reference or policy).params
    places = mesh_lib.state_shardings(jax.eval_shape(make, *arguments), policy.mesh)
    return jax.jit(make, out_shardings=places)(*arguments)


def _difference(one: ModelConfig, other: ModelConfig) -> str:
    """The first field in which two configurations differ, with both values."""
    a, b = (jax.tree_util.tree_leaves_with_path(dataclasses.asdict(config)) for config in (one, other))
    found = next(pair for pair in zip(a, b, strict=False) if pair[0] != pair[1])
    return " and ".join(f"{jax.tree_util.keystr(path)}={value}" for path, value in found)

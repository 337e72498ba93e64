"""What training changes, and what it must not: weights, optimizer, step; the frozen reference. A pytree."""

import dataclasses
from collections.abc import Callable
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
    make, anchor = _start(config, policy.graphdef), _anchor(policy, config, reference)
    places = mesh_lib.state_shardings(jax.eval_shape(make, policy.params, anchor), policy.mesh)
    return jax.jit(make, out_shardings=places)(policy.params, anchor)


def resume_state(policy: Policy, config: SFTConfig | GSPOConfig, *, reference: Policy | None = None) -> TrainState:
    """Shapes and places of everything that changes, for a checkpoint to fill; the reference as `make_state` has it."""
    make, anchor = _start(config, policy.graphdef), _anchor(policy, config, reference)
    shapes = jax.eval_shape(make, policy.params, anchor)
    places = mesh_lib.state_shardings(shapes, policy.mesh)
    abstract = jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), shapes, places)
    if anchor is None:
        return abstract
    kept = jax.jit(lambda tree: _copy(tree, config.compute_dtype), out_shardings=places.reference)(anchor)
    return dataclasses.replace(abstract, reference=kept)


def checksum(tree: Any) -> int:
    """Of all bits of all arrays, the same on every mesh: equal weights have equal ones."""

    def add(tree: Any) -> jax.Array:
        words = {2: jnp.uint16, 4: jnp.uint32}
        parts = [jax.lax.bitcast_convert_type(x, words[x.dtype.itemsize]) for x in jax.tree.leaves(tree)]
        sums = [part.astype(jnp.uint32).sum(dtype=jnp.uint32) for part in parts]
        return sum((jnp.uint32(2 * i + 1) * one for i, one in enumerate(sums)), jnp.uint32(0))

    return int(jax.jit(add)(tree))


def _start(config: SFTConfig | GSPOConfig, graphdef: nnx.GraphDef) -> Callable[[nnx.State, Any], TrainState]:
    """(weights, those of the reference or None) -> the first state."""
    optimizer = optimizer_lib.make_optimizer(config.optimizer, config.updates)

    def make(params: nnx.State, anchor: Any) -> TrainState:
        own = _copy(params, jnp.float32)
        return TrainState(jnp.int32(0), own, optimizer.init(own), _copy(anchor, config.compute_dtype), graphdef)

    return make


def _copy(tree: Any, dtype: Any) -> Any:
    return jax.tree.map(lambda x: jnp.array(x, dtype, copy=True), tree)


def _anchor(policy: Policy, config: SFTConfig | GSPOConfig, reference: Policy | None) -> Any:
    """The weights not to leave too far behind, None where there is no divergence."""
    if reference is not None and reference.config != policy.config:
        raise InputError(
            f"{reference.directory}: the reference is another model than {policy.directory} "
            f"({_difference(reference.config, policy.config)}); expected the same sizes"
        )
    if not isinstance(config, GSPOConfig) or config.kl_coef == 0:
        return None
    return (reference or policy).params


def _difference(one: ModelConfig, other: ModelConfig) -> str:
    """The first field in which two configurations differ, with both values."""
    a, b = (jax.tree_util.tree_leaves_with_path(dataclasses.asdict(config)) for config in (one, other))
    found = next(pair for pair in zip(a, b, strict=False) if pair[0] != pair[1])
    return " and ".join(f"{jax.tree_util.keystr(path)}={value}" for path, value in found)

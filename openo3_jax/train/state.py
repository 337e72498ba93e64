"""What training changes, and what it must not: weights, optimizer, step; the frozen reference. A pytree."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from openo3_jax import mesh as mesh_lib
from openo3_jax.config import GSPOConfig, ModelConfig, SFTConfig
from openo3_jax.errors import InputError
from openo3_jax.models import lora
from openo3_jax.policy import Dtype, Policy
from openo3_jax.train import optimizer as optimizer_lib


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["step", "params", "opt_state", "reference", "frozen"],
    meta_fields=["graphdef"],
)
@dataclasses.dataclass(frozen=True)
class TrainState:
    """`params` are what is trained, float32, and live where the mesh table says; all else of their size beside them.

    `reference`: the weights that stage two must not leave too far behind, in the dtype of computation; None where
    there is no divergence, or where `frozen` are these weights. `frozen`: with adapters, which are `params` then, the
    weights they were attached to, in the dtype of computation; else None.
    """

    step: Any  # int32 scalar; Any, because jax also builds this tree of shardings and placeholders
    params: nnx.State
    opt_state: Any
    reference: Any
    graphdef: nnx.GraphDef
    frozen: Any = None

    @property
    def weights(self) -> nnx.State:
        """All weights of the policy."""
        return lora.join(self.frozen, self.params)


def trained_policy(policy: Policy, state: TrainState, dtype: Dtype | None = None) -> Policy:
    """The policy of a state, its weights in `dtype`, None for as they are there; `policy` lends what is not in it."""
    params = state.weights if dtype is None else _cast(state.weights, dtype)
    return dataclasses.replace(policy, graphdef=state.graphdef, params=params)


@partial(jax.jit, static_argnums=1)
def _cast(tree: Any, dtype: Dtype) -> Any:
    """What is in `dtype` already is not copied."""
    return jax.tree.map(lambda x: x.astype(dtype), tree)


def make_state(policy: Policy, config: SFTConfig | GSPOConfig, *, reference: Policy | None = None) -> TrainState:
    """The state before the first step, with its own copy of the weights: donating it leaves `policy` usable.

    In stage two with a divergence (`kl_coef` > 0) it keeps the weights of `reference`, None for those of `policy`,
    which are there already where adapters are trained. Adapters that `policy` has are merged into its weights.
    Raises: InputError for a reference of another shape.
    """
    policy, reference = _merged(policy), _merged(reference)
    make, anchor = _start(config, policy.graphdef), anchor_of(policy, config, reference)
    places = mesh_lib.state_shardings(jax.eval_shape(make, policy.params, anchor), policy.mesh)
    return jax.jit(make, out_shardings=places)(policy.params, anchor)


def resume_state(policy: Policy, config: SFTConfig | GSPOConfig, *, reference: Policy | None = None) -> TrainState:
    """Shapes and places of everything that changes, for a checkpoint to fill; all else as `make_state` has it."""
    policy, reference = _merged(policy), _merged(reference)
    anchor = anchor_of(policy, config, reference)
    abstract = abstract_state(policy.graphdef, policy.params, config, anchor, mesh=policy.mesh)
    fixed = {"reference": anchor, "frozen": None if config.lora is None else policy.params}
    wanted = {name: jax.tree.map(lambda x: x.sharding, getattr(abstract, name)) for name in fixed}
    kept = jax.jit(lambda trees: _copy(trees, config.compute_dtype), out_shardings=wanted)(fixed)
    return dataclasses.replace(abstract, **kept)


def abstract_state(
    graphdef: nnx.GraphDef, params: nnx.State, config: SFTConfig | GSPOConfig, anchor: Any, *, mesh: Mesh
) -> TrainState:
    """Shapes and places of all that `make_state` makes; of `params` and `anchor` the shapes are enough."""
    shapes = jax.eval_shape(_start(config, graphdef), params, anchor)
    places = mesh_lib.state_shardings(shapes, mesh)
    return jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), shapes, places)


def load_dtype(config: SFTConfig | GSPOConfig) -> Dtype:
    """What the weights to start from are loaded in: what is only frozen is needed in the dtype of computation alone."""
    return "float32" if config.lora is None else config.compute_dtype


def checksum(tree: Any, dtype: Any = None) -> int:
    """Of all bits of all arrays, the same on every mesh: equal weights have equal ones. `dtype`: to cast them to."""

    def add(tree: Any) -> jax.Array:
        tree = tree if dtype is None else jax.tree.map(lambda x: x.astype(dtype), tree)
        words = {2: jnp.uint16, 4: jnp.uint32}
        parts = [jax.lax.bitcast_convert_type(x, words[x.dtype.itemsize]) for x in jax.tree.leaves(tree)]
        sums = [part.astype(jnp.uint32).sum(dtype=jnp.uint32) for part in parts]
        return sum((jnp.uint32(2 * i + 1) * one for i, one in enumerate(sums)), jnp.uint32(0))

    return int(jax.jit(add)(tree))


def _start(config: SFTConfig | GSPOConfig, graphdef: nnx.GraphDef) -> Callable[[nnx.State, Any], TrainState]:
    """(weights, those of the reference or None) -> the first state."""
    optimizer = optimizer_lib.make_optimizer(config.optimizer, config.updates)

    def make(params: nnx.State, anchor: Any) -> TrainState:
        reference = _copy(anchor, config.compute_dtype)
        if config.lora is None:
            own = _copy(params, jnp.float32)
            return TrainState(jnp.int32(0), own, optimizer.init(own), reference, graphdef)
        whole, adapters = lora.attach(graphdef, params, config.lora, config.seed)
        frozen = _copy(params, config.compute_dtype)
        return TrainState(jnp.int32(0), adapters, optimizer.init(adapters), reference, whole, frozen)

    return make


def _copy(tree: Any, dtype: Any) -> Any:
    return jax.tree.map(lambda x: jnp.array(x, dtype, copy=True), tree)


def anchor_of(policy: Policy, config: SFTConfig | GSPOConfig, reference: Policy | None) -> Any:
    """The weights not to leave too far behind, None where there is no divergence or they are frozen in the state."""
    if reference is not None and reference.config != policy.config:
        raise InputError(
            f"{reference.directory}: the reference is another model than {policy.directory} "
            f"({_difference(reference.config, policy.config)}); expected the same sizes"
        )
    if not isinstance(config, GSPOConfig) or config.kl_coef == 0:
        return None
    if reference is None and config.lora is not None:
        return None
    return (reference or policy).params


def _merged(policy: Policy | None) -> Policy | None:
    """The policy without adapters, those that it had added to its weights."""
    if policy is None or not lora.is_attached(policy.params):
        return policy
    graphdef, plain = jax.eval_shape(partial(lora.merge, policy.graphdef), policy.params)
    places = mesh_lib.state_shardings(plain, policy.mesh)
    params = jax.jit(lambda params: lora.merge(policy.graphdef, params)[1], out_shardings=places)(policy.params)
    return dataclasses.replace(policy, graphdef=graphdef, params=params)


def _difference(one: ModelConfig, other: ModelConfig) -> str:
    """The first field in which two configurations differ, with both values."""
    a, b = (jax.tree_util.tree_leaves_with_path(dataclasses.asdict(config)) for config in (one, other))
    found = next(pair for pair in zip(a, b, strict=False) if pair[0] != pair[1])
    return " and ".join(f"{jax.tree_util.keystr(path)}={value}" for path, value in found)

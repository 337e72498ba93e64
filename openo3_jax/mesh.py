"""The mesh and the one table that maps logical axes of weights and activations to its axes.

A mesh always exists, if only of one device, so the sharded path is the only path.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from openo3_jax.errors import InputError

# `data` replicates weights, `fsdp` shards them and gathers them layer by layer, `tensor` splits heads and hidden units.
MESH_AXES = ("data", "fsdp", "tensor")

LOGICAL_AXES: Mapping[str, str | tuple[str, ...] | None] = {
    # weights
    "layers": None,
    "embed": "fsdp",
    "ffn": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "vocab": "tensor",
    "patch_dim": None,
    "norm": None,
    # activations
    "rows": ("data", "fsdp"),
}


def make_mesh(axes: Mapping[str, int] | None = None, *, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with the axes of `MESH_AXES`; axes that are not named have size 1, None puts all devices on `fsdp`.

    Example: `make_mesh({"fsdp": 4, "tensor": 2})` on eight devices.
    Raises InputError for an unknown axis or sizes that do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    axes = {"fsdp": len(devices)} if axes is None else dict(axes)
    unknown = sorted(set(axes) - set(MESH_AXES))
    if unknown:
        raise InputError(f"mesh: unknown axes {unknown}; the axes are {', '.join(MESH_AXES)}")
    sizes = [axes.get(name, 1) for name in MESH_AXES]
    if any(size < 1 for size in sizes) or np.prod(sizes) != len(devices):
        raise InputError(f"mesh: sizes {axes} make {int(np.prod(sizes))} places for {len(devices)} devices")
    return Mesh(np.asarray(devices).reshape(sizes), MESH_AXES)


def partition_spec(logical: Sequence[str | None]) -> PartitionSpec:
    """Logical axes of one array -> mesh axes. Raises KeyError for an unknown name, InputError for a collision.

    Example: `partition_spec(("embed", "ffn")) == PartitionSpec("fsdp", "tensor")`
    """
    spec = [LOGICAL_AXES[name] if name is not None else None for name in logical]
    used = [axis for entry in spec for axis in ((entry,) if isinstance(entry, str) else entry or ())]
    if len(used) != len(set(used)):
        raise InputError(f"mesh: logical axes {tuple(logical)} put one mesh axis on two dimensions: {spec}")
    return PartitionSpec(*spec)


def sharding(mesh: Mesh, *logical: str | None) -> NamedSharding:
    """Where an array with these logical axes lives; `None` for a dimension that is never split.

    In the form in which compiled programs return it (no axes of size 1, no trailing None), so that a state that went
    through a step has the sharding it came with and nothing is compiled twice.
    """
    return NamedSharding(mesh, _canonical(mesh, partition_spec(logical)))


def _canonical(mesh: Mesh, spec: PartitionSpec) -> PartitionSpec:
    def split(entry: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
        names = (entry,) if isinstance(entry, str) else entry or ()
        kept = tuple(name for name in names if mesh.shape[name] > 1)
        return kept[0] if len(kept) == 1 else kept or None

    entries = [split(entry) for entry in spec]
    while entries and entries[-1] is None:
        entries.pop()
    return PartitionSpec(*entries)


def constrain(x: jax.Array, mesh: Mesh, *logical: str | None) -> jax.Array:
    """Pin an activation to its place inside `jit`; trailing dimensions without a name are not split."""
    return jax.lax.with_sharding_constraint(x, sharding(mesh, *logical))


def weight_axes(*logical: str | None) -> dict[str, Any]:
    """Metadata for `nnx.Param`: the logical axes of a weight, placed by us and not when it is created."""
    return {"out_sharding": logical, "eager_sharding": False}


def is_variable(x: Any) -> bool:
    return isinstance(x, nnx.Variable)


def state_shardings(tree: Any, mesh: Mesh) -> Any:
    """Tree of `NamedSharding`: annotated weights (and moments, which keep the annotation) by their logical axes, all
    else on every device.

    Raises InputError for a dimension that its mesh axes do not divide, with the path and the numbers.
    """

    def place(path: tuple, node: Any) -> Any:
        logical = node.get_metadata()["out_sharding"] if is_variable(node) else ()
        where = sharding(mesh, *logical)

        def check(leaf: Any) -> NamedSharding:
            assert not logical or len(logical) == len(leaf.shape), (path, logical, leaf.shape)
            for size, name, axes in zip(leaf.shape, logical, where.spec, strict=False):
                ways = mesh_size(mesh, axes)
                if size % ways:
                    raise InputError(
                        f"mesh: {jax.tree_util.keystr(path)} has {name}={size}, which {ways} devices on {axes!r} "
                        "do not divide; choose a smaller axis"
                    )
            return where

        return jax.tree.map(check, node)

    return jax.tree_util.tree_map_with_path(place, tree, is_leaf=is_variable)


def mesh_size(mesh: Mesh, axes: str | tuple[str, ...] | None) -> int:
    """Number of devices over one entry of a partition spec."""
    names = (axes,) if isinstance(axes, str) else axes or ()
    return int(np.prod([mesh.shape[name] for name in names], initial=1))


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(weight: jax.Array, gathered: NamedSharding, sharded: NamedSharding) -> jax.Array:
    return jax.lax.with_sharding_constraint(weight, gathered)


def _gather_fwd(weight, gathered, sharded):
    return _gather(weight, gathered, sharded), None


def _gather_bwd(gathered, sharded, _, grad):
    return (jax.lax.with_sharding_constraint(grad, sharded),)


_gather.defvjp(_gather_fwd, _gather_bwd)


def gather_layer(params: Any, mesh: Mesh) -> Any:
    """Weights of one layer, gathered over `fsdp` for use; their gradients leave reduce-scattered.

    Called inside the scanned layer so that only one layer is whole at a time. A `custom_vjp`, because the plain
    constraint makes the TPU compiler all-reduce full-size gradients.
    """

    def gather(variable: nnx.Variable) -> nnx.Variable:
        logical = [name for name in variable.get_metadata()["out_sharding"] if name != "layers"]
        kept = [name if name and LOGICAL_AXES[name] != "fsdp" else None for name in logical]
        value = _gather(variable.get_raw_value(), sharding(mesh, *kept), sharding(mesh, *logical))
        return variable.replace(value)

    return jax.tree_util.tree_map(gather, params, is_leaf=is_variable)


def shard_rows(tree: Any, mesh: Mesh) -> Any:
    """Put arrays with a leading `rows` dimension on the devices, split over `data` and `fsdp`."""
    return jax.device_put(tree, sharding(mesh, "rows"))

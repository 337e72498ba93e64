"""The mesh and the one table that maps logical axes of weights and activations to its axes.

A mesh always exists, if only of one device, so the sharded path is the only path.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from openo3_jax.errors import InputError
from openo3_jax.types import RowShare

# `data` replicates weights, `fsdp` shards them and gathers them layer by layer, `tensor` splits heads and hidden units,
# `context` the slots of a row (and weights, as `fsdp` does). In this order: the later an axis, the more often it is
# used and the nearer its devices.
MESH_AXES = ("data", "fsdp", "tensor", "context")

# The axes that may cross hosts, in the order in which they do. The others talk several times in each layer.
ACROSS_HOSTS = ("data", "fsdp")

# Beyond it a 7B model's shards are no whole tiles on a TPU, and weights are then moved by all-reduces.
MAX_FSDP = 64

Granule = Literal["slice_index", "process_index"]  # attributes of devices

LOGICAL_AXES: Mapping[str, str | tuple[str, ...] | None] = {
    # weights
    "layers": None,
    "embed": ("fsdp", "context"),  # devices that share a row have no reason to hold the same weights
    "ffn": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "vocab": "tensor",
    "patch_dim": None,
    "norm": None,
    # activations
    "rows": ("data", "fsdp"),
    "seq": "context",
    "patches": "context",
    "groups": "context",  # windows or frames within which patches attend
}


def make_mesh(
    axes: Mapping[str, int] | None = None, *, devices: Sequence[Any] | None = None, granule: Granule | None = None
) -> Mesh:
    """A mesh with the axes of `MESH_AXES`; axes that are not named have size 1.

    None: `fsdp` over the devices of a host (of a TPU slice), up to 64, and `data` over the rest. Over several hosts, or
    TPU slices, `data` crosses them first, then `fsdp`; `tensor` and `context` stay within one.
    `granule`: what devices with a fast network of their own share, None for what `granule_of` says.

    Example: `make_mesh({"fsdp": 4, "tensor": 2})` on eight devices.
    Raises InputError for an unknown axis, or sizes that do not fit the number of devices and hosts.
    """
    devices = jax.devices() if devices is None else devices
    granule = granule or granule_of(devices)
    sizes = default_sizes(len(devices), num_granules(devices, granule)) if axes is None else dict(axes)
    unknown = sorted(set(sizes) - set(MESH_AXES))
    if unknown:
        raise InputError(f"mesh: unknown axes {unknown}; the axes are {', '.join(MESH_AXES)}")
    places = math.prod(sizes.values())
    if any(size < 1 for size in sizes.values()) or places != len(devices):
        raise InputError(f"mesh: sizes {sizes} make {places} places for {len(devices)} devices")
    return Mesh(arrange(sizes, devices, granule), MESH_AXES)


def default_sizes(num_devices: int, granules: int) -> dict[str, int]:
    """`fsdp` as wide as a granule's devices and `MAX_FSDP` allow, `data` over the rest.

    Example: 16 devices on 2 hosts -> {"data": 2, "fsdp": 8}; 128 on one slice -> {"data": 2, "fsdp": 64}.
    """
    within = num_devices // granules if num_devices % granules == 0 else 1
    fsdp = max(ways for ways in range(1, min(within, MAX_FSDP) + 1) if within % ways == 0)
    return {"data": num_devices // fsdp, "fsdp": fsdp}


def granule_of(devices: Sequence[Any]) -> Granule:
    """What tells apart groups of devices with a fast network of their own: the slices of a TPU pod, hosts of GPUs.

    jax numbers the latter as slices too (NVLink domains, where one is more than a host), whether a process has all GPUs
    of a host or one of them. Where it numbers nothing, a process is a host.
    """
    is_numbered = hasattr(devices[0], "slice_index") or devices[0].platform == "tpu"
    return "slice_index" if is_numbered else "process_index"


def num_granules(devices: Sequence[Any], granule: Granule) -> int:
    """A TPU without a number is in the only slice."""
    return len({getattr(device, granule, 0) for device in devices})


def arrange(sizes: Mapping[str, int], devices: Sequence[Any], granule: Granule) -> np.ndarray:
    """Devices in the places of a mesh with these sizes, neighbours of the network next to each other.

    Raises InputError if an axis other than data and fsdp would have to cross hosts.
    """
    granules = num_granules(devices, granule)
    if granules == 1:
        shape = [sizes.get(name, 1) for name in MESH_AXES]
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    within, across = split_over_hosts(sizes, granules)
    return mesh_utils.create_hybrid_device_mesh(
        within,
        across,
        devices,
        process_is_granule=granule == "process_index",
        allow_split_physical_axes=True,
    )


def split_over_hosts(sizes: Mapping[str, int], granules: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape of the mesh within a host and over the hosts; their product is the mesh.

    Example: {"data": 2, "fsdp": 8} on 2 hosts -> (1, 8, 1, 1) and (2, 1, 1, 1); {"fsdp": 16} -> (1, 8, 1, 1) and
    (1, 2, 1, 1).
    Raises InputError where data x fsdp cannot be cut into as many parts as there are hosts.
    """
    rest, across = granules, dict.fromkeys(MESH_AXES, 1)
    for name in ACROSS_HOSTS:
        across[name] = math.gcd(sizes.get(name, 1), rest)
        rest //= across[name]
    if rest > 1:
        wide = {name: sizes.get(name, 1) for name in ACROSS_HOSTS}
        raise InputError(
            f"mesh: sizes {dict(sizes)} over {granules} hosts: only data and fsdp may cross hosts, and {wide} cannot "
            f"be cut into {granules} equal parts; make data x fsdp a multiple of {granules}"
        )
    return tuple(sizes.get(name, 1) // across[name] for name in MESH_AXES), tuple(across.values())


def partition_spec(logical: Sequence[str | None]) -> PartitionSpec:
    """Logical axes of one array -> mesh axes. Raises KeyError for an unknown name, InputError for a collision.

    Example: `partition_spec(("rows", "seq")) == PartitionSpec(("data", "fsdp"), "context")`
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
    """Pin an activation to its place inside `jit`; trailing dimensions without a name are not split.

    Raises InputError for a dimension that its mesh axes do not divide, with the numbers.
    """
    check_divides(x.shape, logical, mesh)
    return jax.lax.with_sharding_constraint(x, sharding(mesh, *logical))


def check_divides(shape: Sequence[int], logical: Sequence[str | None], mesh: Mesh, *, what: str = "the batch") -> None:
    """Raise InputError for the first dimension that the devices on its mesh axes do not divide."""
    for size, name in zip(shape, logical, strict=False):
        axes = None if name is None else LOGICAL_AXES[name]
        ways = mesh_size(mesh, axes)
        if size % ways:
            raise InputError(
                f"mesh: {what} has {name}={size}, which {ways} devices on {axes!r} do not divide; choose a smaller axis"
            )


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
            check_divides(leaf.shape, logical, mesh, what=jax.tree_util.keystr(path))
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
    """Weights of one layer, gathered over `fsdp` and `context` for use; their gradients leave reduce-scattered.

    Called inside the scanned layer so that only one layer is whole at a time. A `custom_vjp`, because the plain
    constraint makes the TPU compiler all-reduce full-size gradients.
    """

    def gather(variable: nnx.Variable) -> nnx.Variable:
        logical = [name for name in variable.get_metadata()["out_sharding"] if name != "layers"]
        kept = [name if name != "embed" else None for name in logical]
        value = _gather(variable.get_raw_value(), sharding(mesh, *kept), sharding(mesh, *logical))
        return variable.replace(value)

    return jax.tree_util.tree_map(gather, params, is_leaf=is_variable)


def row_share(mesh: Mesh) -> RowShare:
    """The part of a batch's rows that this process feeds: all of them where it is the only one.

    Example: 2 processes with 4 devices each on fsdp -> RowShare(8, (0, 1, 2, 3), (0, 1, 2, 3)) in the first.
    """
    own, parts = jax.process_index(), mesh_size(mesh, LOGICAL_AXES["rows"])
    holders = [{device.process_index for device in part} for part in mesh.devices.reshape(parts, -1)]
    held = tuple(part for part, processes in enumerate(holders) if own in processes)
    return RowShare(parts, held, tuple(part for part in held if own == min(holders[part])))


def shard_rows(tree: Any, mesh: Mesh) -> Any:
    """Put arrays with a leading `rows` dimension on the devices, split over `data` and `fsdp`.

    Of several processes each gives the rows that it holds (`row_share`), and no one waits for another. `patches` of a
    batch, the only large array, is split over `context` as well.
    """
    share = row_share(mesh)

    def place(path: tuple, leaf: Any) -> jax.Array:
        logical = ("rows", "patches") if path and getattr(path[-1], "name", None) == "patches" else ("rows",)
        shape = (len(leaf) * share.parts // len(share.held), *leaf.shape[1:])
        check_divides(shape, logical, mesh)
        where = sharding(mesh, *logical)
        if where.is_fully_addressable:
            return jax.device_put(leaf, where)
        size = shape[0] // share.parts

        def read(index: tuple[slice, ...]) -> np.ndarray:
            at = share.held.index((index[0].start or 0) // size) * size if share.parts > 1 else 0
            return leaf[at : at + size, *index[1:]]

        return jax.make_array_from_callback(shape, where, read)

    return jax.tree_util.tree_map_with_path(place, tree)

"""Moving vectors between layouts of a row by index arrays. Forward and backward are gathers, never a scatter-add.

On a mesh the source is made whole along `context`, and every device picks what its part of the target needs.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Float, Int

from openo3_jax import mesh as mesh_lib
from openo3_jax.types import Array

Groups = tuple[Int[Array, "rows _groups _size"], ...]


def _pick(x: Float[Array, "rows source dim"], index: Int[Array, "rows ..."]) -> Float[Array, "rows ... dim"]:
    """`out[r, i] = x[r, index[r, i]]`, zero where the index is -1."""
    filled = jnp.where(index < 0, x.shape[1], index)  # out of range reads zero
    return jax.vmap(lambda values, at: values.at[at].get(mode="fill", fill_value=0))(x, filled)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def rearrange(
    x: Float[Array, "rows source dim"],
    index: Int[Array, "rows target"],
    inverse: Int[Array, "rows source"],
    mesh: Mesh,
    source: str,
    target: str,
) -> Float[Array, "rows target dim"]:
    """`out[r, i] = x[r, index[r, i]]`, zero where the index is -1; `inverse` says where each source went.

    `source` and `target` are the logical axes of the two layouts.
    """
    whole = mesh_lib.constrain(x, mesh, "rows")
    return mesh_lib.constrain(_pick(whole, index), mesh, "rows", target)


def _rearrange_fwd(x, index, inverse, mesh, source, target):
    return rearrange(x, index, inverse, mesh, source, target), (index, inverse)


def _rearrange_bwd(mesh, source, target, saved, grad):
    index, inverse = saved
    return rearrange(grad, inverse, index, mesh, target, source), None, None


rearrange.defvjp(_rearrange_fwd, _rearrange_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def spread(
    x: Float[Array, "rows patches dim"], groups: Groups, slots: Int[Array, "rows patches"], mesh: Mesh
) -> tuple[Float[Array, "rows _groups _size dim"], ...]:
    """Patches laid out by group, one array for each size of group; `slots`: their places in all groups one after
    the other. Groups are split over `context`.
    """
    whole = mesh_lib.constrain(x, mesh, "rows")
    return tuple(mesh_lib.constrain(_pick(whole, group), mesh, "rows", "groups") for group in groups)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def collect(
    parts: tuple[Float[Array, "rows _groups _size dim"], ...],
    groups: Groups,
    slots: Int[Array, "rows patches"],
    mesh: Mesh,
) -> Float[Array, "rows patches dim"]:
    """The inverse of `spread`."""
    whole = [mesh_lib.constrain(part, mesh, "rows").reshape(part.shape[0], -1, part.shape[-1]) for part in parts]
    return mesh_lib.constrain(_pick(jnp.concatenate(whole, axis=1), slots), mesh, "rows", "patches")


def _spread_fwd(x, groups, slots, mesh):
    return spread(x, groups, slots, mesh), (groups, slots)


def _spread_bwd(mesh, saved, grads):
    return collect(grads, *saved, mesh), None, None


def _collect_fwd(parts, groups, slots, mesh):
    return collect(parts, groups, slots, mesh), (groups, slots)


def _collect_bwd(mesh, saved, grad):
    return spread(grad, *saved, mesh), None, None


spread.defvjp(_spread_fwd, _spread_bwd)
collect.defvjp(_collect_fwd, _collect_bwd)


def even_groups(groups: Groups, slots: Int[Array, "rows patches"], mesh: Mesh) -> tuple[Groups, Array]:
    """Groups padded so that the devices on `context` divide the number of each size, and where patches then are."""
    ways = mesh_lib.mesh_size(mesh, mesh_lib.LOGICAL_AXES["groups"])
    end, moved, padded = 0, slots, []
    for group in groups:
        padding = -group.shape[1] % ways
        end += group.shape[1] * group.shape[2]
        moved = moved + jnp.where(slots >= end, padding * group.shape[2], 0)
        padded.append(jnp.pad(group, ((0, 0), (0, padding), (0, 0)), constant_values=-1))
    return tuple(padded), moved

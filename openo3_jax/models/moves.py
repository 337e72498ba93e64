"""Moving vectors between layouts of a row by index arrays. Forward and backward are gathers, never a scatter-add.

On a mesh the source is made whole along `context`, and every device picks what its part of the target needs.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Float, Int, Shaped

from openo3_jax import mesh as mesh_lib
from openo3_jax.types import Array

Groups = tuple[Int[Array, "rows _groups _size"], ...]


def _pick(x: Shaped[Array, "rows source ..."], index: Int[Array, "rows ..."]) -> Shaped[Array, "rows ..."]:
    """`out[r, i] = x[r, index[r, i]]`, zero where the index is -1."""
    filled = jnp.where(index < 0, x.shape[1], index)  # out of range reads zero
    return jax.vmap(lambda values, at: values.at[at].get(mode="fill", fill_value=0))(x, filled)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def rearrange(
    x: Float[Array, "rows source dim"],
    index: Int[Array, "rows target"],
    inverse: Int[Array, "rows source"],
    mesh: Mesh | None = None,
    source: str | None = None,
    target: str | None = None,
) -> Float[Array, "rows target dim"]:
    """`out[r, i] = x[r, index[r, i]]`, zero where the index is -1; `inverse` says where each source went.

    `source` and `target` are the logical axes of the two layouts on the mesh; None where all is on one device.
    """
    if mesh is None:
        return _pick(x, index)
    whole = mesh_lib.constrain(x, mesh, "rows")
    return mesh_lib.constrain(_pick(whole, index), mesh, "rows", target)


def _rearrange_fwd(x, index, inverse, mesh, source, target):
    return rearrange(x, index, inverse, mesh, source, target), (index, inverse)


def _rearrange_bwd(mesh, source, target, saved, grad):
    index, inverse = saved
    return rearrange(grad, inverse, index, mesh, target, source), None, None


rearrange.defvjp(_rearrange_fwd, _rearrange_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def spread(
    x: Float[Array, "rows patches *rest"],
    groups: Groups,
    slots: Int[Array, "rows patches"],
    mesh: Mesh,
    rest: tuple[str | None, ...],
) -> tuple[Float[Array, "rows _groups _size *rest"], ...]:
    """Patches laid out by group, one array for each size of group; groups are split over `context`.

    `slots`: the patches' places in all groups one after the other. `rest`: logical axes of the dimensions behind.
    """
    whole = mesh_lib.constrain(x, mesh, "rows", None, *rest)
    return tuple(mesh_lib.constrain(_pick(whole, group), mesh, "rows", "groups", None, *rest) for group in groups)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def collect(
    parts: tuple[Float[Array, "rows _groups _size *rest"], ...],
    groups: Groups,
    slots: Int[Array, "rows patches"],
    mesh: Mesh,
    rest: tuple[str | None, ...],
) -> Float[Array, "rows patches *rest"]:
    """The inverse of `spread`."""
    whole = [mesh_lib.constrain(part, mesh, "rows", None, None, *rest) for part in parts]
    flat = jnp.concatenate([part.reshape(part.shape[0], -1, *part.shape[3:]) for part in whole], axis=1)
    return mesh_lib.constrain(_pick(flat, slots), mesh, "rows", "patches", *rest)


def _spread_fwd(x, groups, slots, mesh, rest):
    return spread(x, groups, slots, mesh, rest), (groups, slots)


def _spread_bwd(mesh, rest, saved, grads):
    return collect(grads, *saved, mesh, rest), None, None


def _collect_fwd(parts, groups, slots, mesh, rest):
    return collect(parts, groups, slots, mesh, rest), (groups, slots)


def _collect_bwd(mesh, rest, saved, grad):
    return spread(grad, *saved, mesh, rest), None, None


spread.defvjp(_spread_fwd, _spread_bwd)
collect.defvjp(_collect_fwd, _collect_bwd)


def across_rows(
    x: Shaped[Array, "rows source *dims"],
    at: Int[Array, "targets size"],
    mesh: Mesh,
    *rest: str | None,
) -> Shaped[Array, "targets size *dims"]:
    """`out[t, i] = x[at[t, i]]`, zero where that is -1; `at` counts through the rows of a part of the mesh.

    Every part has as many rows and as many targets. `rest`: logical axes of the dimensions behind. No gradient.
    """
    parts = mesh_lib.mesh_size(mesh, mesh_lib.LOGICAL_AXES["rows"])
    whole = mesh_lib.constrain(x.reshape(parts, -1, *x.shape[2:]), mesh, "rows", None, *rest)
    picked = _pick(whole, at.reshape(parts, -1))
    return mesh_lib.constrain(picked.reshape(*at.shape, *x.shape[2:]), mesh, "rows", None, *rest)


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

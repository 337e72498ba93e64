"""One attention function for text rows, vision windows and vision frames; every backend gives the same numbers.

Einsum letters: r rows, q query slots, k key slots, h key/value heads, g query heads per key/value head, d head size.
"""

import math
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Float, Int

from openo3_jax import mesh as mesh_lib
from openo3_jax.models import attention_blockwise, masks
from openo3_jax.models.masks import MASKED, Slots, visible
from openo3_jax.types import Array

__all__ = ["MASKED", "Backend", "Slots", "attention", "visible"]

Backend = Literal["auto", "xla", "blockwise"]

BLOCK = 128  # slots of a block of queries or keys on a CPU: they fit its cache (docs/log.md)
ACCELERATOR_BLOCK = 512


@jax.named_scope("attention")
def attention(
    q: Float[Array, "rows seq heads head_dim"],
    k: Float[Array, "rows seq kv_heads head_dim"],
    v: Float[Array, "rows seq kv_heads head_dim"],
    slots: Slots,
    *,
    causal: bool,
    backend: Backend = "auto",
    mesh: Mesh | None = None,
) -> Float[Array, "rows seq heads head_dim"]:
    """`softmax(q k^T / sqrt(head_dim)) v` over visible slots; softmax in float32; grouped heads are not repeated.

    `xla` builds the scores, `blockwise` keeps memory linear in the sequence, forward and backward; "auto" takes the
    first for rows of one block. With a mesh, rows, heads and slots are split over it; without, all is on one device.
    Raises InputError for sizes that the mesh does not divide.
    """
    if mesh is None:
        return local(q, k, v, slots, slots, causal=causal, backend=backend, platform=jax.default_backend())
    for x, heads in ((q, "heads"), (k, "kv_heads")):
        mesh_lib.check_divides(x.shape, ("rows", "seq", heads), mesh)
    split = mesh_lib.partition_spec(("rows", "seq", "heads"))
    rows = mesh_lib.partition_spec(("rows", "seq"))
    here = partial(local, causal=causal, backend=backend, platform=mesh.devices.flat[0].platform)
    attend = partial(_over_context, attend=here, ways=mesh.shape["context"])
    # Every axis of the mesh splits q, k and v, so no gradient needs a sum that the check of replication would find.
    sharded = jax.shard_map(attend, mesh=mesh, in_specs=(split, split, split, rows), out_specs=split, check_vma=False)
    return sharded(q, k, v, slots)


def _over_context(q, k, v, slots: Slots, *, attend, ways: int):
    """Attention on one device of a mesh, whose slots are one of `ways` parts of the row.

    Where the heads can be cut into as many parts, devices swap slots for heads: each then has whole rows of some heads,
    and the work is even. Else each gathers all keys and values, and looks at them with the queries it has.
    """
    if ways == 1:
        return attend(q, k, v, slots, slots)
    gather = partial(jax.lax.all_gather, axis_name="context", axis=1, tiled=True)
    whole = jax.tree.map(gather, slots)
    if k.shape[2] % ways == 0:
        swap = partial(jax.lax.all_to_all, axis_name="context", tiled=True)
        q, k, v = (swap(x, split_axis=2, concat_axis=1) for x in (q, k, v))
        return swap(attend(q, k, v, whole, whole), split_axis=1, concat_axis=2)
    first = jax.lax.axis_index("context") * q.shape[1]
    return attend(q, gather(k), gather(v), slots, whole, first=first)


def local(
    q: Float[Array, "rows q heads head_dim"],
    k: Float[Array, "rows k kv_heads head_dim"],
    v: Float[Array, "rows k kv_heads head_dim"],
    query: Slots,
    key: Slots,
    *,
    causal: bool,
    platform: str,
    backend: Backend = "auto",
    first: int | Int[Array, ""] = 0,
) -> Float[Array, "rows q heads head_dim"]:
    """Attention on one device of that platform; query i stands in slot `first + i` of the keys' row."""
    block = BLOCK if platform == "cpu" else ACCELERATOR_BLOCK
    if backend == "auto":
        backend = "xla" if k.shape[1] <= block else "blockwise"
    attend = _dense if backend == "xla" else partial(attention_blockwise.attend, block=block)
    return attend(q, k, v, query, key, causal=causal, first=first)


def _dense(q, k, v, query: Slots, key: Slots, *, causal: bool, first: int | Int[Array, ""] = 0):
    grouped = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[-1])
    scores = jnp.einsum("rqhgd,rkhd->rhgqk", grouped, k, preferred_element_type=jnp.float32) / math.sqrt(q.shape[-1])
    at, key_at = first + jnp.arange(q.shape[1]), jnp.arange(k.shape[1])
    allowed = masks.visible(query, key, at, key_at, causal=causal)[:, None, None]
    weights = jax.nn.softmax(jnp.where(allowed, scores, MASKED), axis=-1).astype(v.dtype)
    return jnp.einsum("rhgqk,rkhd->rqhgd", weights, v).reshape(q.shape)

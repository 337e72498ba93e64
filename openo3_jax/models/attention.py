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
from openo3_jax.errors import InputError
from openo3_jax.models import attention_blockwise, attention_cudnn, attention_groups, attention_splash, masks
from openo3_jax.models.attention_groups import Group
from openo3_jax.models.masks import MASKED, Slots, visible
from openo3_jax.types import Array

__all__ = ["MASKED", "Backend", "Group", "Slots", "attention", "choose", "local", "visible"]

Backend = Literal["auto", "xla", "blockwise", "cudnn", "splash"]
Platform = str  # of a device: "cpu", "gpu", "tpu"

BLOCK = 128  # slots of a block of queries or keys on a CPU: they fit its cache (docs/log.md)
ACCELERATOR_BLOCK = 512
KERNELS = {"gpu": "cudnn", "tpu": "splash"}


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
    group: Group | None = None,
) -> Float[Array, "rows seq heads head_dim"]:
    """`softmax(q k^T / sqrt(head_dim)) v` over visible slots; softmax in float32; grouped heads are not repeated.

    `xla` builds the scores; `blockwise` keeps memory linear in the sequence, forward and backward; `cudnn` and
    `splash` are the kernels of a GPU and a TPU. "auto" takes the platform's kernel where it can, else `xla` for rows of
    one block and `blockwise` for longer ones. The kernels know no branches: rows that share a prompt go to them if they
    keep to `group`, else to `blockwise`; that is decided on the device.

    With a mesh, rows, heads and slots are split over it; without, all is on one device.
    Raises InputError for sizes that the mesh does not divide, and for what a kernel that was asked for cannot do.
    """
    if mesh is None:
        platform = jax.default_backend()
        return local(q, k, v, slots, slots, causal=causal, backend=backend, platform=platform, group=group)
    for x, heads in ((q, "heads"), (k, "kv_heads")):
        mesh_lib.check_divides(x.shape, ("rows", "seq", heads), mesh)
    split = mesh_lib.partition_spec(("rows", "seq", "heads"))
    rows = mesh_lib.partition_spec(("rows", "seq"))
    here = partial(local, causal=causal, backend=backend, platform=mesh.devices.flat[0].platform, group=group)
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
    platform: Platform,
    backend: Backend = "auto",
    first: int | Int[Array, ""] = 0,
    group: Group | None = None,
) -> Float[Array, "rows q heads head_dim"]:
    """Attention on one device of that platform; query i stands in slot `first + i` of the keys' row."""
    backend = choose(q, k, causal=causal, platform=platform, backend=backend)
    if backend == "xla":
        return _dense(q, k, v, query, key, causal=causal, first=first)
    blocks = partial(attention_blockwise.attend, block=BLOCK if platform == "cpu" else ACCELERATOR_BLOCK)
    in_blocks = partial(blocks, query=query, key=key, causal=causal, first=first)
    if backend == "blockwise":
        return in_blocks(q, k, v)
    # A kernel asked for on another platform runs as its reference, which is how the tests compare it.
    if backend == "splash":
        kernel = partial(attention_splash.attend, interpret=platform != "tpu")
    else:
        implementation = "cudnn" if platform == "gpu" else "xla"
        kernel = partial(attention_cudnn.attend, causal=causal, implementation=implementation, otherwise=blocks)
    alone = partial(kernel, query=query, key=key, first=first)
    if key.branches is None:
        return alone(q, k, v)
    has_branches = (key.branches > 0).any()
    if group is None or q.shape[1] != k.shape[1]:
        return alone(q, k, v) if backend == "cudnn" else jax.lax.cond(has_branches, in_blocks, alone, q, k, v)

    def grouped(q, k, v):
        return attention_groups.attend(q, k, v, key, group, kernel)

    way = jnp.where(has_branches, jnp.where(attention_groups.fits(key, group), 1, 2), 0)
    return jax.lax.switch(way, [alone, grouped, in_blocks], q, k, v)


def choose(q: Array, k: Array, *, causal: bool, platform: Platform, backend: Backend = "auto") -> Backend:
    """The backend that "auto" stands for, by platform, dtype and sizes.

    Raises InputError for a kernel that was asked for by name and cannot run with them.
    """
    kernel = KERNELS.get(platform) if backend == "auto" else backend
    if kernel in KERNELS.values():
        problem = _cannot(kernel, q, k, causal, platform)
        if not problem:
            return kernel
        if backend != "auto":
            raise InputError(f"attention: backend={backend!r} {problem}; take 'auto' or 'blockwise'")
    if backend != "auto":
        return backend
    return "xla" if k.shape[1] <= (BLOCK if platform == "cpu" else ACCELERATOR_BLOCK) else "blockwise"


def _cannot(kernel: Backend, q: Array, k: Array, causal: bool, platform: Platform) -> str | None:
    """Why this kernel cannot run, None if it can."""
    head_dim = q.shape[-1]
    if kernel == "splash":
        lengths = [x.shape[1] for x in (q, k) if x.shape[1] % attention_splash.LANES]
        if lengths:
            return f"needs slots in multiples of {attention_splash.LANES}, got {lengths[0]}"
        if platform == "tpu" and head_dim % attention_splash.LANES:
            return f"needs heads of a multiple of {attention_splash.LANES}, got {head_dim}"
        return None if causal else "is causal only"
    if platform == "gpu" and q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"needs bfloat16 or float16, got {q.dtype}"
    return f"needs heads of a multiple of 8 up to 128, got {head_dim}" if head_dim % 8 or head_dim > 128 else None


def _dense(q, k, v, query: Slots, key: Slots, *, causal: bool, first: int | Int[Array, ""] = 0):
    grouped = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[-1])
    scores = jnp.einsum("rqhgd,rkhd->rhgqk", grouped, k, preferred_element_type=jnp.float32) / math.sqrt(q.shape[-1])
    at, key_at = first + jnp.arange(q.shape[1]), jnp.arange(k.shape[1])
    allowed = masks.visible(query, key, at, key_at, causal=causal)[:, None, None]
    weights = jax.nn.softmax(jnp.where(allowed, scores, MASKED), axis=-1).astype(v.dtype)
    return jnp.einsum("rhgqk,rkhd->rqhgd", weights, v).reshape(q.shape)

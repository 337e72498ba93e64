"""Attention by Pallas' splash kernel on a TPU: causal, packed rows, grouped heads not repeated.

The backward pass is not the fused one, whose partial gradients of the queries take five times the memory
(docs/scaling.md).
"""

import math

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask
from jaxtyping import Float, Int

from openo3_jax.models import masks
from openo3_jax.models.layers import ATTENTION
from openo3_jax.types import Array

LANES = 128  # slots come in multiples of it
QUERY_BLOCKS, KEY_BLOCKS = (512, 256, 128), (1024, 512, 256, 128)  # the first that divides the slots is taken


def attend(
    q: Float[Array, "rows q heads head_dim"],
    k: Float[Array, "rows k kv_heads head_dim"],
    v: Float[Array, "rows k kv_heads head_dim"],
    query: masks.Slots,
    key: masks.Slots,
    *,
    first: int | Int[Array, ""] = 0,
    interpret: bool,
) -> Float[Array, "rows q heads head_dim"]:
    """Causal attention within segments; branches are not looked at. `interpret` runs it without a TPU, slowly.

    Query i stands in slot `first + i`; a `first` that is known only at run time must be a multiple of the number of
    queries, which must divide that of the keys.
    """
    num_queries, num_keys = q.shape[1], k.shape[1]
    is_static = isinstance(first, int)
    kernel = _kernel(
        splash_mask.CausalMask((num_queries, num_keys), offset=first)
        if is_static
        else splash_mask.CausalMask((num_keys, num_keys)),
        heads=q.shape[2],
        num_queries=num_queries,
        parts=1 if is_static else num_keys // num_queries,
        interpret=interpret,
    )
    if not is_static:
        kernel = _part(kernel, first // num_queries, num_keys // num_queries)
    q = (q.astype(jnp.float32) / math.sqrt(q.shape[-1])).astype(q.dtype)
    heads_first = [jnp.moveaxis(x, 2, 1) for x in (q, k, v)]
    ids = splash.SegmentIds(query.segments, key.segments)
    return jnp.moveaxis(jax.vmap(kernel)(*heads_first, ids), 1, 2)


def _kernel(mask, *, heads: int, num_queries: int, parts: int, interpret: bool) -> splash.SplashAttentionKernel:
    num_keys = mask.shape[1]
    block_q = next(block for block in QUERY_BLOCKS if num_queries % block == 0)
    block_k = next(block for block in KEY_BLOCKS if num_keys % block == 0)
    blocks = splash.BlockSizes(
        block_q=block_q,
        block_kv=block_k,
        block_kv_compute=min(block_k, 512),
        block_q_dkv=block_q,
        block_kv_dkv=block_k,
        block_kv_dkv_compute=min(block_k, 512),
        block_q_dq=block_q,
        block_kv_dq=block_k,
        use_fused_bwd_kernel=False,
    )
    return splash.make_splash_mha(
        splash_mask.MultiHeadMask([mask] * heads),
        block_sizes=blocks,
        head_shards=1,
        q_seq_shards=parts,
        residual_checkpoint_name=ATTENTION,
        interpret=interpret,
    )


def _part(kernel: splash.SplashAttentionKernel, index: Int[Array, ""], parts: int) -> splash.SplashAttentionKernel:
    """The kernel of one of `parts` equal parts of the queries: that part of its tables of blocks."""

    def cut(info):
        def piece(table, axis: int):
            if table is None:
                return None
            size = table.shape[axis] // parts
            return jax.lax.dynamic_slice_in_dim(table, index * size, size, axis=axis)

        tables = {name: piece(getattr(info, name), 1) for name in ("data_next", "mask_next", "block_mask")}
        return info._replace(**tables, q_sequence=piece(info.q_sequence, 0))

    infos = kernel.fwd_mask_info, kernel.dq_mask_info, kernel.dkv_mask_info
    return splash.SplashAttentionKernel(*map(cut, infos), **kernel.kwargs)

"""Attention in blocks with an online softmax: memory linear in the sequence, forward and backward, on any platform.

Einsum letters: r rows, q query slots, k key slots, h key/value heads, g query heads per key/value head, d head size.
Source: FlashAttention-2, arXiv:2307.08691.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float, Int

from openo3_jax.models import masks
from openo3_jax.models.layers import ATTENTION
from openo3_jax.types import Array

einsum = partial(jnp.einsum, preferred_element_type=jnp.float32)


def attend(
    q: Float[Array, "rows q heads head_dim"],
    k: Float[Array, "rows k kv_heads head_dim"],
    v: Float[Array, "rows k kv_heads head_dim"],
    query: masks.Slots,
    key: masks.Slots,
    *,
    causal: bool,
    first: int | Int[Array, ""] = 0,
    block: int,
) -> Float[Array, "rows q heads head_dim"]:
    """Softmax attention over visible slots; query i stands in slot `first + i` of the keys' row."""
    num_queries, num_keys, head_dim = q.shape[1], k.shape[1], q.shape[-1]
    q_block, k_block = min(block, num_queries), min(block, num_keys)
    grouped = q.reshape(*q.shape[:2], k.shape[2], -1, head_dim)
    blocks = [jnp.moveaxis(_split(x, size), 2, -2) for x, size in ((grouped, q_block), (k, k_block), (v, k_block))]
    query, key = jax.tree.map(partial(_pad, block=q_block), query), jax.tree.map(partial(_pad, block=k_block), key)
    where = jnp.asarray(first, jnp.int32)
    query_at = (where + jnp.arange(query.segments.shape[1], dtype=jnp.int32)).reshape(-1, q_block)
    key_at = jnp.arange(key.segments.shape[1], dtype=jnp.int32).reshape(-1, k_block)
    needed = masks.visible_blocks(query, key, query_at, key_at, causal=causal)
    # For each block of queries the blocks of keys that it needs, in their order, and how many.
    todo = jnp.argsort(~needed, axis=1, stable=True).astype(jnp.int32), needed.sum(1, dtype=jnp.int32)
    slots = [jax.tree.map(partial(_split, block=size), x) for x, size in ((query, q_block), (key, k_block))]
    out = _flash(*blocks, (*slots, query_at, key_at), todo, causal)  # [blocks, rows, h, g, block, d]
    out = jnp.moveaxis(jnp.moveaxis(out, -2, 2), 0, 1)
    return out.reshape(out.shape[0], -1, *out.shape[3:])[:, :num_queries].reshape(q.shape)


def _pad(x, block: int):
    """`[rows, seq, ...]` with zeros up to a whole number of blocks."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % block)) + ((0, 0),) * (x.ndim - 2))


def _split(x, block: int):
    """`[rows, seq, ...]` -> `[blocks, rows, block, ...]`."""
    x = _pad(x, block)
    return jnp.moveaxis(x.reshape(x.shape[0], -1, block, *x.shape[2:]), 1, 0)


def _block_scores(q, k, where, i, j, causal: bool):
    """Scores of query block i against key block j, float32 `[rows, h, g, q, k]`, masked."""
    scores = einsum("rhgqd,rhkd->rhgqk", q[i], k[j]) / math.sqrt(q.shape[-1])
    return jnp.where(_allowed(where, i, j, causal)[:, None, None], scores, masks.MASKED)


def _turned_scores(q, k, where, i, j, causal: bool):
    """The same as `[rows, h, k, g, q]`."""
    scores = einsum("rhkd,rhgqd->rhkgq", k[j], q[i]) / math.sqrt(q.shape[-1])
    return jnp.where(_allowed(where, i, j, causal).swapaxes(1, 2)[:, None, :, None], scores, masks.MASKED)


def _allowed(where, i, j, causal: bool):
    query, key, query_at, key_at = where
    here, there = jax.tree.map(lambda x: x[i], query), jax.tree.map(lambda x: x[j], key)
    return masks.visible(here, there, query_at[i], key_at[j], causal=causal)


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _flash(q, k, v, where, todo, causal: bool):
    return _flash_fwd(q, k, v, where, todo, causal)[0]


def _flash_fwd(q, k, v, where, todo, causal: bool):
    order, number = todo

    def query_block(_, i):
        def key_block(t, carry):
            top, total, out = carry
            j = order[i, t]
            scores = _block_scores(q, k, where, i, j, causal)
            new_top = jnp.maximum(top, scores.max(-1))
            weights = jnp.exp(scores - new_top[..., None])
            decay = jnp.exp(top - new_top)
            part = einsum("rhgqk,rhkd->rhgqd", weights.astype(v.dtype), v[j])
            return new_top, total * decay + weights.sum(-1), out * decay[..., None] + part

        zeros = jnp.zeros(q.shape[1:], jnp.float32)
        start = jnp.full(q.shape[1:-1], masks.MASKED, jnp.float32), zeros[..., 0], zeros
        top, total, out = jax.lax.fori_loop(0, number[i], key_block, start)
        total = jnp.where(total > 0, total, 1.0)  # a block of padding looks at nothing
        return None, ((out / total[..., None]).astype(q.dtype), top + jnp.log(total))

    _, results = jax.lax.scan(query_block, None, jnp.arange(q.shape[0]))
    out, log_total = checkpoint_name(results, ATTENTION)
    return out, (q, k, v, where, todo, out, log_total)


def _flash_bwd(causal: bool, saved, d_out):
    """Works on transposed scores, `[k, g q]`: then no product contracts the first dimension of a large array, which a
    CPU would have to turn round first. Gradients of queries are collected transposed, and turned once for each block.
    """
    q, k, v, where, (order, number), out, log_total = saved
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    turned_k = k.swapaxes(-1, -2)

    def query_block(carry, i):
        def key_block(t, carry):
            d_q, d_k, d_v = carry
            j = order[i, t]
            weights = jnp.exp(_turned_scores(q, k, where, i, j, causal) - log_total[i][:, :, None])
            d_weights = einsum("rhkd,rhgqd->rhkgq", v[j], d_out[i])
            d_scores = (weights * (d_weights - delta[i][:, :, None]) / math.sqrt(q.shape[-1])).astype(q.dtype)
            d_v = d_v.at[j].add(einsum("rhkgq,rhgqd->rhkd", weights.astype(q.dtype), d_out[i]))
            d_k = d_k.at[j].add(einsum("rhkgq,rhgqd->rhkd", d_scores, q[i]))
            return d_q + einsum("rhdk,rhkgq->rhdgq", turned_k[j], d_scores), d_k, d_v

        rows, heads, group, queries, head_dim = q.shape[1:]
        start = jnp.zeros((rows, heads, head_dim, group, queries), jnp.float32), *carry
        d_q, *carry = jax.lax.fori_loop(0, number[i], key_block, start)
        return tuple(carry), jnp.moveaxis(d_q, 2, -1).astype(q.dtype)

    zeros = jnp.zeros(k.shape, jnp.float32)
    (d_k, d_v), d_q = jax.lax.scan(query_block, (zeros, zeros), jnp.arange(q.shape[0]))
    return d_q, d_k.astype(k.dtype), d_v.astype(v.dtype), None, None


_flash.defvjp(_flash_fwd, _flash_bwd)

"""One attention function for text rows, vision windows and vision frames; every backend gives the same numbers.

Einsum letters: r rows, q query slots, k key slots, h key/value heads, g query heads per key/value head, d head size.
"""

import math
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from openo3_jax.types import Array

Backend = Literal["auto", "xla", "blockwise"]

MASKED = -1e30  # finite, so that a row of padding stays finite
BLOCK = 128  # slots of a block of queries or keys; on a CPU, blocks of 128 fit its cache (docs/log.md)


class Slots(NamedTuple):
    """What decides who sees whom. Segment 0 is padding; branch 0 is seen by its whole segment (see types.Batch)."""

    segments: Int[Array, "rows seq"]
    branches: Int[Array, "rows seq"] | None = None


def visible(
    query: Slots, key: Slots, query_at: Int[Array, " q"], key_at: Int[Array, " k"], *, causal: bool
) -> Bool[Array, "rows q k"]:
    """True where a query may look at a key: same segment, not later, and on its own branch or the shared one."""
    allowed = query.segments[:, :, None] == key.segments[:, None, :]
    if causal:
        allowed &= query_at[:, None] >= key_at[None, :]
    if key.branches is not None:
        key_branch = key.branches[:, None, :]
        allowed &= (key_branch == 0) | (query.branches[:, :, None] == key_branch)
    return allowed


@jax.named_scope("attention")
def attention(
    q: Float[Array, "rows seq heads head_dim"],
    k: Float[Array, "rows seq kv_heads head_dim"],
    v: Float[Array, "rows seq kv_heads head_dim"],
    slots: Slots,
    *,
    causal: bool,
    backend: Backend = "auto",
) -> Float[Array, "rows seq heads head_dim"]:
    """`softmax(q k^T / sqrt(head_dim)) v` over visible slots; softmax in float32; grouped heads are not repeated.

    `xla` builds the scores, `blockwise` keeps memory linear in the sequence, forward and backward; "auto" takes the
    first for rows of one block.
    """
    if backend == "auto":
        backend = "xla" if q.shape[1] <= BLOCK else "blockwise"
    rows, seq, heads, head_dim = q.shape
    grouped = q.reshape(rows, seq, k.shape[2], heads // k.shape[2], head_dim)
    attend = _dense if backend == "xla" else _blockwise
    return attend(grouped, k, v, slots, causal).reshape(q.shape)


def _dense(q, k, v, slots: Slots, causal: bool):
    at = jnp.arange(q.shape[1])
    scores = jnp.einsum("rqhgd,rkhd->rhgqk", q, k, preferred_element_type=jnp.float32) / math.sqrt(q.shape[-1])
    allowed = visible(slots, slots, at, at, causal=causal)[:, None, None]
    weights = jax.nn.softmax(jnp.where(allowed, scores, MASKED), axis=-1).astype(v.dtype)
    return jnp.einsum("rhgqk,rkhd->rqhgd", weights, v)


def _blockwise(q, k, v, slots: Slots, causal: bool):
    """Online softmax over blocks. Source: FlashAttention-2, arXiv:2307.08691."""
    seq = q.shape[1]
    block = min(BLOCK, seq)
    padding = -seq % block

    def split(x):  # [rows, seq, ...] -> [blocks, rows, block, ...]
        x = jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], -1, block, *x.shape[2:]), 1, 0)

    heads_first = [jnp.moveaxis(split(x), 2, -2) for x in (q, k, v)]  # [blocks, rows, h, (g,) block, d]
    out = _flash(*heads_first, jax.tree.map(split, slots), causal)  # [blocks, rows, h, g, block, d]
    out = jnp.moveaxis(jnp.moveaxis(out, -2, 2), 0, 1)
    return out.reshape(out.shape[0], -1, *out.shape[3:])[:, :seq]


def _block_scores(q, k, slots: Slots, i, j, causal: bool):
    """Scores of query block i against key block j, float32 `[rows, h, g, block, block]`, masked."""
    block = q.shape[-2]
    scores = jnp.einsum("rhgqd,rhkd->rhgqk", q, k, preferred_element_type=jnp.float32) / math.sqrt(q.shape[-1])
    here, there = (jax.tree.map(lambda x, at=at: x[at], slots) for at in (i, j))
    at = jnp.arange(block)
    allowed = visible(here, there, i * block + at, j * block + at, causal=causal)
    return jnp.where(allowed[:, None, None], scores, MASKED)


def _num_key_blocks(i, blocks: int, causal: bool):
    return i + 1 if causal else blocks


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _flash(q, k, v, slots: Slots, causal: bool):
    return _flash_fwd(q, k, v, slots, causal)[0]


def _flash_fwd(q, k, v, slots: Slots, causal: bool):
    blocks = q.shape[0]

    def query_block(_, i):
        def key_block(j, carry):
            top, total, out = carry
            scores = _block_scores(q[i], k[j], slots, i, j, causal)
            new_top = jnp.maximum(top, scores.max(-1))
            weights = jnp.exp(scores - new_top[..., None])
            decay = jnp.exp(top - new_top)
            part = jnp.einsum("rhgqk,rhkd->rhgqd", weights.astype(v.dtype), v[j], preferred_element_type=jnp.float32)
            return new_top, total * decay + weights.sum(-1), out * decay[..., None] + part

        zeros = jnp.zeros(q.shape[1:], jnp.float32)
        start = jnp.full(q.shape[1:-1], MASKED, jnp.float32), zeros[..., 0], zeros
        top, total, out = jax.lax.fori_loop(0, _num_key_blocks(i, blocks, causal), key_block, start)
        return None, ((out / total[..., None]).astype(q.dtype), top + jnp.log(total))

    _, (out, log_total) = jax.lax.scan(query_block, None, jnp.arange(blocks))
    return out, (q, k, v, slots, out, log_total)


def _flash_bwd(causal: bool, saved, d_out):
    q, k, v, slots, out, log_total = saved
    blocks = q.shape[0]
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    einsum = partial(jnp.einsum, preferred_element_type=jnp.float32)

    def query_block(carry, i):
        def key_block(j, carry):
            d_q, d_k, d_v = carry
            weights = jnp.exp(_block_scores(q[i], k[j], slots, i, j, causal) - log_total[i][..., None])
            d_weights = einsum("rhgqd,rhkd->rhgqk", d_out[i], v[j])
            d_scores = (weights * (d_weights - delta[i][..., None]) / math.sqrt(q.shape[-1])).astype(q.dtype)
            d_v = d_v.at[j].add(einsum("rhgqk,rhgqd->rhkd", weights.astype(q.dtype), d_out[i]))
            d_k = d_k.at[j].add(einsum("rhgqk,rhgqd->rhkd", d_scores, q[i]))
            return d_q + einsum("rhgqk,rhkd->rhgqd", d_scores, k[j]), d_k, d_v

        start = jnp.zeros(q.shape[1:], jnp.float32), *carry
        d_q, *carry = jax.lax.fori_loop(0, _num_key_blocks(i, blocks, causal), key_block, start)
        return tuple(carry), d_q.astype(q.dtype)

    zeros = jnp.zeros(k.shape, jnp.float32)
    (d_k, d_v), d_q = jax.lax.scan(query_block, (zeros, zeros), jnp.arange(blocks))
    return d_q, d_k.astype(k.dtype), d_v.astype(v.dtype), None


_flash.defvjp(_flash_fwd, _flash_bwd)

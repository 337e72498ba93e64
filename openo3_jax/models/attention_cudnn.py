"""Attention by cuDNN on a GPU, through jax.nn: causal rows as they are, others by a mask.

cuDNN masks by cause or by length without an array, everything else by a bias of `[queries, keys]`. Rows of one sample,
padded behind, are merely causal: no real query stands behind padding. Its log-sum-exp is never used: the backward pass
of jax.nn drops that gradient, so parts cannot be merged by it.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from openo3_jax.models import masks
from openo3_jax.types import Array

MASK_BYTES = 2**30  # a larger bias (in bfloat16) is not made; its gradient takes as much again


def attend(
    q: Float[Array, "rows q heads head_dim"],
    k: Float[Array, "rows k kv_heads head_dim"],
    v: Float[Array, "rows k kv_heads head_dim"],
    query: masks.Slots,
    key: masks.Slots,
    *,
    causal: bool,
    first: int | Int[Array, ""] = 0,
    implementation: str,
    otherwise: Callable[..., Array],
) -> Float[Array, "rows q heads head_dim"]:
    """Attention over visible slots; `otherwise`, with the same arguments, computes what would need too large a mask.

    Which of the ways is taken is decided on the device, by the slots. `implementation`: "cudnn", or "xla" for the same
    program without a GPU.
    """

    def plain(q, k, v):
        lengths = None if causal else jnp.maximum((key.segments > 0).sum(1, dtype=jnp.int32), 1)
        return jax.nn.dot_product_attention(
            q, k, v, is_causal=causal, key_value_seq_lengths=lengths, implementation=implementation
        )

    def masked(q, k, v):
        at, key_at = first + jnp.arange(q.shape[1]), jnp.arange(k.shape[1])
        mask = masks.visible(query, key, at, key_at, causal=causal)[:, None]
        return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation=implementation)

    bias_bytes = 2 * q.shape[0] * q.shape[1] * k.shape[1]
    in_blocks = partial(otherwise, query=query, key=key, causal=causal, first=first)
    others = masked if bias_bytes <= MASK_BYTES else in_blocks
    if q.shape[1] != k.shape[1]:
        return others(q, k, v)
    return jax.lax.cond(_one_sample_each(key), plain, others, q, k, v)


def _one_sample_each(slots: masks.Slots) -> Bool[Array, ""]:
    """True if every row is one segment, padded behind, without branches; a row of padding is one too."""
    first, rest = slots.segments[:, :1], slots.segments
    is_prefix = (rest[:, 1:] == 0) | (rest[:, :-1] > 0)
    plain = ((rest == first) | (rest == 0)) & jnp.pad(is_prefix, ((0, 0), (1, 0)), constant_values=True)
    if slots.branches is not None:
        plain &= slots.branches == 0
    return plain.all()

"""Caches of decoding: one prefix per prompt, shared by its samples, and one suffix per sample.

Layouts are chosen so that no step moves a cache: last in a prefix is what its product sums over, the head size of keys
and the sequence of values. On a CPU YNNPACK takes no other; on H100 and v5p no step copies such a one (docs/log.md).
Einsum letters: p prompts, g samples of a prompt, h key/value heads, q query heads per key/value head, d head size,
s prefix slots, t suffix slots.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from openo3_jax.models import attention, text
from openo3_jax.types import Array


class Prefix(NamedTuple):
    """Keys and values of the prompts in one layer; read only while decoding."""

    k: Float[Array, "prompts kv_heads prefix head_dim"]
    v: Float[Array, "prompts kv_heads head_dim prefix"]


class Suffix(NamedTuple):
    """Keys and values of the tokens generated so far in one layer; slot t is filled at step t."""

    k: Float[Array, "prompts group kv_heads suffix head_dim"]
    v: Float[Array, "prompts group kv_heads suffix head_dim"]


def split_layers(cache: text.KeyValue, by_prompt: Callable[[Array], Array]) -> list[Prefix]:
    """The stacked cache of a prefill -> one prefix per layer, as separate arrays.

    `by_prompt` lays out `[rows, seq, kv_heads, head_dim]` as `[prompts, prefix, kv_heads, head_dim]`.
    """
    num_layers = cache.k.shape[0]
    return [
        Prefix(jnp.transpose(by_prompt(cache.k[i]), (0, 2, 1, 3)), jnp.transpose(by_prompt(cache.v[i]), (0, 2, 3, 1)))
        for i in range(num_layers)
    ]


def empty_suffix(prefix: Prefix, group: int, capacity: int) -> Suffix:
    prompts, kv_heads, _, head_dim = prefix.k.shape
    zeros = jnp.zeros((prompts, group, kv_heads, capacity, head_dim), prefix.k.dtype)
    return Suffix(zeros, zeros)


def append(suffix: Suffix, new: text.KeyValue, step: Int[Array, ""]) -> Suffix:
    """Write the keys and values `[prompts, group, kv_heads, head_dim]` of this step's tokens into slot `step`."""

    def write(cache, value):
        return jax.lax.dynamic_update_slice_in_dim(cache, value[:, :, :, None], step, axis=3)

    return Suffix(write(suffix.k, new.k), write(suffix.v, new.v))


@jax.named_scope("decode_attention")
def attend(
    q: Float[Array, "prompts group heads head_dim"],
    prefix: Prefix,
    suffix: Suffix,
    *,
    in_prefix: Bool[Array, "prompts prefix"],
    step: Int[Array, ""],
) -> Float[Array, "prompts group heads head_dim"]:
    """Attention of one new token per sample over its prompt and its own suffix up to `step`; one softmax over both.

    The prompt's cache is read once for all samples.
    """
    prompts, group, heads, head_dim = q.shape
    kv_heads = prefix.k.shape[1]
    grouped = q.reshape(prompts, group, kv_heads, heads // kv_heads, head_dim) / math.sqrt(head_dim)
    grouped = grouped.astype(q.dtype)

    def scores(equation: str, keys, is_visible):
        raw = jnp.einsum(equation, grouped, keys, preferred_element_type=jnp.float32)
        return jnp.where(is_visible, raw, attention.MASKED)

    is_past = jnp.arange(suffix.k.shape[3]) <= step
    to_prefix = scores("pghqd,phsd->pghqs", prefix.k, in_prefix[:, None, None, None, :])
    to_suffix = scores("pghqd,pghtd->pghqt", suffix.k, is_past)
    top = jnp.maximum(to_prefix.max(-1, keepdims=True), to_suffix.max(-1, keepdims=True))
    to_prefix, to_suffix = jnp.exp(to_prefix - top), jnp.exp(to_suffix - top)
    total = to_prefix.sum(-1, keepdims=True) + to_suffix.sum(-1, keepdims=True)
    mixed = jnp.einsum("pghqs,phds->pghqd", (to_prefix / total).astype(q.dtype), prefix.v)
    mixed += jnp.einsum("pghqt,pghtd->pghqd", (to_suffix / total).astype(q.dtype), suffix.v)
    return mixed.reshape(q.shape)

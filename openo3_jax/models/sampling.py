"""Logits -> tokens: penalty, bans, temperature, top-k, top-p. Pure functions of arrays; each row has its own key."""

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from openo3_jax.models import attention
from openo3_jax.types import Array

_ONE_BITS = 0x3F800000  # of 1.0 as float32


def keep_top_k(logits: Float[Array, "*rows vocab"], k: int) -> Float[Array, "*rows vocab"]:
    """All but the k largest are masked (ties with the k-th stay)."""
    kth = jax.lax.top_k(logits, k)[0][..., -1:]
    return jnp.where(logits < kth, attention.MASKED, logits)


def keep_top_p(logits: Float[Array, "*rows vocab"], p: float) -> Float[Array, "*rows vocab"]:
    """The smallest set of largest logits whose probability reaches p stays (ties with its last too); at least one does.

    `p`: in (0, 1). Nothing is sorted, which takes a CPU longer than all else in a small decoder: the least probability
    to keep is found by halving, over the bit patterns of floats from 0 to 1, which are ordered as the floats are.
    """
    probability = jax.nn.softmax(logits, axis=-1)
    low = jnp.zeros((*logits.shape[:-1], 1), jnp.int32)  # what is kept from here on reaches p
    high = jnp.full_like(low, _ONE_BITS + 1)  # from here on it does not

    def halve(_, bounds):
        low, high = bounds
        middle = low + (high - low) // 2
        is_kept = probability >= jax.lax.bitcast_convert_type(middle, jnp.float32)
        reaches = jnp.sum(jnp.where(is_kept, probability, 0), axis=-1, keepdims=True) >= p
        return jnp.where(reaches, middle, low), jnp.where(reaches, high, middle)

    low, _ = jax.lax.fori_loop(0, _ONE_BITS.bit_length(), halve, (low, high))
    return jnp.where(probability < jax.lax.bitcast_convert_type(low, jnp.float32), attention.MASKED, logits)


def discourage(
    logits: Float[Array, "*rows vocab"], seen: Bool[Array, "*rows vocab"], penalty: float
) -> Float[Array, "*rows vocab"]:
    """Logits of tokens that were seen, divided by the penalty where positive and multiplied where negative.

    As CTRL (arXiv 1909.05858), transformers and vLLM have it; `generation_config.json` of Qwen2.5-VL asks for 1.05.
    """
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def sample(
    logits: Float[Array, "*rows vocab"],
    keys: Array,
    banned: Bool[Array, " vocab"],
    *,
    temperature: float,
    top_k: int,
    top_p: float,
    seen: Bool[Array, "*rows vocab"] | None = None,
    repetition_penalty: float = 1.0,
) -> tuple[Int[Array, "*rows"], Float[Array, "*rows"]]:
    """One token per row and its log-probability under the raw logits (temperature 1, whole vocabulary).

    `temperature` 0 takes the largest logit that is not banned; `top_k` 0 and `top_p` 1 are off. `keys`: one PRNG key
    per row, so that a row's token does not depend on its neighbours. `seen`: what `repetition_penalty` is for.
    """
    allowed = logits if seen is None else discourage(logits, seen, repetition_penalty)
    allowed = jnp.where(banned, attention.MASKED, allowed)
    if temperature == 0.0:
        token = jnp.argmax(allowed, axis=-1)
    else:
        allowed = allowed / temperature
        if top_k:
            allowed = keep_top_k(allowed, min(top_k, logits.shape[-1]))
        if top_p < 1.0:
            allowed = keep_top_p(allowed, top_p)
        draw = jax.random.categorical
        for _ in range(logits.ndim - 1):
            draw = jax.vmap(draw)
        token = draw(keys, allowed)
    logp = jnp.take_along_axis(logits, token[..., None], axis=-1)[..., 0] - jax.nn.logsumexp(logits, axis=-1)
    return token, logp

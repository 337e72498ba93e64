"""Logits -> tokens: bans, temperature, top-k, top-p. Pure functions of arrays; each row has its own key."""

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from openo3_jax.models import attention
from openo3_jax.types import Array


def keep_top_k(logits: Float[Array, "*rows vocab"], k: int) -> Float[Array, "*rows vocab"]:
    """All but the k largest are masked (ties with the k-th stay)."""
    kth = jax.lax.top_k(logits, k)[0][..., -1:]
    return jnp.where(logits < kth, attention.MASKED, logits)


def keep_top_p(logits: Float[Array, "*rows vocab"], p: float) -> Float[Array, "*rows vocab"]:
    """The smallest set of largest logits whose probability reaches p stays; at least one does."""
    ordered = jnp.sort(logits, axis=-1, descending=True)
    before = jnp.cumsum(jax.nn.softmax(ordered, axis=-1), axis=-1) - jax.nn.softmax(ordered, axis=-1)
    least = jnp.min(jnp.where(before < p, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits < least, attention.MASKED, logits)


def sample(
    logits: Float[Array, "*rows vocab"],
    keys: Array,
    banned: Bool[Array, " vocab"],
    *,
    temperature: float,
    top_k: int,
    top_p: float,
) -> tuple[Int[Array, "*rows"], Float[Array, "*rows"]]:
    """One token per row and its log-probability under the raw logits (temperature 1, whole vocabulary).

    `temperature` 0 takes the largest logit that is not banned; `top_k` 0 and `top_p` 1 are off. `keys`: one PRNG key
    per row, so that a row's token does not depend on its neighbours.
    """
    allowed = jnp.where(banned, attention.MASKED, logits)
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

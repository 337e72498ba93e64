"""Logits -> tokens: penalty, bans, temperature, top-k, top-p. Pure functions of arrays; each row has its own key."""

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

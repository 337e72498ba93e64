"""Rotary positions: 2-D (row, column) for the vision tower, 3-D (time, row, column) for the decoder."""

import jax.numpy as jnp
from jaxtyping import Float, Int

from openo3_jax.types import Array


def inverse_frequencies(dim: int, theta: float) -> Float[Array, " half"]:
    """`theta^(-2i/dim)` for i < dim/2, float32."""
    return 1.0 / (theta ** (jnp.arange(0, dim, 2, dtype=jnp.float32) / dim))


def vision_angles(patch_hw: Int[Array, "*batch patches 2"], head_dim: int) -> Float[Array, "*batch patches half"]:
    """A quarter of the head turns with the patch's row, a quarter with its column, in float32.

    Source: HF `Qwen2_5_VisionRotaryEmbedding`, theta 10,000.
    """
    angles = patch_hw[..., None].astype(jnp.float32) * inverse_frequencies(head_dim // 2, 10_000.0)
    return angles.reshape(*patch_hw.shape[:-1], head_dim // 2)


def text_angles(
    positions: Int[Array, "rows 3 seq"], *, theta: float, section: tuple[int, int, int]
) -> Float[Array, "rows seq half"]:
    """M-RoPE: rotary pair i turns with time, row or column according to the section it lies in, in float32.

    Source: HF `apply_multimodal_rotary_pos_emb` (sections in blocks, not interleaved).
    """
    half = sum(section)
    axis = jnp.repeat(jnp.arange(3), jnp.array(section), total_repeat_length=half)
    per_pair = jnp.take(positions, axis, axis=1).astype(jnp.float32)  # [rows, half, seq]
    return per_pair.swapaxes(1, 2) * inverse_frequencies(2 * half, theta)


def rotate(
    x: Float[Array, "*batch seq heads head_dim"],
    angles: Float[Array, "*batch seq half"],
    *,
    wide: bool = False,
) -> Float[Array, "*batch seq heads head_dim"]:
    """Turn the pairs (x[i], x[i + half]) of each head by `angles`.

    `wide` computes the product in float32, as the vision tower does; else cos and sin take the dtype of x.
    """
    dtype = x.dtype
    cos, sin = jnp.cos(angles)[..., None, :], jnp.sin(angles)[..., None, :]
    if wide:
        x = x.astype(jnp.float32)
    cos, sin = cos.astype(x.dtype), sin.astype(x.dtype)
    low, high = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1).astype(dtype)

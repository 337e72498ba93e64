"""The vision tower: patches -> merged visual tokens. Attention within windows, in a few layers within whole frames.

MLPs and projections see the patches of a row as one dense buffer; only inside attention are they laid out as a batch
of windows or a batch of frames, so no `[patches, patches]` array per row exists.
Source: transformers `modeling_qwen2_5_vl.py` (Qwen2_5_VisionTransformerPretrainedModel).
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Bool, Float, Int

from openo3_jax import mesh as mesh_lib
from openo3_jax.config import VisionConfig
from openo3_jax.models import attention, layers, rope
from openo3_jax.types import Array, VisionBatch

NORM_EPS = 1e-6
SCORES_AT_ONCE = 2**24  # attention scores that exist at a time: 64 MiB in float32


@jax.custom_vjp
def rearrange(
    x: Float[Array, "rows source dim"],
    index: Int[Array, "rows target"],
    inverse: Int[Array, "rows source"],
) -> Float[Array, "rows target dim"]:
    """`out[r, i] = x[r, index[r, i]]`, zero where the index is -1; `inverse` says where each source went.

    The gradient is a gather by `inverse`, never a scatter.
    """
    filled = jnp.where(index < 0, x.shape[1], index)  # out of range reads zero
    return jax.vmap(lambda values, at: values.at[at].get(mode="fill", fill_value=0))(x, filled)


def _rearrange_fwd(x, index, inverse):
    return rearrange(x, index, inverse), (index, inverse)


def _rearrange_bwd(saved, grad):
    index, inverse = saved
    return rearrange(grad, inverse, index), None, None


rearrange.defvjp(_rearrange_fwd, _rearrange_bwd)


class VisionAttention(nnx.Module):
    """Multi-head attention of patches within groups: the windows or the frames of a row."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs):
        self.qkv = layers.linear(config.hidden_size, 3 * config.hidden_size, ("embed", "heads"), bias=True, rngs=rngs)
        self.proj = layers.linear(config.hidden_size, config.hidden_size, ("heads", "embed"), bias=True, rngs=rngs)
        self.num_heads = config.num_heads

    def __call__(
        self,
        x: Float[Array, "rows patches dim"],
        angles: Float[Array, "rows patches half"],
        vision: VisionBatch,
        is_full: Array,
    ) -> Float[Array, "rows patches dim"]:
        rows, patches, dim = x.shape
        qkv = self.qkv(x).reshape(rows, patches, 3, self.num_heads, -1)
        q, k = (rope.rotate(qkv[:, :, i], angles, wide=True) for i in (0, 1))
        qkv = jnp.stack([q, k, qkv[:, :, 2]], axis=2).reshape(rows, patches, 3 * dim)
        out = jax.lax.cond(
            is_full,
            lambda qkv: self._within(qkv, vision.frame_patches, vision.frame_slots),
            lambda qkv: self._within(qkv, (vision.window_patches,), vision.window_slots),
            qkv,
        )
        return self.proj(out)

    def _within(self, qkv, groups: tuple[Int[Array, "rows _groups _size"], ...], slots: Int[Array, "rows patches"]):
        """Attention inside each group; all groups of one array have one size."""
        index = jnp.concatenate([group.reshape(group.shape[0], -1) for group in groups], axis=1)
        moved = rearrange(qkv, index, slots)
        ends = np.cumsum([group.shape[1] * group.shape[2] for group in groups])[:-1]
        parts = [
            self._attend(part.reshape(*group.shape, 3, self.num_heads, -1), group >= 0)
            for part, group in zip(jnp.split(moved, ends, axis=1), groups, strict=True)
        ]
        return rearrange(jnp.concatenate(parts, axis=1), slots, index)

    def _attend(
        self, qkv: Float[Array, "rows groups size 3 heads head_dim"], is_patch: Bool[Array, "rows groups size"]
    ) -> Float[Array, "rows slots dim"]:
        """A few groups at a time, their scores computed again in the backward pass, so that few exist at once."""
        rows, num_groups, size = is_patch.shape

        @jax.checkpoint
        def attend(part: tuple[Array, Array]) -> Array:
            qkv, is_patch = part  # of one group: [rows, size, 3, heads, head_dim], [rows, size]
            q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
            return attention.attention(q, k, v, attention.Slots(is_patch.astype(jnp.int32)), causal=False)

        at_once = max(1, SCORES_AT_ONCE // (rows * self.num_heads * size**2))
        by_group = jnp.moveaxis(qkv, 1, 0), jnp.moveaxis(is_patch, 1, 0)
        out = jax.lax.map(attend, by_group, batch_size=min(at_once, num_groups))
        return jnp.moveaxis(out, 0, 1).reshape(rows, num_groups * size, -1)


class VisionBlock(nnx.Module):
    """`x + attn(norm1(x))`, then `x + mlp(norm2(x))`."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs):
        self.norm1 = layers.RMSNorm(config.hidden_size, eps=NORM_EPS)
        self.attn = VisionAttention(config, rngs=rngs)
        self.norm2 = layers.RMSNorm(config.hidden_size, eps=NORM_EPS)
        self.mlp = layers.SwiGLU(config.hidden_size, config.intermediate_size, bias=True, rngs=rngs)

    def __call__(self, x, angles, vision: VisionBatch, is_full):
        x = x + self.attn(self.norm1(x), angles, vision, is_full)
        return x + self.mlp(self.norm2(x))


class PatchMerger(nnx.Module):
    """Norm, then the 2x2 patches of a merge unit side by side through a two-layer MLP into the decoder's size."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs):
        width = config.hidden_size * config.merge_unit
        self.ln_q = layers.RMSNorm(config.hidden_size, eps=NORM_EPS)
        self.fc1 = layers.linear(width, width, ("embed", "ffn"), bias=True, rngs=rngs)
        self.fc2 = layers.linear(width, config.out_hidden_size, ("ffn", "embed"), bias=True, rngs=rngs)
        self.merge_unit = config.merge_unit

    def __call__(self, x: Float[Array, "rows patches dim"]) -> Float[Array, "rows visual out_dim"]:
        rows, patches, dim = x.shape
        units = self.ln_q(x).reshape(rows, patches // self.merge_unit, self.merge_unit * dim)
        return self.fc2(nnx.gelu(self.fc1(units), approximate=False))


class VisionTower(nnx.Module):
    """Patches of each row -> its merged visual tokens, in the order of the text slots they fill."""

    def __init__(self, config: VisionConfig, *, mesh: Mesh, rngs: nnx.Rngs):
        self.patch_embed = layers.linear(config.patch_dim, config.hidden_size, ("patch_dim", "embed"), rngs=rngs)
        self.blocks = layers.stack(lambda rngs: VisionBlock(config, rngs=rngs), config.depth, rngs=rngs)
        self.merger = PatchMerger(config, rngs=rngs)
        self.config = config
        self.mesh = mesh

    @jax.named_scope("vision")
    def __call__(self, vision: VisionBatch, *, remat: bool = False) -> Float[Array, "rows visual dim"]:
        """`remat`: keep only the residual stream between layers for the backward pass."""
        patch_embed = layers.gathered(self.patch_embed, self.mesh)
        x = patch_embed(vision.patches.astype(patch_embed.kernel.dtype))
        x = mesh_lib.constrain(x, self.mesh, "rows")
        angles = rope.vision_angles(vision.patch_hw, self.config.head_dim)
        is_full = np.isin(np.arange(self.config.depth), self.config.fullatt_block_indexes)

        def call(block: VisionBlock, x, is_full):
            return mesh_lib.constrain(block(x, angles, vision, is_full), self.mesh, "rows"), None

        x, _ = layers.scan(self.blocks, x, call, jnp.asarray(is_full), mesh=self.mesh, remat=remat)
        return layers.gathered(self.merger, self.mesh)(x)

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
from jaxtyping import Bool, Float, Int, UInt8

from openo3_jax import mesh as mesh_lib
from openo3_jax.config import Remat, VisionConfig
from openo3_jax.models import attention, layers, moves, rope
from openo3_jax.types import Array, VisionBatch

NORM_EPS = 1e-6
HEADS = (None, None, "heads")  # logical axes of a weight [dim, q k v, heads, head_dim]
SCORES_AT_ONCE = 2**24  # attention scores that exist at a time: 64 MiB in float32


def normalise(patches: UInt8[Array, "*batch patch_dim"], config: VisionConfig) -> Float[Array, "*batch patch_dim"]:
    """`(patches / 255 - mean) / std` of each channel in float32; the values of a patch run over the channel first.

    Source: transformers 5.23 image_transforms.py (`rescale`, `normalize`).
    """
    values = config.patch_dim // config.in_channels
    mean, std = (jnp.repeat(jnp.float32(of), values) for of in (config.image_mean, config.image_std))
    return (patches.astype(jnp.float32) * jnp.float32(1 / 255) - mean) / std


class VisionAttention(nnx.Module):
    """Multi-head attention of patches within groups: the windows or the frames of a row."""

    def __init__(self, config: VisionConfig, *, mesh: Mesh, rngs: nnx.Rngs):
        self.qkv = layers.linear(config.hidden_size, 3 * config.hidden_size, ("embed", "heads"), bias=True, rngs=rngs)
        self.proj = layers.linear(config.hidden_size, config.hidden_size, ("heads", "embed"), bias=True, rngs=rngs)
        self.num_heads = config.num_heads
        self.mesh = mesh

    def __call__(
        self,
        x: Float[Array, "rows patches dim"],
        angles: Float[Array, "rows patches half"],
        vision: VisionBatch,
        is_full: Array,
    ) -> Float[Array, "rows patches dim"]:
        q, k, v = jnp.moveaxis(self._project(x), 2, 0)
        q, k = (rope.rotate(part, angles, wide=True) for part in (q, k))
        qkv = jnp.stack([q, k, v], axis=2)
        out = jax.lax.cond(
            is_full,
            lambda qkv: self._within(qkv, vision.frame_patches, vision.frame_slots),
            lambda qkv: self._within(qkv, (vision.window_patches,), vision.window_slots),
            qkv,
        )
        return self.proj(out.reshape(x.shape))

    def _project(self, x: Float[Array, "rows patches dim"]) -> Float[Array, "rows patches 3 heads head_dim"]:
        """Queries, keys and values. Where `tensor` splits the heads, the weights are moved to them, not the patches."""
        dim = x.shape[-1]
        kernel = mesh_lib.constrain(self.qkv.kernel[...].reshape(dim, 3, self.num_heads, -1), self.mesh, *HEADS)
        bias = mesh_lib.constrain(self.qkv.bias[...].reshape(3, self.num_heads, -1), self.mesh, *HEADS[1:])
        out = jnp.einsum("rpd,dchk->rpchk", x, kernel) + bias
        return out if self.qkv.lora_a is None else out + self.qkv.adapted(x).reshape(out.shape)

    def _within(self, qkv, groups: tuple[Int[Array, "rows _groups _size"], ...], slots: Int[Array, "rows patches"]):
        """Attention inside each group; all groups of one array have one size."""
        groups, slots = moves.even_groups(groups, slots, self.mesh)
        parts = moves.spread(qkv, groups, slots, self.mesh, (None, "heads"))
        split, places, out = (
            mesh_lib.partition_spec(("rows", "groups", *rest)) for rest in ((None, None, "heads"), (), (None, "heads"))
        )
        attend = jax.shard_map(self._attend, mesh=self.mesh, in_specs=(split, places), out_specs=out, check_vma=False)
        outs = tuple(attend(part, group >= 0) for part, group in zip(parts, groups, strict=True))
        return moves.collect(outs, groups, slots, self.mesh, ("heads",))

    def _attend(
        self, qkv: Float[Array, "rows groups size 3 heads head_dim"], is_patch: Bool[Array, "rows groups size"]
    ) -> Float[Array, "rows groups size heads head_dim"]:
        """Attention on one device; without a kernel a few groups at a time, their scores computed again in the backward
        pass, so that few exist at once.
        """
        rows, num_groups, size = is_patch.shape
        platform = self.mesh.devices.flat[0].platform

        def attend(part: tuple[Array, Array]) -> Array:
            qkv, is_patch = part  # [batch, size, 3, heads, head_dim], [batch, size]
            q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
            slots = attention.Slots(is_patch.astype(jnp.int32))
            return attention.local(q, k, v, slots, slots, causal=False, platform=platform)

        flat = qkv.reshape(-1, *qkv.shape[2:]), is_patch.reshape(-1, size)
        if attention.choose(flat[0][:, :, 0], flat[0][:, :, 1], causal=False, platform=platform) == "cudnn":
            return attend(flat).reshape(rows, num_groups, size, *qkv.shape[-2:])
        at_once = max(1, SCORES_AT_ONCE // (rows * qkv.shape[-2] * size**2))
        by_group = jnp.moveaxis(qkv, 1, 0), jnp.moveaxis(is_patch, 1, 0)
        out = jax.lax.map(jax.checkpoint(attend), by_group, batch_size=min(at_once, num_groups))
        return jnp.moveaxis(out, 0, 1)


class VisionBlock(nnx.Module):
    """`x + attn(norm1(x))`, then `x + mlp(norm2(x))`."""

    def __init__(self, config: VisionConfig, *, mesh: Mesh, rngs: nnx.Rngs):
        self.norm1 = layers.RMSNorm(config.hidden_size, eps=NORM_EPS)
        self.attn = VisionAttention(config, mesh=mesh, rngs=rngs)
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
        self.blocks = layers.stack(lambda rngs: VisionBlock(config, mesh=mesh, rngs=rngs), config.depth, rngs=rngs)
        self.merger = PatchMerger(config, rngs=rngs)
        self.config = config
        self.mesh = mesh

    @jax.named_scope("vision")
    def __call__(self, vision: VisionBatch, *, remat: bool | Remat = False) -> Float[Array, "rows visual dim"]:
        """`remat`: what is kept between layers for the backward pass, see `config.Remat`."""
        patch_embed = layers.gathered(self.patch_embed, self.mesh)
        x = patch_embed(normalise(vision.patches, self.config).astype(patch_embed.kernel.dtype))
        x = mesh_lib.constrain(x, self.mesh, "rows", "patches")
        angles = rope.vision_angles(vision.patch_hw, self.config.head_dim)
        is_full = np.isin(np.arange(self.config.depth), self.config.fullatt_block_indexes)

        def call(block: VisionBlock, x, is_full):
            return mesh_lib.constrain(block(x, angles, vision, is_full), self.mesh, "rows", "patches"), None

        x, _ = layers.scan(
            self.blocks,
            x,
            call,
            jnp.asarray(is_full),
            mesh=self.mesh,
            remat=remat,
            keep_attention=False,  # room for the results of whole frames would be kept in all blocks; few have any
        )
        return layers.gathered(self.merger, self.mesh)(x)

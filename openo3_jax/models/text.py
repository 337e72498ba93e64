"""The decoder: embedded tokens -> hidden states. Grouped-query attention with M-RoPE, SwiGLU, pre-norm.

Source: transformers `modeling_qwen2_5_vl.py` (Qwen2_5_VLTextModel).
"""

from typing import NamedTuple

import jax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Float, Int

from openo3_jax import mesh as mesh_lib
from openo3_jax.config import Remat, TextConfig
from openo3_jax.models import attention, layers, rope
from openo3_jax.types import Array


class KeyValue(NamedTuple):
    """Rotated keys and values of one layer (or of all, with a leading `layers` dimension)."""

    k: Float[Array, "*layers rows seq kv_heads head_dim"]
    v: Float[Array, "*layers rows seq kv_heads head_dim"]


def angles(config: TextConfig, positions: Int[Array, "rows 3 seq"]) -> Float[Array, "rows seq half"]:
    """Rotary angles of these positions for the decoder's heads."""
    return rope.text_angles(positions, theta=config.rope_theta, section=config.mrope_section)


class TextAttention(nnx.Module):
    """Projections of grouped-query attention; who attends to what is the caller's."""

    def __init__(self, config: TextConfig, *, rngs: nnx.Rngs):
        dim, head_dim = config.hidden_size, config.head_dim
        kv_width = config.num_key_value_heads * head_dim
        self.q_proj = layers.linear(
            dim, config.num_attention_heads * head_dim, ("embed", "heads"), bias=True, rngs=rngs
        )
        self.k_proj = layers.linear(dim, kv_width, ("embed", "kv_heads"), bias=True, rngs=rngs)
        self.v_proj = layers.linear(dim, kv_width, ("embed", "kv_heads"), bias=True, rngs=rngs)
        self.o_proj = layers.linear(config.num_attention_heads * head_dim, dim, ("heads", "embed"), rngs=rngs)
        self.head_dim = head_dim

    def project(
        self, x: Float[Array, "rows seq dim"], angles: Float[Array, "rows seq half"]
    ) -> tuple[Float[Array, "rows seq heads head_dim"], KeyValue]:
        """Rotated queries, and the keys and values to attend to or to keep."""
        heads = (*x.shape[:2], -1, self.head_dim)
        q = rope.rotate(self.q_proj(x).reshape(heads), angles)
        k = rope.rotate(self.k_proj(x).reshape(heads), angles)
        return q, KeyValue(k, self.v_proj(x).reshape(heads))

    def output(self, mixed: Float[Array, "rows seq heads head_dim"]) -> Float[Array, "rows seq dim"]:
        return self.o_proj(mixed.reshape(*mixed.shape[:2], -1))


class DecoderLayer(nnx.Module):
    """One pre-norm layer; `finish` is shared by training, prefill and decoding, which differ in attention only."""

    def __init__(self, config: TextConfig, *, rngs: nnx.Rngs):
        self.input_layernorm = layers.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = TextAttention(config, rngs=rngs)
        self.post_attention_layernorm = layers.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = layers.SwiGLU(config.hidden_size, config.intermediate_size, bias=False, rngs=rngs)

    def project(self, x, angles):
        return self.self_attn.project(self.input_layernorm(x), angles)

    def finish(self, x, mixed):
        x = x + self.self_attn.output(mixed)
        return x + self.mlp(self.post_attention_layernorm(x))


class TextDecoder(nnx.Module):
    """Token embedding, stacked layers and the last norm."""

    def __init__(self, config: TextConfig, *, mesh: Mesh, rngs: nnx.Rngs):
        self.embed_tokens = layers.Embedding(config.vocab_size, config.hidden_size, rngs=rngs)
        self.layers = layers.stack(lambda rngs: DecoderLayer(config, rngs=rngs), config.num_hidden_layers, rngs=rngs)
        self.norm = layers.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.config = config
        self.mesh = mesh

    @jax.named_scope("text")
    def __call__(
        self,
        x: Float[Array, "rows seq dim"],
        positions: Int[Array, "rows 3 seq"],
        slots: attention.Slots,
        *,
        remat: bool | Remat = False,
        keep_cache: bool = False,
        backend: attention.Backend = "auto",
        group: attention.Group | None = None,
    ) -> tuple[Float[Array, "rows seq dim"], KeyValue | None]:
        """Hidden states after the last norm, and every layer's keys and values if `keep_cache`.

        `remat`: what is kept between layers for the backward pass, see `config.Remat`. `backend`, `group`: see
        `attention.attention`.
        """
        rotary = angles(self.config, positions)

        def call(layer: DecoderLayer, x, _):
            q, kv = layer.project(x, rotary)
            mixed = attention.attention(q, kv.k, kv.v, slots, causal=True, backend=backend, mesh=self.mesh, group=group)
            return pin(layer.finish(x, mixed)), kv if keep_cache else None

        def pin(x):
            return mesh_lib.constrain(x, self.mesh, "rows", "seq")

        x, cache = layers.scan(self.layers, pin(x), call, mesh=self.mesh, remat=remat)
        return self.norm(x), cache

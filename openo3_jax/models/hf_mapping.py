"""One table: HF key <-> path of our weight, the layout between them, and its inverse.

Keys are in the hub's spelling (`visual.*`, `model.layers.*`, `lm_head.*`); `hub_key` turns the in-memory spelling of
transformers 5.x (`model.visual.*`, `model.language_model.*`) into it.
"""

import enum
from typing import NamedTuple

import numpy as np

from openo3_jax.config import ModelConfig

LAYER = "{i}"  # stands for the layer's number in a key


class Layout(enum.Enum):
    """How HF's tensor and ours relate."""

    SAME = "same"
    TRANSPOSED = "transposed"  # HF `[out, in]`, ours `[in, out]`
    PATCHES = "patches"  # HF `[out, channels, frames, height, width]`, ours `[channels * frames * height * width, out]`


class Entry(NamedTuple):
    key: str
    path: tuple[str, ...]
    layout: Layout

    @property
    def is_stacked(self) -> bool:
        return LAYER in self.key


def _linear(key: str, path: str, *, bias: bool) -> list[tuple[str, str, Layout]]:
    weight = (f"{key}.weight", f"{path}/kernel", Layout.TRANSPOSED)
    return [weight, (f"{key}.bias", f"{path}/bias", Layout.SAME)] if bias else [weight]


_VISION_BLOCK = [
    ("norm1.weight", "norm1/weight", Layout.SAME),
    ("norm2.weight", "norm2/weight", Layout.SAME),
    *_linear("attn.qkv", "attn/qkv", bias=True),
    *_linear("attn.proj", "attn/proj", bias=True),
    *_linear("mlp.gate_proj", "mlp/gate_proj", bias=True),
    *_linear("mlp.up_proj", "mlp/up_proj", bias=True),
    *_linear("mlp.down_proj", "mlp/down_proj", bias=True),
]
_DECODER_LAYER = [
    ("input_layernorm.weight", "input_layernorm/weight", Layout.SAME),
    ("post_attention_layernorm.weight", "post_attention_layernorm/weight", Layout.SAME),
    *_linear("self_attn.q_proj", "self_attn/q_proj", bias=True),
    *_linear("self_attn.k_proj", "self_attn/k_proj", bias=True),
    *_linear("self_attn.v_proj", "self_attn/v_proj", bias=True),
    *_linear("self_attn.o_proj", "self_attn/o_proj", bias=False),
    *_linear("mlp.gate_proj", "mlp/gate_proj", bias=False),
    *_linear("mlp.up_proj", "mlp/up_proj", bias=False),
    *_linear("mlp.down_proj", "mlp/down_proj", bias=False),
]
_TABLE = [
    ("visual.patch_embed.proj.weight", "visual/patch_embed/kernel", Layout.PATCHES),
    *((f"visual.blocks.{LAYER}.{key}", f"visual/blocks/{path}", layout) for key, path, layout in _VISION_BLOCK),
    ("visual.merger.ln_q.weight", "visual/merger/ln_q/weight", Layout.SAME),
    *_linear("visual.merger.mlp.0", "visual/merger/fc1", bias=True),
    *_linear("visual.merger.mlp.2", "visual/merger/fc2", bias=True),
    ("model.embed_tokens.weight", "text/embed_tokens/weight", Layout.SAME),
    *((f"model.layers.{LAYER}.{key}", f"text/layers/{path}", layout) for key, path, layout in _DECODER_LAYER),
    ("model.norm.weight", "text/norm/weight", Layout.SAME),
    ("lm_head.weight", "lm_head/weight", Layout.SAME),
]
HEAD_KEY = "lm_head.weight"
EMBEDDING_KEY = "model.embed_tokens.weight"


def table(config: ModelConfig) -> list[Entry]:
    """Every weight of this model, each once; a tied head has no row."""
    entries = [Entry(key, tuple(path.split("/")), layout) for key, path, layout in _TABLE]
    return [entry for entry in entries if not (entry.key == HEAD_KEY and config.text.tie_word_embeddings)]


def keys(entry: Entry, config: ModelConfig) -> list[str]:
    """The HF keys of one row: one per layer where it is stacked."""
    if not entry.is_stacked:
        return [entry.key]
    depth = config.vision.depth if entry.path[0] == "visual" else config.text.num_hidden_layers
    return [entry.key.replace(LAYER, str(i)) for i in range(depth)]


def hub_key(key: str) -> str:
    """Either spelling -> the hub's. Example: `model.language_model.norm.weight` -> `model.norm.weight`."""
    for memory, hub in (("model.visual.", "visual."), ("model.language_model.", "model.")):
        if key.startswith(memory):
            return hub + key.removeprefix(memory)
    return key


def memory_key(key: str) -> str:
    """The hub's spelling -> that of transformers 5.x, the inverse of `hub_key`; the head is the same in both."""
    if key.startswith("visual."):
        return f"model.{key}"
    return key.replace("model.", "model.language_model.", 1) if key.startswith("model.") else key


def hf_shape(entry: Entry, shape: tuple[int, ...], config: ModelConfig) -> tuple[int, ...]:
    """Shape of HF's tensor for one layer of ours."""
    if entry.layout is Layout.SAME:
        return shape
    if entry.layout is Layout.TRANSPOSED:
        return shape[::-1]
    vision = config.vision
    return (shape[1], vision.in_channels, vision.temporal_patch_size, vision.patch_size, vision.patch_size)


def hf_index(entry: Entry, index: tuple[slice, ...]) -> tuple[slice, ...]:
    """Which part of HF's tensor holds this part of ours (one layer); a patch embedding is split by output only."""
    if entry.layout is Layout.SAME:
        return index
    assert entry.layout is Layout.TRANSPOSED or index[0] == slice(None) or index[0].start in (None, 0)
    return index[::-1] if entry.layout is Layout.TRANSPOSED else (index[1], *[slice(None)] * 4)


def from_hf(entry: Entry, x: np.ndarray) -> np.ndarray:
    """HF's tensor -> ours (one layer), as a view."""
    return x if entry.layout is Layout.SAME else x.reshape(x.shape[0], -1).T


def to_hf(entry: Entry, x: np.ndarray) -> np.ndarray:
    """Ours (one layer) -> HF's tensor with the patch's dimensions as one, as a view: the inverse of `from_hf`."""
    return x if entry.layout is Layout.SAME else x.T

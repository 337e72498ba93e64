"""Random models of a given size with prompts of frames and text, for benchmarks of both sides."""

import dataclasses
import json
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from openo3_jax import mesh as mesh_lib
from openo3_jax.config import ModelConfig
from openo3_jax.data import tiny_tokenizer, tokens
from openo3_jax.models import hf_mapping, qwen2_5_vl
from openo3_jax.policy import Policy
from openo3_jax.types import Picture, Sample


class Size(NamedTuple):
    hidden: int
    layers: int
    vision_hidden: int
    vision_layers: int
    frames: int
    frame_hw: tuple[int, int]  # px
    prompt: int  # tokens
    group: int
    new_tokens: int
    vocab: int | None = None  # None: that of the tokenizer


FULL = Size(1024, 8, 512, 4, 16, (224, 420), 2048, 8, 256, 16384)
QUICK = Size(128, 2, 64, 2, 4, (56, 84), 128, 4, 32)


def make_config(size: Size, ids: tiny_tokenizer.TokenIds) -> ModelConfig:
    heads = max(4, size.hidden // 128)
    half = size.hidden // heads // 2
    third = half * 3 // 8
    return ModelConfig.from_hf(
        {
            "model_type": "qwen2_5_vl",
            "vocab_size": size.vocab or ids.vocab_size,
            "hidden_size": size.hidden,
            "intermediate_size": 11 * size.hidden // 4,
            "num_hidden_layers": size.layers,
            "num_attention_heads": heads,
            "num_key_value_heads": max(2, heads // 4),
            "tie_word_embeddings": True,
            "rope_scaling": {"mrope_section": [half - 2 * third, third, third]},
            "vision_config": {
                "depth": size.vision_layers,
                "hidden_size": size.vision_hidden,
                "intermediate_size": 11 * size.vision_hidden // 4,
                "num_heads": max(2, size.vision_hidden // 64),
                "out_hidden_size": size.hidden,
                "fullatt_block_indexes": [size.vision_layers - 1],
            },
            "image_token_id": ids.image_token_id,
            "video_token_id": ids.video_token_id,
            "vision_start_token_id": ids.vision_start_token_id,
        }
    )


def make_policy(directory: pathlib.Path, size: Size) -> Policy:
    """Random weights; no token ends an answer, so that both sides write the same number of them."""
    ids = tiny_tokenizer.write_tokenizer(directory)
    return policy_of(directory, make_config(size, ids), ids)


def policy_of(directory: pathlib.Path, config: ModelConfig, ids: tiny_tokenizer.TokenIds) -> Policy:
    """Random float32 weights of this model on the first device, with the tokenizer in `directory`."""
    ends = {"eos_token_id": ids.eos_token_id, "bos_token_id": None}
    (directory / "config.json").write_text(json.dumps(config.to_hf() | ends))
    mesh = mesh_lib.make_mesh({}, devices=jax.devices()[:1])
    graphdef, params = qwen2_5_vl.init_params(config, mesh, 0)
    processor = dataclasses.replace(tokens.load_processor(directory), stop_ids=())
    keys = [key for entry in hf_mapping.table(config) for key in hf_mapping.keys(entry, config)]
    dtypes = dict.fromkeys(keys, jnp.dtype(jnp.float32))
    return Policy(graphdef, params, mesh, processor, directory, dtypes, video=None, video_mode="frames")


def make_prompt(processor: tokens.Processor, size: Size, seed: int = 0, answer: str = "") -> Sample:
    """Frames, then text up to the wanted number of tokens; with an answer, it is the assistant's."""
    draw = np.random.default_rng(seed)
    pictures = [Picture(draw.integers(0, 256, (1, *size.frame_hw, 3), dtype=np.uint8)) for _ in range(size.frames)]
    items: list[dict[str, Any]] = [{"type": "picture", "picture": picture} for picture in pictures]
    reply = [{"role": "assistant", "content": answer}] if answer else []
    words = ""
    while True:
        said = {"role": "user", "content": [*items, {"type": "text", "text": words + "?"}]}
        sample = processor.encode([said, *reply])
        if len(sample.tokens) >= size.prompt:
            return sample
        words += "why " * max(1, (size.prompt - len(sample.tokens)) // 8)

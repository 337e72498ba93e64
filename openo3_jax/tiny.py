"""A small random Qwen2.5-VL directory, made offline: tokenizer, template, processor and weights."""

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp

from openo3_jax import mesh as mesh_lib
from openo3_jax.config import ModelConfig, TextConfig, VisionConfig
from openo3_jax.data import tiny_tokenizer
from openo3_jax.model_files import new_directory
from openo3_jax.models import hf_mapping, hf_weights, qwen2_5_vl


def tiny_config(ids: tiny_tokenizer.TokenIds, *, hidden_size: int = 128, layers: int = 4) -> ModelConfig:
    """Both towers in miniature; every mechanism of the large models is there (windows, GQA, M-RoPE sections)."""
    return ModelConfig(
        text=TextConfig(
            vocab_size=ids.vocab_size,
            hidden_size=hidden_size,
            intermediate_size=2 * hidden_size,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=False,
            mrope_section=(hidden_size // 32, hidden_size // 32 * 3 // 2, hidden_size // 32 * 3 // 2),
            rope_theta=10_000.0,
        ),
        vision=VisionConfig(
            depth=2,
            hidden_size=64,
            intermediate_size=128,
            num_heads=2,
            out_hidden_size=hidden_size,
            fullatt_block_indexes=(1,),
        ),
        image_token_id=ids.image_token_id,
        video_token_id=ids.video_token_id,
        vision_start_token_id=ids.vision_start_token_id,
    )


def init_tiny(out: str | os.PathLike, *, seed: int = 0, hidden_size: int = 128, layers: int = 4) -> ModelConfig:
    """Write a directory of this size; the same seed gives the same bytes. Raises InputError if `out` is not empty."""
    return write_random(out, partial(tiny_config, hidden_size=hidden_size, layers=layers), seed=seed)


def write_random(
    out: str | os.PathLike, make_config: Callable[[tiny_tokenizer.TokenIds], ModelConfig], *, seed: int
) -> ModelConfig:
    """Write a Hugging Face directory with random weights and the built-in tokenizer, whose ids the sizes depend on."""
    with new_directory(Path(out)) as staging:
        ids = tiny_tokenizer.write_tokenizer(staging)
        config = make_config(ids)
        settings = config.to_hf() | {
            "bos_token_id": None,
            "eos_token_id": ids.eos_token_id,
            "pad_token_id": ids.pad_token_id,
            "torch_dtype": "float32",
        }
        (staging / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
        mesh = mesh_lib.make_mesh({}, devices=jax.devices()[:1])
        _, params = qwen2_5_vl.init_params(config, mesh, seed)
        keys = [key for entry in hf_mapping.table(config) for key in hf_mapping.keys(entry, config)]
        hf_weights.save(params, config, dict.fromkeys(keys, jnp.dtype(jnp.float32)), staging)
    return config

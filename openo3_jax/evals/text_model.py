"""A text-only Qwen2.5 directory as a `Policy`: its decoder under the name of a Qwen2.5-VL with a blank vision tower.

Rotary positions with three axes equal those with one where all three axes agree, as they do in text.
"""

import dataclasses
import functools
import json
import operator
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors.numpy
from jax.sharding import Mesh

from openo3_jax import mesh as mesh_lib
from openo3_jax.config import ModelConfig, VisionConfig
from openo3_jax.data import processor_files
from openo3_jax.errors import InputError
from openo3_jax.models import hf_mapping, hf_weights, qwen2_5_vl
from openo3_jax.policy import Dtype, Policy, load_pretrained

_TOWER_FILE = "blank-vision-tower.safetensors"
_IMAGES = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}  # nothing is ever shown


def load_judge(directory: Path, *, mesh: Mapping[str, int] | Mesh | None = None, dtype: Dtype = "bfloat16") -> Policy:
    """A Qwen2.5 or Qwen2.5-VL directory, ready to continue texts.

    Raises: InputError for another architecture, scaled rotary positions, a tokenizer without the visual tokens that
    Qwen2.5's have, and as `load_pretrained` does.
    """
    settings = processor_files.read_json(directory / "config.json")
    if settings.get("model_type") != "qwen2":
        return load_pretrained(directory, mesh=mesh, dtype=dtype)
    if settings.get("rope_scaling"):
        raise InputError(f"{directory}: config.json: rope_scaling is not supported for a text model; expected null")
    with tempfile.TemporaryDirectory() as staging:
        _write_vl_directory(directory.resolve(), Path(staging), settings)
        policy = load_pretrained(staging, mesh=mesh, dtype=dtype)
    return dataclasses.replace(policy, directory=directory)


def _write_vl_directory(source: Path, target: Path, settings: Mapping[str, Any]) -> None:
    """Links to every file of `source`, with a config.json, an index and a tower that make it a Qwen2.5-VL."""
    for file in sorted(source.iterdir()):
        if file.is_file() and file.name not in ("config.json", hf_weights.INDEX, "preprocessor_config.json"):
            os.symlink(file, target / file.name)
    config = _vl_config(source, settings)
    (target / "config.json").write_text(json.dumps(config.to_hf()))
    (target / "preprocessor_config.json").write_text(json.dumps(_IMAGES))
    tower = _blank_tower(config)
    safetensors.numpy.save_file(tower, target / _TOWER_FILE)
    files = {stored.file_key: stored.file.name for stored in hf_weights.read_index(source)}
    index = {"metadata": {}, "weight_map": files | dict.fromkeys(tower, _TOWER_FILE)}
    (target / hf_weights.INDEX).write_text(json.dumps(index))


def _vl_config(source: Path, settings: Mapping[str, Any]) -> ModelConfig:
    tokenizer = processor_files.load_tokenizer(source)
    names = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"}
    names["vision_start_token_id"] = "<|vision_start|>"
    ids = {field: tokenizer.get_vocab().get(token) for field, token in names.items()}
    if None in ids.values():
        raise InputError(f"{source}: the tokenizer lacks {', '.join(names.values())}; expected that of Qwen2.5")
    try:
        hidden, half = settings["hidden_size"], settings["hidden_size"] // settings["num_attention_heads"] // 2
    except (KeyError, TypeError, ZeroDivisionError):
        raise InputError(f"{source}: config.json lacks hidden_size or num_attention_heads") from None
    section = [half - 2 * (half * 3 // 8), half * 3 // 8, half * 3 // 8]
    vision = VisionConfig(
        depth=1,
        hidden_size=128,
        intermediate_size=128,
        num_heads=2,
        out_hidden_size=hidden,
        fullatt_block_indexes=(0,),
    )
    rope = {"rope_scaling": {"type": "mrope", "mrope_section": section}}
    vl = {**settings, **rope, **ids, "model_type": "qwen2_5_vl", "vision_config": dataclasses.asdict(vision)}
    return ModelConfig.from_hf(vl, where=str(source / "config.json"))


def _blank_tower(config: ModelConfig) -> dict[str, np.ndarray]:
    """Zeros for every weight of the vision tower, under HF's keys."""
    one = mesh_lib.make_mesh({}, devices=jax.devices()[:1])
    _, abstract = qwen2_5_vl.abstract_params(config, one)
    tower = {}
    for entry in hf_mapping.table(config):
        if entry.path[0] == "visual":
            shape = functools.reduce(operator.getitem, entry.path, abstract).get_raw_value().shape
            shape = hf_mapping.hf_shape(entry, shape[1:] if entry.is_stacked else shape, config)
            tower |= {key: np.zeros(shape, np.float32) for key in hf_mapping.keys(entry, config)}
    return tower

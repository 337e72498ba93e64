"""Adapters <-> a directory as `peft` has it: adapter_config.json and adapter_model.safetensors.

Keys name the modules of transformers 5.x, such as
`base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight`.
"""

import json
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx

from openo3_jax import mesh as mesh_lib
from openo3_jax.config import ModelConfig
from openo3_jax.errors import InputError
from openo3_jax.models import hf_mapping, lora

SETTINGS = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."

# What may be asked for besides the rank and alpha; anything else would change the result.
PLAIN = {"use_dora": False, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}, "bias": "none"}


def is_adapter(directory: Path) -> bool:
    """Whether this is an adapter and no whole model."""
    return (directory / SETTINGS).is_file() and not (directory / "config.json").is_file()


def base_of(directory: Path) -> Path:
    """The directory of the model that the adapter belongs to. Raises InputError where it is not on this machine."""
    name = _settings(directory).get("base_model_name_or_path")
    if not isinstance(name, str) or not (Path(name) / "config.json").is_file():
        raise InputError(
            f"{directory / SETTINGS}: base_model_name_or_path is {name!r}; expected the directory of the model that "
            "the adapter was trained on: write it there"
        )
    return Path(name)


def save(params: nnx.State, config: ModelConfig, base: Path, out: Path) -> None:
    """Write the adapters of a model, float32, into the directory `out`; `base`: the model's own directory."""
    tensors, names, rank, alpha = {}, set(), 0, 0.0
    for entry, a, b in _adapted(params, config):
        rank, alpha = a.shape[-1], b.scale * a.shape[-1]
        names.add(re.escape(_module(entry.key)).replace(re.escape(hf_mapping.LAYER), r"\d+"))
        for i, key in enumerate(hf_mapping.keys(entry, config)):
            for half, variable in (("lora_A", a), ("lora_B", b)):
                matrix = np.asarray(variable[...][i] if entry.is_stacked else variable[...], np.float32)
                tensors[f"{PREFIX}{_module(key)}.{half}.weight"] = np.ascontiguousarray(matrix.T)
    settings = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": str(base.absolute()),
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "target_modules": "|".join(sorted(names)),  # a regular expression of the whole name
        "modules_to_save": None,
        **PLAIN,
    }
    (out / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n")
    safetensors.numpy.save_file(tensors, out / WEIGHTS, metadata={"format": "pt"})


def merge(params: nnx.State, config: ModelConfig, directory: Path) -> nnx.State:
    """The weights of the base with the directory's adapters added, where they are and in their dtype.

    Raises: InputError for a kind of adapter that is not built here, and for tensors that do not fit, all of them.
    """
    settings = _settings(directory)
    _check_settings(settings, directory)
    tensors = _read(directory)
    rank, scale = settings["r"], settings["lora_alpha"] / settings["r"]
    flat = dict(nnx.to_flat_state(params))
    problems = []
    for entry in hf_mapping.table(config):
        modules = [_module(key) for key in hf_mapping.keys(entry, config)]
        if entry.path[-1] != "kernel" or not any(f"{module}.lora_A.weight" in tensors for module in modules):
            continue
        kernel = flat[entry.path]
        rows, columns = kernel.shape[-2:]
        halves = [
            _stack(tensors, [f"{module}.{half}.weight" for module in modules], shape, problems)
            for half, shape in (("lora_A", (rank, rows)), ("lora_B", (columns, rank)))
        ]
        if not problems:
            a, b = halves if entry.is_stacked else (half[0] for half in halves)
            flat[entry.path] = kernel.replace(_add(kernel, a, b, scale))
    problems += [f"unknown {key}" for key in tensors]
    if problems:
        shown = "; ".join(problems[:8])
        raise InputError(
            f"{directory / WEIGHTS}: {len(problems)} tensors do not fit: {shown}; expected adapters of linear layers "
            "of the model in base_model_name_or_path"
        )
    return nnx.from_flat_state(flat)


def _add(kernel: nnx.Variable, a: np.ndarray, b: np.ndarray, scale: float) -> jax.Array:
    value = kernel.get_raw_value()
    logical = kernel.get_metadata()["out_sharding"]
    mesh = value.sharding.mesh
    a, b = (
        jax.device_put(x, mesh_lib.sharding(mesh, *axes))
        for x, axes in ((a, (*logical[:-1], None)), (b, (*logical[:-2], None, logical[-1])))
    )
    return jax.jit(partial(lora.merge_kernel, scale=scale), out_shardings=value.sharding)(value, a, b)


def _stack(tensors: dict[str, np.ndarray], keys: list[str], shape: tuple[int, int], problems: list[str]) -> np.ndarray:
    """Ours of all layers, transposed; zeros for layers without an adapter. What is used is taken from `tensors`."""
    found = [tensors.pop(key, np.zeros(shape, np.float32)) for key in keys]
    wrong = [(key, one.shape) for key, one in zip(keys, found, strict=True) if one.shape != shape]
    problems += [f"misshapen {key} {list(is_now)}, expected {list(shape)}" for key, is_now in wrong]
    return np.zeros(1) if wrong else np.stack([one.astype(np.float32).T for one in found])


def _adapted(params: nnx.State, config: ModelConfig) -> Iterator[tuple[hf_mapping.Entry, nnx.Variable, nnx.Variable]]:
    """Rows of the weight table whose weight has an adapter, with its halves."""
    for entry in hf_mapping.table(config):
        halves = lora.halves(params, entry.path)
        if halves is not None:
            yield entry, *halves


def _module(key: str) -> str:
    """Example: `visual.blocks.3.attn.qkv.weight` -> `model.visual.blocks.3.attn.qkv`."""
    return hf_mapping.memory_key(key).removesuffix(".weight")


def _settings(directory: Path) -> dict[str, Any]:
    try:
        return json.loads((directory / SETTINGS).read_text())
    except ValueError as error:
        raise InputError(f"{directory / SETTINGS}: no JSON ({error})") from None


def _check_settings(settings: dict[str, Any], directory: Path) -> None:
    wanted = {"peft_type": "LORA", "modules_to_save": None, **PLAIN}
    for name, value in wanted.items():
        if settings.get(name, value) not in (value, value or None):
            raise InputError(f"{directory / SETTINGS}: {name} is {settings[name]!r}; expected {value!r}: plain LoRA")
    for name in ("r", "lora_alpha"):
        if not isinstance(settings.get(name), int | float) or settings[name] <= 0:
            raise InputError(f"{directory / SETTINGS}: {name} is {settings.get(name)!r}; expected a positive number")


def _read(directory: Path) -> dict[str, np.ndarray]:
    """Tensors by module and half, in the spelling of transformers 5.x."""
    file = directory / WEIGHTS
    if not file.is_file():
        raise InputError(f"{directory}: no {WEIGHTS}; expected an adapter as peft saves it")
    try:
        tensors = safetensors.numpy.load_file(file)
    except safetensors.SafetensorError as error:
        raise InputError(f"{file}: not a safetensors file, or cut off ({error}); copy it again") from error
    return {hf_mapping.memory_key(hf_mapping.hub_key(key.removeprefix(PREFIX))): x for key, x in tensors.items()}

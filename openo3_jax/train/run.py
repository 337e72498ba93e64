"""The directory of a run: what is written first, and the policy that can be read back from it."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
from jax.sharding import Mesh

from openo3_jax import config as config_lib
from openo3_jax import hosts
from openo3_jax import mesh as mesh_lib
from openo3_jax import policy as policy_lib
from openo3_jax.config import GSPOConfig, SFTConfig, VideoConfig
from openo3_jax.data import tokens
from openo3_jax.errors import InputError
from openo3_jax.models import qwen2_5_vl
from openo3_jax.train import checkpoint

CONFIG = "config.json"  # the resolved settings
METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"  # of stage two: every completion with its record and rewards; `openo3 score` reads it
BAD_SAMPLES = "bad_samples.jsonl"  # records that could not be used
TENSORBOARD = "tensorboard"
PROFILE = "profile"
CHECKPOINTS = "checkpoints"
MODEL_FILES = "model"  # config, tokenizer and processor files of the model that the run started from


def check_new(out: Path) -> None:
    """Raises InputError unless `out` can become the directory of a new run."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(
            f"{out}: exists and is not an empty directory; choose another place for the run, or --resume it"
        )


def check_resumable(out: Path) -> None:
    """Raises InputError for a directory that is not that of a run. One that is missing or empty becomes a new run."""
    if out.is_dir() and any(out.iterdir()) and not (out / CONFIG).is_file() and not (out / MODEL_FILES).is_dir():
        raise InputError(f"{out}: holds no {CONFIG}; expected the directory of a training run, or a new one")


def create(
    out: Path, policy: policy_lib.Policy, stage: Literal["sft", "gspo"], config: SFTConfig | GSPOConfig, **more: Any
) -> None:
    """Write everything that is known before the first step; config.json, with `more`, is the last of it.

    Of several processes the first one writes, and the others wait for it.
    """
    hosts.together(lambda: _create(out, policy, stage, config, **more) if hosts.is_first() else None)


def _create(
    out: Path, policy: policy_lib.Policy, stage: Literal["sft", "gspo"], config: SFTConfig | GSPOConfig, **more: Any
) -> None:
    files = out / MODEL_FILES
    files.mkdir(parents=True, exist_ok=True)
    policy_lib.copy_model_files(policy.directory, files)
    settings = {
        "model": str(policy.directory),
        "stage": stage,
        "config": config_lib.to_json(config),
        "dtypes": {key: dtype.name for key, dtype in policy.dtypes.items()},
        **more,
    }
    partial = out / f"{CONFIG}.partial"
    partial.write_text(json.dumps(settings, indent=2) + "\n")
    os.replace(partial, out / CONFIG)


def load_config(file: Path, stage: Literal["sft", "gspo"]) -> SFTConfig | GSPOConfig:
    """The settings in the config.json of a run. Raises: InputError for another stage, unknown or missing fields."""
    try:
        settings = json.loads(file.read_text())
    except ValueError as error:
        raise InputError(f"{file}: no JSON ({error}); expected the {CONFIG} of a run") from None
    if not isinstance(settings, dict) or settings.get("stage") != stage or "config" not in settings:
        raise InputError(f"{file}: expected the {CONFIG} of a run of {stage}")
    return config_lib.from_json(SFTConfig if stage == "sft" else GSPOConfig, settings["config"], str(file))


def load(directory: Path, *, mesh: Mapping[str, int] | Mesh | None = None) -> policy_lib.Policy:
    """The policy of the newest checkpoint, float32. Raises InputError if this is no run or has no checkpoint."""
    if not (directory / CONFIG).is_file():
        raise InputError(f"{directory}: no {CONFIG}; expected the directory of a training run")
    settings = json.loads((directory / CONFIG).read_text())
    processor = tokens.load_processor(directory / MODEL_FILES)
    devices = mesh if isinstance(mesh, Mesh) else mesh_lib.make_mesh(mesh)
    graphdef, abstract = qwen2_5_vl.abstract_params(processor.config, devices)
    return policy_lib.Policy(
        graphdef=graphdef,
        params=checkpoint.load_params(directory / CHECKPOINTS, abstract, devices),
        mesh=devices,
        processor=processor,
        directory=directory / MODEL_FILES,
        dtypes={key: jnp.dtype(name) for key, name in settings["dtypes"].items()},
        video=config_lib.from_json(VideoConfig, settings["config"]["video"], str(directory / CONFIG)),
        video_mode="frames",
    )

"""The directory of a run: what is written first, and the policy that can be read back from it."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import jax.numpy as jnp
from jax.sharding import Mesh

from openo3_jax import mesh as mesh_lib
from openo3_jax import policy as policy_lib
from openo3_jax.config import GSPOConfig, SFTConfig, VideoConfig
from openo3_jax.data import tokens
from openo3_jax.errors import InputError
from openo3_jax.models import qwen2_5_vl
from openo3_jax.train import checkpoint

CONFIG = "config.json"  # the resolved settings
METRICS = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
MODEL_FILES = "model"  # config, tokenizer and processor files of the model that the run started from


def check_new(out: Path) -> None:
    """Raises InputError unless `out` can become the directory of a new run."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: exists and is not an empty directory; choose another place for the run")


def create(out: Path, policy: policy_lib.Policy, stage: Literal["sft", "gspo"], config: SFTConfig | GSPOConfig) -> None:
    """Write everything that is known before the first step."""
    files = out / MODEL_FILES
    files.mkdir(parents=True)
    policy_lib.copy_model_files(policy.directory, files)
    settings = {
        "model": str(policy.directory),
        "stage": stage,
        "config": dataclasses.asdict(config),
        "dtypes": {key: dtype.name for key, dtype in policy.dtypes.items()},
    }
    (out / CONFIG).write_text(json.dumps(settings, indent=2) + "\n")


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
        video=VideoConfig(**settings["config"]["video"]),
        video_mode="frames",
    )

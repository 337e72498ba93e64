"""The directory of a run: what is written first, and the policy that can be read back from it."""

import dataclasses
import json
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from openo3_jax import config_json, hosts, model_files
from openo3_jax import mesh as mesh_lib
from openo3_jax import policy as policy_lib
from openo3_jax.config import GSPOConfig, ModelConfig, SFTConfig
from openo3_jax.data import tokens
from openo3_jax.errors import InputError
from openo3_jax.models import lora, peft_files, qwen2_5_vl
from openo3_jax.train import checkpoint
from openo3_jax.train import state as state_lib

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
    is_begun = (out / MODEL_FILES).is_dir() and not (out / CONFIG).exists()  # stopped before that was written
    if out.is_dir() and any(out.iterdir()) and not is_begun:
        read_settings(out)


def create(
    out: Path,
    policy: policy_lib.Policy,
    stage: Literal["sft", "gspo"],
    config: SFTConfig | GSPOConfig,
    *,
    model: Path,
    reference: Path | None = None,
) -> None:
    """Write everything that is known before the first step; config.json is the last of it.

    `model`, `reference`: the directories that `policy` and the reference of stage two were read from. Of several
    processes the first one writes, and the others wait for it.
    """
    hosts.together(lambda: _create(out, policy, stage, config, model, reference) if hosts.is_first() else None)


def _create(
    out: Path,
    policy: policy_lib.Policy,
    stage: Literal["sft", "gspo"],
    config: SFTConfig | GSPOConfig,
    model: Path,
    reference: Path | None,
) -> None:
    files = out / MODEL_FILES
    files.mkdir(parents=True, exist_ok=True)
    model_files.copy_model_files(policy.directory, files)
    settings = {
        "model": str(model.absolute()),
        "reference": None if reference is None else str(reference.absolute()),
        "stage": stage,
        "config": config_json.to_json(config),
        "dtypes": {key: dtype.name for key, dtype in policy.dtypes.items()},
    }
    partial = out / f"{CONFIG}.partial"
    partial.write_text(json.dumps(settings, indent=2) + "\n")
    os.replace(partial, out / CONFIG)


def read_settings(directory: Path) -> dict[str, Any]:
    """What a run says of itself. Raises: InputError for a directory that is not that of a run."""
    if not (directory / CONFIG).is_file():
        raise InputError(f"{directory}: no {CONFIG}; expected the directory of a training run")
    return _read(directory / CONFIG)


def load_config(file: Path, stage: Literal["sft", "gspo"]) -> SFTConfig | GSPOConfig:
    """The settings in the config.json of a run. Raises: InputError for another stage, unknown or missing fields."""
    settings = _read(file)
    if settings["stage"] != stage:
        raise InputError(f"{file}: is of a run of {settings['stage']}; expected the {CONFIG} of a run of {stage}")
    return _config(settings, file)


def _read(file: Path) -> dict[str, Any]:
    try:
        settings = json.loads(file.read_text())
    except ValueError as error:
        raise InputError(f"{file}: no JSON ({error}); expected the {CONFIG} of a run") from None
    if not isinstance(settings, dict) or settings.get("stage") not in ("sft", "gspo") or "config" not in settings:
        raise InputError(f"{file}: has no stage and config; expected the {CONFIG} of a run, not that of a model")
    return settings


def _config(settings: Mapping[str, Any], file: Path) -> SFTConfig | GSPOConfig:
    return config_json.from_json(SFTConfig if settings["stage"] == "sft" else GSPOConfig, settings["config"], str(file))


def load(
    directory: Path, *, mesh: Mapping[str, int] | Mesh | None = None, step: int | None = None
) -> policy_lib.Policy:
    """The policy after `step` steps, float32; None: of the newest checkpoint.

    Of a run that trained adapters they are in the checkpoint, and the model that it started from is read again.
    Raises: InputError if this is no run or has no such checkpoint.
    """
    settings = read_settings(directory)
    config = _config(settings, directory / CONFIG)
    processor = tokens.load_processor(directory / MODEL_FILES)
    devices = mesh if isinstance(mesh, Mesh) else mesh_lib.make_mesh(mesh)
    graphdef, base, abstract = trained_part(directory, processor.config, config, devices)
    params = checkpoint.load_params(directory / CHECKPOINTS, abstract, devices, step)
    if base is not None:
        _check_base(directory, base, config)
        return dataclasses.replace(base, graphdef=graphdef, params=lora.join(base.params, params))
    return policy_lib.Policy(
        graphdef=graphdef,
        params=params,
        mesh=devices,
        processor=processor,
        directory=directory / MODEL_FILES,
        dtypes={key: jnp.dtype(name) for key, name in settings["dtypes"].items()},
        video=config.video,
        video_mode="frames",
    )


def trained_part(
    directory: Path, model: ModelConfig, config: SFTConfig | GSPOConfig, mesh: Mesh
) -> tuple[nnx.GraphDef, policy_lib.Policy | None, nnx.State]:
    """Definition of a run's model, its base where adapters are trained, and shapes of what is trained."""
    if config.lora is None:
        graphdef, abstract = qwen2_5_vl.abstract_params(model, mesh)
        return graphdef, None, abstract
    base = policy_lib.load_pretrained(_source(directory), mesh=mesh, video=config.video)
    attach = partial(lora.attach, base.graphdef, config=config.lora, seed=config.seed)
    graphdef, abstract = jax.eval_shape(attach, base.params)
    return graphdef, base, abstract


def save_adapter(directory: Path, out: Path, *, step: int | None = None) -> None:
    """Write the adapters of a run as `peft` reads them; `step` as of `load`.

    Raises: InputError if it has none, or none that stand alone.
    """
    if peft_files.is_adapter(_source(directory)):
        raise InputError(
            f"{directory}: was started from {_source(directory)}, an adapter itself, and peft adds one to a whole "
            "model; export without --adapter"
        )
    load(directory, step=step).save_adapter(out)


def _source(directory: Path) -> Path:
    """What a run started from."""
    return Path(read_settings(directory)["model"])


def _check_base(directory: Path, base: policy_lib.Policy, config: SFTConfig | GSPOConfig) -> None:
    checkpoints = directory / CHECKPOINTS
    expected = checkpoint.read_record(checkpoints, checkpoint.finished(checkpoints)[-1]).about["frozen"]
    if state_lib.checksum(base.params, config.compute_dtype) != expected:
        raise InputError(
            f"{_source(directory)}: has other weights than when {directory} trained adapters on it; put them back"
        )

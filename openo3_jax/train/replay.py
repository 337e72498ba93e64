"""A batch that gave bad numbers -> a directory with all that is needed to run it again -> where they come from."""

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from openo3_jax import config_json, hosts
from openo3_jax import mesh as mesh_lib
from openo3_jax import policy as policy_lib
from openo3_jax.config import GSPOConfig, SFTConfig
from openo3_jax.data import tokens
from openo3_jax.errors import InputError
from openo3_jax.models import lora
from openo3_jax.train import checkpoint, run, steps
from openo3_jax.types import Batch, Rollouts, VisionBatch

DUMPS = "dumps"
ABOUT = "dump.json"  # written last
ARRAYS = "batch.npz"
WEIGHTS = "weights"
_NESTED = {"batch": Batch, "vision": VisionBatch}  # fields that are dataclasses themselves
_SHOWN = 8  # paths


def write_dump(
    at: Path,
    stage: str,
    config: SFTConfig | GSPOConfig,
    params: nnx.State,
    batch: Batch | Rollouts,
    step: int,
    values: Mapping[str, float],
) -> None:
    """Batch and weights of an update into the directory `at`, which is made. `step`: from 0. Every process calls it."""
    arrays = _to_arrays(hosts.whole(batch))
    if hosts.is_first():
        at.mkdir(parents=True)
        np.savez(at / ARRAYS, **arrays)
    checkpoint.save_params(at / WEIGHTS, params)
    if not hosts.is_first():
        return
    found = {name: repr(value) for name, value in values.items()}  # JSON has no nan
    about = {"stage": stage, "step": step + 1, "measured": found, "config": config_json.to_json(config)}
    (at / ABOUT).write_text(json.dumps(about, indent=2) + "\n")


def replay(dump: Path, *, mesh: Mapping[str, int] | Mesh | None = None) -> str:
    """Run a dumped batch again with the weights of its step, and say where numbers are not finite.

    Raises: InputError for a directory that is no dump within a run.
    """
    if not (dump / ABOUT).is_file():
        raise InputError(f"{dump}: holds no {ABOUT}; expected a directory such as RUN/{DUMPS}/step-12-0")
    home = dump.absolute().parent.parent
    if not (home / run.CONFIG).is_file():
        raise InputError(f"{dump}: {home} is no run; a dump needs the model files of its run, so leave it there")
    settings = run.read_settings(home)
    about = json.loads((dump / ABOUT).read_text())
    is_sft = about["stage"] == "sft"
    config = config_json.from_json(SFTConfig if is_sft else GSPOConfig, about["config"], str(dump / ABOUT))
    with np.load(dump / ARRAYS, allow_pickle=False) as arrays:
        host = _from_arrays(Batch if is_sft else Rollouts, arrays, "")
    devices = mesh if isinstance(mesh, Mesh) else mesh_lib.make_mesh(mesh)
    processor = tokens.load_processor(home / run.MODEL_FILES)
    graphdef, base, abstract = run.trained_part(home, processor.config, config, devices)
    frozen = None if base is None else jax.tree.map(lambda x: x.astype(config.compute_dtype), base.params)
    params = checkpoint.read_params(dump / WEIGHTS, abstract, devices)
    batch = mesh_lib.shard_rows(host, devices)
    reference = None if is_sft else _reference(settings, config, devices)

    @jax.jit
    def again(params: nnx.State, frozen: Any, reference: Any, batch: Batch | Rollouts) -> tuple[Any, nnx.State, Any]:
        def loss_of(params: nnx.State) -> tuple[Any, None]:
            weights = lora.join(frozen, params)
            if is_sft:
                return steps.sft_loss(graphdef, weights, batch, config), None
            return steps.gspo_loss(graphdef, weights, reference, batch, config)[0], None

        (loss, _), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
        rows = batch if is_sft else batch.batch
        return loss, grads, steps.score_batch(graphdef, lora.join(frozen, params), rows, config).logp

    loss, grads, logp = again(params, frozen, reference, batch)
    rows = host if is_sft else host.batch
    logp = np.where(rows.target_slots >= 0, np.asarray(logp), 0.0)
    sums = ", ".join(f"{row}: {-value:.4g}" for row, value in enumerate(logp.sum(1)))
    lines = [
        f"{about['stage']}, step {about['step']}: measured {about['measured']}",
        f"again: loss {float(loss):g}, gradient norm {float(optax.tree.norm(grads)):g}",
        f"nats of each row's targets: {sums}",
        _bad("inputs", dict(_to_arrays(host))),
        _bad("weights", _by_path(params)),
        _bad("gradients", _by_path(grads)),
    ]
    return "\n".join(lines)


def _reference(settings: Mapping[str, Any], config: GSPOConfig, devices: Mesh) -> nnx.State | None:
    """The weights that stage two compared with, from where the run read them; None as `TrainState.reference` is."""
    if config.kl_coef == 0 or (config.lora is not None and settings["reference"] is None):
        return None
    policy = policy_lib.load_pretrained(Path(settings["reference"] or settings["model"]), mesh=devices)
    return jax.tree.map(lambda x: jnp.asarray(x, config.compute_dtype), policy.params)


def _by_path(tree: Any) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def _bad(what: str, arrays: Mapping[str, np.ndarray]) -> str:
    floats = {name: value for name, value in arrays.items() if np.issubdtype(value.dtype, np.floating)}
    bad = [name for name, value in floats.items() if not np.isfinite(value).all()]
    if not bad:
        return f"{what}: all finite"
    more = f" and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
    return f"{what}: not finite in {len(bad)} of {len(floats)} arrays: {', '.join(bad[:_SHOWN])}{more}"


def _to_arrays(value: Any, name: str = "") -> dict[str, np.ndarray]:
    """Arrays by the path of their field: `vision.frame_patches.0`."""
    if dataclasses.is_dataclass(value):
        inner = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    elif isinstance(value, tuple):
        inner = dict(enumerate(value))
    else:
        return {name: np.asarray(value)}
    parts = (_to_arrays(one, f"{name}.{key}" if name else str(key)) for key, one in inner.items())
    return {key: array for part in parts for key, array in part.items()}


def _from_arrays(cls: type, arrays: Mapping[str, np.ndarray], prefix: str) -> Any:
    """The inverse, for the classes of `types.py`."""

    def read(name: str) -> Any:
        path = prefix + name
        if name in _NESTED:
            return _from_arrays(_NESTED[name], arrays, f"{path}.")
        if path in arrays:
            return arrays[path]
        numbered = sorted(int(key.rpartition(".")[2]) for key in arrays if key.rpartition(".")[0] == path)
        return tuple(arrays[f"{path}.{number}"] for number in numbered)

    return cls(**{field.name: read(field.name) for field in dataclasses.fields(cls)})


def remove_after(out: Path, step: int) -> None:
    """Dumps of steps after `step` go: they will be made again."""
    for at in (out / DUMPS).glob("step-*-*"):
        if int(at.name.split("-")[1]) > step:
            shutil.rmtree(at)

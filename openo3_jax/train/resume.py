"""A run that was stopped -> where it goes on: its newest good checkpoint, and files cut back to it."""

import importlib.metadata
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from openo3_jax import config_json, hosts
from openo3_jax.config import GSPOConfig, SFTConfig
from openo3_jax.data import loader, store
from openo3_jax.errors import InputError
from openo3_jax.train import checkpoint, replay, run
from openo3_jax.train import state as state_lib
from openo3_jax.train.state import TrainState

# Settings that may change: what is kept and watched, how many processes decode, and what ends a run for its media.
FREE = ("run", "workers", "max_bad_fraction", *(f"video.{name}" for name in store.LIMITS))
CONFIGS = {"sft": SFTConfig, "gspo": GSPOConfig}
VERSIONED = ("openo3-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
LINES = (run.METRICS, run.SAMPLES, run.BAD_SAMPLES)  # files whose lines name their step
SET_ASIDE = "set_aside"  # directory of the checkpoints that are damaged, or later than where the run goes on


def describe(
    stage: str, config: SFTConfig | GSPOConfig, records: str, params: Any, reference: Any = None
) -> dict[str, Any]:
    """What a checkpoint says about its run, and what a run that goes on compares.

    `records`: their hash. `reference`: weights that stage two compares with, None where the state has no copy of them.
    Where adapters are trained, `params` are what is frozen, and their checksum is kept.
    """
    kept = _without_free(config_json.to_json(config))
    shapes = {
        jax.tree_util.keystr(path): f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    versions = {name: importlib.metadata.version(name) for name in VERSIONED}
    anchor = None if reference is None else state_lib.checksum(reference)
    frozen = None if config.lora is None else state_lib.checksum(params, config.compute_dtype)
    same = {"stage": stage, "config": kept, "records": records, "shapes": shapes, "reference": anchor, "frozen": frozen}
    return {**same, "versions": versions}


def find(out: Path, about: Mapping[str, Any], say: Callable[[str], None]) -> checkpoint.Record | None:
    """The record of the checkpoint to go on with, None if there is none yet.

    Of several processes the first one looks.
    Raises: InputError if it is of another stage, config, data set or model, naming the first difference.
    """
    found = hosts.first(lambda: _find(out, about, say))
    return None if found is None else checkpoint.Record(*found)


def _find(out: Path, about: Mapping[str, Any], say: Callable[[str], None]) -> checkpoint.Record | None:
    directory = out / run.CHECKPOINTS
    step = checkpoint.newest_good(directory, say)
    if step is None:
        if checkpoint.finished(directory):
            raise InputError(f"{directory}: every checkpoint is damaged; start a new run in another directory")
        return None
    record = checkpoint.read_record(directory, step)
    at = directory / str(step)
    saved = {**record.about, "config": _with_defaults(record.about)}
    for name in ("stage", "records", "shapes", "reference", "frozen", "config"):
        difference = first_difference(saved.get(name), about.get(name), name)
        if difference is not None:
            raise InputError(f"{at}: {difference}; resume with what the run was started with, or start a new run")
    changed = first_difference(record.about["versions"], about["versions"], "versions")
    if changed is not None:
        say(f"{at}: {changed}; the numbers may differ in their last bits from those of an uninterrupted run")
    return record


def _with_defaults(about: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings of a checkpoint; one that is newer than the checkpoint had its default when that was written."""
    try:
        whole = config_json.to_json(config_json.from_json(CONFIGS[about["stage"]], about["config"], "config"))
    except InputError:  # not settings of this version: what differs is named by the comparison
        whole = about["config"]
    return _without_free(whole)


def _without_free(settings: Mapping[str, Any], within: str = "") -> dict[str, Any]:
    return {
        name: _without_free(value, f"{within}{name}.") if isinstance(value, Mapping) else value
        for name, value in settings.items()
        if f"{within}{name}" not in FREE
    }


def position(record: checkpoint.Record) -> loader.IteratorState:
    """Where the run stood in its data."""
    return loader.IteratorState(**record.memory["position"])


def go_on(out: Path, record: checkpoint.Record | None, state: TrainState) -> TrainState:
    """Cut the files of a run back to a checkpoint and read its state; without one back to nothing, for `state` itself.

    `state`: shapes and places of what is to be read. Nothing of what is cut off is needed again: it will be the same.
    """
    step = 0 if record is None else record.step

    def cut() -> None:
        for name in LINES:
            cut_back(out / name, step)
        replay.remove_after(out, step)
        checkpoint.set_aside(out / run.CHECKPOINTS, step, out / SET_ASIDE)

    hosts.together(lambda: cut() if hosts.is_first() else None)
    return state if record is None else checkpoint.restore(out / run.CHECKPOINTS, step, state)


def first_difference(saved: Any, now: Any, name: str) -> str | None:
    """Example: `config.seed is 1 in the checkpoint and 2 now`; None if nothing differs."""
    if isinstance(saved, Mapping) and isinstance(now, Mapping):
        for key in [*saved, *(key for key in now if key not in saved)]:
            inner = f"{name}{key}" if str(key).startswith("[") else f"{name}.{key}"
            if key not in saved or key not in now:
                return f"{inner} is known to {'this version' if key in now else 'the checkpoint'} only"
            found = first_difference(saved[key], now[key], inner)
            if found is not None:
                return found
        return None
    return None if saved == now else f"{name} is {saved} in the checkpoint and {now} now"


def cut_back(file: Path, step: int) -> None:
    """Drop the JSON lines of steps after `step`, and a last line that a kill left unfinished."""
    if not file.exists():
        return
    with file.open("rb+") as stream:
        while line := stream.readline():
            if not line.endswith(b"\n") or _step_of(line) > step:
                stream.seek(-len(line), 1)
                stream.truncate()
                return


def _step_of(line: bytes) -> float:
    """A line that is no JSON counts as one of the future: what follows is dropped with it."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf

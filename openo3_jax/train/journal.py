"""Where the numbers of a step go: metrics.jsonl, the terminal and the log; TensorBoard and W&B as configured."""

import contextlib
import hashlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from openo3_jax import config_json
from openo3_jax.config import GSPOConfig, RunConfig, SFTConfig
from openo3_jax.errors import InputError
from openo3_jax.train import board, metrics, run
from openo3_jax.train.runlog import RunLog


class Silence:
    """The journal of a process that is not the one that writes."""

    def __enter__(self) -> "Silence":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def write(self, done: int, values: Mapping[str, float]) -> None:
        pass


class Journal:
    """A context manager. Raises: InputError if the disk takes no more lines, and as `check` does."""

    def __init__(self, out: Path, name: str, headline: str, config: SFTConfig | GSPOConfig, log: RunLog, *, start: int):
        self._log = log
        self._lines = metrics.JsonlWriter(out / run.METRICS)
        self._board = board.Board(log.console, name, headline, start=start, total=config.steps)
        self._events = None
        if config.run.tensorboard:
            from openo3_jax.train import tensorboard  # seconds of import, for those who use it

            self._events = tensorboard.EventWriter(out / run.TENSORBOARD, start=start)
        self._wandb = None if config.run.wandb is None else _start_wandb(config.run.wandb, out, config)

    def __enter__(self) -> "Journal":
        self._board.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        with contextlib.ExitStack() as stack:
            stack.callback(self._lines.close)
            if self._events is not None:
                stack.callback(self._events.close)
            if self._wandb is not None:
                stack.callback(self._wandb.finish)
            self._board.__exit__(*error)

    def write(self, done: int, values: Mapping[str, float]) -> None:
        self._lines.write(done, values)
        self._log.note(self._board.line(done, values))
        for name, value in values.items():
            if name.startswith("guard/") and name.endswith("_spike") and value:
                self._log.say(f"step {done}: a spike of {name.removeprefix('guard/').removesuffix('_spike')}")
        if self._events is not None:
            self._events.write(done, values)
        if self._wandb is not None:
            self._wandb.log(dict(values), step=done)
        self._board.update(done, values)


def check(settings: RunConfig) -> None:
    """Raises: InputError if W&B is asked for and not installed."""
    if settings.wandb is not None and importlib.util.find_spec("wandb") is None:
        raise InputError(
            f"run.wandb={settings.wandb}: the package wandb is not installed; pip install wandb, or leave it out"
        )


def _start_wandb(project: str, out: Path, config: SFTConfig | GSPOConfig) -> Any:
    """A run of Weights & Biases that goes on when this one does."""
    check(config.run)
    wandb = importlib.import_module("wandb")
    name = hashlib.sha256(str(out.absolute()).encode()).hexdigest()[:16]
    return wandb.init(
        project=project, id=name, name=out.name, resume="allow", dir=str(out), config=config_json.to_json(config)
    )

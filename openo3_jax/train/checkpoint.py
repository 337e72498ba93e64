"""Train state <-> disk, through orbax: `directory/<step>`, whole and proven, or not there.

The last file to be written of a checkpoint is its record: what it is, and size and hash of every other file. Without a
record a checkpoint is unfinished; with one, nothing of it can be cut off or changed unnoticed.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from concurrent import futures
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import Mesh

from openo3_jax import hosts
from openo3_jax import mesh as mesh_lib
from openo3_jax.errors import InputError
from openo3_jax.train.state import TrainState

RECORD = "checkpoint.json"
_TEMPORARY = ".orbax-checkpoint-tmp"  # in the names of what orbax has not finished

# Of the file system, of orbax (which reports most things as ValueError) and of the devices.
WRITE_ERRORS = (OSError, ValueError, RuntimeError)


class Record(NamedTuple):
    """What stands beside the arrays of a checkpoint."""

    step: int
    about: Mapping[str, Any]  # config, stage, data, shapes, versions: what a run that goes on must share
    memory: Mapping[str, Any]  # what the stage goes on with, such as its position in the data
    score: float | None  # of the metric by which the best checkpoint is kept


class Checkpoints:
    """Writes the checkpoints of a run. A context manager: leaving it waits for the last one.

    `save` copies the state to the host and returns; threads write it. A save that fails is told to `say` in one line
    and kept in `failure` until one succeeds; earlier checkpoints stay. Of all checkpoints the `keep_last` newest stay,
    and the one with the highest score. Of several processes each writes its part of the arrays, the first one all else.
    """

    def __init__(self, directory: Path, *, keep_last: int, say: Callable[[str], None]):
        self.failure: str | None = None
        self._directory = directory.absolute()
        self._keep_last = keep_last
        self._say = say
        # Directories are made before `save` returns: orbax waits ten minutes for one that cannot be made in a thread.
        options = ocp.options.AsyncOptions(create_directories_asynchronously=False)
        self._writer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(), async_options=options)
        self._thread = futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: futures.Future[None] | None = None
        self._pending_step = 0
        self._saved: int | None = None
        self._is_first = hosts.is_first()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self.wait()
        self._thread.shutdown()
        self._writer.close()

    def save(self, state: TrainState, record: Record) -> None:
        """Start to write a checkpoint; the one before it is waited for. The state may be donated afterwards."""
        self.wait()
        if self._is_first and self._saved is not None and not (self._directory / str(self._saved) / RECORD).exists():
            self._say(f"{self._directory}: checkpoint {self._saved} has been deleted by someone else")
        self._pending_step = record.step
        items = {"params": state.params, "optimizer": (state.step, state.opt_state)}
        arguments = {name: ocp.args.StandardSave(_flatten(tree)) for name, tree in items.items()}
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            if self._is_first:
                for rest in self._directory.glob(f"*{_TEMPORARY}*"):  # of a save that failed, perhaps still written to
                    _remove(rest, ignore_errors=True)
            self._writer.save(self._directory / str(record.step), ocp.args.Composite(**arguments), force=True)
        except WRITE_ERRORS as error:
            self._fail(error)
            return
        self._pending = self._thread.submit(self._finish, record)

    def wait(self) -> None:
        """Until the last checkpoint is on disk, or has failed."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            pending.result()
        except WRITE_ERRORS as error:
            self._fail(error)
        else:
            self._saved, self.failure = self._pending_step, None

    def _finish(self, record: Record) -> None:
        self._writer.wait_until_finished()
        if self._is_first:
            _write_record(self._directory / str(record.step), record)
            prune(self._directory, self._keep_last, self._say)

    def _fail(self, error: Exception) -> None:
        kept = finished(self._directory)
        kept_text = f"the last good one is {kept[-1]}" if kept else "there is no earlier one"
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        if len(reason) > 200:  # the cause of a chain of causes stands at its end
            reason = f"{reason[:80]} ... {reason[-120:]}"
        self.failure = f"{self._directory}: checkpoint {self._pending_step} cannot be written: {reason}; {kept_text}"
        self._say(self.failure)


def prune(directory: Path, keep_last: int, say: Callable[[str], None]) -> None:
    """Delete all finished checkpoints but the `keep_last` newest and the one with the highest score.

    One whose record cannot be read has no score. What cannot be deleted is told to `say` and left.
    """
    steps = finished(directory)
    scores = {step: _score(directory, step) for step in steps}
    known = {step: score for step, score in scores.items() if score is not None}
    best = max(known, key=lambda step: (known[step], -step), default=None)
    for step in steps[:-keep_last]:
        if step == best:
            continue
        try:
            (directory / str(step) / RECORD).unlink()  # first of all: half a checkpoint is none
            shutil.rmtree(directory / str(step))
        except OSError as error:
            say(f"{directory}: checkpoint {step} is no longer needed and cannot be deleted: {error.strerror}")


def _score(directory: Path, step: int) -> float | None:
    try:
        return read_record(directory, step).score
    except (InputError, OSError):
        return None


def finished(directory: Path) -> list[int]:
    """Steps of all checkpoints that were written to their end, the oldest first."""
    if not directory.is_dir():
        return []
    return sorted(int(at.name) for at in directory.iterdir() if at.name.isdecimal() and (at / RECORD).exists())


def read_record(directory: Path, step: int) -> Record:
    """Raises: InputError for a record that is damaged."""
    return _parse_record(directory / str(step) / RECORD)[0]


def damage(directory: Path, step: int) -> str | None:
    """What is wrong with a checkpoint, None if every byte of it is as it was written."""
    at = directory / str(step)
    try:
        _, files = _parse_record(at / RECORD)
    except InputError as error:
        return str(error)
    for name, expected in files.items():
        if not (at / name).is_file():
            return f"{at / name} is missing"
        if (found := (at / name).stat().st_size) != expected["bytes"]:
            return f"{at / name} has {found} bytes where {expected['bytes']} were written"
    for name, expected in files.items():
        if _hash(at / name) != expected["sha256"]:
            return f"{at / name} has other content than was written"
    return None


def newest_good(directory: Path, say: Callable[[str], None]) -> int | None:
    """The newest checkpoint without damage; each newer one is told to `say`, with the file that is damaged."""
    for step in reversed(finished(directory)):
        reason = damage(directory, step)
        if reason is None:
            return step
        say(f"checkpoint {step} is damaged and left out: {reason}")
    return None


def set_aside(directory: Path, after: int, aside: Path) -> None:
    """Make room for the checkpoints after step `after`: finished ones are moved to `aside`, unfinished ones deleted."""
    if not directory.is_dir():
        return
    done = finished(directory)
    for at in list(directory.iterdir()):
        if _TEMPORARY in at.name or (at.name.isdecimal() and int(at.name) not in done):
            _remove(at)
        elif at.name.isdecimal() and int(at.name) > after:
            aside.mkdir(exist_ok=True)
            shutil.rmtree(aside / at.name, ignore_errors=True)
            at.rename(aside / at.name)


def _remove(at: Path, *, ignore_errors: bool = False) -> None:
    """A directory with all that is in it, or a file."""
    if at.is_dir():
        shutil.rmtree(at, ignore_errors=ignore_errors)
        return
    with contextlib.suppress(OSError if ignore_errors else FileNotFoundError):
        at.unlink()


def restore(directory: Path, step: int, abstract: TrainState) -> TrainState:
    """The state of a checkpoint, with the shapes and places of `abstract`, on whatever mesh they name.

    `reference` and `frozen` are taken over as they are: checkpoints hold nothing that never changes.
    """
    wanted = {"params": abstract.params, "optimizer": (abstract.step, abstract.opt_state)}
    read = _read(directory / str(step), wanted)
    count, moments = read["optimizer"]
    return dataclasses.replace(abstract, step=count, params=read["params"], opt_state=moments)


def save_params(directory: Path, params: nnx.State) -> None:
    """The weights alone, as the item `params` of a checkpoint has them; waits until they are written."""
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as writer:
        writer.save(directory.absolute(), ocp.args.Composite(params=ocp.args.StandardSave(_flatten(params))))


def read_params(directory: Path, abstract: nnx.State, mesh: Mesh) -> nnx.State:
    """What one checkpoint says of `abstract`, the weights or the adapters, float32, placed on the mesh."""
    places = mesh_lib.state_shardings(abstract, mesh)
    wanted = jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), abstract, places)
    return _read(directory, {"params": wanted})["params"]


def load_params(directory: Path, abstract: nnx.State, mesh: Mesh, step: int | None = None) -> nnx.State:
    """As `read_params`, of the checkpoint after `step` steps, None for the newest.

    Raises: InputError if it is damaged or missing.
    """
    if not directory.is_dir():
        raise InputError(f"{directory}: no checkpoints; expected the directory of a training run")
    steps = finished(directory)
    if not steps:
        raise InputError(f"{directory}: holds no finished checkpoint; was the run stopped before its first one?")
    if step is not None and step not in steps:
        raise InputError(f"{directory}: no checkpoint of step {step}; expected one of {', '.join(map(str, steps))}")
    chosen = steps[-1] if step is None else step
    reason = damage(directory, chosen)
    if reason is not None:
        raise InputError(f"{reason}; go on with --resume from the checkpoint before it, or delete {chosen}")
    return read_params(directory / str(chosen), abstract, mesh)


def _read(at: Path, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """The items of a checkpoint, in the structure and places of `wanted`."""
    arguments = {name: ocp.args.StandardRestore(_flatten(tree)) for name, tree in wanted.items()}
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
        flat = reader.restore(at.absolute(), ocp.args.Composite(**arguments))
    out = {}
    for name, tree in wanted.items():
        paths, treedef = jax.tree_util.tree_flatten_with_path(tree)
        out[name] = jax.tree.unflatten(treedef, [flat[name][jax.tree_util.keystr(path)] for path, _ in paths])
    return out


def _flatten(tree: Any) -> dict[str, Any]:
    """Leaves by their path: a layout on disk that does not depend on container types."""
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def _write_record(at: Path, record: Record) -> None:
    names = sorted(path.relative_to(at).as_posix() for path in at.rglob("*") if path.is_file())
    files = {name: {"bytes": (at / name).stat().st_size, "sha256": _hash(at / name)} for name in names}
    partial = at.parent / f"{at.name}{_TEMPORARY}.json"
    try:
        partial.write_text(json.dumps({**record._asdict(), "files": files}))  # no newline: a brace ends it
        os.replace(partial, at / RECORD)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def _parse_record(file: Path) -> tuple[Record, dict[str, Any]]:
    try:
        content = json.loads(file.read_text())
    except ValueError as error:
        raise InputError(f"{file} is damaged ({error})") from None
    files = content.pop("files")
    return Record(**content), files


def _hash(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()

"""The directory of an evaluation: settings, predictions line by line, what a killed run left behind."""

import dataclasses
import functools
import importlib.metadata
import json
import os
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from openo3_jax.errors import InputError
from openo3_jax.evals import items

SETTINGS = "settings.json"
PREDICTIONS = "predictions.jsonl"


def open_run(out: Path, settings: Mapping[str, Any]) -> None:
    """Make `out` the directory of a run with these settings, or go on with the one it is.

    Raises: InputError where it belongs to a run with other settings, naming the first that differs.
    """
    file = out / SETTINGS
    settings = json.loads(json.dumps(settings, default=str))
    if file.is_file():
        old = read_json(file)
        for name in {**old, **settings}:
            if old.get(name) != settings.get(name):
                raise InputError(
                    f"{out}: was begun with {name}={old.get(name)!r}, now it is {settings.get(name)!r}; "
                    "go on with the same settings or choose another --out"
                )
        return
    staging = _staging(file).name  # of a start that was cut off
    if out.exists() and (not out.is_dir() or any(inside.name != staging for inside in out.iterdir())):
        raise InputError(f"{out}: exists and holds something else (no {SETTINGS}); choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    replace_json(file, settings)


class Predictions:
    """predictions.jsonl: what is there already, and lines added to it. A context manager.

    Every `add` is on the disk when it returns. A line that a kill cut off is dropped and asked again.
    """

    def __init__(self, file: Path):
        self._file = file
        self.known: dict[items.Key, items.Prediction] = {}

    def __enter__(self) -> "Predictions":
        cut_torn(self._file)
        for number, line in enumerate(read_lines(self._file), 1):
            prediction = _from_json(line, f"{self._file}:{number}")
            if prediction.key in self.known:
                raise InputError(f"{self._file}:{number}: {prediction.key} stands there twice; remove one of the lines")
            self.known[prediction.key] = prediction
        self._stream = self._file.open("a", encoding="utf-8")
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def check(self, call: items.Call, prompt_hash: str) -> bool:
        """Is the call answered already? Raises InputError where it was asked in another way."""
        known = self.known.get(call.key)
        if known is not None and known.prompt_hash != prompt_hash:
            raise InputError(
                f"{self._file}: {call.key} was asked with prompt {known.prompt_hash}, now it is {prompt_hash}; "
                "choose another --out"
            )
        return known is not None

    def add(self, predictions: Iterable[items.Prediction]) -> None:
        for prediction in predictions:
            fields = {name: value for name, value in dataclasses.asdict(prediction).items() if value is not None}
            self._stream.write(json.dumps(fields) + "\n")
            self.known[prediction.key] = prediction
        self._stream.flush()
        os.fsync(self._stream.fileno())


def _from_json(line: Any, where: str) -> items.Prediction:
    known = {field.name for field in dataclasses.fields(items.Prediction)}
    try:
        fields = {name: tuple(value) if isinstance(value, list) else value for name, value in line.items()}
        return items.Prediction(**{name: value for name, value in fields.items() if name in known})
    except (AttributeError, TypeError) as error:
        raise InputError(f"{where}: is no prediction ({error}); expected a line that this command wrote") from None


def read_lines(file: Path) -> list[Any]:
    """The values of a JSONL file, [] without one. Raises: InputError naming the line that is not JSON."""
    if not file.is_file():
        return []
    return [parse_line(line, f"{file}:{i}") for i, line in enumerate(file.read_bytes().splitlines(), 1) if line.strip()]


def cut_torn(file: Path) -> None:
    """Take off a last line without its newline, which a kill has left, before lines are added."""
    if file.is_file():
        raw = file.read_bytes()
        whole = raw.rfind(b"\n") + 1
        if whole < len(raw):
            os.truncate(file, whole)


def parse_line(line: bytes | str, where: str) -> Any:
    """The value of one line. Raises InputError, naming `where`, for what is not JSON."""
    try:
        return json.loads(line)
    except ValueError as error:
        raise InputError(f"{where}: is not JSON ({error}); remove the line") from None


def read_json(file: Path) -> Any:
    """Raises InputError for a file that is not there or not JSON."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror}); expected a JSON file") from None
    except ValueError as error:
        raise InputError(f"{file}: is not JSON ({error})") from None


def replace_text(file: Path, text: str) -> None:
    """Write `file` whole or not at all."""
    staging = _staging(file)
    try:
        staging.write_text(text, encoding="utf-8")
        staging.replace(file)
    except OSError:
        staging.unlink(missing_ok=True)
        raise


def _staging(file: Path) -> Path:
    return file.with_name(f".{file.name}.tmp")


def replace_json(file: Path, value: Any) -> None:
    """`replace_text` for a value; it holds no number that is not finite."""
    replace_text(file, json.dumps(value, indent=2, allow_nan=False) + "\n")


@functools.cache
def project_commit() -> str:
    """The commit of this project's checkout, with "+" where files differ from it; the version where it is installed."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return f"openo3-jax {importlib.metadata.version('openo3-jax')}"
    try:
        commit, changes = (
            subprocess.run(["git", "-C", root, *words], capture_output=True, text=True, check=True).stdout.strip()
            for words in (["rev-parse", "--short=12", "HEAD"], ["status", "--porcelain", "-uno"])
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + ("+" if changes else "")

"""The directory of a run, finished or not -> its settings, its metrics as series, and some of its samples."""

import collections
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from openo3_jax.errors import InputError
from openo3_jax.report.curves import Series
from openo3_jax.train import gspo, run

KEPT = 256  # samples from either end of the file


class Run(NamedTuple):
    """`early`, `late`: lines of samples.jsonl from its beginning and end, each once; `gap`: why there are none.

    `stage`: "sft" or "gspo". `unread`: what of the files could not be used.
    """

    directory: Path
    settings: Mapping[str, Any]
    stage: str
    metrics: Mapping[str, Series]
    num_steps: int  # recorded
    early: list[dict[str, Any]]
    late: list[dict[str, Any]]
    gap: str
    unread: list[str]

    @property
    def config(self) -> Mapping[str, Any]:
        found = self.settings.get("config")
        return found if isinstance(found, dict) else {}

    @property
    def has_checkpoint(self) -> bool:
        folder = self.directory / run.CHECKPOINTS
        return folder.is_dir() and any(folder.iterdir())


def load(directory: Path) -> Run:
    """Read what is there. Raises: InputError unless this is the directory of a run with readable settings."""
    file = directory / run.CONFIG
    if not file.is_file():
        raise InputError(f"{directory}: no {run.CONFIG}; expected the directory of a training run")
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{file}: is not JSON ({error}); expected the settings that training wrote") from None
    stage = settings.get("stage") if isinstance(settings, dict) else None
    if stage not in ("sft", "gspo"):
        raise InputError(f"{file}: stage={stage!r}; expected 'sft' or 'gspo'")
    unread: list[str] = []
    metrics, num_steps = _read_metrics(directory / run.METRICS, unread)
    early, late = _read_samples(directory / gspo.SAMPLES, unread)
    gap = ""
    if not late:
        is_sft = stage == "sft"
        gap = "supervised training samples no answers" if is_sft else f"there is no answer in {gspo.SAMPLES}"
    return Run(directory, settings, stage, metrics, num_steps, early, late, gap, unread)


def _read_metrics(file: Path, unread: list[str]) -> tuple[dict[str, Series], int]:
    """Every metric by name; of a step that was written twice the last line counts."""
    rows: dict[int, dict[str, Any]] = {}
    for line in _lines(file, unread):
        if isinstance(line.get("step"), int):
            rows[line["step"]] = line
    found: dict[str, tuple[list[int], list[float]]] = {}
    for step in sorted(rows):
        for name, value in rows[step].items():
            if name != "step" and (value is None or type(value) in (int, float)):
                steps, values = found.setdefault(name, ([], []))
                steps.append(step)
                values.append(math.nan if value is None else float(value))
    return {name: Series(*columns) for name, columns in found.items()}, len(rows)


def _read_samples(file: Path, unread: list[str]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The first and the last `KEPT` lines; of a file with fewer than both its halves."""
    early: list[dict[str, Any]] = []
    late: collections.deque[dict[str, Any]] = collections.deque(maxlen=KEPT)
    number = 0
    for line in _lines(file, unread):
        if not isinstance(line.get("completion"), str) or not isinstance(line.get("task"), str):
            continue
        number += 1
        late.append(line)
        if number <= KEPT:
            early.append(line)
    half = number // 2
    return early[:half], list(late)[-(number - half) :]


def _lines(file: Path, unread: list[str]) -> Iterator[dict[str, Any]]:
    """The objects of a JSONL file, none without one; a line that is none, such as a torn last one, is noted."""
    if not file.is_file():
        return
    bad: list[int] = []
    with file.open(encoding="utf-8", errors="replace") as stream:
        for number, text in enumerate(stream, 1):
            if not text.strip():
                continue
            try:
                value = json.loads(text)
            except (ValueError, RecursionError):
                value = None
            if isinstance(value, dict):
                yield value
            else:
                bad.append(number)
    if bad:
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        unread.append(f"{file.name}: line {bad[0]}{more} could not be read and was left out")

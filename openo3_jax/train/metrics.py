"""Numbers as JSON lines, written and read back, and a progress line for work that has no metrics."""

import contextlib
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich import console, progress

from openo3_jax.errors import InputError

REPORT_EVERY_S = 10.0  # of plain lines, where stderr is not a terminal


class JsonlWriter:
    """Appends `{"step": .., name: value, ..}` lines; each is flushed, so a killed run loses none. A context manager."""

    def __init__(self, file: Path):
        self._file = file
        self._stream = file.open("a", encoding="utf-8")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        try:
            self._stream.write(json.dumps({"step": step, **finite}) + "\n")
            self._stream.flush()
        except OSError as error:
            raise InputError(f"{self._file}: cannot be written: {error.strerror}; go on with --resume") from None

    def close(self) -> None:
        with contextlib.suppress(OSError):  # of the line that could not be written
            self._stream.close()

    def __enter__(self) -> "JsonlWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_lines(file: Path) -> list[dict[str, Any]]:
    """What `JsonlWriter` wrote, None for values that were not finite."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


class Progress:
    """A bar with rate and time left on a terminal, else a plain line now and then. A context manager."""

    def __init__(self, what: str, total: int):
        self._what = what
        self._total = total
        self._console = console.Console(stderr=True)
        columns = [
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.fields[note]}"),
            progress.TimeElapsedColumn(),
            progress.TimeRemainingColumn(),
        ]
        self._bar = progress.Progress(*columns, console=self._console, disable=not self._console.is_terminal)
        self._task = self._bar.add_task(what, total=total, note="")
        self._reported_s = -math.inf

    def __enter__(self) -> "Progress":
        self._started_s = time.monotonic()
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def update(self, done: int, note: str) -> None:
        now_s = time.monotonic()
        rate = done / max(now_s - self._started_s, 1e-9)
        note = ", ".join(filter(None, [note, f"{rate:.3g}/s"]))
        self._bar.update(self._task, completed=done, note=note)
        is_due = now_s - self._reported_s >= REPORT_EVERY_S or done == self._total
        if not self._console.is_terminal and is_due:
            self._reported_s = now_s
            left_s = (self._total - done) / rate
            line = f"{self._what}: {done}/{self._total}, {note}, {left_s:.0f} s left"
            self._console.print(line, highlight=False, soft_wrap=True)

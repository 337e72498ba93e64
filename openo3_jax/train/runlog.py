"""What a run says: one line each, on stderr and, with the time, in a file without terminal codes."""

import datetime
import threading
from pathlib import Path

from rich import console

from openo3_jax import hosts

LOG = "log.txt"


class RunLog:
    """`say` may be called by any thread. Lines said before the run's directory exists are on stderr alone.

    Of several processes the first one says and writes; the others only `warn`, on stderr with their number.
    """

    def __init__(self, out: Path):
        self.console = console.Console(stderr=True)  # a live table on it stays below what is said
        self._out = out
        self._lock = threading.Lock()
        self._is_first, self._name = hosts.is_first(), hosts.name()

    def say(self, line: str) -> None:
        if self._is_first:
            self._print(line)
            self.note(line)

    def warn(self, line: str) -> None:
        """What concerns this process."""
        text = f"{self._name}: {line}" if self._name else line
        self._print(text)
        if self._is_first:
            self.note(text)

    def _print(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def note(self, text: str) -> None:
        """Into the file alone. A full disk is no reason to stop: the file is left as it is."""
        now = datetime.datetime.now().isoformat(sep=" ", timespec="seconds")
        with self._lock:
            try:
                with (self._out / LOG).open("a", encoding="utf-8") as stream:
                    stream.write(f"{now} {text}\n")
            except OSError:
                return

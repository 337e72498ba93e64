"""What a run says: one line each, on stderr and, with the time, in a file without terminal codes."""

import datetime
import threading
from pathlib import Path

from rich import console

LOG = "log.txt"


class RunLog:
    """`say` may be called by any thread. Lines said before the run's directory exists are on stderr alone."""

    def __init__(self, out: Path):
        self.console = console.Console(stderr=True)  # a live table on it stays below what is said
        self._out = out
        self._lock = threading.Lock()

    def say(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)
        self.note(line)

    def note(self, text: str) -> None:
        """Into the file alone. A full disk is no reason to stop: the file is left as it is."""
        now = datetime.datetime.now().isoformat(sep=" ", timespec="seconds")
        with self._lock:
            try:
                with (self._out / LOG).open("a", encoding="utf-8") as stream:
                    stream.write(f"{now} {text}\n")
            except OSError:
                return

"""No progress for a while -> where every thread of the process is, in words."""

import sys
import threading
import time
import traceback
from collections.abc import Callable


class Watchdog:
    """A thread that waits for `beat`; after `limit_s` without one it tells, once, where each thread stands.

    `limit_s` 0: nothing is watched. A context manager.
    """

    def __init__(self, limit_s: float, say: Callable[[str], None]):
        self._limit_s = limit_s
        self._say = say
        self._over = threading.Event()
        self._beat_s = time.monotonic()
        self._doing = "starting"
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def beat(self, doing: str) -> None:
        """There is progress; `doing` is what follows."""
        self._doing, self._beat_s = doing, time.monotonic()

    def __enter__(self) -> "Watchdog":
        if self._limit_s:
            self.beat(self._doing)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._limit_s:
            self._thread.join()

    def _watch(self) -> None:
        told_s = None  # the beat that was told about
        while not self._over.wait(self._limit_s / 10):
            beat_s = self._beat_s
            waited_s = time.monotonic() - beat_s
            if waited_s > self._limit_s and told_s != beat_s:
                told_s = beat_s
                self._say(f"no progress for {waited_s:.0f} s while {self._doing}; threads:\n{stacks()}")


def stacks() -> str:
    """The stack of every Python thread but this one, innermost call last."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    own = threading.get_ident()
    parts = [
        f"thread {names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame)).rstrip()}"
        for ident, frame in sys._current_frames().items()
        if ident != own
    ]
    return "\n".join(parts)

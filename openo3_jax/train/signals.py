"""SIGTERM and SIGINT -> a wish to stop that the loop can see; the second one leaves at once."""

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignals:
    """While the `with` block runs, the first signal sets `name`, the second ends the process with 128 + its number.

    A thread is woken by the operating system, so the second signal works while the main thread compiles; the main
    thread sees the wish before it goes on. Outside of the main thread nothing is caught.
    """

    def __init__(self, say: Callable[[str], None]):
        self.name: str | None = None  # of the signal that came
        self._say = say
        self._is_main = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> "StopSignals":
        if self._is_main:
            self._read, write = os.pipe()
            os.set_blocking(write, False)
            self._write = write
            self._handlers = {number: signal.signal(number, self._note) for number in SIGNALS}
            self._previous_fd = signal.set_wakeup_fd(write)
            self._thread = threading.Thread(target=self._watch, name="signals", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_main:
            signal.set_wakeup_fd(self._previous_fd)
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
            os.close(self._write)  # ends the thread
            self._thread.join()
            os.close(self._read)

    def _watch(self) -> None:
        number_seen = 0
        while byte := os.read(self._read, 1):
            if byte[0] not in SIGNALS:
                continue
            number_seen += 1
            if number_seen == 2:
                os._exit(128 + byte[0])
            self._note(byte[0], None)
            self._say(f"{self.name}: saving after this step; a second signal leaves at once")

    def _note(self, number: int, frame: FrameType | None) -> None:
        """Python writes the number into the pipe before it calls this in the main thread."""
        del frame
        self.name = self.name or signal.Signals(number).name

"""What the next step needs, made while this one runs."""

from collections.abc import Callable
from concurrent import futures
from typing import Generic, TypeVar

Made = TypeVar("Made")


class Ahead(Generic[Made]):
    """Step -> `make(step)`, of which a thread makes the following one meanwhile: one waits, never more.

    With batches on the devices: while a step runs, the next batch is read, packed and copied there. What `make`
    raises is raised when its step is asked for. A context manager: leaving it waits for what is being made.
    """

    def __init__(self, make: Callable[[int], Made], steps: int):
        self._make = make
        self._steps = steps
        self._thread = futures.ThreadPoolExecutor(1, thread_name_prefix="ahead")
        self._waiting: tuple[int, futures.Future[Made]] | None = None

    def __enter__(self) -> "Ahead[Made]":
        return self

    def __exit__(self, *_: object) -> None:
        self._waiting = None
        self._thread.shutdown(cancel_futures=True)

    def __call__(self, step: int) -> Made:
        """What was made for a step below `steps`."""
        is_there = self._waiting is not None and self._waiting[0] == step
        future = self._waiting[1] if is_there else self._thread.submit(self._make, step)
        self._waiting = None
        made = future.result()
        if step + 1 < self._steps:
            self._waiting = step + 1, self._thread.submit(self._make, step + 1)
        return made

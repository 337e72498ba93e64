"""A few decoding processes shared by many threads; each serves one caller at a time and can be killed."""

import contextlib
import os
import queue
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from typing import TypeVar

from openo3_jax.data import video
from openo3_jax.errors import InputError

MOST = 32  # decoders, unless more are asked for: enough for one host of accelerators

Item = TypeVar("Item")
Result = TypeVar("Result")


def count(asked: int) -> int:
    """How many decoders to use where `asked` are wanted; 0: one per core, at most `MOST`.

    Raises: InputError for a number below 0.
    """
    if asked < 0:
        raise InputError(f"{asked} decoders; expected 0, for one per core, or more")
    return asked or min(os.cpu_count() or 1, MOST)


class Decoders:
    """`num` decoders, started when they are first needed. A context manager: leaving it ends their processes.

    Example: `with Decoders(8) as decoders, decoders.borrow() as decoder: decoder.read("clip.mp4", VideoConfig())`
    """

    def __init__(self, num: int):
        assert num >= 1
        self._all = [video.Decoder() for _ in range(num)]
        self._idle: queue.LifoQueue[video.Decoder] = queue.LifoQueue()  # last in, first out: few are ever started
        for decoder in self._all:
            self._idle.put(decoder)

    def __len__(self) -> int:
        return len(self._all)

    def __enter__(self) -> "Decoders":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the processes; what still waits for one gets an error, so that none is started again."""
        for decoder in self._all:
            decoder.close()

    @contextlib.contextmanager
    def borrow(self) -> Iterator[video.Decoder]:
        """A decoder for the `with` block; waits for one to be free."""
        decoder = self._idle.get()
        try:
            yield decoder
        finally:
            self._idle.put(decoder)

    def map(self, function: Callable[[video.Decoder, Item], Result], items: Sequence[Item]) -> Iterator[Result]:
        """`function(decoder, item)` for each item, as many at once as there are decoders; results in order."""

        def call(item: Item) -> Result:
            with self.borrow() as decoder:
                return function(decoder, item)

        executor = futures.ThreadPoolExecutor(len(self._all), thread_name_prefix="decode")
        try:
            yield from executor.map(call, items)
        finally:
            executor.shutdown(cancel_futures=True)

"""Metrics -> event files that TensorBoard reads, written without threads: what is written is on disk."""

import time
from collections.abc import Mapping
from pathlib import Path

from tensorboardX import event_file_writer, summary
from tensorboardX.proto import event_pb2


class EventWriter:
    """One file for each start of a run; what earlier files hold of steps after `start` is no longer shown."""

    def __init__(self, directory: Path, *, start: int):
        directory.mkdir(parents=True, exist_ok=True)
        self._writer = event_file_writer.EventsWriter(str(directory / "events"), f".{start}")
        session = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._writer.write_event(event_pb2.Event(step=start + 1, wall_time=time.time(), session_log=session))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        now_s = time.time()
        for name, value in values.items():
            scalar = summary.scalar(name, value)
            self._writer.write_event(event_pb2.Event(step=step, wall_time=now_s, summary=scalar))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()

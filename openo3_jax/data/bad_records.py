"""Records that cannot be used: named in a file, counted, and too many of them end the run."""

import json
import os
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from openo3_jax.errors import InputError

_SHOWN = 3  # of the reasons, in the error


class BadRecords:
    """Collects what is wrong with which records; any thread may add. Each record counts once.

    `file`: a JSON line for each is appended to it, {"index", "id", "task", "source", "path", "reason"}.
    """

    def __init__(
        self, records: Sequence[Mapping[str, Any]], max_fraction: float, file: str | os.PathLike | None = None
    ):
        self._records = records
        self._max_fraction = max_fraction
        self._file = file
        self._reasons: dict[int, str] = {}
        self._lock = threading.Lock()

    def write_to(self, file: str | os.PathLike) -> None:
        """Name those known so far and all that follow in `file`, which is written anew."""
        with self._lock:
            open(file, "w").close()
            self._file = file
            for index, reason in self._reasons.items():
                self._write(index, reason)

    def __len__(self) -> int:
        return len(self._reasons)

    @property
    def reasons(self) -> Mapping[int, str]:
        """What is wrong, by index of the record."""
        return dict(self._reasons)

    def add(self, index: int, reason: str) -> None:
        """Raises: InputError once more than `max_fraction` of all records are bad, with the first of the reasons."""
        with self._lock:
            if index not in self._reasons:
                self._reasons[index] = reason
                self._write(index, reason)
            num, limit = len(self._reasons), self._max_fraction * len(self._records)
            if num > limit:
                named = " | ".join(f"record {i}: {why}" for i, why in list(self._reasons.items())[:_SHOWN])
                more = f" | and {num - _SHOWN} more" if num > _SHOWN else ""
                where = f"; all are listed in {self._file}" if self._file else ""
                raise InputError(
                    f"{num} of {len(self._records)} records cannot be used, which is more than "
                    f"max_bad_fraction={self._max_fraction:g}: {named}{more}{where}; `openo3 data check --fix` leaves "
                    "them out"
                )

    def _write(self, index: int, reason: str) -> None:
        if self._file is None:
            return
        record = self._records[index]
        line = {"index": index, "id": record.get("id"), "task": record["task"], "source": record["source"]}
        line |= {"path": record.get("video_path") or record.get("image_path"), "reason": reason}
        with open(self._file, "a", encoding="utf-8") as lines:
            lines.write(json.dumps(line, ensure_ascii=False) + "\n")

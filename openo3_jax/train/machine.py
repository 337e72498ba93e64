"""What a run takes of its machine: memory, and programs compiled. Metrics that differ from one machine to another."""

import os
from collections.abc import Callable
from pathlib import Path

import jax

_COMPILED = "/jax/core/compile/backend_compile_duration"  # also of programs read from the cache
_GIB = 2**30
NOTED_S = 0.5  # a program that takes as long is noted when it is there; all of them are counted
_SHOWN = 8  # of the programs, in the summary


class Machine:
    """Counts programs while the `with` block runs and tells `note` what they are: long ones at once, all at the end.

    A function that is compiled for several shapes is several programs.
    """

    def __init__(self, note: Callable[[str], None]):
        self._note = note
        self._programs = 0
        self._compile_s = 0.0
        self._by_name: dict[str, list[float]] = {}

    def __enter__(self) -> "Machine":
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        return self

    def __exit__(self, *_: object) -> None:
        jax.monitoring.unregister_event_duration_listener(self._listen)
        longest = sorted(self._by_name.items(), key=lambda item: -sum(item[1]))
        parts = [f"{name} {len(times)} x, {sum(times):.1f} s" for name, times in longest[:_SHOWN]]
        more = f"; {len(longest) - _SHOWN} others" if len(longest) > _SHOWN else ""
        self._note(f"compiled {self._programs} programs in {self._compile_s:.1f} s: {'; '.join(parts) or 'none'}{more}")

    def _listen(self, event: str, duration_s: float, *, fun_name: str = "unnamed", **_: object) -> None:
        if event == _COMPILED:
            self._programs += 1
            self._compile_s += duration_s
            self._by_name.setdefault(fun_name, []).append(duration_s)
            if duration_s >= NOTED_S:
                self._note(f"compiled {fun_name} in {duration_s:.1f} s, program {self._programs} of this run")

    def values(self) -> dict[str, float]:
        """Since the block began: programs and their seconds. Now: GiB of the process and of its fullest device."""
        values = {"time/programs": float(self._programs), "time/compile_s": self._compile_s}
        resident = _resident_bytes()
        if resident is not None:
            values["memory/host_gib"] = resident / _GIB
        stats = [found for device in jax.local_devices() if (found := device.memory_stats())]
        for name, key in (("device_gib", "bytes_in_use"), ("device_peak_gib", "peak_bytes_in_use")):
            if stats:
                values[f"memory/{name}"] = max(one.get(key, 0) for one in stats) / _GIB
        return values


def _resident_bytes() -> int | None:
    """None where the kernel does not tell in the way of Linux."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else None

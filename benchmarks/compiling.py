"""Seconds that jax has spent compiling in this process, so that they can be told apart from the work."""

import time

from jax import monitoring

_found: list[float] = []


def watch() -> None:
    """Count from now on."""
    monitoring.register_event_duration_secs_listener(_note)


def _note(event: str, seconds: float, **_: object) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
        _found.append(seconds)


def seconds() -> float:
    return sum(_found)


def clock_s() -> float:
    """A clock that stands still while jax compiles."""
    return time.perf_counter() - seconds()

"""Where a step's time goes: a trace of some steps, and the model's arithmetic as a share of the devices' peak."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax

from openo3_jax import hosts
from openo3_jax.config import LoRAConfig, ModelConfig
from openo3_jax.errors import InputError
from openo3_jax.models import flops
from openo3_jax.types import VisionGrid

# Dense bfloat16 operations per second of one device, as its maker states them, by a part of `device_kind`.
PEAKS: Mapping[str, float] = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "TPU v6 lite": 918e12,
    "TPU v5p": 459e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v4": 275e12,
}


class Steps(NamedTuple):
    """Steps to trace, from 1, the last one included."""

    first: int
    last: int


def parse_steps(text: str) -> Steps:
    """`10:15` -> steps 10 to 15. Raises: InputError for anything else."""
    first, colon, last = text.partition(":")
    if not (colon and first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise InputError(f"--profile {text}: expected the first and the last step to trace, such as 10:15")
    return Steps(int(first), int(last))


class Tracer:
    """Writes a trace of the chosen steps into `directory`, for XProf or Perfetto: of the first process.

    A context manager.
    """

    def __init__(self, directory: Path, wanted: Steps | None):
        self._directory = directory
        self._wanted = wanted if hosts.is_first() else None
        self._is_on = False

    def __enter__(self) -> "Tracer":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """The `with` block is step `number`, from 1."""
        if self._wanted is not None and number == self._wanted.first:
            jax.profiler.start_trace(str(self._directory), create_perfetto_trace=True)
            self._is_on = True
        with jax.profiler.StepTraceAnnotation("step", step_num=number):
            yield
        if self._wanted is not None and number == self._wanted.last:
            self._stop()

    def _stop(self) -> None:
        if self._is_on:
            self._is_on = False
            jax.profiler.stop_trace()


def peak_flops() -> float | None:
    """Of all devices together, per second; None where a device is not in the table."""
    devices = jax.devices()
    peak = next((peak for part, peak in PEAKS.items() if part in devices[0].device_kind), None)
    return None if peak is None else peak * len(devices)


def rates(model_flops: int, tokens: int, seconds: float) -> dict[str, float]:
    """Of a step: TFLOP/s of the model's arithmetic, tokens per second, and MFU in [0, 1] where the peak is known.

    Example: 1e12 operations and 100 tokens in 2 s -> 0.5 TFLOP/s and 50 tokens/s.
    """
    values = {"time/model_tflops_per_s": model_flops / seconds / 1e12, "time/tokens_per_s": tokens / seconds}
    peak = peak_flops()
    return values if peak is None else values | {"time/mfu": model_flops / seconds / peak}


def sft_flops(
    config: ModelConfig,
    sizes: Iterable[tuple[int, int, Sequence[VisionGrid]]],
    *,
    lora: LoRAConfig | None = None,
) -> int:
    """An update of stage one on samples of (tokens, targets, pictures), forward and backward; no recomputation."""
    return sum(
        flops.forward_flops(config, grids, prompt=length, targets=targets)
        + flops.backward_flops(config, grids, prompt=length, targets=targets, lora=lora)
        for length, targets, grids in sizes
    )


def gspo_flops(
    config: ModelConfig,
    groups: Iterable[tuple[int, Sequence[int], Sequence[VisionGrid]]],
    *,
    scored: int,
    lora: LoRAConfig | None = None,
) -> int:
    """A step of stage two on groups of (prompt tokens, tokens of each completion, pictures).

    Sampling is one forward, training one with its backward, and `scored` more are made by the reference and by the old
    policy.
    """
    total = 0
    for prompt, lengths, grids in groups:
        sizes = {"prompt": prompt, "completions": lengths, "targets": sum(lengths)}
        total += (2 + scored) * flops.forward_flops(config, grids, **sizes)
        total += flops.backward_flops(config, grids, **sizes, lora=lora)
    return total

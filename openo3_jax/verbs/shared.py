"""What several verbs share: flags without a prefix, the sizes of a mesh, devices, a bar, the exit code of a claim."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from tyro.conf import arg

from openo3_jax.errors import InputError

Flat = arg(name="")  # fields of a nested dataclass as flags of their own


def claim(text: str, holds: bool) -> int:
    """Print what was found; the exit code tells whether it holds."""
    print(text)
    return 0 if holds else 3


def mesh_axes(text: str | None) -> dict[str, int] | None:
    """`fsdp=4,tensor=2` -> {"fsdp": 4, "tensor": 2}."""
    if text is None:
        return None
    pairs = [part.partition("=") for part in text.split(",")]
    axes = {axis.strip(): int(size) for axis, _, size in pairs if size.strip().isdecimal()}
    if len(axes) != len(pairs):
        raise InputError(f"--mesh {text}: expected different axes with their sizes, such as fsdp=4,tensor=2")
    return axes


def split_cpu() -> None:
    """Two devices of one thread each train small models faster than one of two threads. To call before jax starts."""
    os.environ.setdefault("XLA_FLAGS", f"--xla_force_host_platform_device_count={min(2, os.cpu_count() or 1)}")


def check_place(flag: str, file: Path | None) -> None:
    """Before what may take minutes. Raises: InputError for a file that cannot be written."""
    if file is not None and (file.is_dir() or not file.absolute().parent.is_dir()):
        raise InputError(f"{flag} {file}: cannot be written; expected the name of a file in a directory that exists")


@contextlib.contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A function that is told how much is done, of how much, and shows it on stderr."""
    from openo3_jax.train import metrics

    with contextlib.ExitStack() as stack:
        bars: list[metrics.Progress] = []

        def advance(done: int, total: int) -> None:
            if not bars:
                bars.append(stack.enter_context(metrics.Progress(what, total)))
            bars[0].update(done, "")

        yield advance

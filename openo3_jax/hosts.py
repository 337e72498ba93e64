"""The processes of a run: how they find each other, what they tell each other, and how one ends when another is gone.

With one process everything here is what it is given, and nothing is sent.
"""

import contextlib
import ctypes
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from openo3_jax.config import HostsConfig
from openo3_jax.errors import InputError

Made = TypeVar("Made")
Told = TypeVar("Told")

ROOM = 2048  # bytes of a message that goes in one collective; a longer one takes a second
LOST = "another process of the run is gone; go on with --resume, on as many processes as there are"
SHUTDOWN_S = 60  # that a process which is done waits for the others

# What jax raises when a process of the other end is gone, by the words of its transport: gloo on CPUs, NCCL on GPUs,
# the coordination service everywhere.
_LOST_WORDS = ("Gloo", "gloo", "NCCL", "coordination service", "CoordinationService", "heartbeat")

_LOG_LINE = re.compile(rb"[IWEF]\d{4} \d\d:\d\d:")  # what a line of XLA's own log begins with
_OF_SERVICE = (b"coordination_service", b" client.h:")


def start(config: HostsConfig, *, heartbeat_timeout_seconds: int) -> None:
    """Join the other processes, before anything else is asked of jax. Nothing happens where one process is meant.

    From here on this process ends with one line and exit code 1 when another one is gone: at once where it was killed,
    after `heartbeat_timeout_seconds` where it is silent.
    Raises: InputError where the cluster does not say who is who.
    """
    if not config.is_distributed:
        return
    # Signals are the run's own (train/signals.py); this service would take SIGTERM for itself.
    jax.config.update("jax_enable_preemption_service", False)
    who = {}
    if config.coordinator is not None:
        who = {"coordinator_address": config.coordinator, "cluster_detection_method": "deactivate"}
        who |= {"num_processes": config.num_processes, "process_id": config.process_id}
    elif "SLURM_JOB_ID" in os.environ and os.environ.get("SLURM_NTASKS") == os.environ.get("SLURM_NNODES"):
        # jax gives each process of Slurm one GPU; this one is alone on its node.
        who = {"local_device_ids": _all_gpus()}
    try:
        jax.distributed.initialize(
            **who, heartbeat_timeout_seconds=heartbeat_timeout_seconds, shutdown_timeout_seconds=SHUTDOWN_S
        )
    except ValueError as error:  # no cluster that jax knows
        raise InputError(
            f"--distributed: {error} Not within Slurm, Open MPI, Kubernetes or a TPU VM? Give --coordinator HOST:PORT, "
            "--num-processes and --process-id"
        ) from None
    except RuntimeError as error:
        raise InputError(f"{config.coordinator or '--distributed'}: {_first_line(error)}") from None
    if jax.default_backend() == "cpu":
        # The cache of programs serves the first process alone; it would then wait for the others while they compile,
        # and gloo gives up after 30 s.
        jax.config.update("jax_enable_compilation_cache", False)
    _Farewell(name()).install()


def _all_gpus() -> list[int] | None:
    """Those of the node that Slurm has given to its one process; None where Slurm gives none."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES") or os.environ.get("SLURM_STEP_GPUS")
    return None if not given else list(range(len(given.split(","))))


def is_first() -> bool:
    """Whether this process is the one that writes."""
    return jax.process_index() == 0


def name() -> str:
    """How this process names itself in what it says: empty where there is no other."""
    return "" if jax.process_count() == 1 else f"process {jax.process_index()} of {jax.process_count()}"


def gather(value: Told) -> list[Told]:
    """What each process has, in their order; values as JSON has them. Every process must call it, in the same order."""
    if jax.process_count() == 1:
        return [value]
    message = np.frombuffer(json.dumps(value).encode(), np.uint8)
    head = np.zeros(8 + ROOM, np.uint8)
    head[:8] = np.frombuffer(np.int64(len(message)).tobytes(), np.uint8)
    head[8:][: len(message)] = message[:ROOM]
    heads = multihost_utils.process_allgather(head)
    lengths = heads[:, :8].copy().view(np.int64)[:, 0]
    texts = heads[:, 8:]
    if lengths.max() > ROOM:
        rest = np.zeros(1 << int(lengths.max()).bit_length(), np.uint8)  # few sizes: each is a program
        rest[: len(message)] = message
        texts = multihost_utils.process_allgather(rest)
    return [json.loads(text[:length].tobytes()) for text, length in zip(texts, lengths, strict=True)]


def together(make: Callable[[], Made], tell: Callable[[Made], Any] = lambda made: None) -> tuple[Made, list[Any]]:
    """`make()` in every process, and what each one tells of what it made.

    Raises: InputError in all of them if one did, or could not read or write a file, with its words: no process waits
    for one that has stopped. In that one itself what it raised.
    """
    made, own = None, None
    try:
        made = make()
        said = {"told": tell(made)}
    except (InputError, OSError) as error:
        own = error
        said = {"error": str(error)}
    answers = gather(said)
    if own is not None:
        raise own
    for number, answer in enumerate(answers):
        if "error" in answer:
            raise InputError(f"process {number}: {answer['error']}")
    return made, [answer["told"] for answer in answers]


def agree(said: Sequence[str], what: str, remedy: str) -> None:
    """Raises: InputError, in all processes alike, where one of them has said another thing than the first."""
    for number, one in enumerate(said):
        if one != said[0]:
            raise InputError(f"{what}: {one} in process {number}, {said[0]} in process 0; {remedy}")


def first(make: Callable[[], Told]) -> Told:
    """What `make` gives in the first process, as JSON has it; the others wait for it and do not call it."""
    return together(lambda: make() if is_first() else None, lambda made: made)[1][0]


def whole(tree: Any) -> Any:
    """Arrays of which each process holds a part -> numpy arrays, whole in every process."""

    def fetch(leaf: Any) -> np.ndarray:
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated:
            return np.asarray(leaf)
        return multihost_utils.process_allgather(leaf, tiled=True)

    return jax.tree.map(fetch, tree)


def is_lost(error: Exception) -> bool:
    """Whether an error of the devices says that another process is gone."""
    is_own = isinstance(error, InputError)
    return jax.process_count() > 1 and not is_own and any(word in str(error) for word in _LOST_WORDS)


@contextlib.contextmanager
def until_lost() -> Iterator[None]:
    """The innermost `with` block of what works with other processes: where one is gone this one ends, with one line.

    At once: leaving the blocks around it, and jax's own way out, would wait for the one that is gone.
    """
    try:
        yield
    except (jax.errors.JaxRuntimeError, ValueError) as error:  # jax raises one or the other
        if not is_lost(error):
            raise
        sys.stderr.write(f"openo3: {name()}: {LOST} ({_first_line(error)[:200]})\n")
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


class _Farewell:
    """What the coordination service does when another process is silent or the first one is gone: it writes pages to
    stderr and aborts. This makes it one line and exit code 1; everything else that libraries write passes.

    They write to the file descriptor, so that is a pipe now, whose other end a thread reads.
    """

    def __init__(self, process: str):
        self._process = process
        self._stderr = os.dup(2)
        self._pipe, end = os.pipe()
        os.dup2(end, 2)
        os.close(end)
        self._is_hiding = False  # what follows of the log is the coordination service's

    def install(self) -> None:
        sys.stderr.flush()
        sys.stderr = os.fdopen(os.dup(self._stderr), "w", buffering=1, encoding="utf-8", errors="backslashreplace")
        threading.Thread(target=self._forward, name="stderr", daemon=True).start()
        handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(self._abort)
        libc = ctypes.CDLL(None)
        libc.signal.restype = ctypes.c_void_p
        libc.signal(int(signal.SIGABRT), handler)  # Python's own handlers run in the main thread, which may be waiting
        self._kept = handler  # the kernel has its address

    def _forward(self) -> None:
        with os.fdopen(self._pipe, "rb") as lines:
            for line in lines:
                if _LOG_LINE.match(line):
                    self._is_hiding = any(place in line for place in _OF_SERVICE)
                if not self._is_hiding:
                    os.write(self._stderr, line)

    def _abort(self, number: int) -> None:
        """In the thread that aborts. Returning lets it go on."""
        del number
        time.sleep(0.3)  # until what it wrote has been read
        if self._is_hiding:
            os.write(self._stderr, f"openo3: {self._process}: {LOST}\n".encode())
            os._exit(1)

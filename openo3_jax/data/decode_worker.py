"""The decoding process: one JSON request per line on stdin -> one JSON line and raw frames on stdout.

It imports no jax: numpy, PyAV (or decord) and Pillow only. Run as `python -m openo3_jax.data.decode_worker`.
"""

import io
import json
import os
import queue
import signal
import threading
from typing import IO, Any

from openo3_jax.config import VideoConfig
from openo3_jax.data import decode
from openo3_jax.errors import InputError

_GRACE_S = 5.0  # beyond the deadline, should the parent be gone and the decoder deaf


def main() -> None:
    """Serve requests until stdin closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a codec library prints must not reach the answers
    requests: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    # Unbuffered: should a decode raise, Python could not close a buffer that this thread waits on, and would abort.
    lines = open(0, "rb", buffering=0, closefd=False)  # noqa: SIM115 - open as long as the process lives
    threading.Thread(target=_receive, args=(lines, requests), daemon=True).start()
    answers.write(b"ready\n")
    answers.flush()
    while True:
        _serve(requests.get(), answers)


def _receive(lines: io.FileIO, requests: queue.SimpleQueue) -> None:
    """Own thread, so that the end of the parent is noticed in the middle of a decode."""
    for line in lines:
        requests.put(json.loads(line))
    os._exit(0)


def _serve(request: dict[str, Any], answers: IO[bytes]) -> None:
    if hasattr(signal, "setitimer"):  # the kernel ends a decode that holds the interpreter lock for ever
        signal.setitimer(signal.ITIMER_REAL, request["deadline_s"] + _GRACE_S)
    frames = None
    try:
        video = decode.decode_clip(request["path"], VideoConfig(**request["config"]), name=request["name"])
    except InputError as error:
        header = {"error": str(error)}
    else:
        frames = video.frames
        header = {
            "shape": frames.shape,
            "times_s": video.times_s.tolist(),
            "duration_s": video.duration_s,
            "source_hw": video.source_hw,
        }
    answers.write(json.dumps(header).encode() + b"\n")
    if frames is not None:
        answers.write(frames.tobytes())
    answers.flush()
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, 0.0)


if __name__ == "__main__":
    main()

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

import numpy as np

from openo3_jax.config import VideoConfig
from openo3_jax.data import decode, images
from openo3_jax.data.video import Video
from openo3_jax.errors import InputError

_GRACE_S = 5.0  # beyond the deadline, should the parent be gone and the decoder deaf


def main() -> None:
    """Serve requests until stdin closes."""
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
    pixels = None
    try:
        header, pixels = _ANSWERS[request["wish"]](request)
    except InputError as error:
        header = {"error": str(error)}
    answers.write(json.dumps(header).encode() + b"\n")
    if pixels is not None:
        answers.write(pixels.tobytes())
    answers.flush()
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, 0.0)


Answer = tuple[dict[str, Any], np.ndarray | None]  # a header, and the pixels that follow it


def _decode(request: dict[str, Any]) -> Answer:
    video = decode.decode_clip(request["path"], VideoConfig(**request["config"]), name=request["name"])
    return _video_header(video), video.frames


def _probe(request: dict[str, Any]) -> Answer:
    video = decode.probe_clip(request["path"], VideoConfig(**request["config"]), name=request["name"])
    return _video_header(video), None


def _video_header(video: Video) -> dict[str, Any]:
    return {
        "shape": video.frames.shape,
        "times_s": video.times_s.tolist(),
        "duration_s": video.duration_s,
        "source_hw": video.source_hw,
    }


def _inspect(request: dict[str, Any]) -> Answer:
    inspection = decode.inspect_clip(request["path"], VideoConfig(**request["config"]), name=request["name"])
    return inspection._asdict(), None


def _frames_at(request: dict[str, Any]) -> Answer:
    config = VideoConfig(**request["config"])
    frames = decode.decode_frames_at(request["path"], request["times_s"], config, name=request["name"])
    return {"shape": frames.shape}, frames


def _picture(request: dict[str, Any]) -> Answer:
    """Opened by its name, so that errors name the file as the user did; both processes stand in one directory."""
    pixels, source_hw = images.fit_picture(request["name"], images.to_size(request["size"]))
    return {"shape": pixels.shape, "source_hw": source_hw}, pixels


_ANSWERS = {"decode": _decode, "probe": _probe, "inspect": _inspect, "frames_at": _frames_at, "picture": _picture}


if __name__ == "__main__":
    main()

"""A video file -> the frames the model sees and when each is shown, decoded in a process that can be killed."""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from typing import IO, Any, NamedTuple

import numpy as np
from jaxtyping import Float64, UInt8

from openo3_jax.config import VideoConfig
from openo3_jax.data import images, sampling
from openo3_jax.errors import InputError

_START_DEADLINE_S = 60.0  # imports on a busy machine; not part of the deadline of a decode


@dataclasses.dataclass(frozen=True)
class Video:
    """The shown frames of a clip, an even number of them, sides multiples of 28 px.

    `times_s`: when each frame is presented, from the first shown frame of the stream, or the reference's
    labels i / sample_fps (`VideoConfig.frame_times`). `duration_s`: likewise to the end of the last frame.
    `source_hw`: height and width in px of the upright picture before the resize.
    """

    frames: UInt8[np.ndarray, "frames height width 3"]
    times_s: Float64[np.ndarray, " frames"]
    duration_s: float
    source_hw: tuple[int, int]

    @property
    def size_wh(self) -> tuple[int, int]:
        """Width and height in px of the frames, in the order of the records' `image_size`."""
        return self.frames.shape[2], self.frames.shape[1]


class Inspection(NamedTuple):
    """What a look at the first, middle and last frame of a clip tells; `source_hw` as in `Video`.

    `is_whole`: the three come out where the file says they are. Else what is left of the clip counts.
    """

    duration_s: float
    source_hw: tuple[int, int]
    is_whole: bool


Reader = Callable[[str | os.PathLike, VideoConfig], Video]


class Decoder:
    """One decoding process that serves any number of clips, one after the other.

    A decode that passes its deadline is killed, one that crashes is reported; the next `read` starts afresh.
    The process ends with the `with` block and, whatever happens to this one, when its standard input closes.

    Example: `with Decoder() as decoder: video = decoder.read("clip.mp4", VideoConfig())`
    """

    def __init__(self):
        self._process: subprocess.Popen | None = None
        self._log: IO[bytes] | None = None  # what the process writes to stderr
        self._lock = threading.Lock()
        self._is_closed = False

    def __enter__(self) -> "Decoder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process, for good; does not wait for a decode that is under way."""
        self._is_closed = True
        process = self._process
        if process is not None:
            process.kill()
        with self._lock:
            self._stop()

    def read(self, path: str | os.PathLike, config: VideoConfig) -> Video:
        """The frames of one clip.

        Raises: InputError naming the file when it is missing, empty, no video, unreadable, shorter than two
        frames, too large, or when decoding it crashes or takes longer than `config.deadline_s` seconds.
        """
        header, frames = self._call("decode", path, config.deadline_s, config=dataclasses.asdict(config))
        return _to_video(header, frames)

    def read_part(self, path: str | os.PathLike, config: VideoConfig, start_s: float, end_s: float) -> Video:
        """The frames at moments spread evenly from `start_s` to `end_s`, or to the clip's end where that comes first.

        There are config.fps moments per second, an even number within the config's limits. `times_s` are these moments,
        from `start_s`; in what `read` gives it is when the frames begin. Where the file holds fewer frames than there
        are moments, one is given several times, as `read` never does. `duration_s` is the length of the part.

        Raises: as `read` does, where the part begins after the clip ends, and for a file whose frames cannot be found
        by their times.
        """
        whole = self.probe(path, config)
        length_s = min(end_s, whole.duration_s) - start_s
        if start_s < 0 or length_s <= 0:
            raise InputError(
                f"{os.fspath(path)}: is {whole.duration_s:.1f} s long; expected a part of it in seconds, got "
                f"{start_s:g} to {end_s:g}"
            )
        hundredths = max(round(100 * length_s), sampling.FRAME_FACTOR)
        times_s = np.linspace(0.0, length_s, sampling.choose_num_frames(hundredths, 100.0, config))
        return Video(self.frames_at(path, (start_s + times_s).tolist(), config), times_s, length_s, whole.source_hw)

    def probe(self, path: str | os.PathLike, config: VideoConfig) -> Video:
        """What `read` gives, but black and without memory: how many frames, how large and when.

        Where the file promises more than can be decoded, `read` may find fewer frames. Raises: as `read` does.
        """
        header, _ = self._call("probe", path, config.deadline_s, config=dataclasses.asdict(config))
        return _to_video(header, np.broadcast_to(np.uint8(0), header["shape"]))

    def inspect(self, path: str | os.PathLike, config: VideoConfig) -> Inspection:
        """Decode the first, the middle and the last frame. Raises: as `read` does."""
        header, _ = self._call("inspect", path, config.deadline_s, config=dataclasses.asdict(config))
        return Inspection(header["duration_s"], tuple(header["source_hw"]), header["is_whole"])

    def frames_at(
        self, path: str | os.PathLike, times_s: Sequence[float], config: VideoConfig
    ) -> UInt8[np.ndarray, "frames height width 3"]:
        """The frames that are shown at these times, in seconds from the first; sized as `read` sizes them.

        Raises: as `read` does.
        """
        settings = {"config": dataclasses.asdict(config), "times_s": list(times_s)}
        return self._call("frames_at", path, config.deadline_s, **settings)[1]

    def picture(
        self, path: str | os.PathLike, size: images.Size, *, deadline_s: float = VideoConfig.deadline_s
    ) -> tuple[UInt8[np.ndarray, "height width 3"], tuple[int, int]]:
        """`images.fit_picture` in the decoding process. Raises: as that does, and as `read` does."""
        header, pixels = self._call("picture", path, deadline_s, size=size)
        return pixels, tuple(header["source_hw"])

    def _call(
        self, wish: str, path: str | os.PathLike, deadline_s: float, **wants: Any
    ) -> tuple[dict[str, Any], UInt8[np.ndarray, "..."] | None]:
        """The header of the answer, and the pixels if some follow it."""
        name = os.fspath(path)
        kind = "picture" if wish == "picture" else "video"
        if not os.path.isfile(name):
            raise InputError(f"{name}: no such {kind} file")
        if not os.path.getsize(name):
            raise InputError(f"{name}: is empty (0 bytes); expected a {kind} file")
        request = {"wish": wish, "path": os.path.abspath(name), "name": name, "deadline_s": deadline_s, **wants}
        with self._lock:
            if self._is_closed:
                raise RuntimeError("this decoder has been closed")
            try:
                if self._process is None or self._process.poll() is not None:
                    self._start()
                return self._ask(name, request, deadline_s)
            except InputError:
                raise
            except BaseException:  # interrupted: the answer, when it comes, would be taken for the next one's
                self._stop()
                raise

    def _start(self) -> None:
        self._stop()
        # The worker finds what this process finds. decord's retries are the reference's (vision_process.py:25-42):
        # with 128 it refuses clean clips whose last frames are slow to come; the deadline bounds its endless ones.
        paths = os.pathsep.join(p or os.getcwd() for p in sys.path)
        # One thread for the resize: workers run side by side, and threads of several would wait for each other.
        env = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", **os.environ}
        env |= {"PYTHONPATH": paths, "DECORD_EOF_RETRY_MAX": "20480"}
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by _stop
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "openo3_jax.data.decode_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=env,
            start_new_session=True,  # a signal to this one's group (Slurm, Ctrl-C) is not a clip that cannot be read
        )
        with _Deadline(self._process, _START_DEADLINE_S):
            ready = self._process.stdout.readline()
        if not ready:
            raise RuntimeError(f"the decoding process did not start: {self._last_words()}")

    def _stop(self) -> None:
        process, log, self._process, self._log = self._process, self._log, None, None
        if process is not None:
            process.kill()
            process.wait()
            process.stdout.close()
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
        if log is not None:
            log.close()

    def _ask(
        self, name: str, request: dict[str, Any], deadline_s: float
    ) -> tuple[dict[str, Any], UInt8[np.ndarray, "..."] | None]:
        process = self._process
        with _Deadline(process, deadline_s) as deadline:
            with contextlib.suppress(BrokenPipeError):  # it ended: reading tells
                process.stdin.write(json.dumps(request).encode() + b"\n")
                process.stdin.flush()
            answer = process.stdout.readline()
            header = json.loads(answer) if answer.endswith(b"\n") else {}
            has_pixels = "shape" in header and request["wish"] != "probe"
            pixels = _read_pixels(process.stdout, header["shape"]) if has_pixels else None
        if header and "error" not in header and (pixels is not None or not has_pixels):
            return header, pixels
        if "error" in header:
            raise InputError(header["error"])
        reason = self._last_words()
        self._stop()
        if self._is_closed:
            raise RuntimeError("this decoder has been closed")
        if deadline.passed:
            raise InputError(
                f"{name}: decoding took longer than deadline_s={deadline_s:g} s and was stopped; "
                "re-encode the clip or raise the deadline"
            )
        raise InputError(f"{name}: the decoder crashed ({reason}); re-encode the clip or leave it out")

    def _last_words(self) -> str:
        """Exit status and last line on stderr of a process that ended by itself."""
        code = self._process.wait()
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").split("\n")
        return "; ".join([f"exit status {code}", *[line.strip() for line in lines if line.strip()][-1:]])


class _Deadline:
    """Kills the process if the block takes longer; `passed` tells."""

    def __init__(self, process: subprocess.Popen, seconds: float):
        self.passed = False
        self._process = process
        self._timer = threading.Timer(seconds, self._expire)
        self._timer.daemon = True

    def _expire(self) -> None:
        self.passed = True
        self._process.kill()

    def __enter__(self) -> "_Deadline":
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()


def _read_pixels(stream: IO[bytes], shape: list[int]) -> UInt8[np.ndarray, "..."] | None:
    """Raw bytes -> pixels; None if the stream ends early."""
    pixels = np.empty(shape, np.uint8)
    rest = memoryview(pixels).cast("B")
    while rest:
        count = stream.readinto(rest)
        if not count:
            return None
        rest = rest[count:]
    return pixels


def _to_video(header: dict[str, Any], frames: UInt8[np.ndarray, "frames height width 3"]) -> Video:
    return Video(frames, np.array(header["times_s"], np.float64), header["duration_s"], tuple(header["source_hw"]))


def read_video(path: str | os.PathLike, config: VideoConfig, *, decoder: Decoder | None = None) -> Video:
    """The frames of one clip, chosen and sized by `config`; `decoder` is reused, else one is started for it.

    Raises: InputError as `Decoder.read` does.
    """
    if decoder is not None:
        return decoder.read(path, config)
    with Decoder() as own:
        return own.read(path, config)


def make_reader(decoder: Decoder) -> Reader:
    """`decoder.read` that decodes a clip once, however often it is asked for while the reader lives.

    Meant for one call over a few records: it keeps every clip it has read.
    """
    clips: dict[tuple[str, VideoConfig], Video] = {}

    def read(path: str | os.PathLike, config: VideoConfig) -> Video:
        key = os.path.realpath(path), config
        if key not in clips:
            clips[key] = decoder.read(path, config)
        return clips[key]

    return read

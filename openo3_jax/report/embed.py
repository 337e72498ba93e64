"""A clip or picture -> bytes that live inside a page: VP9 in WebM where it fits, else stills."""

import base64
import dataclasses
import io
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from typing import Literal

import av
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from openo3_jax.config import VideoConfig
from openo3_jax.data import images
from openo3_jax.data.video import Decoder
from openo3_jax.errors import InputError

Frames = UInt8[np.ndarray, "frames height width 3"]

_CHUNK = 48  # frames held at once
_TICKS_PER_S = 1000  # of time stamps: what WebM has
_FEWEST_FPS = 2.0  # below this a clip is shown as stills
_MOST_STILLS = 48
_JPEG_QUALITY = 80
# Every current browser plays it, those built without patented codecs too; constant quality, frequent key frames.
_CODEC = "libvpx-vp9"
_CODEC_OPTIONS = {"deadline": "realtime", "cpu-used": "8", "crf": "36", "b": "0", "g": "24", "threads": "1"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """How much of a clip goes into a page."""

    max_bytes: int = 8 * 2**20  # before base64, which adds a third
    max_pixels: int = 640 * 360  # per frame
    fps: float = 12.0
    max_frames: int = 720


@dataclasses.dataclass(frozen=True)
class Still:
    """A picture of the clip, a data URI, and when it is shown."""

    time_s: float
    uri: str


@dataclasses.dataclass(frozen=True)
class Embedded:
    """Media of one sample. `uri`: of the video, empty for stills. `width`, `height`: px of the upright source.

    `note`: what a viewer must know of how it was made.
    """

    kind: Literal["video", "stills", "picture"]
    uri: str
    stills: tuple[Still, ...]
    duration_s: float
    width: int
    height: int
    note: str


def embed_clip(
    path: str | os.PathLike, decoder: Decoder, moments_s: Sequence[float], limits: Limits | None = None
) -> Embedded:
    """The clip at `path`, its clock starting at its first frame; `moments_s` are shown exactly, whatever the rate.

    A clip that is too long or, encoded, too large, and one whose frames cannot be found by their times, becomes
    stills. Raises: InputError for a clip that cannot be decoded.
    """
    limits = limits or Limits()
    config = VideoConfig(min_pixels=28 * 28, max_pixels=limits.max_pixels)
    clip = decoder.probe(path, config)
    last_s = float(clip.duration_s)
    height, width = clip.source_hw
    fps = min(limits.fps, limits.max_frames / last_s)
    inside = sorted({min(max(t, 0.0), last_s) for t in moments_s if math.isfinite(t)})
    if fps >= _FEWEST_FPS:
        times_s = _merge(np.arange(0.0, last_s, 1 / fps).tolist(), inside, limits.max_frames)
        try:
            video = encode_webm(read_frames(path, decoder, times_s, config), times_s, last_s)
            if len(video) <= limits.max_bytes:
                note = f"re-encoded as VP9, {fps:.3g} frames per second and every cited moment, without sound"
                return Embedded("video", _uri(video, "video/webm"), (), last_s, width, height, note)
            reason = f"encoded it takes {len(video) / 2**20:.1f} MiB, more than {limits.max_bytes / 2**20:.1f}"
        except InputError as error:  # frames cannot be found by their times
            reason = str(error)
    else:
        reason = f"the clip is {last_s:.0f} s long"
    return _stills(path, decoder, inside, config, limits, reason)


def _stills(
    path: str | os.PathLike,
    decoder: Decoder,
    moments_s: Sequence[float],
    config: VideoConfig,
    limits: Limits,
    reason: str,
) -> Embedded:
    """What a model is shown of the clip, and the cited moments where they can be found."""
    clip = decoder.read(path, config)
    spread = list(zip(clip.times_s.tolist(), clip.frames, strict=True))
    cited, what = [], "evenly spread frames and the cited moments"
    if moments_s:
        try:
            wanted = list(moments_s)[: _MOST_STILLS - len(spread)]
            cited = list(zip(wanted, decoder.frames_at(path, wanted, config), strict=True))
        except InputError:
            what = "evenly spread frames"
    stills, size = {}, 0
    for time_s, pixels in [*cited, *spread]:
        uri = picture_uri(pixels)
        size += len(uri) * 3 // 4
        if size > limits.max_bytes:
            what += ", as many as fit"
            break
        stills.setdefault(time_s, Still(time_s, uri))
    height, width = clip.source_hw
    note = f"stills instead of the clip ({reason}): {what}"
    return Embedded("stills", "", tuple(stills[t] for t in sorted(stills)), float(clip.duration_s), width, height, note)


def embed_picture(path: str | os.PathLike, decoder: Decoder, limits: Limits | None = None) -> Embedded:
    """A still, scaled down to the limits. Raises: InputError for what is no picture."""
    limits = limits or Limits()
    pixels, (height, width) = decoder.picture(path, images.Area(28 * 28, limits.max_pixels))
    uri = picture_uri(pixels)
    return Embedded("picture", "", (Still(0.0, uri),), 0.0, width, height, "")


def picture_uri(pixels: UInt8[np.ndarray, "height width 3"]) -> str:
    """A JPEG as a data URI."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=_JPEG_QUALITY)
    return _uri(file.getvalue(), "image/jpeg")


def encode_webm(frames: Iterable[UInt8[np.ndarray, "height width 3"]], times_s: Sequence[float], end_s: float) -> bytes:
    """VP9 frames, each shown from its time on, the last one until `end_s`; sides are even.

    Raises: InputError where this build of av cannot encode VP9.
    """
    if _CODEC not in av.codecs_available:
        raise InputError(f"this build of av has no {_CODEC} encoder; install the av wheel from PyPI")
    file, tick = io.BytesIO(), Fraction(1, _TICKS_PER_S)
    with av.open(file, "w", format="webm") as container:
        stream = None
        for time_s, pixels in zip([*times_s, end_s], _repeat_last(frames), strict=True):
            if stream is None:
                stream = container.add_stream(_CODEC, rate=24, options=_CODEC_OPTIONS)
                stream.height, stream.width, stream.pix_fmt = *pixels.shape[:2], "yuv420p"
                stream.codec_context.time_base = tick
            frame = av.VideoFrame.from_ndarray(pixels, "rgb24")
            frame.pts, frame.time_base = round(time_s * _TICKS_PER_S), tick
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.getvalue()


def _repeat_last(frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """The last frame twice, so that the clip lasts to its end."""
    for frame in frames:
        yield frame
    yield frame


def read_frames(
    path: str | os.PathLike, decoder: Decoder, times_s: Sequence[float], config: VideoConfig
) -> Iterator[UInt8[np.ndarray, "height width 3"]]:
    """The frames shown at these times, a few of them in memory at once. Raises: InputError as `frames_at` does."""
    for start in range(0, len(times_s), _CHUNK):
        yield from decoder.frames_at(path, times_s[start : start + _CHUNK], config)


def _merge(even_s: Sequence[float], moments_s: Sequence[float], most: int) -> list[float]:
    """Both in order, no two in one tick of the container; of `most` the moments come first."""
    ticks = {round(time_s * _TICKS_PER_S) for time_s in list(moments_s)[: most // 2]}
    ticks |= {round(time_s * _TICKS_PER_S) for time_s in even_s}
    return [tick / _TICKS_PER_S for tick in sorted(ticks)]


def _uri(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"

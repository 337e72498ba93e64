"""A video file -> `Video`, in this process: PyAV or decord. Called by the decoding process, which can be killed."""

import bisect
import contextlib
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import NamedTuple

import av
import numpy as np
from jaxtyping import Int, UInt8

from openo3_jax.config import VideoConfig
from openo3_jax.data import images, sampling
from openo3_jax.data.video import Inspection, Video
from openo3_jax.errors import InputError

Pixels = UInt8[np.ndarray, "height width 3"]
Choice = Callable[[int, float, VideoConfig], Int[np.ndarray, " frames"]]  # number of frames, fps -> which are shown

# A container's average rate is believed when it agrees with its own time stamps to this share.
_RATE_TOLERANCE = 0.01
# Decoders that pass over a frame that no other refers to, and give the others unchanged.
_SKIP_EXACTLY = ("h264", "hevc")
# PyAV raises IndexError for a packet of a stream that a transport stream introduces half way.
_DEMUX_ERRORS = (av.error.FFmpegError, IndexError)


class _Index(NamedTuple):
    """When the frames of a stream are shown, in units of `time_base`, before or after decoding them."""

    pts: list[int]  # sorted, distinct
    keys: list[int]  # the key frames among them, sorted
    last_duration: int
    time_base: Fraction
    average_rate: Fraction | None  # as the container says
    whole: bool  # every packet could be read and tells its time

    @property
    def duration_s(self) -> float:
        return float((self.pts[-1] + self.last_duration - self.pts[0]) * self.time_base)

    @property
    def fps(self) -> float:
        """The container's rate; the measured one where the container is wrong (variable frame rate, lost frames)."""
        measured = len(self.pts) / self.duration_s
        stated = float(self.average_rate or 0.0)
        return stated if abs(stated - measured) <= _RATE_TOLERANCE * measured else measured


def decode_clip(path: str, config: VideoConfig, *, name: str) -> Video:
    """Read, choose and resize the frames of the file at `path`; errors call it `name`.

    Frames are found by the presentation times of their packets. Where those cannot be trusted (a cut tail, lost
    packets, missing or shuffled time stamps) the whole clip is decoded and what comes out is used.

    Raises: InputError as `video.Decoder.read` does, crash and deadline aside.
    """
    with _named_errors(name):
        index = _read_index(path, config, name)
        if config.decoder == "decord":
            return _decord_video(path, index, config, name)
        video = _video_by_time(path, index, config, name) if index.whole else None
        return video or _video_in_order(path, config, name)


def probe_clip(path: str, config: VideoConfig, *, name: str) -> Video:
    """What `decode_clip` gives, but black; only the first frame is decoded.

    Where the file promises more than can be decoded, `decode_clip` may find fewer frames.

    Raises: InputError as `decode_clip` does.
    """
    with _named_errors(name):
        index = _read_index(path, config, name)
        source_hw = _first_size(path, config, name) if index.whole else None
        if source_hw is None:
            return _video_in_order(path, config, name)
        wanted = sampling.choose_frames(len(index.pts), index.fps, config)
        size_hw = sampling.frame_size(*source_hw, len(wanted), config)
        black = np.broadcast_to(np.uint8(0), (len(wanted), *size_hw, 3))
        return Video(black, *_times(wanted, index, config), source_hw)


def _first_size(path: str, config: VideoConfig, name: str) -> tuple[int, int] | None:
    """Height and width in px of the first frame, upright; None if it cannot be decoded."""
    with _open(path, config, name) as (container, stream):
        try:
            frame = next(container.decode(stream), None)
        except av.error.FFmpegError:
            return None
        if frame is None:
            return None
        height, width = _upright(frame, stream).shape[:2]
        return height, width


def inspect_clip(path: str, config: VideoConfig, *, name: str) -> Inspection:
    """Decode the first, the middle and the last frame of the file at `path`.

    Raises: InputError as `decode_clip` does.
    """
    with _named_errors(name):
        index = _read_index(path, config, name)
        video = _video_by_time(path, index, config, name, sampling.choose_ends) if index.whole else None
        rest = video or _video_in_order(path, config, name, sampling.choose_ends)
        return Inspection(rest.duration_s, rest.source_hw, video is not None)


def decode_frames_at(
    path: str, times_s: Sequence[float], config: VideoConfig, *, name: str
) -> UInt8[np.ndarray, "frames height width 3"]:
    """The frames of the file at `path` that are shown at `times_s`, which may stand in any order.

    Raises: InputError as `decode_clip` does, and for a file whose frames cannot be found by their times.
    """
    with _named_errors(name):
        index = _read_index(path, config, name)
        shown_s = [float((pts - index.pts[0]) * index.time_base) for pts in index.pts] if index.whole else []
        # The last frame that begins by then; a rounded time may fall just short of its frame.
        chosen = [max(bisect.bisect_right(shown_s, time_s + 1e-3) - 1, 0) for time_s in times_s]
        wanted = np.unique(chosen)
        video = _video_by_time(path, index, config, name, lambda *_: wanted) if index.whole else None
        if video is None:
            raise InputError(f"{name}: its frames cannot be found by their times; remux it as mp4")
        return video.frames[np.searchsorted(wanted, chosen)]


@contextlib.contextmanager
def _named_errors(name: str) -> Iterator[None]:
    """FFmpeg's errors as one line that names the file."""
    try:
        yield
    except av.error.FFmpegError as error:
        reason = error.strerror or type(error).__name__
        raise InputError(f"{name}: cannot be decoded ({reason}); expected a whole video file such as mp4") from None


class _Frames:
    """Collects the chosen frames, each resized at once, so that only one is held at full size."""

    def __init__(self, index: _Index, config: VideoConfig, choose: Choice = sampling.choose_frames):
        self.wanted = choose(len(index.pts), index.fps, config)
        self._index, self._config = index, config
        self._source_hw: tuple[int, int] | None = None
        self._resized: list[Pixels] = []

    def __len__(self) -> int:
        return len(self._resized)

    def drop_after(self, count: int) -> None:
        del self._resized[count:]

    def add(self, pixels: Pixels) -> None:
        if self._source_hw is None:
            self._source_hw = (pixels.shape[0], pixels.shape[1])
        size_hw = sampling.frame_size(*self._source_hw, len(self.wanted), self._config)
        self._resized.append(images.resize_frames(pixels[None], *size_hw)[0])

    def to_video(self) -> Video:
        assert len(self._resized) == len(self.wanted), (len(self._resized), len(self.wanted))
        times_s, duration_s = _times(self.wanted, self._index, self._config)
        return Video(np.stack(self._resized), times_s, duration_s, self._source_hw)


def _times(wanted: Int[np.ndarray, " frames"], index: _Index, config: VideoConfig) -> tuple[np.ndarray, float]:
    """Seconds of each shown frame and of the clip, true or as the reference labels them.

    Source: Open-o3-Video src/r1-v/src/open_r1/vision_process.py:252-255, sft_multi_task.py:345.
    """
    if config.frame_times == "released":
        sample_fps = len(wanted) / len(index.pts) * index.fps
        return np.arange(len(wanted)) / sample_fps, len(wanted) / sample_fps
    first = index.pts[0]
    return np.array([float((index.pts[i] - first) * index.time_base) for i in wanted]), index.duration_s


# ---- the file ----


@contextlib.contextmanager
def _open(path: str, config: VideoConfig, name: str) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """The container and its first real video stream, sizes checked; only local files are ever opened."""
    with av.open(path, options={"protocol_whitelist": "file"}, metadata_errors="replace") as container:
        covers = av.stream.Disposition.attached_pic
        streams = [s for s in container.streams.video if not s.disposition & covers]
        if not streams:
            raise InputError(f"{name}: has no video stream (audio or subtitles only); expected a video file")
        stream = streams[0]
        if stream.codec_context is None:
            raise InputError(f"{name}: its codec is not known here; re-encode it, for example as H.264 in mp4")
        height, width = stream.codec_context.height, stream.codec_context.width
        if max(height, width) > config.max_side_px:
            raise InputError(
                f"{name}: {width}x{height} px (width x height); sides of at most max_side_px="
                f"{config.max_side_px} are decoded; scale the clip down"
            )
        if min(height, width) and max(height, width) > images.MAX_ASPECT_RATIO * min(height, width):
            raise InputError(
                f"{name}: {width}x{height} px (width x height); a side is more than "
                f"{images.MAX_ASPECT_RATIO} times the other; crop the clip"
            )
        yield container, stream


def _read_index(path: str, config: VideoConfig, name: str) -> _Index:
    """Presentation times of all packets, without decoding one."""
    with _open(path, config, name) as (container, stream):
        packets, whole = [], True
        try:
            for packet in container.demux(stream):
                if packet.size and not packet.is_discard:
                    whole &= packet.pts is not None and not packet.is_corrupt
                    packets.append((packet.pts, packet.is_keyframe, packet.duration))
        except _DEMUX_ERRORS:
            whole = False
        timed = sorted((p for p in packets if p[0] is not None), key=lambda packet: packet[0])
        index = _Index(
            sorted({pts for pts, _, _ in timed}),
            sorted({pts for pts, is_key, _ in timed if is_key}),
            timed[-1][2] or 0 if timed else 0,
            stream.time_base,
            stream.average_rate,
            whole,
        )
        return _checked(index, name) if whole else index


def _checked(index: _Index, name: str) -> _Index:
    """The index of a clip of at least two frames; the last one lasts as long as the one before if it does not say."""
    if not index.pts:
        raise InputError(f"{name}: no frame can be decoded; expected a whole video file such as mp4")
    if len(index.pts) < 2:
        raise InputError(f"{name}: holds 1 frame; a video needs at least 2; pass a still as an image")
    return index if index.last_duration > 0 else index._replace(last_duration=index.pts[-1] - index.pts[-2])


def _upright(frame: av.VideoFrame, stream: av.VideoStream) -> Pixels:
    """RGB pixels turned as the file's display matrix says; a stream that changes size keeps its first one."""
    context = stream.codec_context
    pixels = frame.to_ndarray(format="rgb24", width=context.width, height=context.height)
    return np.ascontiguousarray(np.rot90(pixels, frame.rotation // 90))


# ---- PyAV, by time ----


def _video_by_time(
    path: str, index: _Index, config: VideoConfig, name: str, choose: Choice = sampling.choose_frames
) -> Video | None:
    """Seek to each chosen frame; None where one of them does not come out of the decoder in its turn."""
    frames = _Frames(index, config, choose)
    groups: dict[int, list[int]] = {}  # key frame -> the chosen frames before the next key frame
    for i in frames.wanted:
        key = bisect.bisect_right(index.keys, index.pts[i]) - 1
        groups.setdefault(key, []).append(index.pts[i])
    with _open(path, config, name) as (container, stream):
        for key, targets in groups.items():
            # A seek may land late (transport streams, open groups of pictures): try one key frame earlier.
            starts = [index.keys[k] for k in (key, key - 1) if k >= 0]
            if not any(_run(container, stream, start, targets, frames) for start in starts):
                with _open(path, config, name) as (afresh, stream_afresh):
                    if not _run(afresh, stream_afresh, None, targets, frames):
                        return None
    return frames.to_video()


def _run(
    container: av.container.InputContainer,
    stream: av.VideoStream,
    start: int | None,
    targets: Sequence[int],
    frames: _Frames,
) -> bool:
    """Decode from the key frame shown at `start` (None: where the container stands), add the targets to `frames`.

    False, with nothing added, unless every target came out and times only grew.
    """
    before, last = len(frames), None
    try:
        if start is not None:
            container.seek(start, stream=stream)
        for frame in _decoded(container, stream, targets):
            late = last is None and frame.pts is not None and frame.pts > targets[0]
            if late or frame.pts is None or (last is not None and frame.pts <= last):
                break
            last = frame.pts
            if last in targets:
                frames.add(_upright(frame, stream))
            if last >= targets[-1]:
                break
    except av.error.FFmpegError:  # a broken packet: the caller decodes the clip in order
        last = None
    if len(frames) == before + len(targets):
        return True
    frames.drop_after(before)
    return False


def _decoded(
    container: av.container.InputContainer, stream: av.VideoStream, targets: Sequence[int]
) -> Iterator[av.VideoFrame]:
    """Frames as they are shown, without those that are neither targets nor needed to decode others."""
    can_skip = stream.codec_context.name in _SKIP_EXACTLY
    for packet in container.demux(stream):
        if can_skip:
            is_wanted = packet.pts is None or packet.pts in targets
            stream.codec_context.skip_frame = "DEFAULT" if is_wanted else "NONREF"
        yield from packet.decode()


# ---- PyAV, in order ----


def _shown(path: str, config: VideoConfig, name: str) -> Iterator[tuple[av.VideoFrame, av.VideoStream]]:
    """Every frame that can be decoded, as it is shown; broken packets are passed over, a broken tail ends it."""
    with _open(path, config, name) as (container, stream):
        packets = container.demux(stream)
        while True:
            try:
                packet = next(packets)
            except (StopIteration, *_DEMUX_ERRORS):
                return
            try:
                decoded = [] if packet.is_corrupt else packet.decode()
            except av.error.FFmpegError:
                continue
            for frame in decoded:
                yield frame, stream


def _video_in_order(path: str, config: VideoConfig, name: str, choose: Choice = sampling.choose_frames) -> Video:
    """Decode the clip twice: to see which frames there are, and to keep the chosen ones.

    Frames come out in the order they are shown, so shuffled time stamps (H.264 in AVI) are sorted; where there
    are none (a raw stream) they follow from the stated frame rate. Of frames with one time the first counts.
    """
    with _open(path, config, name) as (_, stream):
        time_base, rate = stream.time_base, stream.average_rate
    shown = [(frame.pts, frame.duration or 0) for frame, _ in _shown(path, config, name)]
    if any(pts is None for pts, _ in shown):
        if not rate:
            raise InputError(f"{name}: states neither frame times nor a frame rate (0 fps); remux it as mp4")
        shown, time_base = [(i, 1) for i in range(len(shown))], 1 / rate
    first_with: dict[int, int] = {}
    for ordinal, (pts, _) in enumerate(shown):
        first_with.setdefault(pts, ordinal)
    ordinals = list(first_with.values())
    last_duration = max(shown, default=(0, 0))[1]
    index = _Index(sorted(first_with), [], last_duration, time_base, rate, True)
    frames = _Frames(_checked(index, name), config, choose)
    chosen = {ordinals[i] for i in frames.wanted}
    for ordinal, (frame, stream) in enumerate(_shown(path, config, name)):
        if ordinal in chosen:
            frames.add(_upright(frame, stream))
    return frames.to_video()


# ---- decord ----


def _decord_video(path: str, index: _Index, config: VideoConfig, name: str) -> Video:
    """decord counts frames and turns pictures itself; times stay PyAV's.

    Raises: InputError where the two disagree on the number of frames, or decord gives up.
    """
    import decord  # another copy of FFmpeg, loaded only where it is asked for

    hint = "use decoder='pyav'"
    if not index.whole:
        raise InputError(f"{name}: has broken packets or no frame times, which decord cannot place; {hint}")
    frames = _Frames(index, config)
    try:
        reader = decord.VideoReader(path, num_threads=1)
        if len(reader) != len(index.pts):
            raise InputError(f"{name}: decord counts {len(reader)} frames, the file holds {len(index.pts)}; {hint}")
        for i in frames.wanted:
            frames.add(reader[int(i)].asnumpy())
    except decord.DECORDError as error:
        reason = str(error).strip().splitlines()[0].rpartition("]")[2]
        raise InputError(f"{name}: decord cannot decode it ({reason}); {hint}") from None
    return frames.to_video()

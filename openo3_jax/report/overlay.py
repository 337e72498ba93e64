"""An answer and its clip -> an mp4 or gif that stops at every cited moment, with boxes and captions."""

import contextlib
import dataclasses
import math
import os
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from openo3_jax import tags
from openo3_jax.config import VideoConfig
from openo3_jax.data.video import Decoder
from openo3_jax.errors import InputError
from openo3_jax.report import embed

Pixels = UInt8[np.ndarray, "height width 3"]
Color = tuple[int, int, int]

COLORS: tuple[Color, ...] = ((255, 107, 94), (106, 168, 255), (255, 174, 77), (212, 144, 255), (79, 224, 228))
_GROUND, _INK, _SOFT = (20, 23, 27), (240, 240, 240), (150, 158, 168)
_SAME_S = 0.05  # mentions closer than this share a stop
_MARGIN, _LINES = 8, 5  # px; lines of the answer that are shown


@dataclasses.dataclass(frozen=True)
class Style:
    """`play_s`: a longer clip is played faster, in this time. `hold_s`: how long the clip stops at a cited moment."""

    fps: int
    width: int  # px of the picture
    play_s: float
    hold_s: float = 1.5
    most_stops: int = 12


STYLES = {".mp4": Style(fps=12, width=640, play_s=30.0), ".gif": Style(fps=6, width=320, play_s=12.0)}


class Box(NamedTuple):
    """xyxy, fractions of the picture."""

    name: str
    frac: tuple[float, float, float, float]
    color: Color


class Stop(NamedTuple):
    """A moment at which the clip stops: what is drawn, and what stands below."""

    time_s: float
    caption: str
    boxes: tuple[Box, ...]


def check_name(out: Path) -> None:
    """Raises InputError unless the name says mp4 or gif."""
    if out.suffix.lower() not in STYLES:
        raise InputError(f"{out}: expected a name that ends in {' or '.join(STYLES)}")


def write(
    out: str | os.PathLike, path: str | os.PathLike, question: str, completion: str, shown_hw: tuple[int, int]
) -> None:
    """Write the clip at `path` with the answer's evidence, whole or not at all; `shown_hw`: px that its boxes refer to.

    An answer without evidence gives the clip with the answer below it. Raises: InputError for another kind of file
    and for a clip that cannot be decoded.
    """
    out = Path(out)
    check_name(out)
    style = STYLES[out.suffix.lower()]
    staging = out.with_name(f".{out.name}.part{out.suffix}")
    config = VideoConfig(min_pixels=28 * 28, max_pixels=640 * 360)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with Decoder() as decoder:
            clip = decoder.probe(path, config)
            stops = find_stops(completion, shown_hw, float(clip.duration_s))[: style.most_stops]
            schedule = make_schedule(stops, float(clip.duration_s), style)
            canvas = Canvas(question, completion, clip.source_hw, float(clip.duration_s), stops, style)
            times_s = [time_s for time_s, _ in schedule]
            pictures = embed.read_frames(path, decoder, times_s, config)
            drawn = (canvas.draw(p, t, stop) for p, (t, stop) in zip(pictures, schedule, strict=True))
            repeats = [1 if stop is None else round(style.hold_s * style.fps) for _, stop in schedule]
            _ENCODERS[out.suffix.lower()](staging, drawn, repeats, style.fps, canvas.total)
        staging.replace(out)
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error.strerror}); choose another place") from None
    finally:
        with contextlib.suppress(OSError):
            staging.unlink()


def find_stops(completion: str, shown_hw: tuple[int, int], duration_s: float) -> list[Stop]:
    """Where the clip stops, in order; mentions of one moment share a stop, boxes without a time come at the end.

    A cited time outside of the clip stops at its nearest end, and the caption says so.
    """
    height, width = shown_hw
    found: dict[float, list[tuple[str, list[Box]]]] = {}
    for number, mention in enumerate(tags.parse_mentions(completion), 1):
        color = COLORS[(number - 1) % len(COLORS)]
        times_s = [t for t in mention.times_s if t is not None and math.isfinite(t)]
        if not times_s and not mention.boxes:
            continue
        name = textwrap.shorten(mention.name, 40, placeholder="..")
        known = [box for box in mention.boxes or () if box is not None and all(map(math.isfinite, box))]
        scaled = [(x1 / width, y1 / height, x2 / width, y2 / height) for x1, y1, x2, y2 in known]
        boxes = [Box(f"{number} {name}".strip(), box, color) for box in scaled if box[2] > box[0] and box[3] > box[1]]
        when = " to ".join(f"{t:g} s" for t in times_s) or "no time cited"
        time_s = min(max(times_s[0], 0.0), duration_s) if times_s else duration_s
        if times_s and time_s != times_s[0]:
            when += " (outside of the clip)"
        at = next((t for t in found if abs(t - time_s) < _SAME_S), time_s)
        found.setdefault(at, []).append((f"{number} {name} {when}".replace("  ", " "), boxes))
    return [
        Stop(time_s, "   ".join(text for text, _ in said), tuple(box for _, boxes in said for box in boxes))
        for time_s, said in sorted(found.items())
    ]


def make_schedule(stops: Sequence[Stop], duration_s: float, style: Style) -> list[tuple[float, Stop | None]]:
    """Times of the clip in the order they are shown, each played or a stop."""
    step_s = max(1 / style.fps, duration_s / (style.play_s * style.fps))
    played = [(float(t), None) for t in np.arange(0.0, duration_s, step_s)]
    return sorted([*played, *((stop.time_s, stop) for stop in stops)], key=lambda one: (one[0], one[1] is not None))


class Canvas:
    """Draws one frame: question, picture with boxes, progress, caption, answer."""

    def __init__(
        self,
        question: str,
        completion: str,
        source_hw: tuple[int, int],
        duration_s: float,
        stops: Sequence[Stop],
        style: Style,
    ):
        height, width = source_hw
        self.size = (style.width, max(round(height / width * style.width / 2) * 2, 2))
        self._duration_s, self._stops = duration_s, stops
        self._font = ImageFont.load_default(max(style.width // 36, 11))
        self._line = round(self._font.getbbox("Ag")[3] * 1.25)
        reply = tags.answer_text(completion)
        reply = completion if reply is None else reply
        self._question = self._wrap(question)[:2]
        self._answer = self._wrap(f"Answer: {reply}")[:_LINES]
        self.top = len(self._question) * self._line + 2 * _MARGIN
        below = (len(self._answer) + 2) * self._line + 4 * _MARGIN
        total = self.top + self.size[1] + below
        self.total = (style.width, total + total % 2)

    def _wrap(self, text: str) -> list[str]:
        """Lines that fit the width."""
        most = max(int((self.size[0] - 2 * _MARGIN) / self._font.getlength("n")), 8)
        return textwrap.wrap(" ".join(text.split()), most) or [""]

    def draw(
        self, picture: Pixels, time_s: float, stop: Stop | None
    ) -> UInt8[np.ndarray, "total_height total_width 3"]:
        """The whole frame, `total` px (width, height)."""
        page = Image.new("RGB", self.total, _GROUND)
        shown = Image.fromarray(picture).resize(self.size, Image.Resampling.BILINEAR)
        for box in stop.boxes if stop is not None else ():
            self._draw_box(ImageDraw.Draw(shown), box)
        page.paste(shown, (0, self.top))
        pen = ImageDraw.Draw(page)
        y = _MARGIN
        for line in self._question:
            pen.text((_MARGIN, y), line, _SOFT, self._font)
            y += self._line
        y = self.top + self.size[1] + _MARGIN
        self._draw_progress(pen, y, time_s)
        y += _MARGIN
        pen.text((_MARGIN, y), f"{time_s:.1f} s", _INK, self._font)
        if stop is not None:
            color = stop.boxes[0].color if stop.boxes else _INK
            pen.text((_MARGIN + self.size[0] // 7, y), self._wrap(stop.caption)[0], color, self._font)
        y += self._line + _MARGIN
        for line in self._answer:
            pen.text((_MARGIN, y), line, _INK, self._font)
            y += self._line
        return np.asarray(page)

    def _draw_box(self, pen: ImageDraw.ImageDraw, box: Box) -> None:
        width, height = self.size
        x1, x2 = (min(max(v, 0.0), 1.0) * (width - 1) for v in box.frac[::2])
        y1, y2 = (min(max(v, 0.0), 1.0) * (height - 1) for v in box.frac[1::2])
        pen.rectangle((x1, y1, x2, y2), outline=box.color, width=max(width // 160, 2))
        high = self._line
        y = y1 - high if y1 >= high else y1
        pen.rectangle((x1, y, x1 + self._font.getlength(box.name) + 4, y + high), fill=(0, 0, 0))
        pen.text((x1 + 2, y), box.name, box.color, self._font)

    def _draw_progress(self, pen: ImageDraw.ImageDraw, y: int, time_s: float) -> None:
        left, right = _MARGIN, self.size[0] - _MARGIN

        def at(t: float) -> float:
            return left + (right - left) * min(t / self._duration_s, 1.0)

        pen.line((left, y, right, y), _SOFT, 1)
        pen.line((left, y, at(time_s), y), _INK, 3)
        for stop in self._stops:
            x = at(stop.time_s)
            pen.line((x, y - 4, x, y + 4), stop.boxes[0].color if stop.boxes else _INK, 3)


# ---- files ----


def _write_mp4(file: Path, frames: Iterable[Pixels], repeats: Sequence[int], fps: int, size: tuple[int, int]) -> None:
    if "libx264" not in av.codecs_available:
        raise InputError("this build of av has no libx264 encoder; install the av wheel from PyPI, or write a .gif")
    with av.open(str(file), "w", format="mp4", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "23", "threads": "1"})
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for frame in _repeated(frames, repeats):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
        container.mux(stream.encode(None))


def _write_gif(file: Path, frames: Iterable[Pixels], repeats: Sequence[int], fps: int, size: tuple[int, int]) -> None:
    del size  # that of the frames
    pictures = [Image.fromarray(frame).quantize(128, Image.Quantize.MEDIANCUT) for frame in frames]
    durations_ms = [round(1000 * count / fps) for count in repeats]
    first, *rest = pictures
    first.save(file, "GIF", save_all=True, append_images=rest, duration=durations_ms, loop=0)


def _repeated(frames: Iterable[Pixels], repeats: Sequence[int]) -> Iterator[Pixels]:
    for frame, count in zip(frames, repeats, strict=True):
        for _ in range(count):
            yield frame


_ENCODERS: dict[str, Callable[[Path, Iterable[Pixels], Sequence[int], int, tuple[int, int]], None]] = {
    ".mp4": _write_mp4,
    ".gif": _write_gif,
}

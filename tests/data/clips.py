"""Clips whose frames carry their number as eight black or white bars, so that a test reads what was decoded."""

from fractions import Fraction

import av
import numpy as np

HEIGHT, WIDTH = 64, 128


def bars(number: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    bits = [(number >> bit) & 1 for bit in range(8)]
    return np.repeat(np.repeat(255 * np.uint8(bits), width // 8)[None, :, None], height, 0).repeat(3, 2)


def read_number(frame: np.ndarray) -> int:
    """The number in the bars of a frame of any size."""
    columns = (np.arange(8) * 2 + 1) * frame.shape[1] // 16
    row = frame[frame.shape[0] // 2, columns].mean(-1) > 128
    return int(sum(1 << bit for bit in range(8) if row[bit]))


def encode(
    path,
    codec="libx264",
    *,
    pts=range(60),
    fps=10,
    options=None,
    gop=12,
    rotation=None,
    format=None,
    title="bars",
):
    """Write frames 0, 1, .. shown at `pts` / fps seconds; `rotation` in degrees goes into the display matrix."""
    rate = Fraction(fps).limit_denominator(1001)
    with av.open(str(path), "w", format=format) as container:
        container.metadata["title"] = title
        stream = container.add_stream(codec, rate=rate, options=options or {})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.codec_context.gop_size = gop
        if rotation is not None:
            stream.set_display_rotation(rotation)
        for number, time in enumerate(pts):
            frame = av.VideoFrame.from_ndarray(bars(number), "rgb24")
            frame.pts, frame.time_base = time, 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path

"""A clip of which the tests know everything: a blue square that crosses a white ground."""

from pathlib import Path

import av
import numpy as np

HEIGHT, WIDTH, SIDE = 112, 140, 36  # px
FPS, FRAMES = 10, 40
BLUE, WHITE = (40, 70, 230), (250, 250, 250)
NAME = "blue square"


def box_px(i: int) -> tuple[int, int, int, int]:
    """xyxy of the square in frame i."""
    return 4 + 2 * i, 10 + i, 4 + 2 * i + SIDE, 10 + i + SIDE


def box_frac(i: int) -> list[float]:
    """The same as fractions of the frame."""
    return (np.array(box_px(i)) / [WIDTH, HEIGHT, WIDTH, HEIGHT]).tolist()


def write(file: Path) -> Path:
    """An mp4, H.264, 4 s long."""
    with av.open(str(file), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"qp": "10", "threads": "1"})
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        for i in range(FRAMES):
            x1, y1, x2, y2 = box_px(i)
            pixels = np.full((HEIGHT, WIDTH, 3), WHITE, np.uint8)
            pixels[y1:y2, x1:x2] = BLUE
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, "rgb24")))
        container.mux(stream.encode(None))
    return file

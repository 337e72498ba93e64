"""Picture files and decoded frames -> uint8 pixels of the size the model sees. numpy and Pillow only.

Runs inside decode workers, so nothing here may import jax.
"""

import functools
import math
import os
import struct
import zlib
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, TypeVar

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from openo3_jax.errors import InputError

Decoded = TypeVar("Decoded")
Rule = Literal["reference", "transformers"]


class Area(NamedTuple):
    """The size of a picture, left to `smart_resize`: an area in px. The defaults are those of the training code.

    Source: Open-o3-Video src/r1-v/src/open_r1/vision_process.py:25-42.
    """

    min_pixels: int = 4 * 28 * 28
    max_pixels: int = 256 * 28 * 28
    like: Rule = "reference"


Size = Area | tuple[int, int]  # or height and width in px

MAX_ASPECT_RATIO = 200
MAX_SIDE_PX = 16_384
# What Pillow's decoders raise for bytes that are not a whole picture.
_DECODE_ERRORS = (
    OSError,
    EOFError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    struct.error,
    zlib.error,
)


def smart_resize(
    height: int, width: int, *, min_pixels: int, max_pixels: int, factor: int = 28, like: Rule = "reference"
) -> tuple[int, int]:
    """Height and width in px, both multiples of `factor`, with min_pixels <= height * width <= max_pixels.

    Sides are rounded half to even, then scaled together when the area is out of range. The range is missed
    where rounding leaves no such size (a side is at least `factor`, a small picture is scaled up past it).
    `like`: only thin pictures, one side below `factor` / 2, tell the training code and transformers apart: the first
    keeps that side at `factor`, the second scales both up until min_pixels are reached.

    Example: `smart_resize(480, 640, min_pixels=100_352, max_pixels=105_369) == (280, 364)`

    Raises: InputError for an empty picture or one with one side more than 200 times the other.
    Source: Open-o3-Video src/r1-v/src/open_r1/vision_process.py:61-87, where a very long picture can come out
    with a side of 0; here no side is below `factor`.
    """
    if height < 1 or width < 1:
        raise InputError(f"picture of {height}x{width} px is empty; expected both sides >= 1")
    if max(height, width) / min(height, width) > MAX_ASPECT_RATIO:
        raise InputError(
            f"picture of {height}x{width} px (height x width): a side is more than {MAX_ASPECT_RATIO} times "
            "the other; crop it"
        )
    least = factor if like == "reference" else 0
    new_height = max(least, round(height / factor) * factor)
    new_width = max(least, round(width / factor) * factor)
    if new_height * new_width > max_pixels:
        scale = math.sqrt(height * width / max_pixels)
        new_height = max(factor, math.floor(height / scale / factor) * factor)
        new_width = max(factor, math.floor(width / scale / factor) * factor)
    elif new_height * new_width < min_pixels:
        scale = math.sqrt(min_pixels / (height * width))
        new_height = math.ceil(height * scale / factor) * factor
        new_width = math.ceil(width * scale / factor) * factor
    return new_height, new_width


def load_picture(source: str | os.PathLike | Image.Image | np.ndarray) -> UInt8[np.ndarray, "height width 3"]:
    """RGB pixels of a file, a Pillow image or a uint8 array [height, width, 3], at their own size.

    RGBA is laid on white, every other mode is converted to RGB; the EXIF orientation is ignored.

    Raises: InputError naming the file when it is missing, truncated, not a picture, or larger than 16,384 px
    on a side or than Pillow's decompression-bomb limit; and for an array of another shape or type.
    Source: Open-o3-Video src/r1-v/src/open_r1/vision_process.py:90-96, 140.
    """
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[-1] != 3 or 0 in source.shape:
            raise InputError(
                f"picture array: got {source.dtype} {list(source.shape)}; expected uint8 [height, width, 3]"
            )
        _check_side(*source.shape[:2], name="picture array")
        return source
    if isinstance(source, Image.Image):
        return _decoded(lambda: _to_rgb(source, "picture"), "picture")
    if not isinstance(source, str | os.PathLike):
        raise InputError(
            f"picture: got {type(source).__name__}; expected a path, a PIL image or uint8 [height, width, 3]"
        )
    name = str(os.fspath(source))

    def read() -> np.ndarray:
        with Image.open(source) as picture:
            return _to_rgb(picture, name)

    return _decoded(read, name)


def fit_picture(
    source: str | os.PathLike | Image.Image | np.ndarray, size: Size
) -> tuple[UInt8[np.ndarray, "height width 3"], tuple[int, int]]:
    """RGB pixels resized to `size`, and the height and width in px before.

    Raises: InputError as `load_picture` does, and for a picture over 200 times as long as wide.
    """
    pixels = load_picture(source)
    source_hw = (pixels.shape[0], pixels.shape[1])
    return resize_picture(pixels, *_target(source, source_hw, size)), source_hw


def probe_picture(source: str | os.PathLike, size: Size) -> tuple[UInt8[np.ndarray, "height width 3"], tuple[int, int]]:
    """What `fit_picture` gives, but black and without memory; only the header of the file is read."""
    name = str(os.fspath(source))

    def read() -> tuple[int, int]:
        with Image.open(source) as picture:
            _check_side(picture.height, picture.width, name=name)
            return picture.height, picture.width

    source_hw = _decoded(read, name)
    return np.broadcast_to(np.uint8(0), (*_target(source, source_hw, size), 3)), source_hw


def to_size(numbers: Sequence[int | str]) -> Size:
    """The size that was sent as a JSON list."""
    return Area(*numbers) if len(numbers) == len(Area._fields) else (numbers[0], numbers[1])


def _target(source: object, source_hw: tuple[int, int], size: Size) -> tuple[int, int]:
    """Height and width in px after the resize."""
    if not isinstance(size, Area):
        return size
    try:
        return smart_resize(*source_hw, min_pixels=size.min_pixels, max_pixels=size.max_pixels, like=size.like)
    except InputError as error:
        raise InputError(f"{source}: {error}" if isinstance(source, str | os.PathLike) else str(error)) from None


def _decoded(read: Callable[[], Decoded], name: str) -> Decoded:
    """What `read` returns, with everything Pillow raises turned into one line that names the picture."""
    try:
        return read()
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{name}: no such picture file") from None
    except Image.DecompressionBombError:
        raise InputError(
            f"{name}: has more than {2 * Image.MAX_IMAGE_PIXELS:,} px (Pillow's limit); scale it down"
        ) from None
    except _DECODE_ERRORS as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{name}: not a readable picture ({reason}); expected a whole PNG or JPEG file") from None


def _check_side(height: int, width: int, *, name: str) -> None:
    if max(height, width) > MAX_SIDE_PX:
        raise InputError(f"{name}: {height}x{width} px; sides of at most {MAX_SIDE_PX} px are read; scale it down")


def _to_rgb(picture: Image.Image, name: str) -> UInt8[np.ndarray, "height width 3"]:
    _check_side(picture.height, picture.width, name=name)
    if picture.mode == "RGBA":
        white = Image.new("RGB", picture.size, (255, 255, 255))
        white.paste(picture, mask=picture.getchannel("A"))
        return np.asarray(white)
    return np.asarray(picture.convert("RGB"))


def resize_picture(
    pixels: UInt8[np.ndarray, "old_height old_width 3"], height: int, width: int
) -> UInt8[np.ndarray, "height width 3"]:
    """Pillow's bicubic resize, which stills and key frames get; heights and widths in px.

    Source: Open-o3-Video src/r1-v/src/open_r1/vision_process.py:140.
    """
    if pixels.shape[:2] == (height, width):
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))


def resize_frames(
    frames: UInt8[np.ndarray, "frames old_height old_width 3"], height: int, width: int
) -> UInt8[np.ndarray, "frames height width 3"]:
    """Antialiased bicubic (a = -0.5) in float32, rounded and clipped to 0..255 once: torchvision's.

    Two separable passes, each a few small dense products: an output block needs a narrow band of the input.

    Source: Open-o3-Video src/r1-v/src/open_r1/vision_process.py:310-315; the filter is that of
    `torch.nn.functional.interpolate(mode="bicubic", antialias=True)`.
    """
    num_frames, old_height, old_width, _ = frames.shape
    if (old_height, old_width) == (height, width):
        return frames
    rows = np.empty((num_frames, height, old_width * 3), np.float32)
    for out, band, weights in _bands(old_height, height):
        source = frames[:, band].reshape(num_frames, -1, old_width * 3).astype(np.float32)
        np.matmul(weights, source, out=rows[:, out])
    rows = rows.reshape(num_frames * height, old_width * 3)
    resized = np.empty((num_frames * height, width * 3), np.float32)
    for out, band, per_channel in _column_bands(old_width, width):
        resized[:, 3 * out.start : 3 * out.stop] = rows[:, 3 * band.start : 3 * band.stop] @ per_channel
    np.clip(np.rint(resized, out=resized), 0, 255, out=resized)
    return resized.astype(np.uint8).reshape(num_frames, height, width, 3)


Bands = tuple[tuple[slice, slice, np.ndarray], ...]


@functools.lru_cache(maxsize=16)  # every frame of a clip asks for the same
def _bands(size: int, new_size: int, block: int = 16) -> Bands:
    """(output slice, input slice, weights float32 [output, input]) for each block of outputs of a side."""
    weights, first, last = _bicubic_weights(size, new_size)
    starts = range(0, new_size, block)
    ends = [min(start + block, new_size) for start in starts]
    bands = [slice(int(first[start]), int(last[stop - 1])) for start, stop in zip(starts, ends, strict=True)]
    slices = [slice(start, stop) for start, stop in zip(starts, ends, strict=True)]
    return tuple((out, band, weights[out, band]) for out, band in zip(slices, bands, strict=True))


@functools.lru_cache(maxsize=16)
def _column_bands(size: int, new_size: int) -> Bands:
    """`_bands` for interleaved channels: expanding the weights costs less than transposing the pixels twice."""
    eye = np.eye(3, dtype=np.float32)
    return tuple((out, band, np.kron(weights.T, eye)) for out, band, weights in _bands(size, new_size))


def _bicubic_weights(size: int, new_size: int) -> tuple[Float[np.ndarray, "new_size size"], np.ndarray, np.ndarray]:
    """Row i weighs the inputs of output i and sums to 1; only inputs first[i] <= j < last[i] have any weight.

    Keys' cubic, w(x) = 1.5|x|^3 - 2.5|x|^2 + 1 for |x| < 1 and -0.5|x|^3 + 2.5|x|^2 - 4|x| + 2 for |x| < 2,
    stretched by the scale when shrinking (the antialiasing).
    """
    scale = size / new_size
    stretch = max(scale, 1.0)
    centre = scale * (np.arange(new_size) + 0.5)
    first = np.maximum((centre - 2 * stretch + 0.5).astype(np.int64), 0)
    last = np.minimum((centre + 2 * stretch + 0.5).astype(np.int64), size)
    inputs = np.arange(size)
    x = np.abs(inputs - centre[:, None] + 0.5) / stretch
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    weights = np.where(x < 1, near, np.where(x < 2, far, 0.0))
    weights *= (inputs >= first[:, None]) & (inputs < last[:, None])
    weights /= weights.sum(axis=1, keepdims=True)
    return weights.astype(np.float32), first, last

"""Sizes, resizes and loading of pictures; numbers are worked out by hand."""

import io
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from openo3_jax.data import images
from openo3_jax.errors import InputError

FRAME = {"min_pixels": 100_352, "max_pixels": 105_369}  # the reference's effective range for video frames
STILL = {"min_pixels": 3136, "max_pixels": 12_845_056}

SIZES = {  # name: (height, width, range, expected height and width)
    "full hd": (1080, 1920, FRAME, (224, 420)),
    "hd": (720, 1280, FRAME, (224, 420)),
    "vga": (480, 640, FRAME, (280, 364)),
    "nhd": (360, 640, FRAME, (224, 420)),
    "upscaled beyond the maximum": (240, 320, FRAME, (280, 392)),
    "portrait": (1920, 1080, FRAME, (420, 224)),
    "one pixel": (1, 1, STILL, (56, 56)),  # 28 * 28 < 3136, scale 56
    "ratio of exactly 200": (10, 2000, STILL, (28, 1988)),
    "half rounds to even, down": (70, 140, STILL, (56, 140)),  # 2.5 and 5 tokens
    "half rounds to even, up": (98, 140, STILL, (112, 140)),  # 3.5 and 5 tokens
    "side never 0": (30, 3000, {"min_pixels": 784, "max_pixels": 4 * 784}, (28, 560)),  # scale sqrt(28.7)
}


@pytest.mark.parametrize("name", SIZES)
def test_smart_resize(name):
    height, width, pixels, expected = SIZES[name]
    assert images.smart_resize(height, width, **pixels) == expected


@pytest.mark.parametrize(("height", "width", "says"), [(1, 201, "200 times"), (0, 5, "empty")])
def test_smart_resize_refuses(height, width, says):
    with pytest.raises(InputError, match=says):
        images.smart_resize(height, width, **STILL)


def test_resize_picture_is_pillows_bicubic():
    pixels = np.random.default_rng(0).integers(0, 256, (37, 53, 3), dtype=np.uint8)
    expected = Image.fromarray(pixels).resize((84, 28), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(images.resize_picture(pixels, 28, 84), np.asarray(expected))
    assert images.resize_picture(pixels, 37, 53) is pixels


# 4 -> 2: centres 1 and 3, stretch 2. Inputs 0..3 lie .25 .25 .75 1.25 from the first centre and weigh
# .8671875 .8671875 .2265625 -.0703125, in sum 1.890625.
HALVINGS = {  # name: (one line of 4 values, the 2 of half its length)
    "first": ([189, 0, 0, 0], [87, 0]),  # 189 * .86719 / 1.89063 = 86.69; second: -7.03, clipped
    "third": ([0, 0, 189, 0], [23, 87]),  # 22.65
    "overshoot": ([189, 189, 189, 0], [196, 102]),  # 189 + 7.03; 189 - 86.69 = 102.31
    "white stays white": ([255, 255, 255, 0], [255, 138]),  # 264.48 is clipped; 255 - 116.96 = 138.04
}


@pytest.mark.parametrize("name", HALVINGS)
def test_resize_frames_halves_a_line(name):
    line, expected = HALVINGS[name]
    across = np.zeros((1, 1, 4, 3), np.uint8)
    across[0, 0, :, 1] = line  # green only: channels must not mix
    want = np.zeros((1, 1, 2, 3), np.uint8)
    want[0, 0, :, 1] = expected
    np.testing.assert_array_equal(images.resize_frames(across, 1, 2), want)
    down, want_down = across.transpose(0, 2, 1, 3), want.transpose(0, 2, 1, 3)
    np.testing.assert_array_equal(images.resize_frames(down, 2, 1), want_down)


def test_resize_frames_keeps_frames_apart_and_flat_colours_flat():
    frames = np.stack([np.full((30, 50, 3), value, np.uint8) for value in (0, 7, 255)])
    resized = images.resize_frames(frames, 84, 28)
    assert resized.shape == (3, 84, 28, 3)
    assert [np.unique(frame).tolist() for frame in resized] == [[0], [7], [255]]
    assert images.resize_frames(frames, 30, 50) is frames


def test_load_picture_modes(tmp_path):
    rgba = Image.new("RGBA", (2, 1), (10, 20, 30, 255))
    rgba.putpixel((1, 0), (10, 20, 30, 0))
    rgba.save(tmp_path / "rgba.png")
    np.testing.assert_array_equal(images.load_picture(tmp_path / "rgba.png"), [[[10, 20, 30], [255, 255, 255]]])
    grey = Image.new("L", (3, 2), 77)
    np.testing.assert_array_equal(images.load_picture(grey), np.full((2, 3, 3), 77))
    array = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    np.testing.assert_array_equal(images.load_picture(array), array)


def test_load_picture_ignores_exif_orientation(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    Image.new("RGB", (8, 4)).save(tmp_path / "turned.jpg", exif=exif)
    assert images.load_picture(str(tmp_path / "turned.jpg")).shape == (4, 8, 3)


def _png(width: int, height: int) -> bytes:
    data = io.BytesIO()
    Image.new("L", (width, height)).save(data, "png")
    return data.getvalue()


BAD_FILES = {  # name: (bytes, what the message says)
    "text": (b"not a picture", "not a readable picture"),
    "empty": (b"", "not a readable picture"),
    "truncated": (_png(400, 400)[:-60], "not a readable picture"),
    "damaged header": (_png(4, 4)[:20] + b"\xff" * 30, "not a readable picture"),
    "too long": (_png(16_385, 1), "1x16385 px"),
    "bomb": (_png(16_000, 12_000), "Pillow's limit"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_load_picture_refuses_bad_files(name, tmp_path):
    data, says = BAD_FILES[name]
    path = tmp_path / "bad.png"
    path.write_bytes(data)
    with pytest.raises(InputError, match=says) as caught:
        images.load_picture(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow also warns of what it skips
def test_load_picture_survives_any_damage(tmp_path):
    """Every file is read or refused in one line, whichever bytes are wrong."""
    rng, refused = np.random.default_rng(0), 0
    noise = Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8))
    for number in range(300):
        data = io.BytesIO()
        noise.save(data, ("png", "jpeg", "gif", "webp", "tiff", "bmp")[number % 6])
        raw = np.frombuffer(data.getvalue(), np.uint8).copy()
        raw[rng.integers(0, min(len(raw), 400), 12)] = rng.integers(0, 256, 12)
        path = tmp_path / "damaged"
        path.write_bytes(raw.tobytes())
        try:
            assert images.load_picture(path).dtype == np.uint8
        except InputError as error:
            refused += "\n" not in str(error)
    assert refused > 50


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("/no/such/file.png", "no such picture file"),
        ("/tmp", "not a readable picture"),
        (np.zeros((2, 2, 3)), "float64"),
        (np.zeros((2, 2), np.uint8), r"\[2, 2\]"),
        (np.zeros((0, 2, 3), np.uint8), r"\[0, 2, 3\]"),
    ],
)
def test_load_picture_refuses_bad_sources(source, says):
    with pytest.raises(InputError, match=says):
        images.load_picture(source)


def test_workers_stay_free_of_jax():
    code = "import sys, openo3_jax.data.images; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0

"""The two decoders give the same pixels and times for clean clips."""

import dataclasses

import numpy as np
import pytest

from data import clips
from openo3_jax.config import VideoConfig
from openo3_jax.data import synthetic, video
from openo3_jax.errors import InputError

PYAV = VideoConfig(min_pixels=3136, max_pixels=3136)
DECORD = dataclasses.replace(PYAV, decoder="decord")

CLIPS = {
    "h264.mp4": {},
    "no_b_frames.mp4": {"options": {"bf": "0"}},
    "one_key_frame.mp4": {"gop": 250},
    "turned_left.mp4": {"rotation": 90},
    "turned_right.mp4": {"rotation": -90},
    "upside_down.mp4": {"rotation": 180},
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"deadline": "realtime", "cpu-used": "8"}},
    "ntsc.mp4": {"fps": 30_000 / 1001, "pts": range(200)},
}


@pytest.fixture(scope="module")
def decoder():
    with video.Decoder() as decoder:
        yield decoder


@pytest.mark.parametrize("name", CLIPS)
def test_decord_equals_pyav(name, tmp_path, decoder):
    path = clips.encode(tmp_path / name, **CLIPS[name])
    assert_equal(decoder.read(path, PYAV), decoder.read(path, DECORD))


@pytest.mark.parametrize("seed", range(3))
def test_decord_equals_pyav_on_rendered_clips(seed, tmp_path, decoder):
    path = tmp_path / "clip.mp4"
    synthetic.render_clip(path, seed=seed)
    assert_equal(decoder.read(path, VideoConfig()), decoder.read(path, VideoConfig(decoder="decord")))


def assert_equal(ours, theirs):
    assert len(ours.frames) >= 4 and ours.frames.std() > 1
    np.testing.assert_array_equal(ours.frames, theirs.frames)
    np.testing.assert_array_equal(ours.times_s, theirs.times_s)
    assert (ours.duration_s, ours.source_hw) == (theirs.duration_s, theirs.source_hw)


def test_decord_says_where_it_cannot_place_frames(tmp_path, decoder):
    path = clips.encode(tmp_path / "raw.h264", format="h264")
    with pytest.raises(InputError, match=r"raw.h264: .*decord cannot place; use decoder='pyav'"):
        decoder.read(path, DECORD)

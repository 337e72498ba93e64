"""The frame asked for is the frame returned, at its own time: codecs, containers, rates, rotations, by barcode."""

import dataclasses
import os
from concurrent.futures import ThreadPoolExecutor

import av
import numpy as np
import pytest

from data import clips
from openo3_jax.config import VideoConfig
from openo3_jax.data import decode, video

FPS = 10
EVERY = VideoConfig(min_pixels=3136, max_pixels=3136, fps=float(FPS), max_frames=64)  # all of up to 64 frames
FEW = VideoConfig(min_pixels=3136, max_pixels=3136, max_frames=6)

CODECS = {  # name: encoder, its options
    "h264": ("libx264", {"bf": "2"}),
    "h264, open groups": ("libx264", {"x264-params": "open-gop=1:bframes=3:b-adapt=0:scenecut=0"}),
    "hevc": ("libx265", {"x265-params": "open-gop=0:keyint=12:log-level=none"}),
    "hevc, open groups": ("libx265", {"x265-params": "open-gop=1:keyint=12:bframes=4:log-level=none"}),
    "av1": ("libsvtav1", {"preset": "12", "crf": "20"}),
    "vp9": ("libvpx-vp9", {"deadline": "realtime", "cpu-used": "8"}),
}
CONTAINERS = {
    "mp4": CODECS,
    "mkv": CODECS,
    "webm": ("av1", "vp9"),
    "ts": ("h264", "h264, open groups", "hevc", "hevc, open groups"),
}
CASES = [(container, codec) for container, codecs in CONTAINERS.items() for codec in codecs]


@pytest.fixture(scope="module")
def decoder():
    with video.Decoder() as decoder:
        yield decoder


def encode(path, codec, **settings):
    encoder, options = CODECS[codec]
    if encoder not in av.codecs_available:
        pytest.skip(f"this build of av has no {encoder}")
    if path.suffix == ".ts":
        settings["format"] = "mpegts"
    # In a thread of its own: libsvtav1 gives the one that calls it real-time priority where it may, for good, and every
    # thread and process that comes from it has that too; they would take the machine from all others.
    with ThreadPoolExecutor(1) as alone:
        return alone.submit(clips.encode, path, encoder, fps=FPS, options=options, **settings).result()


def numbers(clip):
    return [clips.read_number(frame) for frame in clip.frames]


@pytest.mark.parametrize(("container", "codec"), CASES)
def test_every_frame_and_a_few(container, codec, tmp_path, decoder):
    path = encode(tmp_path / f"a.{container}", codec)
    whole = decoder.read(path, EVERY)
    assert numbers(whole) == list(range(60))
    np.testing.assert_allclose(whole.times_s, np.arange(60) / FPS, atol=1e-9)
    few = decoder.read(path, FEW)
    # linspace(0, 59, 6) = 0, 11.8, 23.6, 35.4, 47.2, 59
    assert numbers(few) == [0, 12, 24, 35, 47, 59]
    np.testing.assert_allclose(few.times_s, np.array([0, 12, 24, 35, 47, 59]) / FPS, atol=1e-9)


def test_encoders_leave_our_priority(tmp_path):
    encode(tmp_path / "a.mp4", "av1")
    assert os.sched_getscheduler(0) == os.SCHED_OTHER


VARIABLE = sorted(np.random.default_rng(5).choice(np.arange(1, 240), 58, replace=False).tolist())
VARIABLE = [0, *VARIABLE, 240]  # 60 frames at uneven times within 24 s


@pytest.mark.parametrize(("container", "codec"), [case for case in CASES if case[0] in ("mp4", "mkv")])
def test_variable_rates(container, codec, tmp_path, decoder):
    clip = decoder.read(encode(tmp_path / f"a.{container}", codec, pts=VARIABLE), FEW)
    shown = numbers(clip)
    assert shown == [0, 12, 24, 35, 47, 59]
    # Matroska keeps milliseconds.
    np.testing.assert_allclose(clip.times_s, np.array(VARIABLE)[shown] / FPS, atol=1e-3)


@pytest.mark.parametrize("degrees", [90, 180, 270])
@pytest.mark.parametrize("codec", ["h264", "hevc", "av1"])
def test_rotations(codec, degrees, tmp_path, decoder):
    clip = decoder.read(encode(tmp_path / "a.mp4", codec, rotation=degrees), FEW)
    upright = np.rot90(clip.frames, -degrees // 90, axes=(1, 2))
    assert [clips.read_number(frame) for frame in upright] == [0, 12, 24, 35, 47, 59]
    assert clip.source_hw == ((clips.HEIGHT, clips.WIDTH) if degrees == 180 else (clips.WIDTH, clips.HEIGHT))


def test_long_groups_of_pictures(tmp_path, decoder):
    """One key frame, or one for each frame: where a seek lands must not matter."""
    for gop in (1, 250):
        clip = decoder.read(encode(tmp_path / f"{gop}.mp4", "h264", gop=gop), FEW)
        assert numbers(clip) == [0, 12, 24, 35, 47, 59]


@pytest.mark.parametrize(("container", "codec"), CASES)
def test_frames_are_found_by_time(container, codec, tmp_path):
    """In order the clip would be decoded twice over; that is for damaged files."""
    path = str(encode(tmp_path / f"a.{container}", codec))
    index = decode._read_index(path, FEW, path)
    found = decode._video_by_time(path, index, FEW, path)
    assert found is not None and numbers(found) == [0, 12, 24, 35, 47, 59]


def test_seeking_decodes_only_what_is_needed(tmp_path, monkeypatch):
    path = str(encode(tmp_path / "a.mp4", "h264", gop=5))
    decoded, whole = [], decode._decoded

    def counted(*arguments):
        for frame in whole(*arguments):
            decoded.append(frame.pts)
            yield frame

    monkeypatch.setattr(decode, "_decoded", counted)
    few = dataclasses.replace(FEW, max_frames=4)
    assert numbers(decode.decode_clip(path, few, name=path)) == [0, 20, 39, 59]
    # Groups of five frames: the wanted ones are the first of theirs or at most four frames after it.
    assert len(decoded) <= 1 + 1 + 5 + 5

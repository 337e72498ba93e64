"""Whatever a media file holds: it is read or refused in one line, in time, and no process is left behind."""

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data import hostile
from openo3_jax.config import VideoConfig
from openo3_jax.data import images, video, workers
from openo3_jax.errors import InputError

NUM_FILES = int(os.environ.get("HOSTILE_FILES", "60"))
SETTINGS = VideoConfig(min_pixels=3136, max_pixels=3136, deadline_s=30.0)


def children():
    """Number of processes that this one has started and that still run."""
    count = 0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            state, parent = (process / "stat").read_text().rpartition(")")[2].split()[:2]
        except OSError:  # it has just ended
            continue
        count += int(parent) == os.getpid() and state != "Z"
    return count


def outcome(decoder, path):
    """The clip, or what is said of it."""
    try:
        return decoder.read(path, SETTINGS)
    except InputError as error:
        return str(error)


def test_hostile_files_are_read_or_refused_and_leave_nothing_behind(tmp_path):
    before, whole = children(), {}
    files = [hostile.make_file(tmp_path, number, whole) for number in range(NUM_FILES)]
    with workers.Decoders(2) as decoders:
        outcomes = list(decoders.map(outcome, files))
        assert children() <= before + 2
    assert children() == before
    for path, found in zip(files, outcomes, strict=True):
        if isinstance(found, str):
            assert found.startswith(f"{path}: ") and "\n" not in found
            assert "crashed" not in found and "took longer" not in found, found
        else:
            check_clip(found)
    refused = sum(isinstance(found, str) for found in outcomes)
    assert NUM_FILES * 0.2 < refused < NUM_FILES * 0.9  # the set is of use: some are refused, some are not


def check_clip(clip: video.Video):
    num = len(clip.frames)
    assert num >= 2 and num % 2 == 0
    assert clip.frames.shape[1] % 28 == clip.frames.shape[2] % 28 == 0
    assert len(clip.times_s) == num and (np.diff(clip.times_s) > 0).all() and clip.times_s[0] >= 0
    assert clip.duration_s >= clip.times_s[-1]


def test_a_probe_tells_what_a_decode_gives_or_less(tmp_path):
    """Frames promised by a damaged file may not come; what was promised has the size of what comes."""
    whole, agree = {}, 0
    with video.Decoder() as decoder:
        for number in range(NUM_FILES // 2):
            path = hostile.make_file(tmp_path, number, whole)
            found = outcome(decoder, path)
            if isinstance(found, str):
                continue
            probed = decoder.probe(path, SETTINGS)
            check_clip(probed)
            assert probed.frames.strides == (0, 0, 0, 0) and not probed.frames.any()
            if len(probed.frames) == len(found.frames):
                agree += 1
                assert probed.frames.shape == found.frames.shape and probed.source_hw == found.source_hw
    assert agree >= 5


def test_pictures_are_read_in_the_process_too(tmp_path):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (60, 90, 3), np.uint8)).save(tmp_path / "a.png")
    whole = (tmp_path / "a.png").read_bytes()
    with video.Decoder() as decoder:
        pixels, source_hw = decoder.picture(tmp_path / "a.png", images.Area())
        np.testing.assert_array_equal(pixels, images.fit_picture(tmp_path / "a.png", images.Area())[0])
        assert source_hw == (60, 90)
        assert decoder.picture(tmp_path / "a.png", (28, 56))[0].shape == (28, 56, 3)
        for number in range(40):
            path = tmp_path / f"{number}.png"
            path.write_bytes(hostile.DAMAGES[number % len(hostile.DAMAGES)](rng, whole))
            try:
                assert decoder.picture(path, (28, 28))[0].shape == (28, 28, 3)
            except InputError as error:
                assert str(path) in str(error) and "crashed" not in str(error)


def test_a_closed_pool_starts_nothing(tmp_path):
    before = children()
    path = hostile.clips.encode(tmp_path / "a.mp4")
    with workers.Decoders(1) as decoders, decoders.borrow() as decoder:
        assert len(decoder.read(path, dataclasses.replace(SETTINGS, max_frames=4)).frames) == 4
    with pytest.raises(RuntimeError, match="closed"):
        decoder.read(path, SETTINGS)
    assert children() == before

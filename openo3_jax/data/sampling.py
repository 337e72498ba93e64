"""Which frames of a clip the model sees and how large: counts in, indices and sizes in px out. No media here."""

import math

import numpy as np
from jaxtyping import Int

from openo3_jax.config import VideoConfig
from openo3_jax.data import images

FRAME_FACTOR = 2  # counts of frames are even: native video groups frames in pairs


def choose_num_frames(total: int, video_fps: float, config: VideoConfig) -> int:
    """How many of `total` frames are shown: config.fps per second, within the config's limits, even.

    Example: 540 frames at 30 fps are 18 s, 36 frames at 2 fps, of which 16 are allowed.

    Source: Open-o3-Video src/r1-v/src/open_r1/vision_process.py:145-182.
    """
    assert total >= FRAME_FACTOR and video_fps > 0, (total, video_fps)
    fewest = math.ceil(config.min_frames / FRAME_FACTOR) * FRAME_FACTOR
    most = min(config.max_frames, total) // FRAME_FACTOR * FRAME_FACTOR
    num_frames = min(max(total / video_fps * config.fps, fewest), most, total)
    return int(num_frames // FRAME_FACTOR * FRAME_FACTOR)


def choose_frames(total: int, video_fps: float, config: VideoConfig) -> Int[np.ndarray, " frames"]:
    """Indices of the shown frames, evenly spread from the first to the last one, rounded half to even.

    Example: 10 frames at 10 fps -> [0, 3, 6, 9].

    Source: Open-o3-Video src/r1-v/src/open_r1/vision_process.py:245-256.
    """
    num_frames = choose_num_frames(total, video_fps, config)
    return np.rint(np.linspace(0, total - 1, num_frames)).astype(np.int64)


def choose_ends(total: int, video_fps: float, config: VideoConfig) -> Int[np.ndarray, " frames"]:
    """The first, the middle and the last frame, whatever the settings. Example: of 10 frames [0, 5, 9]."""
    return np.unique([0, total // 2, total - 1])


def frame_size(height: int, width: int, num_frames: int, config: VideoConfig) -> tuple[int, int]:
    """Height and width in px that each frame is resized to, multiples of 28.

    At most `most_pixels` large; but one below config.min_pixels is scaled up, and its sides are rounded up, past that.

    Example: 480x640 -> (280, 364), 130 visual tokens; 240x320 -> (280, 392), 140 of them.

    Raises: InputError for an aspect ratio over 200.
    Source: Open-o3-Video src/r1-v/src/open_r1/vision_process.py:289-315.
    """
    most = most_pixels(num_frames, config)
    return images.smart_resize(height, width, min_pixels=config.min_pixels, max_pixels=most)


def most_pixels(num_frames: int, config: VideoConfig) -> int:
    """The cap on the area in px of each of `num_frames` frames; never below 1.05 times config.min_pixels.

    Example: 105,369 by default, 134 visual tokens.

    Source: as of `frame_size`.
    """
    budget = int(config.total_pixels / num_frames * FRAME_FACTOR)
    return max(min(config.max_pixels, budget), int(config.min_pixels * 1.05))

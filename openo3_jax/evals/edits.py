"""Frames of a clip, cropped to a region or with regions painted over: pixels in, pixels out."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

from openo3_jax.data import images, video

GREY = 128  # what is hidden; the middle of the range


def nearest_frame(clip: video.Video, time_s: float) -> int:
    """The shown frame whose time is closest; the earlier one of two."""
    return int(np.abs(clip.times_s - time_s).argmin())


def crop(clip: video.Video, region: Mapping[str, Any]) -> UInt8[np.ndarray, "height width 3"]:
    """The part `region["box"]` (xyxy, whole px of the frames shown) at `region["time_s"]`, stretched to a frame.

    Source: Open-o3-Video eval/tts.py.
    """
    x1, y1, x2, y2 = region["box"]
    frame = clip.frames[nearest_frame(clip, region["time_s"])]
    return images.resize_picture(np.ascontiguousarray(frame[y1:y2, x1:x2]), *frame.shape[:2])


def hide(clip: video.Video, regions: Sequence[Mapping[str, Any]]) -> video.Video:
    """The clip with each region grey in the frame nearest to its time. Regions as in `crop`."""
    if not regions:
        return clip
    frames = clip.frames.copy()
    for region in regions:
        x1, y1, x2, y2 = region["box"]
        frames[nearest_frame(clip, region["time_s"]), y1:y2, x1:x2] = GREY
    return dataclasses.replace(clip, frames=frames)

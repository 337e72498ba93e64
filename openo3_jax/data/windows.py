"""Grids of one row -> where each patch stands in its picture, its attention window and its frame."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32

from openo3_jax import config as config_lib
from openo3_jax import types


@dataclasses.dataclass(frozen=True)
class PatchLayout:
    """Index arrays over the patches of one row, pictures one after the other in the order of `Sample.patches`.

    `window_rank`, `frame_rank`: place of the patch within its window or frame, counted from 0.
    """

    hw: Int32[np.ndarray, "patches 2"]
    window: Int32[np.ndarray, " patches"]
    window_rank: Int32[np.ndarray, " patches"]
    frame: Int32[np.ndarray, " patches"]
    frame_rank: Int32[np.ndarray, " patches"]
    num_windows: int
    num_frames: int


def count_windows(grid: types.VisionGrid, vision: config_lib.VisionConfig) -> int:
    """Number of windows that tile all temporal patches of a picture.

    Example: 16 x 30 patches with windows of 8 x 8 are 2 x 4 windows.
    """
    side_patches = vision.window_size // vision.patch_size
    return grid.frames * -(-grid.height // side_patches) * -(-grid.width // side_patches)


def patch_layout(grids: Sequence[types.VisionGrid], vision: config_lib.VisionConfig) -> PatchLayout:
    """Windows of window_size px tile each temporal patch from its top left corner; those at the edge are smaller.

    A frame is one temporal patch. Both count through the row; neither crosses a temporal patch.

    Source: transformers 5.23 vision_utils.py (`get_vision_window_index`, `get_vision_position_ids`).
    """
    parts: dict[str, list[np.ndarray]] = {field: [] for field in ("hw", "window", "window_rank", "frame", "frame_rank")}
    num_windows = num_frames = 0
    for grid in grids:
        hw, window, window_rank, windows_per_frame = _frame_layout(grid.height, grid.width, vision)
        frames = np.arange(grid.frames)[:, None]
        rank = np.arange(len(window))
        parts["hw"].append(np.tile(hw, (grid.frames, 1)))
        parts["window"].append((num_windows + frames * windows_per_frame + window).ravel())
        parts["window_rank"].append(np.tile(window_rank, grid.frames))
        parts["frame"].append((num_frames + frames + np.zeros_like(rank)).ravel())
        parts["frame_rank"].append(np.tile(rank, grid.frames))
        num_windows += grid.frames * windows_per_frame
        num_frames += grid.frames
    empty = {"hw": np.zeros((0, 2), np.int32)}
    arrays = {
        field: np.concatenate([empty.get(field, np.zeros(0, np.int32)), *part]).astype(np.int32)
        for field, part in parts.items()
    }
    return PatchLayout(**arrays, num_windows=num_windows, num_frames=num_frames)


def _frame_layout(
    height: int, width: int, vision: config_lib.VisionConfig
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """For one temporal patch of height x width patches: hw, window, place in the window; number of windows."""
    merge, side = vision.spatial_merge_size, vision.window_size // vision.merged_px
    unit_rows, unit_cols = height // merge, width // merge
    # Patches stand in units of merge x merge: (row of units, column of units, row in the unit, column in it).
    row, col, sub_row, sub_col = (i.ravel() for i in np.indices((unit_rows, unit_cols, merge, merge)))
    windows_across = -(-unit_cols // side)
    window = row // side * windows_across + col // side
    width_of_window = np.minimum(side, unit_cols - col // side * side)
    unit_rank = row % side * width_of_window + col % side
    rank = unit_rank * merge**2 + sub_row * merge + sub_col
    hw = np.stack([row * merge + sub_row, col * merge + sub_col], axis=-1)
    return hw, window, rank, -(-unit_rows // side) * windows_across

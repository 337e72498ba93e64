"""Windows and frames of a row of pictures, by hand."""

import numpy as np

from openo3_jax import config as config_lib
from openo3_jax import types
from openo3_jax.data import windows

VISION = config_lib.QWEN2_5_VL["7b"].vision


def test_edge_windows():
    """5x6 units: windows of 4x4, 4x2, 1x4 and 1x2 units of 4 patches."""
    layout = windows.patch_layout([types.VisionGrid(1, 10, 12)], VISION)
    assert (layout.num_windows, layout.num_frames) == (4, 1)
    np.testing.assert_array_equal(np.bincount(layout.window), [64, 32, 16, 8])
    unit = layout.window[::4].reshape(5, 6)
    np.testing.assert_array_equal(unit[0], [0, 0, 0, 0, 1, 1])
    np.testing.assert_array_equal(unit[4], [2, 2, 2, 2, 3, 3])
    # Unit (1, 5) is second row, second column of window 1, two units wide: place 3, so patches 12..15.
    number = (1 * 6 + 5) * 4
    np.testing.assert_array_equal(layout.window_rank[number : number + 4], [12, 13, 14, 15])
    np.testing.assert_array_equal(layout.frame_rank, np.arange(120))
    # Its patches are rows 2 and 3, columns 10 and 11.
    np.testing.assert_array_equal(layout.hw[number : number + 4], [[2, 10], [2, 11], [3, 10], [3, 11]])


def test_nothing_is_shared_between_frames_and_pictures():
    """A video of 2 temporal patches of 4x4, then a still of 2x2: windows 0, 1, 2 and frames 0, 1, 2."""
    layout = windows.patch_layout([types.VisionGrid(2, 4, 4), types.VisionGrid(1, 2, 2)], VISION)
    expected = np.repeat([0, 1, 2], [16, 16, 4])
    np.testing.assert_array_equal(layout.window, expected)
    np.testing.assert_array_equal(layout.frame, expected)
    np.testing.assert_array_equal(layout.window_rank, [*range(16), *range(16), *range(4)])
    assert (layout.num_windows, layout.num_frames) == (3, 3)


def test_no_pictures():
    layout = windows.patch_layout([], VISION)
    assert (layout.num_windows, layout.num_frames, layout.hw.shape) == (0, 0, (0, 2))

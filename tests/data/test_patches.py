"""Patches: order and repeated last frame, by hand."""

import numpy as np
import pytest

from openo3_jax.data import patches
from openo3_jax.errors import InputError


def test_order_of_patches():
    """Patch (row, column) of a 4x4 patch picture is filled with 4 * row + column: units of 2x2, row by row."""
    pixels = np.kron(np.arange(16).reshape(4, 4), np.ones((14, 14)))[None, ..., None].repeat(3, -1).astype(np.uint8)
    got, grid = patches.to_patches(pixels)
    assert grid == (1, 4, 4)
    assert got.shape == (16, 1176)
    order = [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]
    assert got.dtype == np.uint8
    np.testing.assert_array_equal(got, np.repeat(np.array(order)[:, None], 1176, 1))


def test_order_within_a_patch():
    """Values run over channel (R, G, B), then frame, then row, then column."""
    pixels = np.zeros((3, 28, 28, 3), np.uint8)  # 3 frames: the last is repeated, 2 temporal patches
    pixels[0, 1, 2] = (10, 20, 30)  # frame 0, row 1, column 2
    pixels[2, 0, 13] = (40, 50, 60)  # frame 2, last column of the first patch
    got, grid = patches.to_patches(pixels)
    assert grid == (2, 2, 2)
    expected = np.zeros((8, 3, 2, 14, 14))  # patch, channel, frame, row, column
    expected[0, :, 0, 1, 2] = (10, 20, 30)
    expected[4, :, 0, 0, 13] = expected[4, :, 1, 0, 13] = (40, 50, 60)
    np.testing.assert_array_equal(got, expected.reshape(8, 1176))


def test_sides_must_fit():
    with pytest.raises(InputError, match="multiples of 28 px"):
        patches.to_patches(np.zeros((1, 28, 30, 3), np.uint8))

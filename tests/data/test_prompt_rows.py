"""Prompts that share the rows of a prefill: which, and where their tokens are; worked out by hand."""

import numpy as np
import pytest

from openo3_jax.data import prompt_rows

SHARED = {  # name: (lengths, slots of a row, rows)
    "the example": ([5, 2, 9, 3], 9, [[0, 3], [1], [2]]),
    "two longs, two shorts": ([7, 3, 8, 2], 10, [[0, 1], [2, 3]]),
    "all fit one": ([1, 2, 3], 6, [[0, 1, 2]]),
    "none shares": ([4, 4, 4], 7, [[0], [1], [2]]),
    "a place without tokens": ([4, 0], 4, [[0, 1]]),
    "none": ([], 4, []),
}


@pytest.mark.parametrize("name", SHARED)
def test_share(name):
    lengths, most, rows = SHARED[name]
    assert prompt_rows.share(lengths, most) == rows


def test_alone():
    assert prompt_rows.alone(3) == [[0], [1], [2]]


def test_slots():
    """Rows of four slots: prompts 0 and 2 share the first, 1 has the second, 3 is padding."""
    expected = [[0, 1, -1, -1], [4, 5, 6, -1], [2, -1, -1, -1], [-1] * 4]
    np.testing.assert_array_equal(prompt_rows.slots([[0, 2], [1]], [2, 3, 1, 0], 4), expected)

"""M-RoPE ids against vectors worked out by hand."""

import dataclasses

import numpy as np
import pytest

from openo3_jax import config as config_lib
from openo3_jax import types
from openo3_jax.data import positions
from openo3_jax.errors import InputError

CONFIG = config_lib.QWEN2_5_VL["3b"]
T, I, V = 7, CONFIG.image_token_id, CONFIG.video_token_id  # text, image and video placeholder  # noqa: E741

CASES = {  # name: (tokens, grids, seconds per temporal patch, times, rows, columns)
    "text": ([T] * 3, [], [], [0, 1, 2], [0, 1, 2], [0, 1, 2]),
    "nothing": ([], [], [], [], [], []),
    "still of 2x3 tokens": (
        [T, T] + [I] * 6 + [T, T],
        [(1, 4, 6)],
        [None],
        [0, 1, 2, 2, 2, 2, 2, 2, 5, 6],  # the widest axis reaches 2 + 2, text goes on at 5
        [0, 1, 2, 2, 2, 3, 3, 3, 5, 6],
        [0, 1, 2, 3, 4, 2, 3, 4, 5, 6],
    ),
    "two stills with text between": (
        [I, T, I, I, T],
        [(1, 2, 2), (1, 4, 2)],
        [None, None],
        [0, 1, 2, 2, 4],
        [0, 1, 2, 3, 4],
        [0, 1, 2, 2, 4],
    ),
    # One patch a second, 2 ids a second: times 0 2 4. Text goes on beyond time, though the picture is 1x2 tokens.
    "video, a second apart": (
        [T] + [V] * 6 + [T, T],
        [(3, 2, 4)],
        [1.0],
        [0, 1, 1, 3, 3, 5, 5, 6, 7],
        [0, 1, 1, 1, 1, 1, 1, 6, 7],
        [0, 1, 2, 1, 2, 1, 2, 6, 7],
    ),
    # floor(t * 0.7 * 2) = floor(0, 1.4, 2.8, 4.2): the interval itself is not cut to whole seconds or whole ids.
    "video, 0.7 s apart": (
        [V] * 4 + [T],
        [(4, 2, 2)],
        [0.7],
        [0, 1, 2, 4, 5],
        [0, 0, 0, 0, 5],
        [0, 0, 0, 0, 5],
    ),
    # floor(t * 0.2 * 2) = 0 0 0 1 of 0, .4, .8, 1.2; three rows outlast the times: rows 1 2 3, text at 4.
    "video, high and fast": (
        [T] + [V] * 12 + [T],
        [(4, 6, 2)],
        [0.2],
        [0] + [1] * 9 + [2] * 3 + [4],
        [0] + [1, 2, 3] * 4 + [4],
        [0] + [1] * 12 + [4],
    ),
    "video, then a still": (
        [V, V, T, I, T],
        [(2, 2, 2), (1, 2, 2)],
        [2.0, None],
        [0, 4, 5, 6, 7],
        [0, 0, 5, 6, 7],
        [0, 0, 5, 6, 7],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_mrope_positions(name):
    tokens, grids, seconds, *expected = CASES[name]
    grids = [types.VisionGrid(*grid) for grid in grids]
    got = positions.mrope_positions(np.array(tokens, np.int32), grids, seconds, CONFIG)
    assert got.dtype == np.int32
    np.testing.assert_array_equal(got, np.reshape(expected, (3, -1)))


def test_tokens_per_second_comes_from_the_config():
    faster = dataclasses.replace(CONFIG, vision=dataclasses.replace(CONFIG.vision, tokens_per_second=25))
    got = positions.mrope_positions(np.array([V, V, T], np.int32), [types.VisionGrid(2, 2, 2)], [0.5], faster)
    np.testing.assert_array_equal(got[0], [0, 12, 13])  # 12.5, floored


@pytest.mark.parametrize(
    ("tokens", "num_grids"),
    [
        ([T, I, I, T], 1),
        ([T, I, T], 1),
        ([T, T], 1),
        ([I] * 4, 0),
        ([I] * 4 + [T, I], 1),
        ([I, T, I, I, I], 1),
        ([], 1),
    ],
)
def test_placeholders_and_grids_must_match(tokens, num_grids):
    grids = [types.VisionGrid(1, 4, 4)] * num_grids  # 4 visual tokens each
    with pytest.raises(InputError, match="visual tokens"):
        positions.mrope_positions(np.array(tokens, np.int32), grids, [None] * num_grids, CONFIG)

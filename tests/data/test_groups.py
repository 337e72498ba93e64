"""Rows of a prompt with its completions."""

import numpy as np
import pytest

import small
from openo3_jax.data import groups
from openo3_jax.errors import InputError

CONFIG = small.model_config()
PROMPT = small.sample(CONFIG, prompt=3, answer=1, pictures=[(4, 6)])
X, Y, Z, U, V = 11, 12, 13, 14, 15
GROUP = [np.int32([X, Y, Z]), np.int32([U, V])]


def make(prompts, completions, **options):
    bucket = groups.group_bucket(prompts, completions, CONFIG.vision, num_rows=len(prompts) + 1)
    return groups.make_group_batch(prompts, completions, bucket, CONFIG, pad_id=0, **options)


def test_a_row_by_hand():
    """Prompt of n slots, completions x y z and u v: slots x y u behind it, targets x y z u v from n-1 n n+1 n-1 n+2."""
    batch, completion = make([PROMPT], [GROUP])
    n = len(PROMPT.tokens)
    assert batch.tokens[0, n : n + 4].tolist() == [X, Y, U, 0]
    assert batch.branches[0, : n + 4].tolist() == [0] * n + [1, 1, 2, 0]
    assert batch.segments[0, : n + 4].tolist() == [1] * (n + 3) + [0]
    assert batch.targets[0, :6].tolist() == [X, Y, Z, U, V, -1]
    assert batch.target_slots[0, :6].tolist() == [n - 1, n, n + 1, n - 1, n + 2, -1]
    assert completion[0, :6].tolist() == [0, 0, 0, 1, 1, -1]
    assert (completion[1] == -1).all() and (batch.segments[1] == 0).all()  # the row that is padding


def test_positions_restart_behind_the_largest_of_the_prompt():
    """A picture of 2 x 3 visual tokens makes the largest position smaller than the number of slots."""
    batch, _ = make([PROMPT], [GROUP])
    n, top = len(PROMPT.tokens), int(PROMPT.positions.max())
    assert top + 1 < n
    assert batch.positions[0, :, n : n + 3].tolist() == [[top + 1, top + 2, top + 1]] * 3


def test_pictures_are_there_once():
    batch, _ = make([PROMPT], [GROUP * 4])
    assert (np.abs(batch.vision.patches[0]).sum(-1) > 0).sum() == len(PROMPT.patches)


def test_values_of_tokens_stand_as_their_targets_do():
    out = groups.spread([[np.float32([1, 2, 3]), np.float32([4, 5])], [np.float32([6])]], (3, 7))
    assert out.tolist() == [[1, 2, 3, 4, 5, 0, 0], [6, 0, 0, 0, 0, 0, 0], [0] * 7]


def test_a_bucket_that_is_too_small_is_named():
    bucket = groups.group_bucket([PROMPT], [GROUP], CONFIG.vision, num_rows=1)
    with pytest.raises(InputError, match="row 0: seq="):
        groups.make_group_batch([PROMPT], [[np.arange(1, 200)]], bucket, CONFIG, pad_id=0)

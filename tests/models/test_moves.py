"""Patches to groups and back: by hand, over devices that do not divide the groups, and as each other's gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from openo3_jax import mesh as mesh_lib
from openo3_jax.models import moves

# Eight patches in three groups of two and one of three, one patch in none: places in the groups one after the other.
PAIRS = np.int32([[[4, 0], [1, -1], [6, 7]]])
TRIPLE = np.int32([[[2, 5, -1]]])
SLOTS = np.int32([[1, 2, 6, -1, 0, 7, 4, 5]])


def on(context: int):
    return mesh_lib.make_mesh({"context": context}, devices=jax.devices()[:context])


@pytest.mark.parametrize("context", [1, 2, 4])
def test_spread_and_collect_by_hand(context):
    mesh = on(context)
    x = np.arange(10.0, 18.0, dtype=np.float32)[None, :, None]

    @jax.jit
    def run(x):
        groups, slots = moves.even_groups((PAIRS, TRIPLE), SLOTS, mesh)
        parts = moves.spread(x, groups, slots, mesh, ())
        return parts, moves.collect(parts, groups, slots, mesh, ())

    (pairs, triple), back = run(x)
    assert pairs.shape[1] % context == triple.shape[1] % context == 0
    assert pairs[0, :3, :, 0].tolist() == [[14, 10], [11, 0], [16, 17]] and not pairs[0, 3:].any()
    assert triple[0, 0, :, 0].tolist() == [12, 15, 0] and not triple[0, 1:].any()
    assert back[0, :, 0].tolist() == [10, 11, 12, 0, 14, 15, 16, 17]


def test_gradients_are_those_of_plain_indexing():
    mesh = on(2)
    draw = np.random.default_rng(0)
    x, pull = draw.normal(size=(2, 1, 8, 4)).astype(np.float32)

    def ours(x):
        groups, slots = moves.even_groups((PAIRS, TRIPLE), SLOTS, mesh)
        parts = moves.spread(x, groups, slots, mesh, ())
        return moves.collect(tuple(part**2 for part in parts), groups, slots, mesh, ())

    def plain(x):
        return jnp.where((SLOTS >= 0)[..., None], x**2, 0)

    @jax.jit
    def run(x, pull):
        (out, back), (expected, expected_back) = (jax.vjp(f, x) for f in (ours, plain))
        return (out, back(pull)), (expected, expected_back(pull))

    jax.tree.map(np.testing.assert_array_equal, *run(x, pull))


def test_rearrange_by_hand():
    """Visual tokens b a into slots 1 and 3 of four."""
    x = np.float32([[[2.0], [3.0]]])
    index, inverse = np.int32([[-1, 1, -1, 0]]), np.int32([[3, 1]])
    pull = np.float32([[[1.0], [10.0], [100.0], [1000.0]]])

    @jax.jit
    def run(x):
        out, back = jax.vjp(lambda x: moves.rearrange(x, index, inverse, on(2), "patches", "seq"), x)
        return out, back(pull)[0]

    out, grad = run(x)
    assert out[0, :, 0].tolist() == [0, 3, 0, 2]
    assert grad[0, :, 0].tolist() == [1000, 10]

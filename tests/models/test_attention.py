"""Attention by hand, and the two backends against each other: values, gradients, what exists in memory."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import small
from openo3_jax.models import attention

BACKENDS = ("xla", "blockwise")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks of queries and keys in every case, and a ragged last one."""
    monkeypatch.setattr(attention, "BLOCK", 8)


@partial(jax.jit, static_argnames=("causal", "backend"))
def attend(q, k, v, slots, *, causal, backend):
    return attention.attention(q, k, v, slots, causal=causal, backend=backend)


def slots(segments, branches=None):
    return attention.Slots(np.int32(segments), None if branches is None else np.int32(branches))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("causal", "expected"),
    [
        # Head 0 scores its second key ln 3 lower: 3/4 of 4 and 1/4 of 8. Head 1 the other way round.
        (True, [[4.0, 4.0], [5.0, 7.0]]),
        (False, [[6.0, 6.0], [5.0, 7.0]]),
    ],
)
def test_two_tokens_by_hand(backend, causal, expected):
    """Two heads share one key head of size 1; the first query is 0 and looks at both tokens alike."""
    q = jnp.float32([[0.0, 0.0], [np.log(3.0), -np.log(3.0)]])[None, :, :, None]
    k, v = jnp.float32([1.0, 0.0])[None, :, None, None], jnp.float32([4.0, 8.0])[None, :, None, None]
    out = attend(q, k, v, slots([[1, 1]]), causal=causal, backend=backend)
    np.testing.assert_allclose(out[0, :, :, 0], expected, rtol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_scores_are_divided_by_the_root_of_the_head_size(backend):
    """Head size 4, q.k = 2 ln 3: the score is ln 3."""
    q = jnp.full((1, 2, 1, 4), np.log(3.0) / 2, jnp.float32)
    k = jnp.float32([1.0, 0.0])[None, :, None, None] * jnp.ones((1, 2, 1, 4), jnp.float32)
    v = jnp.float32([4.0, 8.0])[None, :, None, None] * jnp.ones((1, 2, 1, 4), jnp.float32)
    out = attend(q, k, v, slots([[1, 1]]), causal=False, backend=backend)
    np.testing.assert_allclose(out, np.full((1, 2, 1, 4), 5.0), rtol=1e-6)


def test_who_sees_whom():
    """A shared prompt (slots 0, 1), a completion on branch 1 (2, 3), one on branch 2 (4), padding (5)."""
    row = slots([[1, 1, 1, 1, 1, 0]], [[0, 0, 1, 1, 2, 0]])
    at = jnp.arange(6)
    seen = attention.visible(row, row, at, at, causal=True)[0]
    assert np.asarray(seen).astype(int).tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]


def random_qkv(rows, seq, heads, kv_heads, head_dim=4, seed=0):
    draw = np.random.default_rng(seed)
    sizes = [(rows, seq, heads, head_dim), (rows, seq, kv_heads, head_dim), (rows, seq, kv_heads, head_dim)]
    return [draw.normal(size=size).astype(np.float32) for size in sizes]


PACKED = [[1] * 5 + [2] * 9 + [3] * 2 + [0] * 5, [1] * 21, [0] * 21]  # the last row is all padding
CASES = {  # name: (heads, kv heads, segments, branches, causal)
    "less than a block": (2, 1, [[1] * 5], None, True),
    "odd length, grouped 3:1": (6, 2, [[1] * 19, [1] * 19], None, True),
    "packed rows and padding": (4, 2, PACKED, None, True),
    "whole windows": (2, 2, [[1] * 16 + [0] * 7], None, False),
    "branches": (4, 2, [[1] * 20 + [2] * 3], [[0] * 9 + [1] * 4 + [2] * 7 + [0] * 3], True),
}


@pytest.mark.parametrize("name", CASES)
def test_backends_agree_in_value_and_gradient(name):
    heads, kv_heads, segments, branches, causal = CASES[name]
    where = slots(segments, branches)
    real = np.asarray(segments) > 0
    qkv = random_qkv(*real.shape, heads, kv_heads)
    pull = (np.random.default_rng(1).normal(size=qkv[0].shape) * real[:, :, None, None]).astype(np.float32)

    @jax.jit
    def run(qkv):
        outs = []
        for backend in BACKENDS:
            out, backward = jax.vjp(partial(attention.attention, slots=where, causal=causal, backend=backend), *qkv)
            outs.append([jnp.where(real[:, :, None, None], out, 0.0), *backward(pull)])
        return outs

    for dense, blocks in zip(*run(qkv), strict=True):
        assert np.isfinite(blocks).all()
        np.testing.assert_allclose(blocks, dense, atol=2e-6)


def test_grouped_heads_use_their_own_key_head():
    """Four heads over two key heads: the same as each key head repeated twice."""
    q, k, v = random_qkv(1, 11, 4, 2)
    where = slots([[1] * 11])
    grouped = attend(q, k, v, where, causal=True, backend="xla")
    repeated = attend(q, *(np.repeat(x, 2, axis=2) for x in (k, v)), where, causal=True, backend="xla")
    np.testing.assert_allclose(grouped, repeated, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_branches_equal_separate_rows(backend):
    """A prompt of 7 slots with completions of 6 and 4 in one row, against prompt + completion alone."""
    q, k, v = random_qkv(1, 17, 4, 2)
    together = attend(q, k, v, slots([[1] * 17], [[0] * 7 + [1] * 6 + [2] * 4]), causal=True, backend=backend)
    for branch in (np.r_[0:7, 7:13], np.r_[0:7, 13:17]):
        alone = attend(*(x[:, branch] for x in (q, k, v)), slots([[1] * len(branch)]), causal=True, backend=backend)
        np.testing.assert_allclose(together[:, branch], alone, atol=1e-6)


def test_segments_equal_separate_rows():
    q, k, v = random_qkv(1, 17, 2, 2)
    together = attend(q, k, v, slots([[1] * 6 + [2] * 11]), causal=True, backend="blockwise")
    for part in (slice(0, 6), slice(6, 17)):
        alone = attend(
            *(x[:, part] for x in (q, k, v)), slots([[1] * (part.stop - part.start)]), causal=True, backend="xla"
        )
        np.testing.assert_allclose(together[:, part], alone, atol=1e-6)


def test_blockwise_never_holds_all_scores():
    """Of 40 slots in blocks of 8, no array in forward or backward has two dimensions of 40."""
    q, k, v = random_qkv(1, 40, 2, 2)

    def total(backend):
        return lambda q: attention.attention(q, k, v, slots([[1] * 40]), causal=True, backend=backend).sum()

    def is_square(shape):
        return sum(size == 40 for size in shape) >= 2

    for backend, expected in (("xla", True), ("blockwise", False), ("auto", False)):
        shapes = small.shapes_in(jax.make_jaxpr(jax.grad(total(backend)))(q))
        assert any(map(is_square, shapes)) is expected, backend


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_stays_close_to_float32(backend):
    """Softmax and sums are float32 inside: the error is that of rounding inputs and output to 8 bits."""
    qkv = random_qkv(1, 21, 4, 2)
    where = slots([[1] * 21])
    low = attend(*(x.astype(jnp.bfloat16) for x in qkv), where, causal=True, backend=backend)
    exact = attend(*qkv, where, causal=True, backend="xla")
    assert low.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(low), exact, atol=0.04)

"""Bans, temperature, top-k and top-p: sets worked out by hand, frequencies against the softmax."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from openo3_jax.models import attention, sampling

LOG = np.log(np.float32([0.5, 0.25, 0.125, 0.0625, 0.0625]))  # logits whose softmax is these probabilities


def kept(logits):
    return np.flatnonzero(np.asarray(logits) > attention.MASKED).tolist()


@pytest.mark.parametrize(
    ("k", "expected"),
    [(1, [0]), (2, [0, 1]), (4, [0, 1, 2, 3, 4]), (5, [0, 1, 2, 3, 4])],  # with 4 the tie for the fourth place stays
)
def test_top_k(k, expected):
    assert kept(sampling.keep_top_k(LOG, k)) == expected


@pytest.mark.parametrize(
    ("p", "expected"),
    [(0.01, [0]), (0.5, [0]), (0.51, [0, 1]), (0.75, [0, 1]), (0.8, [0, 1, 2]), (0.99, [0, 1, 2, 3, 4])],
)
def test_top_p(p, expected):
    """The smallest set that reaches p: 0.5, 0.75, 0.875, 1."""
    assert kept(sampling.keep_top_p(LOG, p)) == expected


def test_top_p_does_not_need_sorted_logits():
    assert kept(sampling.keep_top_p(LOG[[3, 1, 4, 0, 2]], 0.8)) == [1, 3, 4]


@pytest.mark.parametrize("p", [1e-6, 0.3, 0.9, 0.95, 0.9999])
@pytest.mark.parametrize("spread", [0.01, 1.0, 8.0])
def test_top_p_keeps_what_sorting_would(p, spread):
    """Rows of 1,000 logits, nearly even, usual and sharp; the sums in double precision."""
    logits = spread * np.random.default_rng(0).normal(size=(3, 7, 1000)).astype(np.float32)
    probability = np.exp(np.float64(logits)) / np.exp(np.float64(logits)).sum(-1, keepdims=True)
    before = np.cumsum(-np.sort(-probability, -1), -1) - -np.sort(-probability, -1)
    number = (np.asarray(sampling.keep_top_p(logits, p)) > attention.MASKED).sum(-1)
    assert abs(number - (before < p).sum(-1)).max() <= 1  # rounding of the sum at the edge
    order = np.argsort(-logits, -1)
    is_kept = np.take_along_axis(np.asarray(sampling.keep_top_p(logits, p)), order, -1) > attention.MASKED
    np.testing.assert_array_equal(is_kept, np.arange(1000) < number[..., None])  # the largest ones


def draw(logits, num, *, seed=0, banned=(), **knobs):
    """`num` independent draws from one row of logits."""
    options = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} | knobs
    keys = jax.random.split(jax.random.key(seed), num)
    rows = np.broadcast_to(np.asarray(logits, np.float32), (num, len(logits)))
    mask = np.isin(np.arange(len(logits)), banned)
    run = jax.jit(lambda rows, keys, mask: sampling.sample(rows, keys, mask, **options))
    return tuple(np.asarray(x) for x in run(rows, keys, mask))


def chi_square(tokens, probabilities):
    expected = np.asarray(probabilities) * len(tokens)
    counts = np.bincount(tokens, minlength=len(expected))
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_follow_the_softmax(temperature):
    """Chi-square of 20,000 draws over 5 tokens: 18.47 is passed once in a thousand (4 degrees of freedom)."""
    tokens, _ = draw(LOG, 20_000, temperature=temperature)
    scaled = np.exp(LOG / temperature)
    assert chi_square(tokens, scaled / scaled.sum()) < 18.47
    other = np.exp(LOG / (temperature * 1.2))
    assert chi_square(tokens, other / other.sum()) > 18.47, "the test cannot tell temperatures apart"


def test_what_top_p_keeps_is_drawn_in_proportion():
    """p = 0.8 keeps 0.5, 0.25 and 0.125, that is 4/7, 2/7 and 1/7; 13.82 is passed once in a thousand."""
    tokens, _ = draw(LOG, 20_000, top_p=0.8)
    assert set(tokens) == {0, 1, 2}
    assert chi_square(tokens, np.float32([4, 2, 1]) / 7) < 13.82


def test_banned_tokens_are_never_drawn_and_the_rest_keeps_its_proportions():
    """Without token 0 the others have 1/2, 1/4, 1/8 and 1/8; 16.27 is passed once in a thousand."""
    tokens, _ = draw(LOG, 20_000, banned=[0])
    assert 0 not in tokens
    assert chi_square(tokens - 1, [1 / 2, 1 / 4, 1 / 8, 1 / 8]) < 16.27


@pytest.mark.parametrize("knobs", [{"temperature": 0.0}, {"temperature": 0.7, "top_k": 1}, {"top_p": 1e-6}])
def test_one_candidate_is_greedy(knobs):
    tokens, _ = draw(LOG[[1, 0, 2, 3, 4]], 50, **knobs)
    assert set(tokens) == {1}
    tokens, _ = draw(LOG[[1, 0, 2, 3, 4]], 50, banned=[1], **knobs)
    assert set(tokens) == {0}


def test_log_probability_is_of_the_raw_logits():
    """Whatever temperature, ban or cut: ln 1/4 for the second token."""
    for knobs in ({}, {"temperature": 0.3}, {"top_k": 2}, {"top_p": 0.6}, {"temperature": 0.0, "banned": [0]}):
        tokens, logp = draw(LOG, 64, **knobs)
        assert 1 in tokens
        np.testing.assert_allclose(logp, np.log([0.5, 0.25, 0.125, 0.0625, 0.0625])[tokens], rtol=1e-5)


def test_a_penalty_is_for_what_was_seen():
    """2 and -1 become 1 and -2 where seen; the log-probability stays that of the raw logits."""
    logits, seen = jnp.array([2.0, -1.0, 1.5, -1.0]), jnp.array([True, True, False, False])
    np.testing.assert_array_equal(sampling.discourage(logits, seen, 2.0), [1.0, -2.0, 1.5, -1.0])
    greedy = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "seen": seen, "repetition_penalty": 2.0}
    token, logp = sampling.sample(logits, jax.random.key(0), jnp.zeros(4, bool), **greedy)
    assert int(token) == 2
    np.testing.assert_allclose(logp, jax.nn.log_softmax(logits)[2], rtol=1e-6)


def test_a_row_does_not_depend_on_its_neighbours():
    keys = jax.random.split(jax.random.key(3), 4)
    logits = np.random.default_rng(0).normal(size=(4, 50)).astype(np.float32)
    options = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
    nothing = jnp.zeros(50, bool)
    together, _ = sampling.sample(logits, keys, nothing, **options)
    order = np.array([2, 0, 3, 1])
    shuffled, _ = sampling.sample(logits[order], keys[order], nothing, **options)
    assert np.asarray(shuffled).tolist() == np.asarray(together)[order].tolist()

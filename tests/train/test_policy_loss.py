"""The loss of stage two against numbers worked by hand and against a transcription of the released trainer."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from openo3_jax.config import AdvantageConfig, GSPOConfig
from openo3_jax.errors import InputError
from openo3_jax.rewards import rubric
from openo3_jax.train import policy_loss

CONFIG = GSPOConfig(steps=1)
# One prompt, two completions of two tokens and one; a last slot of padding.
COMPLETION = np.int32([[0, 0, 1, -1]])
KEEP = np.array([[True, True]])


def loss_of(config, logp, old, advantage, *, reference=None, sampled=None, completion=COMPLETION, keep=KEEP):
    return policy_loss.policy_loss(
        jnp.float32(logp),
        jnp.float32(old),
        None if reference is None else jnp.float32(reference),
        jnp.float32(old if sampled is None else sampled),
        completion,
        jnp.float32(advantage),
        keep,
        config,
    )


LN = np.log
LOGP = [[LN(0.5), LN(0.2), LN(0.3), 0.0]]
OLD = [[LN(0.4), LN(0.25), LN(0.2), 0.0]]  # token ratios 1.25, 0.8 and 1.5; sequence ratios sqrt(1.25 * 0.8) = 1, 1.5


def test_sequence_ratio_by_hand():
    """Ratios 1 and 1.5, clipped to [0.8, 1.2]; A = 1, 2: -(1 * 1 + 1.2 * 2) / 2 = -1.7; one of three tokens clipped."""
    out = loss_of(CONFIG, LOGP, OLD, [[1, 2]])
    np.testing.assert_allclose(out.loss, -1.7, rtol=1e-6)
    np.testing.assert_allclose(out.ratio, (1 + 1 + 1.5) / 3, rtol=1e-6)
    np.testing.assert_allclose(out.clip_fraction, 1 / 3, rtol=1e-6)
    assert out.kl == 0


def test_token_ratio_by_hand():
    """Ratios 1.25 -> 1.2, 0.8, 1.5 -> 1.2: -((1.2 + 0.8) / 2 * 1 + 1.2 * 2) / 2 = -1.7 as well; with A = -1 the larger
    ratio counts: (1.25 + 0.8) / 2 = 1.025."""
    config = dataclasses.replace(CONFIG, ratio="token")
    np.testing.assert_allclose(loss_of(config, LOGP, OLD, [[1, 2]]).loss, -1.7, rtol=1e-6)
    np.testing.assert_allclose(loss_of(config, LOGP, OLD, [[-1, 0]]).loss, 1.025 / 2, rtol=1e-6)


def test_the_clip_is_asymmetric_and_acts_on_the_side_that_gains():
    config = dataclasses.replace(CONFIG, clip_low=0.1, clip_high=0.3)
    up, down = [[LN(1.5), LN(1.5), 0, 0]], [[LN(0.5), LN(0.5), 0, 0]]
    zeros = [[0.0] * 4]
    cases = {(1.5, 1): -1.3, (1.5, -1): 1.5, (0.5, 1): -0.5, (0.5, -1): 0.9}
    for (ratio, gain), expected in cases.items():
        out = loss_of(config, up if ratio > 1 else down, zeros, [[gain, 0]])
        np.testing.assert_allclose(out.loss, expected / 2, rtol=1e-6)
        assert (out.clip_fraction > 0) == (expected in (-1.3, 0.9))


def test_a_clipped_completion_has_no_gradient():
    grad = jax.grad(lambda logp: loss_of(CONFIG, logp, OLD, [[1, 2]]).loss)(jnp.float32(LOGP))
    np.testing.assert_allclose(grad, [[-0.25, -0.25, 0, 0]], rtol=1e-6)  # -A r / tokens / completions, and 0 at r = 1.5


def test_reductions_by_hand():
    """Three tokens: -(1 + 1 + 1.2 * 2) / 3."""
    config = dataclasses.replace(CONFIG, reduction="token_mean")
    np.testing.assert_allclose(loss_of(config, LOGP, OLD, [[1, 2]]).loss, -4.4 / 3, rtol=1e-6)


def test_divergence_by_hand_and_clamped():
    """x = ln 2: 2 - ln 2 - 1; beyond 10 the value stays and the gradient is 0."""
    np.testing.assert_allclose(policy_loss.k3(jnp.zeros((1, 1)), jnp.full((1, 1), LN(2))), [[1 - LN(2)]], rtol=1e-6)
    far = jnp.full((1, 1), -30.0)
    value, back = jax.vjp(lambda logp: policy_loss.k3(logp, jnp.zeros((1, 1))), far)
    np.testing.assert_allclose(value, [[np.exp(10) - 11]], rtol=1e-6)
    assert back(jnp.ones((1, 1)))[0] == 0


def test_what_is_not_kept_counts_nowhere():
    """Only the second completion: -1.2 * 2; nothing at all: 0."""
    np.testing.assert_allclose(
        loss_of(CONFIG, LOGP, OLD, [[1, 2]], keep=np.array([[False, True]])).loss, -2.4, rtol=1e-6
    )
    assert loss_of(CONFIG, LOGP, OLD, [[1, 2]], keep=np.array([[False, False]])).loss == 0


def test_importance_weights_by_hand():
    """The old policy gives the second completion twice the sampler's probability: its term doubles, or is capped."""
    sampled = [[*OLD[0][:2], LN(0.1), 0.0]]
    for cap, weight in ((5.0, 2.0), (1.5, 1.5)):
        config = dataclasses.replace(CONFIG, old_logp="recompute", importance_cap=cap)
        out = loss_of(config, LOGP, OLD, [[1, 2]], sampled=sampled)
        np.testing.assert_allclose(out.loss, -(1 + weight * 2.4) / 2, rtol=1e-6)


def random_case(seed, drift):
    draw = np.random.default_rng(seed)
    completion = np.int32([[0, 0, 0, 1, 2, 2, -1, -1], [0, 1, 1, 1, 1, 2, 2, -1]])
    logp = -draw.exponential(size=completion.shape)
    old = logp + drift * draw.normal(size=completion.shape)
    return completion, logp, old, logp + draw.normal(size=completion.shape), draw.normal(size=(2, 3))


@pytest.mark.parametrize("drift", [0.0, 0.1])
def test_sequence_and_token_ratios_agree_at_the_first_update_and_differ_later(drift):
    completion, logp, old, reference, advantage = random_case(0, drift)

    def grad_of(ratio):
        config = dataclasses.replace(CONFIG, ratio=ratio)

        def loss(logp):
            parts = {"reference": reference, "completion": completion, "keep": np.ones((2, 3), bool)}
            return loss_of(config, logp, old, advantage, **parts).loss

        return np.asarray(jax.grad(loss)(jnp.float32(logp)))

    gap = np.abs(grad_of("sequence") - grad_of("token")).max() / np.abs(grad_of("token")).max()
    assert gap < 1e-6 if drift == 0 else gap > 1e-2


def released_loss(logp, reference, completion, reward):
    """The released trainer's loss and its gradient with respect to logp, float64 (grpo_trainer.py:635-706)."""
    loss, grad = 0.0, np.zeros_like(logp)
    num = reward.size
    for row, rewards in enumerate(reward):
        advantage = (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-4)
        for g, a in enumerate(advantage):
            at = np.flatnonzero(completion[row] == g)
            x = np.clip(reference[row, at] - logp[row, at], -10, 10)
            kl = np.exp(x) - x - 1
            is_inside = np.abs(reference[row, at] - logp[row, at]) < 10
            loss += (-a + 0.04 * kl).mean() / num  # the ratio is exp(0), its gradient that of the mean of logp
            grad[row, at] = (-a / len(at) + 0.04 * (1 - np.exp(x)) * is_inside / len(at)) / num
    return loss, grad


@pytest.mark.parametrize("ratio", ["sequence", "token"])
def test_on_policy_it_is_the_released_loss(ratio):
    """Rewards to gradient: unbiased std with its floor, clamp at 10 (two tokens lie beyond), k3, means."""
    completion, logp, _, reference, _ = random_case(3, 0.0)
    reference[0, 0], reference[1, 5] = logp[0, 0] + 11, logp[1, 5] - 12
    reward = np.array([[0.1, 1.3, 0.7], [2.0, 2.0, 2.001]])
    advantage = rubric.advantages(jnp.float32(reward), AdvantageConfig()).advantage
    config = dataclasses.replace(CONFIG, ratio=ratio)

    def loss(now):
        parts = {"reference": reference, "completion": completion, "keep": np.ones((2, 3), bool)}
        return loss_of(config, now, logp, advantage, **parts).loss

    value, grad = jax.value_and_grad(loss)(jnp.float32(logp))
    expected_value, expected = released_loss(logp, reference, completion, reward)
    np.testing.assert_allclose(value, expected_value, rtol=1e-4)
    np.testing.assert_allclose(grad, expected, rtol=2e-4, atol=2e-4 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 8, "minibatches": 3}, "minibatches=3 do not divide batch_size=8"),
        ({"importance_cap": 2.0}, "importance_cap=2.0 with old_logp='rollout'"),
        ({"clip_low": 1.0}, "0 <= clip_low < 1"),
        ({"steps": 0}, "steps=0"),
        ({"sampling": dataclasses.replace(CONFIG.sampling, num_samples=1)}, "num_samples=1; a reward is compared"),
        ({"sampling": dataclasses.replace(CONFIG.sampling, temperature=0.0)}, "temperature=0 draws the same"),
        ({"max_bad_fraction": 1.0}, "max_bad_fraction=1.0"),
    ],
)
def test_settings_that_cannot_work_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(CONFIG, **change)

"""Learning rates and first updates worked by hand; which weights are whose; one compiled step."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import small
from openo3_jax import mesh as mesh_lib
from openo3_jax.config import OptimizerConfig, SFTConfig
from openo3_jax.train import optimizer, state, steps

SCHEDULES = {  # name: (schedule, warm-up steps, learning rate at steps 0, 1, 2, 5, 10 of 10, in units of the peak)
    "linear": ("linear", 0, [1.0, 0.9, 0.8, 0.5, 0.0]),
    "linear after warm-up": ("linear", 2, [0.0, 0.5, 1.0, 0.625, 0.0]),
    "cosine": ("cosine", 0, [1.0, 0.9755283, 0.9045085, 0.5, 0.0]),  # (1 + cos(pi t / 10)) / 2
    "constant": ("constant", 0, [1.0, 1.0, 1.0, 1.0, 1.0]),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules(name):
    kind, warmup_steps, expected = SCHEDULES[name]
    schedule = optimizer.make_schedule(
        OptimizerConfig(schedule=kind, warmup_steps=warmup_steps, learning_rate=3e-4), steps=10
    )
    np.testing.assert_allclose([schedule(t) for t in (0, 1, 2, 5, 10)], 3e-4 * np.array(expected), atol=1e-10)


def first_update(config, params, grads):
    chain = optimizer.make_optimizer(dataclasses.replace(config, schedule="constant"), steps=10)
    return chain.update(grads, chain.init(params), params)[0]


def test_the_first_step_of_adamw():
    """-lr g / (|g| + eps) - lr decay w: both moments start at 0 and are corrected for it.

    lr 0.1, decay 0.5, w = [2, -4], g = [3, -1e-3]: -0.1 - 0.1 and +0.1 + 0.2.
    """
    config = OptimizerConfig(learning_rate=0.1, weight_decay=0.5, clip_norm=100.0)
    update = first_update(config, jnp.float32([2.0, -4.0]), jnp.float32([3.0, -1e-3]))
    np.testing.assert_allclose(update, [-0.2, 0.3], rtol=1e-4)


def test_gradients_are_clipped_by_the_norm_of_all_of_them():
    """Norm of (3, 4) is 5, clipped to 1e-6: eps 1e-6 then shows the size. 0.6e-6 / (0.6e-6 + 1e-6) and 0.8 / 1.8."""
    config = OptimizerConfig(learning_rate=1.0, clip_norm=1e-6, eps=1e-6)
    params = {"a": jnp.float32([0.0]), "b": jnp.float32([0.0])}
    update = first_update(config, params, {"a": jnp.float32([3.0]), "b": jnp.float32([4.0])})
    np.testing.assert_allclose([update["a"][0], update["b"][0]], [-0.6 / 1.6, -0.8 / 1.8], rtol=1e-5)


@pytest.fixture(scope="module")
def weights(one_device):
    graphdef, params = small.make_params(small.model_config(), one_device)
    return graphdef, params, small.make_params(small.model_config(), one_device, seed=1)[1]


@pytest.mark.parametrize(("given", "adam_rate"), [(None, 0.01), (0.003, 0.003)])
def test_muon_turns_kernels_and_adam_the_rest(weights, given, adam_rate):
    """A kernel's update is orthonormal, layer by layer, times 0.2 lr sqrt(its longer side).

    The others get Adam's first step with Nesterov's momentum: lr (0.9 * 0.1 / 0.19 + 1), lr their own if given.
    """
    _, params, grads = weights
    config = OptimizerConfig(name="muon", learning_rate=0.01, adam_learning_rate=given, clip_norm=1e9)
    update = jax.jit(lambda params, grads: first_update(config, params, grads))(params, grads)
    seen = {"kernel": 0, "other": 0}
    for path, leaf in jax.tree_util.tree_leaves_with_path(update):
        if "kernel" in jax.tree_util.keystr(path):
            seen["kernel"] += 1
            for matrix in np.asarray(leaf).reshape(-1, *leaf.shape[-2:]):
                singular = np.linalg.svd(matrix, compute_uv=False)
                ideal = 0.01 * optimizer.MUON_RMS * max(matrix.shape) ** 0.5
                # Five Newton-Schulz steps take nearly all singular values to 0.7 .. 1.2 of the ideal.
                assert singular.max() < 1.25 * ideal, path
                assert np.quantile(singular, 0.1) > 0.6 * ideal, path
        else:
            seen["other"] += 1
            expected = adam_rate * (0.9 * 0.1 / 0.19 + 1)
            np.testing.assert_allclose(np.abs(leaf), expected, rtol=1e-3, err_msg=str(path))
    assert seen["kernel"] >= 10 and seen["other"] >= 10


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_moments_live_where_their_weights_do(name):
    """On 4 x 2 devices every optimizer array with the shape of a split weight is split the same way."""
    mesh = mesh_lib.make_mesh({"fsdp": 4, "tensor": 2})
    _, params = small.make_params(small.model_config(), mesh)
    chain = optimizer.make_optimizer(OptimizerConfig(name=name), steps=1)
    places = mesh_lib.state_shardings(jax.eval_shape(chain.init, params), mesh)
    expected = {leaf.sharding.spec for leaf in jax.tree.leaves(params) if leaf.ndim >= 2}
    found = [place.spec for place in jax.tree.leaves(places) if len(place.spec)]
    assert set(found) >= expected - {jax.sharding.PartitionSpec()}


# ---- the step ----


def test_the_step_compiles_once_and_leaves_the_policy_alone(tmp_path):
    """Three steps on 2 x 2 x 2 devices: one program, a falling loss, steps counted, the policy's weights untouched."""
    mesh = mesh_lib.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    policy = small.make_policy(tmp_path, mesh)
    config = SFTConfig(
        steps=3, compute_dtype="float32", remat="none", optimizer=OptimizerConfig(learning_rate=1e-2, schedule="linear")
    )
    messages = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "At the left, at 2.0 s."}]
    sample = policy.processor.encode(messages)
    batch = mesh_lib.shard_rows(small.make_batch([[sample]] * 3, policy.config, num_rows=4), policy.mesh)
    before = jax.tree.map(np.asarray, policy.params)

    step, training = steps.make_sft_step(config), state.make_state(policy, config)
    places = jax.tree.map(lambda leaf: leaf.sharding, training)
    history = []
    for _ in range(3):
        training, metrics = step(training, batch)
        history.append({name: float(value) for name, value in metrics.items()})
    assert step._cache_size() == 1
    assert jax.tree.map(lambda leaf: leaf.sharding, training) == places
    assert int(training.step) == 3
    assert history[0]["loss"] > history[1]["loss"] > history[2]["loss"]
    np.testing.assert_allclose([row["learning_rate"] for row in history], [1e-2, 1e-2 * 2 / 3, 1e-2 / 3], rtol=1e-5)
    assert {row["targets"] for row in history} == {3.0 * int(sample.loss_mask.sum())}
    assert all(np.isfinite(row["grad_norm"]) and row["grad_norm"] > 0 for row in history)
    jax.tree.map(np.testing.assert_array_equal, before, policy.params)
    assert isinstance(nnx.merge(training.graphdef, training.params), nnx.Module)

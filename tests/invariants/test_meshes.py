"""8 CPU devices: losses and gradients of SFT and GSPO are those of one device, every leaf where its weight is."""

import dataclasses

import jax
import numpy as np
import pytest

import small
from openo3_jax import mesh as mesh_lib
from openo3_jax.config import GSPOConfig, OptimizerConfig, SFTConfig
from openo3_jax.models import attention, qwen2_5_vl
from openo3_jax.train import losses, policy_loss, state, steps
from openo3_jax.types import Rollouts

CONFIG = small.model_config()
GSPO = GSPOConfig(steps=1, compute_dtype="float32", remat="none", ratio="token", kl_coef=0.1)


def make_batch():
    """Four rows: pictures; two samples, one with a picture; a prompt with two completions that share it; padding."""
    rows = [
        [small.sample(CONFIG, prompt=5, answer=7, pictures=[(4, 6), (6, 4)])],
        [small.sample(CONFIG, prompt=3, answer=4), small.sample(CONFIG, prompt=6, answer=2, pictures=[(6, 4)])],
        [small.sample(CONFIG, prompt=50, answer=40)],
    ]
    batch = small.make_batch(rows, CONFIG, num_rows=4)
    branches = batch.branches.copy()
    branches[2, 50:90] = np.repeat([1, 2], [25, 15])
    return dataclasses.replace(batch, branches=branches)


def loss_and_gradients(axes):
    """Losses of both stages, from one forward pass, and the gradients of their sum."""
    mesh = mesh_lib.make_mesh(axes, devices=jax.devices()[: int(np.prod([*axes.values(), 1]))])
    graphdef, params = small.make_params(CONFIG, mesh)
    batch = make_batch()
    draw = np.random.default_rng(0)
    # The first ten targets of a row are one completion's, the next the other's; ratios on both sides of the clip.
    completion = np.where(batch.targets >= 0, np.arange(batch.targets.shape[1]) >= 10, -1).astype(np.int32)
    drift = draw.normal(size=(2, *completion.shape)).astype(np.float32)
    advantage, keep = draw.normal(size=(4, 2)).astype(np.float32), np.ones((4, 2), bool)

    def loss_of(params, batch, completion, drift, advantage, keep):
        logp = steps.score_batch(graphdef, params, batch, GSPO).logp
        old, reference = jax.lax.stop_gradient(logp) + drift
        loss = policy_loss.policy_loss(logp, old, reference, old, completion, advantage, keep, GSPO).loss
        sft = losses.cross_entropy(logp, batch.target_slots >= 0)
        return sft + loss, (sft, loss)

    run = jax.jit(jax.value_and_grad(loss_of, has_aux=True))
    batch, completion, advantage, keep = mesh_lib.shard_rows((batch, completion, advantage, keep), mesh)
    (_, both), grads = run(params, batch, completion, drift, advantage, keep)
    named = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(grads)}
    return np.asarray(both), named


@pytest.fixture(scope="module")
def expected():
    return loss_and_gradients({})


def assert_equal(ours, expected):
    """Losses within 1e-5, each gradient within 1e-5 of its norm."""
    np.testing.assert_allclose(ours[0], expected[0], atol=1e-5)
    for name, reference in expected[1].items():
        difference = np.linalg.norm(np.asarray(ours[1][name]) - np.asarray(reference))
        # Adding a constant to every key moves no softmax: that gradient is rounding noise.
        floor = 1e-7 if "k_proj" in name and "bias" in name else 0.0
        assert difference <= 1e-5 * np.linalg.norm(np.asarray(reference)) + floor, name


MESHES = [  # axes, and the slots of an attention block: rows of 128 have one, or four
    ({"data": 4}, 128),
    ({"fsdp": 4}, 128),
    ({"tensor": 2}, 32),
    ({"context": 2}, 128),  # devices swap slots for heads
    ({"context": 8}, 32),  # more than there are key heads: devices gather keys and values
    ({"data": 2, "fsdp": 2, "tensor": 2}, 128),
    ({"fsdp": 2, "tensor": 2, "context": 2}, 32),
]


@pytest.mark.parametrize(("axes", "block"), MESHES, ids=["-".join(f"{n}{s}" for n, s in m[0].items()) for m in MESHES])
def test_loss_and_gradients_do_not_depend_on_the_mesh(expected, axes, block, monkeypatch, capfd):
    """Every gradient lives where its weight does, and the compiler found no array that it had to make whole."""
    monkeypatch.setattr(attention, "BLOCK", block)
    loss, grads = loss_and_gradients(axes)
    assert "Involuntary full rematerialization" not in capfd.readouterr().err
    assert_equal((loss, grads), expected)
    mesh = mesh_lib.make_mesh(axes, devices=jax.devices()[: int(np.prod(list(axes.values())))])
    _, abstract = qwen2_5_vl.abstract_params(CONFIG, mesh)
    for path, place in jax.tree_util.tree_leaves_with_path(mesh_lib.state_shardings(abstract, mesh)):
        grad = grads[jax.tree_util.keystr(path)]
        assert grad.sharding.is_equivalent_to(place, grad.ndim), path


# ---- the jitted steps ----

# An update follows its gradient, not its sign.
SMOOTH = OptimizerConfig(learning_rate=1e-2, eps=1e-2, schedule="constant")
SETTINGS = {"steps": 2, "compute_dtype": "float32", "remat": "none", "optimizer": SMOOTH}
SFT_STEP, GSPO_STEP = SFTConfig(**SETTINGS), GSPOConfig(**SETTINGS, ratio="sequence", kl_coef=0.1)
TOGETHER = [{"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 2, "tensor": 2, "context": 2}]
ALONE = [{"data": 4}, {"fsdp": 4}, {"tensor": 2}, {"context": 2}]


def make_policy(axes, directory):
    mesh = mesh_lib.make_mesh(axes, devices=jax.devices()[: int(np.prod([*axes.values(), 1]))])
    policy = small.make_policy(directory, mesh)
    graphdef, params = small.make_params(CONFIG, mesh)
    processor = dataclasses.replace(policy.processor, config=CONFIG)
    return dataclasses.replace(policy, graphdef=graphdef, params=params, processor=processor)


def make_step_rollouts(batch):
    draw = np.random.default_rng(1)
    completion = np.where(batch.targets >= 0, np.arange(batch.targets.shape[1]) >= 10, -1).astype(np.int32)
    old = draw.normal(-4, 0.5, completion.shape).astype(np.float32)
    keep = np.array([[True, True], [True, False], [True, True], [False, False]])
    return Rollouts(batch, completion, old, old, draw.normal(size=(4, 2)).astype(np.float32), keep)


def updated(axes, directory):
    """After one update of each stage: what was measured, and every array of the state: weights and moments.

    The first moment after the first update is a tenth of the clipped gradient.
    """
    policy, batch = make_policy(axes, directory), make_batch()
    parts = (SFT_STEP, steps.make_sft_step, batch), (GSPO_STEP, steps.make_gspo_step, make_step_rollouts(batch))
    found = {}
    for config, make, host in parts:
        training = state.make_state(policy, config)
        before = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves(training.params)}
        rows = mesh_lib.shard_rows(host, policy.mesh)
        training, measured = make(config)(training, rows)
        name = type(config).__name__
        found[name] = {key: float(value) for key, value in measured.items()}
        found[name] |= {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves(training)}
        moved = [np.abs(found[name][f".params{path}"] - value).max() for path, value in before.items()]
        assert min(moved) > 0, name  # every weight has learned something
    return found


def leaves(tree):
    return jax.tree_util.tree_leaves_with_path(tree)


@pytest.fixture(scope="module")
def updated_alone(tmp_path_factory):
    return updated({}, tmp_path_factory.mktemp("alone"))


@pytest.mark.parametrize("axes", [*TOGETHER, *(pytest.param(axes, marks=pytest.mark.soak) for axes in ALONE)], ids=str)
def test_steps_do_not_depend_on_the_mesh(axes, updated_alone, tmp_path):
    """Losses, gradients (as moments), and weights after an update, within float32 of those of one device."""
    for stage, ours in updated(axes, tmp_path).items():
        theirs = updated_alone[stage]
        assert ours.keys() == theirs.keys() and len(ours) > 60
        for name, value in theirs.items():
            if isinstance(value, float):
                assert ours[name] == pytest.approx(value, rel=2e-5, abs=1e-6), (stage, name)
                continue
            scale = np.linalg.norm(value.astype(np.float64))
            difference = np.linalg.norm(ours[name].astype(np.float64) - value)
            floor = 1e-6 if "k_proj" in name and "bias" in name else 1e-9  # moves no softmax: rounding on both sides
            assert difference <= 2e-5 * scale + floor, (stage, name, difference, scale)

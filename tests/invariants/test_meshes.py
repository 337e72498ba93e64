"""8 CPU devices: loss and gradients of SFT are those of one device on every mesh, every leaf where its weight is."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

import small
from openo3_jax import mesh as mesh_lib
from openo3_jax.models import attention, qwen2_5_vl
from openo3_jax.train import losses

CONFIG = small.model_config()


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
    mesh = mesh_lib.make_mesh(axes, devices=jax.devices()[: int(np.prod([*axes.values(), 1]))])
    graphdef, params = small.make_params(CONFIG, mesh)

    def loss_of(params, batch):
        model = nnx.merge(graphdef, params)
        hidden, _ = model.hidden(batch)
        scores = losses.target_scores(hidden, model.head, batch.target_slots, batch.targets, mesh=mesh)
        return losses.cross_entropy(scores.logp, batch.target_slots >= 0)

    run = small.jit(jax.value_and_grad(loss_of))
    loss, grads = run(params, mesh_lib.shard_rows(make_batch(), mesh))
    named = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(grads)}
    return float(loss), named


@pytest.fixture(scope="module")
def expected():
    return loss_and_gradients({})


def assert_equal(ours, expected):
    """Loss within 1e-5, each gradient within 1e-5 of its norm."""
    assert abs(ours[0] - expected[0]) < 1e-5
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
    ({"data": 2, "context": 4}, 128),
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

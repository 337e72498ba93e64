"""8 CPU devices: loss and gradients of SFT are those of one device on every mesh, every leaf where its weight is."""

import dataclasses

import jax
import numpy as np
import pytest

import small
from openo3_jax import mesh as mesh_lib
from openo3_jax.config import SFTConfig
from openo3_jax.models import attention, qwen2_5_vl
from openo3_jax.train import steps

CONFIG = small.model_config()
SFT = SFTConfig(steps=1, compute_dtype="float32", remat=False)


def make_batch():
    """Four rows: pictures; two samples, one with a picture; a prompt with two completions that share it; padding."""
    rows = [
        [small.sample(CONFIG, prompt=5, answer=7, pictures=[(4, 6), (10, 4)])],
        [small.sample(CONFIG, prompt=3, answer=4), small.sample(CONFIG, prompt=6, answer=2, pictures=[(4, 4)])],
        [small.sample(CONFIG, prompt=50, answer=40)],
    ]
    batch = small.make_batch(rows, CONFIG, num_rows=4)
    branches = batch.branches.copy()
    branches[2, 50:90] = np.repeat([1, 2], [25, 15])
    return dataclasses.replace(batch, branches=branches)


def loss_and_gradients(axes):
    mesh = mesh_lib.make_mesh(axes, devices=jax.devices()[: int(np.prod([*axes.values(), 1]))])
    graphdef, params = small.make_params(CONFIG, mesh)
    run = small.jit(jax.value_and_grad(lambda params, batch: steps.sft_loss(graphdef, params, batch, SFT)))
    loss, grads = run(params, mesh_lib.shard_rows(make_batch(), mesh))
    named = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(grads)}
    return float(loss), named


@pytest.fixture(scope="module", params=["xla", "blockwise"])
def expected(request):
    """On one device; blocks of 32 slots, so that a row has several, or none."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "BLOCK", {"xla": 128, "blockwise": 32}[request.param])
        yield loss_and_gradients({})


@pytest.mark.parametrize(
    "axes",
    [
        {"data": 4},
        {"fsdp": 4},
        {"tensor": 2},
        {"context": 2},  # devices swap slots for heads
        {"context": 8},  # more than there are key heads: devices gather keys and values
        {"data": 2, "fsdp": 2, "tensor": 2},
        {"fsdp": 2, "tensor": 2, "context": 2},
        {"data": 2, "context": 4},
    ],
    ids=lambda axes: "-".join(f"{name}{size}" for name, size in axes.items()),
)
def test_loss_and_gradients_do_not_depend_on_the_mesh(expected, axes):
    """Loss within 1e-5, each gradient within 1e-5 of its norm."""
    loss, grads = loss_and_gradients(axes)
    assert abs(loss - expected[0]) < 1e-5
    mesh = mesh_lib.make_mesh(axes, devices=jax.devices()[: int(np.prod(list(axes.values())))])
    _, abstract = qwen2_5_vl.abstract_params(CONFIG, mesh)
    places = jax.tree_util.tree_leaves_with_path(mesh_lib.state_shardings(abstract, mesh))
    places = {jax.tree_util.keystr(path): place for path, place in places}
    for name, reference in expected[1].items():
        reference = np.asarray(reference)
        difference = np.linalg.norm(np.asarray(grads[name]) - reference)
        # Adding a constant to every key moves no softmax: that gradient is rounding noise.
        floor = 1e-7 if "k_proj" in name and "bias" in name else 0.0
        assert difference <= 1e-5 * np.linalg.norm(reference) + floor, name
        assert grads[name].sharding.is_equivalent_to(places[name], reference.ndim), name

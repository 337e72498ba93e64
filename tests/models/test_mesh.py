"""The mesh and its table: collisions, sizes, and the same loss and gradients on every mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import small
from openo3_jax import mesh as mesh_lib
from openo3_jax.config import SFTConfig
from openo3_jax.errors import InputError
from openo3_jax.models import qwen2_5_vl
from openo3_jax.train import steps

CONFIG = small.model_config()
SFT = SFTConfig(steps=1, compute_dtype="float32", remat=False)


@pytest.mark.parametrize(
    ("logical", "expected"),
    [
        (("embed", "ffn"), PartitionSpec("fsdp", "tensor")),
        (("layers", "heads", "embed"), PartitionSpec(None, "tensor", "fsdp")),
        (("rows", None, "heads"), PartitionSpec(("data", "fsdp"), None, "tensor")),
    ],
)
def test_logical_axes_to_mesh_axes(logical, expected):
    assert mesh_lib.partition_spec(logical) == expected


@pytest.mark.parametrize("logical", [("embed", "embed"), ("ffn", "heads"), ("rows", "embed")])
def test_one_mesh_axis_cannot_split_two_dimensions(logical):
    with pytest.raises(InputError, match="put one mesh axis on two dimensions"):
        mesh_lib.partition_spec(logical)


def test_an_unknown_logical_axis_is_our_bug():
    with pytest.raises(KeyError, match="hidden"):
        mesh_lib.partition_spec(("hidden",))


def test_make_mesh():
    assert dict(mesh_lib.make_mesh().shape) == {"data": 1, "fsdp": 8, "tensor": 1}
    assert dict(mesh_lib.make_mesh({"tensor": 2, "data": 4}).shape) == {"data": 4, "fsdp": 1, "tensor": 2}
    assert mesh_lib.make_mesh({}, devices=jax.devices()[3:4]).devices.item() == jax.devices()[3]


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"fsdp": 4, "model": 2}, r"unknown axes \['model'\]; the axes are data, fsdp, tensor"),
        ({"fsdp": 3}, r"sizes \{'fsdp': 3\} make 3 places for 8 devices"),
        ({"fsdp": 16}, "make 16 places for 8 devices"),
        ({"fsdp": -8, "data": -1}, "make 8 places for 8 devices"),
    ],
)
def test_meshes_that_do_not_fit(axes, message):
    with pytest.raises(InputError, match=message):
        mesh_lib.make_mesh(axes)


def test_a_dimension_that_does_not_divide_is_named_with_its_numbers():
    odd = small.model_config(intermediate_size=41)
    mesh = mesh_lib.make_mesh({"fsdp": 4, "tensor": 2})
    _, abstract = qwen2_5_vl.abstract_params(odd, mesh)
    with pytest.raises(InputError, match=r"down_proj.*ffn=41, which 2 devices on 'tensor' do not divide"):
        mesh_lib.state_shardings(abstract, mesh)


def test_shardings_are_canonical():
    """As a compiled program returns them: no axes of size 1, no trailing None."""
    mesh = mesh_lib.make_mesh({"fsdp": 8})
    assert mesh_lib.sharding(mesh, "layers", "embed", "ffn").spec == PartitionSpec(None, "fsdp")
    assert mesh_lib.sharding(mesh, "rows").spec == PartitionSpec("fsdp")
    assert mesh_lib.sharding(mesh, "norm").spec == PartitionSpec()


# ---- one loss on every mesh ----


def loss_and_gradients(axes):
    """Four rows, two of them packed, two with pictures, one of them padding."""
    devices = jax.devices()[: int(np.prod([*axes.values(), 1]))]
    mesh = mesh_lib.make_mesh(axes, devices=devices)
    graphdef, params = small.make_params(CONFIG, mesh)
    rows = [
        [small.sample(CONFIG, prompt=5, answer=7, pictures=[(4, 6), (10, 4)])],
        [small.sample(CONFIG, prompt=3, answer=4), small.sample(CONFIG, prompt=6, answer=2, pictures=[(4, 4)])],
        [small.sample(CONFIG, prompt=9, answer=5)],
    ]
    batch = mesh_lib.shard_rows(small.make_batch(rows, CONFIG, num_rows=4), mesh)

    @small.jit
    def run(params, batch):
        def loss(params):
            return steps.sft_loss(graphdef, params, batch, SFT)

        return jax.value_and_grad(loss)(params)

    loss, grads = run(params, batch)
    named = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(grads)}
    return float(loss), named


@pytest.fixture(scope="module")
def expected():
    return loss_and_gradients({})


@pytest.mark.parametrize("axes", [{"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 4}])
def test_loss_and_gradients_do_not_depend_on_the_mesh(expected, axes):
    """Loss within 1e-5, each gradient within 1e-5 of its norm; every gradient lives where its weight does."""
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


def test_the_model_is_split_and_not_copied():
    """On 4 x 2 devices a decoder's matrix lies in eighths, an embedding too."""
    mesh = mesh_lib.make_mesh({"fsdp": 4, "tensor": 2})
    _, params = small.make_params(CONFIG, mesh)
    for weight in (params["text"]["layers"]["mlp"]["gate_proj"]["kernel"], params["text"]["embed_tokens"]["weight"]):
        value = weight.get_raw_value()
        assert value.addressable_shards[0].data.size * 8 == value.size
        assert jnp.isfinite(value).all()

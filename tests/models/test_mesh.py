"""The mesh and its table: collisions, sizes, and which devices stand where."""

import dataclasses

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

CONFIG = small.model_config()
SFT = SFTConfig(steps=1, compute_dtype="float32", remat="none")


@pytest.mark.parametrize(
    ("logical", "expected"),
    [
        (("embed", "ffn"), PartitionSpec(("fsdp", "context"), "tensor")),
        (("layers", "heads", "embed"), PartitionSpec(None, "tensor", ("fsdp", "context"))),
        (("rows", "seq", "heads"), PartitionSpec(("data", "fsdp"), "context", "tensor")),
    ],
)
def test_logical_axes_to_mesh_axes(logical, expected):
    assert mesh_lib.partition_spec(logical) == expected


@pytest.mark.parametrize(
    "logical", [("embed", "embed"), ("ffn", "heads"), ("rows", "embed"), ("seq", "patches"), ("seq", "embed")]
)
def test_one_mesh_axis_cannot_split_two_dimensions(logical):
    with pytest.raises(InputError, match="put one mesh axis on two dimensions"):
        mesh_lib.partition_spec(logical)


def test_an_unknown_logical_axis_is_our_bug():
    with pytest.raises(KeyError, match="hidden"):
        mesh_lib.partition_spec(("hidden",))


def test_make_mesh():
    assert dict(mesh_lib.make_mesh().shape) == {"data": 1, "fsdp": 8, "tensor": 1, "context": 1}
    assert dict(mesh_lib.make_mesh({"tensor": 2, "data": 4}).shape) == {"data": 4, "fsdp": 1, "tensor": 2, "context": 1}
    assert mesh_lib.make_mesh({}, devices=jax.devices()[3:4]).devices.item() == jax.devices()[3]


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"fsdp": 4, "model": 2}, r"unknown axes \['model'\]; the axes are data, fsdp, tensor, context"),
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


@pytest.mark.parametrize(
    ("shape", "logical", "message"),
    [
        ((6, 128), ("rows", "seq"), r"rows=6, which 4 devices on \('data', 'fsdp'\) do not divide"),
        ((8, 129), ("rows", "seq"), r"seq=129, which 2 devices on 'context' do not divide"),
    ],
)
def test_an_activation_that_does_not_divide_is_named_with_its_numbers(shape, logical, message):
    mesh = mesh_lib.make_mesh({"data": 2, "fsdp": 2, "context": 2})
    with pytest.raises(InputError, match=message):
        mesh_lib.constrain(jnp.zeros(shape), mesh, *logical)


def test_rows_that_do_not_divide_are_named_before_they_are_moved():
    with pytest.raises(InputError, match="rows=3, which 8 devices"):
        mesh_lib.shard_rows(np.zeros((3, 5)), mesh_lib.make_mesh())


def test_shardings_are_canonical():
    """As a compiled program returns them: no axes of size 1, no trailing None."""
    mesh = mesh_lib.make_mesh({"fsdp": 8})
    assert mesh_lib.sharding(mesh, "layers", "embed", "ffn").spec == PartitionSpec(None, "fsdp")
    assert mesh_lib.sharding(mesh, "rows").spec == PartitionSpec("fsdp")
    assert mesh_lib.sharding(mesh, "norm").spec == PartitionSpec()


# ---- several hosts ----


@dataclasses.dataclass(frozen=True)
class Device:
    """What the network's shape is read from."""

    id: int
    process_index: int
    platform: str = "gpu"
    device_kind: str = "fake"


@dataclasses.dataclass(frozen=True)
class Numbered(Device):
    """As TPUs and GPUs are."""

    slice_index: int = 0


def hosts(number: int, each: int, processes: int = 1) -> list[Device]:
    """Devices in an order that mixes hosts, as a cluster may give them; on each host in so many processes."""
    devices = [
        Numbered(id=host * each + i, process_index=host * processes + i * processes // each, slice_index=host)
        for host in range(number)
        for i in range(each)
    ]
    return devices[::-1]


@pytest.mark.parametrize(
    ("sizes", "number", "within", "across"),
    [
        ({"data": 2, "fsdp": 8}, 2, (1, 8, 1, 1), (2, 1, 1, 1)),
        ({"fsdp": 16}, 2, (1, 8, 1, 1), (1, 2, 1, 1)),
        ({"data": 2, "fsdp": 8, "tensor": 2}, 4, (1, 4, 2, 1), (2, 2, 1, 1)),
        ({"data": 6, "fsdp": 2, "context": 2}, 3, (2, 2, 1, 2), (3, 1, 1, 1)),
    ],
)
def test_data_crosses_hosts_first_then_fsdp(sizes, number, within, across):
    assert mesh_lib.split_over_hosts(sizes, number) == (within, across)


@pytest.mark.parametrize("sizes", [{"tensor": 16}, {"fsdp": 2, "context": 8}, {"data": 3, "tensor": 8}])
def test_tensor_and_context_stay_within_a_host(sizes):
    with pytest.raises(InputError, match=r"over 4 hosts: only data and fsdp may cross hosts.*a multiple of 4"):
        mesh_lib.split_over_hosts(sizes, 4)


@pytest.mark.parametrize("processes", [1, 4])
def test_each_host_has_whole_rows_of_the_mesh(processes):
    """Two hosts of four: every tensor pair, and every fsdp pair, lies within one, whatever the processes."""
    devices = hosts(2, 4, processes)
    granule = mesh_lib.granule_of(devices)
    assert mesh_lib.default_sizes(8, mesh_lib.num_granules(devices, granule)) == {"data": 2, "fsdp": 4}
    placed = mesh_lib.arrange({"data": 2, "fsdp": 2, "tensor": 2}, devices, granule)
    assert placed.shape == (2, 2, 2, 1)
    of_host = np.vectorize(lambda device: device.slice_index)(placed)
    assert of_host.reshape(2, 4).tolist() == [[0] * 4, [1] * 4]


def test_a_slice_of_a_pod_is_one_network_however_many_hosts_it_has():
    pod = [Numbered(id=i, process_index=i // 4, platform="tpu", slice_index=i // 8) for i in range(16)]
    assert mesh_lib.num_granules(pod, mesh_lib.granule_of(pod)) == 2
    assert mesh_lib.num_granules(hosts(4, 4), mesh_lib.granule_of(hosts(4, 4))) == 4


def test_devices_without_the_number_of_a_slice():
    """A process is a host; a TPU is in the only slice."""
    devices = [Device(id=i, process_index=i // 2) for i in range(4)][::-1]
    placed = mesh_lib.arrange({"data": 2, "tensor": 2}, devices, mesh_lib.granule_of(devices))
    assert np.vectorize(lambda device: device.process_index)(placed).reshape(2, 2).tolist() == [[0, 0], [1, 1]]
    chips = [Device(id=i, process_index=i // 2, platform="tpu") for i in range(4)]
    assert mesh_lib.num_granules(chips, mesh_lib.granule_of(chips)) == 1


@pytest.mark.parametrize(
    ("devices", "granules", "expected"),
    [
        (8, 1, {"data": 1, "fsdp": 8}),
        (16, 2, {"data": 2, "fsdp": 8}),
        (128, 1, {"data": 2, "fsdp": 64}),
        (96, 1, {"data": 2, "fsdp": 48}),
    ],
)
def test_sizes_that_are_not_given(devices, granules, expected):
    assert mesh_lib.default_sizes(devices, granules) == expected


def test_the_model_is_split_and_not_copied():
    """On 2 x 2 x 2 devices a decoder's matrix lies in eighths, an embedding too."""
    mesh = mesh_lib.make_mesh({"fsdp": 2, "tensor": 2, "context": 2})
    _, params = small.make_params(CONFIG, mesh)
    for weight in (params["text"]["layers"]["mlp"]["gate_proj"]["kernel"], params["text"]["embed_tokens"]["weight"]):
        value = weight.get_raw_value()
        assert value.addressable_shards[0].data.size * 8 == value.size
        assert jnp.isfinite(value).all()

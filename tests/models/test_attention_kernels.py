"""The kernels' programs, run on the CPU by their references: who sees whom, values and gradients against `xla`.

What only a GPU or a TPU can run is compiled for them by `benchmarks/attention.py --aot`.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax._src.cudnn import fused_attention_stablehlo

import small
from openo3_jax import mesh as mesh_lib
from openo3_jax.errors import InputError
from openo3_jax.models import attention, attention_cudnn, layers

SEQ = 256
GROUP = attention.Group(completions=3, slots=60)


def ids(*runs):
    """`ids((100, 1), (56, 0))`: 100 slots of 1, then 56 of 0, padded with 0."""
    row = np.concatenate([np.full(length, value) for length, value in runs])
    return np.pad(row, (0, SEQ - len(row))).astype(np.int32)


ONE, NONE = ids((SEQ, 1)), ids((0, 0))
ROWS = {  # name: (segments, branches) of two rows
    "one sample, and padding behind": ([ONE, ids((130, 1))], [NONE, NONE]),
    "packed, and a row of padding": ([ids((90, 1), (33, 2), (100, 3)), NONE], [NONE, NONE]),
    "groups": (
        [ids((250, 1)), ids((140, 1))],
        [ids((130, 0), (40, 1), (60, 2), (20, 3)), ids((100, 0), (10, 1), (30, 2))],
    ),
    "a completion longer than its bound": ([ONE, ONE], [ids((130, 0), (80, 1), (46, 2)), NONE]),
    "a prompt behind its completion": ([ONE, ONE], [ids((100, 0), (20, 1), (30, 0), (10, 2)), NONE]),
}


@partial(jax.jit, static_argnames=("backend", "group"))
def run(qkv, pull, slots, *, backend, group=None):
    out, back = jax.vjp(partial(attention.attention, slots=slots, causal=True, backend=backend, group=group), *qkv)
    real = (slots.segments > 0)[..., None, None]
    return jnp.where(real, out, 0), back(jnp.where(real, pull, 0))


@pytest.fixture(scope="module")
def arrays():
    """Four heads, two for keys; head size 8."""
    draw = np.random.default_rng(0)
    qkv = [draw.normal(size=(2, SEQ, heads, 8)).astype(np.float32) for heads in (4, 2, 2)]
    return qkv, draw.normal(size=qkv[0].shape).astype(np.float32)


def assert_equal(ours, expected):
    """Within 2e-6 of the largest value."""
    for mine, reference in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        assert np.isfinite(mine).all()
        np.testing.assert_allclose(mine, reference, atol=2e-6 * max(1.0, float(np.abs(reference).max())))


def slots_of(name):
    return attention.Slots(*(np.stack(rows) for rows in ROWS[name]))


@pytest.mark.parametrize("group", [None, GROUP], ids=["no bounds", "bounds"])
@pytest.mark.parametrize("backend", ["cudnn", "splash"])
def test_kernels_agree_with_scores_in_full(arrays, backend, group):
    for slots in map(slots_of, ROWS):
        ours, expected = (run(*arrays, slots, backend=b, group=group) for b in (backend, "xla"))
        assert_equal(ours, expected)


def test_what_would_need_too_large_a_mask_goes_in_blocks(arrays, monkeypatch):
    slots = slots_of("packed, and a row of padding")
    monkeypatch.setattr(attention_cudnn, "MASK_BYTES", 2 * 2 * SEQ * SEQ - 1)
    ours, expected = (run(*arrays, slots, backend=backend) for backend in ("cudnn", "xla"))
    assert_equal(ours, expected)
    bound = partial(attention.attention, slots=slots, causal=True, backend="cudnn")
    assert (2, 1, SEQ, SEQ) not in set(small.shapes_in(jax.make_jaxpr(bound)(*arrays[0])))
    monkeypatch.undo()
    assert (2, 1, SEQ, SEQ) in set(small.shapes_in(jax.make_jaxpr(lambda *a: bound(*a))(*arrays[0])))


@pytest.mark.parametrize("kv_heads", [2, 1], ids=["slots for heads", "keys gathered"])
@pytest.mark.parametrize("backend", ["cudnn", "splash"])
def test_kernels_over_context(arrays, backend, kv_heads):
    """Two devices with half of the slots each."""
    (q, k, v), pull = arrays
    qkv = q, k[:, :, :kv_heads], v[:, :, :kv_heads]
    mesh = mesh_lib.make_mesh({"context": 2}, devices=jax.devices()[:2])
    slots = slots_of("packed, and a row of padding")

    @jax.jit
    def over_two(qkv, pull):
        out, back = jax.vjp(partial(attention.attention, slots=slots, causal=True, backend=backend, mesh=mesh), *qkv)
        real = (slots.segments > 0)[..., None, None]
        return jnp.where(real, out, 0), back(jnp.where(real, pull, 0))

    ours, expected = over_two(qkv, pull), run(qkv, pull, slots, backend="xla")
    assert_equal(ours, expected)


@pytest.mark.parametrize("group", [None, attention.Group(completions=2, slots=8)], ids=["no bounds", "bounds"])
def test_what_cudnn_gave_is_kept(group, one_device, monkeypatch):
    """As for a GPU, not run: "layers" runs each of its kernels again in the backward pass, the others none of the
    decoder's, but the vision tower's.

    They are in branches, in `shard_map`, in a loop over layers.
    """
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)

    def on_gpu(function):
        return lambda *args, **how: function(*args, **how | {"platform": "gpu"})

    for name in ("local", "choose"):
        monkeypatch.setattr(attention, name, on_gpu(getattr(attention, name)))
    config = small.model_config()
    graphdef, params = small.make_params(config, one_device)
    batch = small.make_batch([[small.sample(config, prompt=9, answer=5, pictures=[(4, 6)])]], config)

    def count(function) -> int:
        def of_params(params):
            return function(nnx.merge(graphdef, jax.tree.map(lambda x: x.astype("bfloat16"), params))).sum()

        equations = small.equations_in(jax.make_jaxpr(jax.grad(of_params))(params))
        return [equation.primitive.name for equation in equations].count(layers.CUDNN_FORWARD)

    def kernels(remat) -> int:
        return count(lambda model: model.hidden(batch, remat=remat, group=group)[0])

    forward = kernels("none")
    assert forward > 2
    of_vision = count(lambda model: model.visual(batch.vision))
    assert 0 < of_vision < forward
    assert {remat: kernels(remat) for remat in ("layers", "attention", "dots")} == {
        "layers": 2 * forward,
        "attention": forward + of_vision,
        "dots": forward + of_vision,
    }


def shapes(seq=1024, head_dim=128, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct((1, seq, 4, head_dim), dtype), jax.ShapeDtypeStruct((1, seq, 2, head_dim), dtype)


@pytest.mark.parametrize(
    ("platform", "what", "causal", "expected"),
    [
        ("cpu", {}, True, "blockwise"),
        ("cpu", {"seq": 128}, True, "xla"),
        ("gpu", {}, True, "cudnn"),
        ("gpu", {"head_dim": 80}, False, "cudnn"),
        ("gpu", {"dtype": jnp.float32}, True, "blockwise"),
        ("gpu", {"dtype": jnp.float32, "seq": 512}, True, "xla"),
        ("tpu", {}, True, "splash"),
        ("tpu", {"seq": 1000}, True, "blockwise"),
        ("tpu", {"head_dim": 80}, False, "blockwise"),
    ],
)
def test_what_auto_stands_for(platform, what, causal, expected):
    assert attention.choose(*shapes(**what), causal=causal, platform=platform) == expected


@pytest.mark.parametrize(
    ("platform", "backend", "what", "causal", "message"),
    [
        ("gpu", "cudnn", {"dtype": jnp.float32}, True, "'cudnn' needs bfloat16 or float16, got float32; take 'auto'"),
        ("gpu", "cudnn", {"head_dim": 12}, True, "multiple of 8 up to 128, got 12"),
        ("tpu", "splash", {"seq": 1000}, True, "'splash' needs slots in multiples of 128, got 1000"),
        ("tpu", "splash", {"head_dim": 80}, True, "needs heads of a multiple of 128, got 80"),
        ("tpu", "splash", {}, False, "is causal only"),
    ],
)
def test_a_kernel_that_cannot_says_why(platform, backend, what, causal, message):
    with pytest.raises(InputError, match=message):
        attention.choose(*shapes(**what), causal=causal, platform=platform, backend=backend)


@pytest.mark.parametrize("heads", [3, 6])
def test_heads_that_the_mesh_does_not_divide_are_named(heads):
    mesh = mesh_lib.make_mesh({"tensor": 4}, devices=jax.devices()[:4])
    q, k = np.zeros((1, 8, heads * 2, 4), np.float32), np.zeros((1, 8, heads, 4), np.float32)
    with pytest.raises(InputError, match=r"heads=\d, which 4 devices on 'tensor' do not divide"):
        attention.attention(q, k, k, attention.Slots(np.ones((1, 8), np.int32)), causal=True, mesh=mesh)

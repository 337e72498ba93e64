"""Stacked layers: what the backward pass keeps of them, and that it changes nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from openo3_jax.models import layers


class Block(nnx.Module):
    def __init__(self, *, rngs):
        self.mlp = layers.SwiGLU(8, 12, bias=False, rngs=rngs)


def call(block, x, _):
    return x + checkpoint_name(jnp.sin(block.mlp(x)), layers.ATTENTION) ** 2, None


@pytest.mark.parametrize(
    ("remat", "sines", "products"),
    # One sine and three products forward; six products backward. What is not kept is computed again, of "dots" the
    # narrow product, which the sine's gradient asks for.
    [("none", 1, 9), (False, 1, 9), ("layers", 2, 12), (True, 2, 12), ("attention", 1, 12), ("dots", 1, 10)],
)
def test_what_is_computed_again_changes_nothing(one_device, remat, sines, products):
    with jax.default_matmul_precision("highest"):
        stacked = layers.stack(lambda rngs: Block(rngs=rngs), 3, rngs=nnx.Rngs(0))
        graphdef, params = nnx.split(stacked)
        x = np.random.default_rng(0).normal(size=(2, 5, 8)).astype(np.float32)

        def total(params, remat):
            out, _ = layers.scan(nnx.merge(graphdef, params), x, call, mesh=one_device, remat=remat)
            return (out**2).sum()

        expected = jax.jit(jax.grad(total), static_argnums=1)(params, "none")
        ours = jax.jit(jax.grad(total), static_argnums=1)(params, remat)
    for mine, reference in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(mine, reference, rtol=1e-5, atol=1e-7)
    text = str(jax.make_jaxpr(jax.grad(total), static_argnums=1)(params, remat))
    assert (text.count(" sin "), text.count("dot_general[")) == (sines, products)

"""The building blocks of both towers. Attribute names follow HF, so that the weight table reads as identity."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh
from jaxtyping import Float, Int

from openo3_jax import mesh as mesh_lib
from openo3_jax.config import Remat
from openo3_jax.types import Array

INIT_STD = 0.02  # HF `initializer_range`

ATTENTION, PRODUCT = "attention", "product"  # names under which results are kept for the backward pass
CUDNN_FORWARD = "dot_product_attention_fwd_wrapper"  # cuDNN's, which have no name: what jax calls the operation


@jax.custom_vjp
def multiply(x: Float[Array, "*batch in"], kernel: Float[Array, "in out"]) -> Float[Array, "*batch out"]:
    """`x W`, whose gradient by W turns the narrower of its two factors round.

    A CPU's kernels contract the last dimension of their first factor, and the compiler turns it round value by value
    together with what it is computed from: for the wide one of a SwiGLU that took longer than the product.
    """
    return x @ kernel


def _multiply_fwd(x, kernel):
    return x @ kernel, (x, kernel)


def _multiply_bwd(saved, grad):
    x, kernel = saved
    batch = tuple(range(x.ndim - 1))
    first, second = (x, grad) if x.shape[-1] <= grad.shape[-1] else (grad, x)
    d_kernel = jax.lax.dot_general(first, second, ((batch, batch), ((), ())))
    return grad @ kernel.T, d_kernel if first is x else d_kernel.T


multiply.defvjp(_multiply_fwd, _multiply_bwd)


class Linear(nnx.Linear):
    """`x W + b`, and where there is an adapter (`lora.attach`) `+ scale (x A) B` with it.

    `lora_a`: `[in, rank]`, `lora_b`: `[rank, out]`; `scale` is part of `lora_b`.
    """

    lora_a: nnx.LoRAParam | None = None
    lora_b: nnx.LoRAParam | None = None

    def __call__(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        y = multiply(x, self.kernel[...])
        y = y if self.bias is None else y + self.bias[...]
        return y if self.lora_a is None else y + self.adapted(x)

    def adapted(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        """What the adapter adds, in the dtype of x: its halves are float32 where they are trained."""
        a, b = (half[...].astype(x.dtype) for half in (self.lora_a, self.lora_b))
        return (x @ a) @ b * self.lora_b.scale


def linear(
    in_features: int,
    out_features: int,
    axes: tuple[str | None, str | None],
    *,
    bias: bool = False,
    rngs: nnx.Rngs,
) -> Linear:
    """A linear layer whose kernel `[in, out]` carries logical axes and whose bias carries that of the output."""
    return Linear(
        in_features,
        out_features,
        use_bias=bias,
        kernel_init=nnx.initializers.normal(INIT_STD),
        kernel_metadata=mesh_lib.weight_axes(*axes),
        bias_metadata=mesh_lib.weight_axes(axes[1]),
        rngs=rngs,
    )


class RMSNorm(nnx.Module):
    """`weight * x / sqrt(mean(x^2) + eps)`, statistics in float32. Source: HF `Qwen2RMSNorm`."""

    def __init__(self, dim: int, *, eps: float):
        self.weight = nnx.Param(jnp.ones((dim,)), **mesh_lib.weight_axes("norm"))
        self.eps = eps

    def __call__(self, x: Float[Array, "*batch dim"]) -> Float[Array, "*batch dim"]:
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return self.weight[...] * wide.astype(x.dtype)


class Embedding(nnx.Module):
    """Token id -> vector. The table is `[vocab, dim]`, as HF stores it; a tied head reads the same array."""

    def __init__(self, vocab: int, dim: int, *, rngs: nnx.Rngs):
        init = nnx.initializers.normal(INIT_STD)
        self.weight = nnx.Param(init(rngs.params(), (vocab, dim)), **mesh_lib.weight_axes("vocab", "embed"))

    def __call__(self, ids: Int[Array, "rows seq"], *, mesh: Mesh) -> Float[Array, "rows seq dim"]:
        """Each device looks up the ids of its rows in its part of the vocabulary; the parts are summed.

        In `shard_map`, because the compiler's own way to the gradient of a table split over `tensor` makes it whole
        on every device.
        """
        slots, weights = (mesh_lib.partition_spec(axes) for axes in (("rows", "seq"), ("vocab", "embed")))
        axes = mesh_lib.LOGICAL_AXES["embed"]
        is_split = mesh_lib.mesh_size(mesh, axes) > 1

        @partial(jax.shard_map, mesh=mesh, in_specs=(weights, slots), out_specs=slots)
        def look_up(table, ids):
            if is_split:  # a gather over one device is a copy
                table = jax.lax.all_gather(table, axes, axis=1, tiled=True)
            at = ids - jax.lax.axis_index("tensor") * table.shape[0]
            is_here = (at >= 0) & (at < table.shape[0])
            found = jnp.take(table, jnp.where(is_here, at, 0), axis=0)
            return jax.lax.psum(jnp.where(is_here[..., None], found, 0), "tensor")

        return look_up(self.weight[...], ids)


class SwiGLU(nnx.Module):
    """`down(silu(gate(x)) * up(x))`. Source: HF `Qwen2MLP`; the vision tower's has biases."""

    def __init__(self, dim: int, ffn: int, *, bias: bool, rngs: nnx.Rngs):
        self.gate_proj = linear(dim, ffn, ("embed", "ffn"), bias=bias, rngs=rngs)
        self.up_proj = linear(dim, ffn, ("embed", "ffn"), bias=bias, rngs=rngs)
        self.down_proj = linear(ffn, dim, ("ffn", "embed"), bias=bias, rngs=rngs)

    @jax.named_scope("swiglu")
    def __call__(self, x: Float[Array, "*batch dim"]) -> Float[Array, "*batch dim"]:
        gate, up = checkpoint_name((self.gate_proj(x), self.up_proj(x)), PRODUCT)
        return self.down_proj(nnx.silu(gate) * up)


def stack(make_layer: Callable[[nnx.Rngs], nnx.Module], depth: int, *, rngs: nnx.Rngs) -> nnx.Module:
    """`depth` layers as one module whose weights have a leading `layers` dimension."""

    @nnx.split_rngs(splits=depth)
    @nnx.vmap(transform_metadata={nnx.PARTITION_NAME: "layers"})
    def make(rngs: nnx.Rngs) -> nnx.Module:
        return make_layer(rngs)

    return make(rngs)


def gathered(module: nnx.Module, mesh: Mesh) -> nnx.Module:
    """The module with its weights gathered, ready to be used."""
    graphdef, params = nnx.split(module)
    return nnx.merge(graphdef, mesh_lib.gather_layer(params, mesh))


def scan(
    layers: nnx.Module,
    x: Array,
    call: Callable[[nnx.Module, Array, Any], tuple[Array, Any]],
    per_layer: Any = None,
    *,
    mesh: Mesh,
    remat: bool | Remat,
    keep_attention: bool = True,
) -> tuple[Array, Any]:
    """Run stacked layers: `x, out = call(layer, x, per_layer[i])` for each; returns the last x and the stacked outs.

    Weights are gathered one layer at a time. `remat`: see `config.Remat`; True is "layers", False is "none".
    `keep_attention`: whether what this keeps of attention is worth its memory in these layers.
    """
    graphdef, params = nnx.split(layers)

    def body(x, scanned):
        layer_params, extra = scanned
        return call(nnx.merge(graphdef, mesh_lib.gather_layer(layer_params, mesh)), x, extra)

    if isinstance(remat, bool):
        remat = "layers" if remat else "none"
    if remat != "none":
        body = jax.checkpoint(body, policy=_kept(remat, keep_attention))
    return jax.lax.scan(body, x, (params, per_layer))


def _kept(remat: Remat, keep_attention: bool) -> Callable[..., Any]:
    """Which values between a layer's input and output are kept for the backward pass."""
    policies = jax.checkpoint_policies
    names = {"layers": set(), "attention": {ATTENTION}, "dots": {ATTENTION, PRODUCT}}[remat]
    if ATTENTION not in names or not keep_attention:
        return policies.save_only_these_names(*(names - {ATTENTION}))
    return policies.save_from_both_policies(policies.save_only_these_names(*names), _is_cudnn_forward)


def _is_cudnn_forward(operation: Any, *_: Any, **__: Any) -> bool:
    return operation.name == CUDNN_FORWARD

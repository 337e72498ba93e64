"""Adapters (LoRA, arXiv:2106.09685): attached to a model's linear layers, taken off, or merged into the weights.

The adapters of a model are those of its variables that are `nnx.LoRAParam`; all paths of the base stay as they are.
"""

import zlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float

from openo3_jax import mesh as mesh_lib
from openo3_jax.config import LoRAConfig
from openo3_jax.models import layers
from openo3_jax.types import Array

NAMES = ("lora_a", "lora_b")


def attach(graphdef: nnx.GraphDef, params: nnx.State, config: LoRAConfig, seed: int) -> tuple[nnx.GraphDef, nnx.State]:
    """Definition of the model with fresh adapters, and these alone, in float32: A uniform in +-1/sqrt(in), B zero.

    They depend on seed and path only, not on the mesh. Source: the start is that of `peft` (kaiming_uniform, a=sqrt 5).
    """
    model = nnx.merge(graphdef, params)
    for path, layer in _linears(model):
        if path[-1] not in (config.vision if path[0] == "visual" else config.text):
            continue
        *stacked, rows, columns = layer.kernel.shape
        *lead, row_axis, column_axis = layer.kernel.get_metadata()["out_sharding"]
        key = jax.random.fold_in(jax.random.key(seed), zlib.crc32("/".join(path).encode()))
        a = jax.random.uniform(key, (*stacked, rows, config.rank), minval=-1, maxval=1) * rows**-0.5
        b = jnp.zeros((*stacked, config.rank, columns))
        layer.lora_a = nnx.LoRAParam(a, **mesh_lib.weight_axes(*lead, row_axis, None))
        layer.lora_b = nnx.LoRAParam(
            b, **mesh_lib.weight_axes(*lead, None, column_axis), scale=config.alpha / config.rank
        )
    whole, adapters, _ = nnx.split(model, nnx.LoRAParam, ...)
    return whole, adapters


def detach(graphdef: nnx.GraphDef, params: nnx.State) -> tuple[nnx.GraphDef, nnx.State]:
    """The model without its adapters: the one they were attached to."""
    model = nnx.merge(graphdef, params)
    for _, layer in _linears(model):
        for name in NAMES:
            if getattr(layer, name) is not None:
                delattr(layer, name)
    return nnx.split(model)


def join(frozen: nnx.State | None, trained: nnx.State) -> nnx.State:
    """All weights of a model from those that are frozen, None for none, and those that are trained."""
    return trained if frozen is None else nnx.merge_state(frozen, trained)


def is_attached(params: nnx.State) -> bool:
    return any(path[-1] in NAMES for path, _ in nnx.to_flat_state(params))


def halves(params: nnx.State, path: tuple[str, ...]) -> tuple[nnx.Variable, nnx.Variable] | None:
    """A and B of the weight at `path`, None where it has no adapter."""
    for name in path[:-1]:
        params = params[name]
    return (params["lora_a"], params["lora_b"]) if path[-1] == "kernel" and "lora_a" in params else None


def merge(graphdef: nnx.GraphDef, params: nnx.State) -> tuple[nnx.GraphDef, nnx.State]:
    """The model with its adapters added to the weights, in float32, and without them; call it under `jit`."""
    model = nnx.merge(graphdef, params)
    for _, layer in _linears(model):
        if layer.lora_a is not None:
            a, b = layer.lora_a[...], layer.lora_b[...]
            layer.kernel.set_value(merge_kernel(layer.kernel[...], a, b, layer.lora_b.scale))
    return detach(*nnx.split(model))


def merge_kernel(
    kernel: Float[Array, "*layers in out"],
    a: Float[Array, "*layers in rank"],
    b: Float[Array, "*layers rank out"],
    scale: float,
) -> Float[Array, "*layers in out"]:
    """`W + scale A B`, in float32, in the dtype of W; one layer's product exists at a time."""

    def add(one: tuple[Array, Array, Array]) -> Array:
        kernel, a, b = one
        product = jnp.matmul(a, b, precision="highest", preferred_element_type=jnp.float32)
        return (kernel + scale * product).astype(kernel.dtype)

    return add((kernel, a, b)) if kernel.ndim == 2 else jax.lax.map(add, (kernel, a, b))


def _linears(model: nnx.Module) -> Iterator[tuple[tuple[str, ...], layers.Linear]]:
    """Every linear layer with its path, such as ("text", "layers", "self_attn", "q_proj")."""
    for path, node in nnx.iter_graph(model):
        if isinstance(node, layers.Linear):
            yield tuple(map(str, path)), node

"""Prefill once per prompt, then one jitted loop that decodes a group of samples per prompt.

`prefill` scans the stacked layers; `decode` unrolls them, each with its own arrays (`sampling_layout`), because a
loop over stacked weights copies every slice before it is multiplied.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Bool, Float, Int

from openo3_jax import mesh as mesh_lib
from openo3_jax.config import SamplingConfig, TextConfig
from openo3_jax.models import kv_cache, moves, sampling, text
from openo3_jax.types import Array, Batch


class Prompts(NamedTuple):
    """What decoding needs of a prefill: the caches, the first logits, the tokens, and where positions continue."""

    logits: Float[Array, "prompts vocab"]
    prefix: list[kv_cache.Prefix]
    tokens: Int[Array, "prompts prefix"]
    in_prefix: Bool[Array, "prompts prefix"]
    next_position: Int[Array, " prompts"]


class Generated(NamedTuple):
    """`tokens` are valid up to `lengths` (the stop token counts); `finished` is False where the limit cut it."""

    tokens: Int[Array, "prompts group suffix"]
    logp: Float[Array, "prompts group suffix"]
    lengths: Int[Array, "prompts group"]
    finished: Bool[Array, "prompts group"]


@partial(
    jax.tree_util.register_dataclass, meta_fields=["layer_def", "norm_def", "config"], data_fields=["layers", "rest"]
)
@dataclasses.dataclass(frozen=True)
class SamplingLayout:
    """The decoder's weights as decoding wants them: gathered over `fsdp`, one tree per layer."""

    layers: list[nnx.State]
    rest: nnx.State  # embedding, last norm and, where it is not tied, the head
    layer_def: nnx.GraphDef
    norm_def: nnx.GraphDef
    config: TextConfig


def sampling_layout(graphdef: nnx.GraphDef, params: nnx.State) -> SamplingLayout:
    """Training layout -> sampling layout, on the device; call it under `jit`."""
    return _lay_out(graphdef, params, lambda x, i: x[i], mesh_lib.gather_layer)


def shared_layout(graphdef: nnx.GraphDef, params: nnx.State) -> SamplingLayout:
    """The same on one CPU device without a copy: a layer's arrays are parts of the stacked ones' memory."""

    def view(x: Array, i: int) -> Array:
        whole = np.asarray(x)
        return jax.make_array_from_callback(
            x.shape[1:], NamedSharding(x.sharding.mesh, PartitionSpec()), whole[i].__getitem__
        )

    return _lay_out(graphdef, params, view, lambda tree, mesh: tree)


def _lay_out(
    graphdef: nnx.GraphDef,
    params: nnx.State,
    take: Callable[[Array, int], Array],
    gather: Callable[[nnx.State, Mesh], nnx.State],
) -> SamplingLayout:
    model = nnx.merge(graphdef, params)
    depth = model.config.text.num_hidden_layers
    stacked = params["text"]["layers"]
    layers = [gather(jax.tree.map(lambda x, i=i: take(x, i), stacked), model.mesh) for i in range(depth)]
    head = {} if model.config.text.tie_word_embeddings else {"lm_head": params["lm_head"]}
    rest = nnx.State({"embed_tokens": params["text"]["embed_tokens"], "norm": params["text"]["norm"], **head})
    return SamplingLayout(
        layers=layers,
        rest=gather(rest, model.mesh),
        layer_def=nnx.graphdef(model.text.layers),
        norm_def=nnx.graphdef(model.text.norm),
        config=model.config.text,
    )


def prefill(graphdef: nnx.GraphDef, params: nnx.State, batch: Batch, slots: Int[Array, "prompts prefix"]) -> Prompts:
    """Run the prompts, of which several may share a row, and lay out what they leave by prompt.

    `slots`: where each token of a prompt is, counted through the rows of its part of the mesh (as many rows, and as
    many prompts, in each part); -1 is padding, on the right.
    """
    model = nnx.merge(graphdef, params)
    hidden, cache = model.hidden(batch, keep_cache=True)
    in_prefix = slots >= 0

    def pick(x, at, *rest):
        return moves.across_rows(x, at, model.mesh, *rest)

    length = in_prefix.sum(1, dtype=jnp.int32)
    last = jnp.take_along_axis(slots, length[:, None] - 1, axis=1)
    positions = jnp.where(in_prefix[..., None], pick(batch.positions.swapaxes(1, 2), slots), -1)
    return Prompts(
        model.logits(pick(hidden, last)[:, 0]),
        kv_cache.split_layers(cache, lambda x: pick(x, slots, "kv_heads")),
        pick(batch.tokens, slots),
        in_prefix,
        positions.max((1, 2)) + 1,
    )


def decode(
    layout: SamplingLayout,
    prompts: Prompts,
    keys: Array,
    stops: Bool[Array, " vocab"],
    banned: Bool[Array, " vocab"],
    limit: Int[Array, ""],
    *,
    config: SamplingConfig,
) -> Generated:
    """Sample up to `limit` tokens (at most `config.max_new_tokens`, the static size) for each key `[prompts, group]`.

    A sample ends at its first stop token; the loop ends when all have. Sample g of prompt p at step t draws with
    `fold_in(keys[p, g], t)`, whatever else is in the batch.
    """
    group, capacity = keys.shape[1], config.max_new_tokens
    fold = jax.vmap(jax.vmap(jax.random.fold_in, (0, None)), (0, None))
    knobs = {"temperature": config.temperature, "top_k": config.top_k, "top_p": config.top_p}
    knobs["repetition_penalty"] = config.repetition_penalty
    mark = jax.vmap(jax.vmap(lambda seen, token: seen.at[token].set(True)))

    def draw(logits, step, seen):
        token, logp = sampling.sample(logits, fold(keys, step), banned, seen=seen, **knobs)
        return token, logp, None if seen is None else mark(seen, token)

    def record(out: Generated, step, token, logp):
        alive = ~out.finished
        at = jnp.where(alive, step, capacity)  # finished samples write outside and are dropped

        def put(buffer, value):
            return jax.vmap(jax.vmap(lambda row, i, x: row.at[i].set(x, mode="drop")))(buffer, at, value)

        lengths = out.lengths + alive.astype(jnp.int32)
        return Generated(put(out.tokens, token), put(out.logp, logp), lengths, out.finished | stops[token])

    def forward(token, suffixes, step):
        x = jnp.take(layout.rest["embed_tokens"]["weight"][...], token, axis=0)  # [prompts, group, dim]
        positions = jnp.broadcast_to((prompts.next_position + step)[:, None, None], (*token.shape[:1], 3, group))
        angles = text.angles(layout.config, positions)
        kept = []
        for params, prefix, suffix in zip(layout.layers, prompts.prefix, suffixes, strict=True):
            layer = nnx.merge(layout.layer_def, params)
            q, new = layer.project(x, angles)
            suffix = kv_cache.append(suffix, new, step)
            x = layer.finish(x, kv_cache.attend(q, prefix, suffix, in_prefix=prompts.in_prefix, step=step))
            kept.append(suffix)
        x = nnx.merge(layout.norm_def, layout.rest["norm"])(x)
        head = layout.rest["lm_head" if "lm_head" in layout.rest else "embed_tokens"]["weight"][...]
        return jnp.einsum("pgd,vd->pgv", x, head, preferred_element_type=jnp.float32), kept

    def body(carry):
        step, token, suffixes, seen, out = carry
        logits, suffixes = forward(token, suffixes, step)
        token, logp, seen = draw(logits, step + 1, seen)
        return step + 1, token, suffixes, seen, record(out, step + 1, token, logp)

    def unfinished(carry):
        step, *_, out = carry
        return (step + 1 < limit) & ~jnp.all(out.finished)

    shape = keys.shape
    out = Generated(
        jnp.zeros((*shape, capacity), jnp.int32),
        jnp.zeros((*shape, capacity), jnp.float32),
        jnp.zeros(shape, jnp.int32),
        jnp.broadcast_to(~jnp.any(prompts.in_prefix, axis=1)[:, None], shape),  # rows of padding are done
    )
    logits = jnp.broadcast_to(prompts.logits[:, None], (shape[0], group, prompts.logits.shape[-1]))
    token, logp, seen = draw(
        logits, jnp.int32(0), _in_prompts(prompts, logits) if config.repetition_penalty != 1 else None
    )
    suffixes = [kv_cache.empty_suffix(prefix, group, capacity) for prefix in prompts.prefix]
    carry = (jnp.int32(0), token, suffixes, seen, record(out, jnp.int32(0), token, logp))
    return jax.lax.while_loop(unfinished, body, carry)[-1]


def _in_prompts(prompts: Prompts, logits: Float[Array, "prompts group vocab"]) -> Bool[Array, "prompts group vocab"]:
    """The tokens of each prompt, of the vocabulary; the same for each of its samples."""
    vocab = logits.shape[-1]
    at = jnp.where(prompts.in_prefix, prompts.tokens, vocab)  # padding is marked outside and dropped
    seen = jax.vmap(lambda row: jnp.zeros(vocab, bool).at[row].set(True, mode="drop"))(at)
    return jnp.broadcast_to(seen[:, None], logits.shape)

"""Losses as functions of arrays. The vocabulary is met in chunks of targets; no `[seq, vocab]` array exists."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Bool, Float, Int

from openo3_jax import mesh as mesh_lib
from openo3_jax.types import Array

CHUNK_LOGITS = 2**26  # logits that exist at a time on one device: 256 MiB in float32
MIN_CHUNK_TARGETS = 64


class TargetScores(NamedTuple):
    """Of each target, nats; 0 for padding. `entropy` is that of the distribution it is drawn from, no gradient."""

    logp: Float[Array, "*targets"]
    entropy: Float[Array, "*targets"]


def target_scores(
    hidden: Float[Array, "rows seq dim"],
    head: Float[Array, "vocab dim"],
    target_slots: Int[Array, "rows num_targets"],
    targets: Int[Array, "rows num_targets"],
    *,
    mesh: Mesh,
) -> TargetScores:
    """Log-probability of each target token given the hidden state at its slot, and the entropy there.

    log p = h . w_target - log sum_v exp(h . w_v), over chunks of targets, recomputed in the backward pass. Runs in
    `shard_map`: the head is gathered once and its gradient is scattered once, not once per chunk. Where
    `context` splits the row, each device has some of the slots and scores as many of the targets.
    """
    slots, weights = mesh_lib.partition_spec(("rows", "seq")), mesh_lib.partition_spec(("vocab", "embed"))
    rows = mesh_lib.partition_spec(("rows",))
    num_targets = targets.shape[1]
    padding = ((0, 0), (0, -num_targets % mesh.shape["context"]))
    target_slots, targets = (jnp.pad(x, padding, constant_values=-1) for x in (target_slots, targets))

    @partial(jax.shard_map, mesh=mesh, in_specs=(slots, weights, rows, rows), out_specs=slots)
    def local(hidden, head, slots, targets):
        table = jax.lax.all_gather(head, mesh_lib.LOGICAL_AXES["embed"], axis=1, tiled=True)
        picked, slots, targets = _own_targets(hidden, slots, targets)
        flat, wanted = picked.reshape(-1, picked.shape[-1]), targets.reshape(-1)
        chunk = min(len(flat), max(MIN_CHUNK_TARGETS, CHUNK_LOGITS // table.shape[0]))
        padding = -len(flat) % chunk
        chunks = (
            jnp.pad(flat, ((0, padding), (0, 0))).reshape(-1, chunk, flat.shape[-1]),
            jnp.pad(wanted, (0, padding)).reshape(-1, chunk),
        )
        score = jax.checkpoint(lambda chunk: _chunk_scores(*chunk, table))
        scores = jax.lax.map(score, chunks)
        return jax.tree.map(
            lambda x: jnp.where(slots >= 0, x.reshape(-1)[: len(flat)].reshape(slots.shape), 0.0), scores
        )

    return jax.tree.map(lambda x: x[:, :num_targets], local(hidden, head, target_slots, targets))


def _own_targets(
    hidden: Float[Array, "rows _part dim"], slots: Int[Array, "rows all"], targets: Int[Array, "rows all"]
) -> tuple[Float[Array, "rows own dim"], Int[Array, "rows own"], Int[Array, "rows own"]]:
    """An equal share of a row's targets for each device on `context`, with the hidden states, wherever they were."""
    place, part = jax.lax.axis_index("context"), hidden.shape[1]
    at = slots - place * part
    picked = jnp.take_along_axis(hidden, jnp.clip(at, 0, part - 1)[..., None], axis=1)
    picked = jnp.where(((at >= 0) & (at < part))[..., None], picked, 0)
    picked = jax.lax.psum_scatter(picked, "context", scatter_dimension=1, tiled=True)
    own = picked.shape[1]
    return picked, *(jax.lax.dynamic_slice_in_dim(x, place * own, own, axis=1) for x in (slots, targets))


def _chunk_scores(
    hidden: Float[Array, "chunk dim"], targets: Int[Array, " chunk"], table: Float[Array, "vocab dim"]
) -> TargetScores:
    """The vocabulary may be split over `tensor`: each device has its part, sums cross devices."""
    logits = jnp.einsum("nd,vd->nv", hidden, table, preferred_element_type=jnp.float32)
    top = jax.lax.pmax(jax.lax.stop_gradient(logits.max(-1)), "tensor")
    total = jax.lax.psum(jnp.exp(logits - top[:, None]).sum(-1), "tensor")
    at = targets - jax.lax.axis_index("tensor") * table.shape[0]
    is_here = (at >= 0) & (at < table.shape[0])
    mine = jnp.take_along_axis(logits, jnp.clip(at, 0, table.shape[0] - 1)[:, None], axis=1)[:, 0]
    score = jax.lax.psum(jnp.where(is_here, mine, 0.0), "tensor")
    # H = log sum_v exp(l_v) - sum_v p_v l_v
    centred = jax.lax.stop_gradient(logits - top[:, None])
    mean = jax.lax.psum((jnp.exp(centred) * centred).sum(-1), "tensor") / jax.lax.stop_gradient(total)
    return TargetScores(score - top - jnp.log(total), jax.lax.stop_gradient(jnp.log(total)) - mean)


def cross_entropy(
    logp: Float[Array, "rows num_targets"], is_target: Bool[Array, "rows num_targets"]
) -> Float[Array, ""]:
    """Mean of -log p over all targets of the batch, in nats per token."""
    return -jnp.where(is_target, logp, 0.0).sum() / jnp.maximum(is_target.sum(dtype=logp.dtype), 1.0)

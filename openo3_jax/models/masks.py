"""Who sees whom in attention: samples packed into a row, padding, and completions that share a prompt."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Bool, Int

from openo3_jax.types import Array

MASKED = -1e30  # finite, so that a row of padding stays finite


class Slots(NamedTuple):
    """What decides who sees whom. Segment 0 is padding; branch 0 is seen by its whole segment (see types.Batch)."""

    segments: Int[Array, "rows seq"]
    branches: Int[Array, "rows seq"] | None = None


def visible(
    query: Slots, key: Slots, query_at: Int[Array, " q"], key_at: Int[Array, " k"], *, causal: bool
) -> Bool[Array, "rows q k"]:
    """True where a query may look at a key: same segment, not later, and on its own branch or the shared one."""
    allowed = query.segments[:, :, None] == key.segments[:, None, :]
    if causal:
        allowed &= query_at[:, None] >= key_at[None, :]
    if key.branches is not None:
        key_branch = key.branches[:, None, :]
        allowed &= (key_branch == 0) | (query.branches[:, :, None] == key_branch)
    return allowed


def visible_blocks(
    query: Slots, key: Slots, query_at: Int[Array, "q_blocks q"], key_at: Int[Array, "k_blocks k"], *, causal: bool
) -> Bool[Array, "q_blocks k_blocks"]:
    """False where no query of a block may look at a key of the other, in any row; padding looks at nothing.

    By the smallest and largest segment and branch of each block, so a block may be kept that none needs, never the
    other way round.
    """

    def span(ids, is_real, at):  # of each block: [rows, blocks, 1]
        shape = (ids.shape[0], *at.shape)
        ids, is_real = ids.reshape(shape), is_real.reshape(shape)
        ends = jnp.iinfo(jnp.int32)
        return jnp.where(is_real, ids, ends.max).min(-1), jnp.where(is_real, ids, -1).max(-1)

    def overlap(query_ids, key_ids):
        low, high = span(query_ids, query.segments > 0, query_at)
        key_low, key_high = span(key_ids, key.segments > 0, key_at)
        meet = (low[:, :, None] <= key_high[:, None]) & (key_low[:, None] <= high[:, :, None])
        return meet, key_low[:, None]

    needed, _ = overlap(query.segments, key.segments)
    if key.branches is not None:
        same, lowest = overlap(query.branches, key.branches)
        needed &= same | (lowest == 0)
    needed = needed.any(0)
    if causal:
        needed &= query_at[:, -1:] >= key_at[None, :, 0]
    return needed

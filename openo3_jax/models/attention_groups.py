"""A prompt and its completions in one row, for attention kernels that know causes and segments but no branches.

The row is attended to twice: as it stands, which is right for the prompt, and once per completion by the completion's
own queries, over the row's prompt followed by the completion's own keys. Nothing is merged: each query takes its result
from one of the two.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from openo3_jax.models import masks, moves
from openo3_jax.types import Array

LANES = 128  # kernels want slots in multiples of it
Attend = Callable[..., Array]  # (q, k, v, query, key, first) -> out


class Group(NamedTuple):
    """Static bounds of the completions of a row, so that memory can be planned: how many, and slots of the longest."""

    completions: int
    slots: int


def attend(
    q: Float[Array, "rows seq heads head_dim"],
    k: Float[Array, "rows seq kv_heads head_dim"],
    v: Float[Array, "rows seq kv_heads head_dim"],
    slots: masks.Slots,
    group: Group,
    plain: Attend,
) -> Float[Array, "rows seq heads head_dim"]:
    """Causal attention; `plain` attends without branches, query i of it standing in slot `first + i` of its keys."""
    rows, seq = slots.segments.shape
    group = group._replace(slots=-(-group.slots // LANES) * LANES)
    index, inverse = _places(slots.branches, group)
    each = rows * group.completions

    def own(x):  # [rows, seq, heads, head_dim] -> [rows * completions, slots, heads, head_dim]
        return moves.rearrange(x.reshape(rows, seq, -1), index, inverse).reshape(each, group.slots, *x.shape[2:])

    def of_all(x):  # [rows, seq, ..] -> [rows * completions, seq, ..]
        return jnp.repeat(x, group.completions, axis=0)

    own_ids = jnp.where(index < 0, 0, jnp.take_along_axis(slots.segments, jnp.maximum(index, 0), axis=1))
    own_ids = own_ids.reshape(each, group.slots)
    shared_ids = of_all(jnp.where(slots.branches == 0, slots.segments, 0))
    keys = masks.Slots(jnp.concatenate([shared_ids, own_ids], axis=1))
    keys_and_values = (jnp.concatenate([of_all(x), own(x)], axis=1) for x in (k, v))
    completions = plain(own(q), *keys_and_values, query=masks.Slots(own_ids), key=keys, first=seq)
    spread = moves.rearrange(completions.reshape(rows, group.completions * group.slots, -1), inverse, index)
    alone = masks.Slots(slots.segments)
    whole = plain(q, k, v, query=alone, key=alone, first=0)
    return jnp.where((slots.branches > 0)[..., None, None], spread.reshape(q.shape), whole)


def fits(slots: masks.Slots, group: Group) -> Bool[Array, ""]:
    """True if the rows keep to the bounds: one sample, then each of its completions in one piece."""
    branches = slots.branches
    number = jnp.arange(1, group.completions + 1)
    is_of = branches[:, None] == number[:, None]  # [rows, completions, seq]
    in_one_piece = (is_of & ~jnp.pad(is_of, ((0, 0), (0, 0), (1, 0)))[..., :-1]).sum(-1) <= 1
    prompt_first = (branches[:, 1:] > 0) | (branches[:, :-1] == 0) | (slots.segments[:, 1:] == 0)
    one_sample = (slots.segments == slots.segments[:, :1]) | (slots.segments == 0)
    return (
        (is_of.sum(-1) <= group.slots).all()
        & in_one_piece.all()
        & (branches <= group.completions).all()
        & prompt_first.all()
        & one_sample.all()
    )


def _places(branches: Int[Array, "rows seq"], group: Group) -> tuple[Int[Array, "rows places"], Int[Array, "rows seq"]]:
    """Slot of every place in the completions laid side by side, -1 behind their ends, and the place of every slot."""
    number = jnp.arange(1, group.completions + 1)
    is_of = branches[:, None] == number[:, None]  # [rows, completions, seq]
    start, length = jnp.argmax(is_of, axis=-1), is_of.sum(-1)
    at = jnp.arange(group.slots)
    index = jnp.where(at < length[..., None], start[..., None] + at, -1).reshape(branches.shape[0], -1)
    begin = jnp.take_along_axis(start, jnp.maximum(branches - 1, 0), axis=1)
    place = (branches - 1) * group.slots + jnp.arange(branches.shape[1]) - begin
    return index.astype(jnp.int32), jnp.where(branches > 0, place, -1).astype(jnp.int32)

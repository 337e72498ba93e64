"""A prompt and all of its completions in a row: the prompt is computed once, each completion is a branch of it.

A row may hold several such groups; their segments keep them apart.
"""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from openo3_jax import config as config_lib
from openo3_jax import types
from openo3_jax.data import packing, plan

Completions = Sequence[Int[np.ndarray, " _tokens"]]  # of one prompt; at least one token each


def place_groups(rooms: Sequence[int | None], *, num_rows: int, parts: int = 1) -> list[list[int]]:
    """Which groups stand in each row, so that the rows of a part are about equally long; `rooms` are in tokens.

    Of `parts` equal parts of the groups each has an equal part of the rows to itself, as their devices hold them. None
    is a group that is not there.

    Example: rooms 5, 1, 4, 2 in two rows -> [[0, 1], [2, 3]], in two parts of one row each the same.
    """
    assert num_rows % parts == 0, (num_rows, parts)
    size = -(-len(rooms) // parts)
    rows: list[list[int]] = []
    for part in range(parts):
        there = [i for i in range(len(rooms))[part * size :][:size] if rooms[i] is not None]
        filled = plan.fill_rows([rooms[i] for i in there], num_rows // parts)
        rows += [[there[i] for i in row] for row in sorted(filled, key=lambda row: (not row, row))]
    return rows


def group_bucket(
    prompts: Sequence[packing.Placed | None],
    groups: Sequence[Completions],
    vision: config_lib.VisionConfig,
    *,
    num_rows: int,
    rows: Sequence[Sequence[int]] | None = None,
) -> packing.Bucket:
    """The smallest bucket, of `num_rows` rows, for the groups named in `rows`; None: a row for each of them."""
    rows = _alone(prompts) if rows is None else rows
    placed = [[room(prompts[i], groups[i]) for i in row] for row in rows]
    targets = max((sum(len(tokens) for i in row for tokens in groups[i]) for row in rows), default=0)
    return dataclasses.replace(
        packing.bucket_for(placed, vision, num_rows=num_rows),
        targets=packing.round_up(targets, packing.STEPS["targets"]),
    )


def make_group_batch(
    prompts: Sequence[types.Sample | None],
    groups: Sequence[Completions],
    bucket: packing.Bucket,
    config: config_lib.ModelConfig,
    *,
    pad_id: int,
    rows: Sequence[Sequence[int]] | None = None,
) -> tuple[types.Batch, Int[np.ndarray, "rows num_targets"]]:
    """Rows of prompt + completions, and for each target the number of its completion in the row, -1 for padding.

    A group: the prompt on branch 0, then completion g on branch g + 1, without its last token, which predicts nothing.
    Every completion's positions start at the prompt's largest + 1 on all three axes, and its first token is predicted
    from the prompt's last slot. Targets stand completion by completion. `rows`: the numbers of the groups of each row,
    one after the other; None: a row for each, which is padding where the prompt is None.

    Example: a prompt a b with completions x y z and u v is a row a b x y u, branches 0 0 1 1 2, whose targets x y z u v
    are predicted from slots 1 2 3 1 4.

    Raises: InputError when a row needs more than the bucket has.
    """
    rows = _alone(prompts) if rows is None else rows
    joined = [[_join(prompts[i], groups[i]) for i in row] for row in rows]
    batch = packing.make_batch(joined, bucket, config, pad_id=pad_id)
    completion = np.full((bucket.rows, bucket.targets), -1, np.int32)
    for row, numbers in enumerate(rows):
        slot, target, count = 0, 0, itertools.count()
        for i in numbers:
            slot += len(prompts[i].tokens)
            last = slot - 1  # of the prompt
            for branch, tokens in enumerate(groups[i], start=1):
                own = slice(slot, slot + len(tokens) - 1)
                places = slice(target, target + len(tokens))
                batch.branches[row, own] = branch
                batch.target_slots[row, places] = [last, *range(own.start, own.stop)]
                batch.targets[row, places] = tokens
                completion[row, places] = next(count)
                slot, target = own.stop, places.stop
    return batch, completion


def spread(rows: Sequence[Sequence[np.ndarray]], shape: tuple[int, int]) -> np.ndarray:
    """Values of the tokens of each row's completions -> `[rows, num_targets]` float32, as its targets stand, then 0."""
    out = np.zeros(shape, np.float32)
    for row, completions in enumerate(rows):
        values = np.concatenate([np.zeros(0, np.float32), *completions])
        out[row, : len(values)] = values
    return out


def room(prompt: packing.Placed, group: Completions) -> packing.Size:
    """What a prompt and its group take of a row; targets are counted elsewhere."""
    num = prompt.tokens if isinstance(prompt, packing.Size) else len(prompt.tokens)
    return packing.Size(num + sum(len(tokens) - 1 for tokens in group), 0, prompt.grids)


def _alone(prompts: Sequence[packing.Placed | None]) -> list[list[int]]:
    return [[] if prompt is None else [i] for i, prompt in enumerate(prompts)]


def _join(prompt: types.Sample, group: Completions) -> types.Sample:
    """Tokens and positions of the row; nothing of it is a target of the next token, as SFT has them."""
    own = [tokens[:-1] for tokens in group]
    num = sum(map(len, own))
    steps = np.concatenate([np.arange(len(tokens)) for tokens in own])
    following = np.broadcast_to(prompt.positions.max() + 1 + steps, (3, num))
    tokens = np.concatenate([prompt.tokens, *own]).astype(np.int32)
    return dataclasses.replace(
        prompt,
        tokens=tokens,
        positions=np.concatenate([prompt.positions, following], axis=1).astype(np.int32),
        loss_mask=np.zeros(len(tokens), bool),
        is_visual=np.concatenate([prompt.is_visual, np.zeros(num, bool)]),
    )

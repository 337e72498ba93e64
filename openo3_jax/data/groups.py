"""A prompt and all of its completions in one row: the prompt is computed once, each completion is a branch of it."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from openo3_jax import config as config_lib
from openo3_jax import types
from openo3_jax.data import packing

Completions = Sequence[Int[np.ndarray, " _tokens"]]  # of one prompt; at least one token each


def group_bucket(
    prompts: Sequence[packing.Placed],
    groups: Sequence[Completions],
    vision: config_lib.VisionConfig,
    *,
    num_rows: int,
) -> packing.Bucket:
    """The smallest bucket whose rows hold a prompt with its group each, out of `num_rows` rows."""
    rows = [[_room(prompt, group)] for prompt, group in zip(prompts, groups, strict=True)]
    targets = max((sum(map(len, group)) for group in groups), default=0)
    return dataclasses.replace(
        packing.bucket_for(rows, vision, num_rows=num_rows), targets=packing.round_up(targets, packing.STEPS["targets"])
    )


def make_group_batch(
    prompts: Sequence[types.Sample | None],
    groups: Sequence[Completions],
    bucket: packing.Bucket,
    config: config_lib.ModelConfig,
    *,
    pad_id: int,
) -> tuple[types.Batch, Int[np.ndarray, "rows num_targets"]]:
    """Rows of prompt + completions, and for each target the number of its completion, -1 for padding.

    Row r: the prompt on branch 0, then completion g on branch g + 1, without its last token, which predicts nothing.
    Every completion's positions start at the prompt's largest + 1 on all three axes, and its first token is predicted
    from the prompt's last slot. Targets stand completion by completion. A row without a prompt is padding.

    Example: a prompt a b with completions x y z and u v is a row a b x y u, branches 0 0 1 1 2, whose targets x y z u v
    are predicted from slots 1 2 3 1 4.

    Raises: InputError when a row needs more than the bucket has.
    """
    rows = [[_join(prompt, group)] if prompt else [] for prompt, group in zip(prompts, groups, strict=True)]
    batch = packing.make_batch(rows, bucket, config, pad_id=pad_id)
    completion = np.full((bucket.rows, bucket.targets), -1, np.int32)
    for row, (prompt, group) in enumerate(zip(prompts, groups, strict=True)):
        if prompt is None:
            continue
        slot, target = len(prompt.tokens), 0
        for number, tokens in enumerate(group):
            own = slice(slot, slot + len(tokens) - 1)
            places = slice(target, target + len(tokens))
            batch.branches[row, own] = number + 1
            batch.target_slots[row, places] = [len(prompt.tokens) - 1, *range(own.start, own.stop)]
            batch.targets[row, places] = tokens
            completion[row, places] = number
            slot, target = own.stop, places.stop
    return batch, completion


def spread(groups: Sequence[Sequence[np.ndarray]], shape: tuple[int, int]) -> np.ndarray:
    """Values of every completion's tokens -> `[rows, num_targets]` float32, in the order of the targets, 0 behind."""
    out = np.zeros(shape, np.float32)
    for row, group in enumerate(groups):
        values = np.concatenate([np.zeros(0, np.float32), *group])
        out[row, : len(values)] = values
    return out


def _room(prompt: packing.Placed, group: Completions) -> packing.Size:
    """What a prompt and its group take of a row; targets are counted elsewhere."""
    num = prompt.tokens if isinstance(prompt, packing.Size) else len(prompt.tokens)
    return packing.Size(num + sum(len(tokens) - 1 for tokens in group), 0, prompt.grids)


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

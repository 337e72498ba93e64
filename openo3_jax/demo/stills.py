"""Rendered stills and questions about them: what the demo's base learns to see by, with nothing of evidence or time."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8

from openo3_jax import types
from openo3_jax.data import groups, packing, tokens, world

HEIGHT, WIDTH = 84, 112  # px, of every still and of the demo's clips: 12 visual tokens
ROW_TOKENS = 160  # of a still with its questions


class Asked(NamedTuple):
    """A question about a still and its answer."""

    question: str
    answer: str


class Still(NamedTuple):
    """Pixels, and the name and box (xyxy px) of everything on them."""

    pixels: UInt8[np.ndarray, "height width 3"]
    objects: list[tuple[str, Float[np.ndarray, " 4"]]]


def make_still(seed: int, objects: tuple[int, int]) -> Still:
    """With between `objects[0]` and `objects[1]` of them in the scene; equal arguments, equal pixels."""
    pixels, found = world.make_still(seed, world.WorldConfig(objects=objects, height=HEIGHT, width=WIDTH))
    return Still(pixels, [(name, np.rint(box * [WIDTH, HEIGHT, WIDTH, HEIGHT])) for name, box in found])


def ask_all(still: Still) -> list[Asked]:
    """Everything that is asked about a still: places, names and colors of single objects, then the whole."""
    found = []
    for name, box in still.objects:
        color, shape = name.split()
        found += [
            Asked(f"Where is the {name}?", _place(box)),
            Asked(f"Where is the {shape}?", f"{name} {_place(box)}"),
            Asked(f"What is at {_place(box)}?", name),
            Asked(f"What color is the {shape}?", color),
        ]
    from_left = sorted(still.objects, key=lambda item: item[1][0])
    return [*found, Asked("What is here?", ", ".join(f"{name} {_place(box)}" for name, box in from_left))]


def make_batch(
    processor: tokens.Processor, seed: int | Sequence[int], rows: int, objects: tuple[int, int]
) -> types.Batch:
    """A still in each row with as many of its questions as there is room for, in random order; answers are targets."""
    draw = np.random.default_rng(seed)
    prompts, tails, begins = [], [], []
    for still_seed in draw.integers(2**32, size=rows).tolist():
        still = make_still(still_seed, objects)
        every = ask_all(still)
        prompt, own, starts = _encode(processor, still, [every[i] for i in draw.permutation(len(every))])
        prompts.append(prompt)
        tails.append(own)
        begins.append(starts)
    bucket = groups.group_bucket(prompts, tails, processor.config.vision, num_rows=rows)
    bucket = dataclasses.replace(bucket, seq=ROW_TOKENS, targets=packing.round_up(ROW_TOKENS, 64))
    batch, completion = groups.make_group_batch(prompts, tails, bucket, processor.config, pad_id=processor.pad_id)
    for row, starts in enumerate(begins):
        is_question = np.concatenate(
            [np.arange(len(tail)) < start for tail, start in zip(tails[row], starts, strict=True)]
        )
        batch.target_slots[row, : len(is_question)][is_question] = -1
    assert (completion >= 0).any(axis=1).all()
    return batch


def conversation(still: Still, question: str) -> list[tokens.Message]:
    picture = {"type": "picture", "picture": types.Picture(still.pixels[None])}
    return [{"role": "user", "content": [picture, {"type": "text", "text": question}]}]


def _encode(
    processor: tokens.Processor, still: Still, asked: list[Asked]
) -> tuple[types.Sample, list[Int[np.ndarray, " _tokens"]], list[int]]:
    """The conversation up to the picture, and for each question the rest of it; where in that the answer begins."""
    tails, starts, used = [], [], 0
    for one in asked:
        answer = {"role": "assistant", "content": one.answer}
        whole = processor.encode([*conversation(still, one.question), answer])
        prefix = int(np.flatnonzero(whole.is_visual)[-1]) + 2  # the picture and the token that closes it
        spoken = np.flatnonzero(whole.loss_mask)
        tail = whole.tokens[prefix : spoken[-1] + 1]
        if prefix + used + len(tail) - 1 > ROW_TOKENS:
            continue
        tails.append(tail)
        starts.append(int(spoken[0]) - prefix)
        used += len(tail) - 1
    prompt = dataclasses.replace(
        whole,
        tokens=whole.tokens[:prefix],
        positions=whole.positions[:, :prefix],
        loss_mask=whole.loss_mask[:prefix],
        is_visual=whole.is_visual[:prefix],
    )
    return prompt, tails, starts


def _place(box: Float[np.ndarray, " 4"]) -> str:
    return f"[{','.join(str(int(edge)) for edge in box)}]"

"""Prompts -> rows of a prefill: short ones share a row, and where each prompt's tokens then are."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int


def alone(number: int) -> list[list[int]]:
    """A row for each prompt."""
    return [[prompt] for prompt in range(number)]


def share(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Which prompts share a row of `most` tokens: the longest first, each into the first row with room.

    Rows, and what is in them, are in the order of the prompts. Example: `share([5, 2, 9, 3], 9) == [[0, 3], [1], [2]]`.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for prompt in sorted(range(len(lengths)), key=lambda prompt: -lengths[prompt]):
        row = next((row for row, left in enumerate(room) if lengths[prompt] <= left), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(most)
        rows[row].append(prompt)
        room[row] -= lengths[prompt]
    return sorted(map(sorted, rows))


def slots(rows: Sequence[Sequence[int]], lengths: Sequence[int], seq: int) -> Int[np.ndarray, "prompts seq"]:
    """The slot of each token of each prompt, counted through rows of `seq` slots; -1 where there is none."""
    at = np.full((len(lengths), seq), -1, np.int32)
    for number, row in enumerate(rows):
        start = number * seq
        for prompt in row:
            at[prompt, : lengths[prompt]] = start + np.arange(lengths[prompt])
            start += lengths[prompt]
    return at

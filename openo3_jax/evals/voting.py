"""Several samples of one question -> one option: by majority, or weighted by how far the cited evidence helps.

Ties and votes without any option stay what they are: nothing is decided by the alphabet, nothing defaults to "A".
"""

from collections.abc import Sequence
from typing import NamedTuple


class Vote(NamedTuple):
    """The options with the largest sum of weights, in order; none where no sample states one."""

    winners: tuple[str, ...]

    def share_of(self, letter: str) -> float:
        """1 where `letter` won alone, 1/k where it is one of k tied, else 0."""
        return 1 / len(self.winners) if letter in self.winners else 0.0


def count(letters: Sequence[str | None], weights: Sequence[float] | None = None) -> Vote:
    """One vote per sample that states an option, each with its weight (1 without `weights`).

    Source: arXiv:2510.20579, test-time scaling; Open-o3-Video eval/test/test_videomme.py takes the alphabetically
    first of tied options, and "A" where no sample is valid.
    """
    sums: dict[str, float] = {}
    for letter, weight in zip(letters, weights if weights is not None else [1.0] * len(letters), strict=True):
        if letter is not None:
            sums[letter] = sums.get(letter, 0.0) + weight
    best = max(sums.values(), default=0.0)
    # Weights are multiples of 0.2 or their means: sums that differ by less than this are equal.
    return Vote(tuple(sorted(letter for letter, total in sums.items() if total > best - 1e-9)))

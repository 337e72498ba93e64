"""The shape of a run's batches when what they need is only known step by step, such as completions just sampled."""

import collections
import dataclasses
from collections.abc import Mapping
from typing import Any

from openo3_jax.data import packing

PATIENCE = 8  # asks in a row that must have fitted a smaller bucket
SMALLER = 0.75  # of the row; padding that is worth a compilation


class FittingBucket:
    """Grows at once when it must, shrinks when much less was needed for a while: few programs, little padding.

    Early in stage two completions run to their limit, later they do not. A bucket that was used before, whose program
    is there, is taken before a new one. What it gives follows from what it was asked, in that order, alone.
    """

    def __init__(self):
        self._used: list[packing.Bucket] = []  # the last is the one in use
        self._recent: collections.deque[packing.Bucket] = collections.deque(maxlen=PATIENCE)

    def __call__(self, need: packing.Bucket) -> packing.Bucket:
        self._recent.append(need)
        if not self._used:
            self._use(need)
        elif not packing.holds(self._used[-1], need):
            self._use(self._known(need) or packing.union(self._used[-1], need))
        elif len(self._recent) == PATIENCE:
            self._shrink()
        return self._used[-1]

    def _shrink(self) -> None:
        needed = self._recent[0]
        for need in self._recent:
            needed = packing.union(needed, need)
        smaller = self._known(needed)
        if smaller is None or smaller.seq > SMALLER * self._used[-1].seq:
            smaller = needed
        if smaller.seq <= SMALLER * self._used[-1].seq:
            self._use(smaller)

    def _known(self, need: packing.Bucket) -> packing.Bucket | None:
        """The smallest of those that were used and hold it."""
        return min((one for one in self._used if packing.holds(one, need)), key=lambda one: one.seq, default=None)

    def _use(self, bucket: packing.Bucket) -> None:
        self._used = [one for one in self._used if one != bucket] + [bucket]

    def to_json(self) -> dict[str, Any]:
        """What a checkpoint keeps, so that a resumed run has the same shapes."""
        lists = {"used": self._used, "recent": self._recent}
        return {name: [dataclasses.asdict(bucket) for bucket in buckets] for name, buckets in lists.items()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "FittingBucket":
        fitting = cls()
        fitting._used = [_bucket(one) for one in values["used"]]
        fitting._recent.extend(_bucket(one) for one in values["recent"])
        return fitting


def _bucket(values: Mapping[str, Any]) -> packing.Bucket:
    return packing.Bucket(**{**values, "frames": {int(size): count for size, count in values["frames"].items()}})

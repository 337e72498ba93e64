"""How long each record is, known before anything is decoded -> which records make up each batch, and in which rows.

Everything here is a pure function of its arguments, the same on every host.
"""

import collections
import functools
import hashlib
import heapq
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int64

from openo3_jax.data import packing
from openo3_jax.errors import InputError

Lengths = Sequence[int] | Int64[np.ndarray, "_"]

WINDOW_BATCHES = 128  # batches are made of so many batches' worth of shuffled records
MAX_CLASSES = 8  # classes of like length in a window; one static shape for each
_CLASS_BATCHES = 8  # at least so many in a class: in smaller ones the same records would always meet
_TRIED = 4  # numbers of rows
_WORTH = 0.01  # of all slots: what another class must save
_ODD = 1 / 16  # of a class's batches: those with the most patches


class Place(NamedTuple):
    """Where a batch stands: epoch, and number within the epoch, both from 0."""

    epoch: int
    batch: int


class Epochs(NamedTuple):
    """Cuts a set into epochs of whole batches. A set smaller than a batch is one batch."""

    num_draws: int  # records in an epoch
    batch_size: int

    @property
    def num_batches(self) -> int:
        return max(1, self.num_draws // self.batch_size)

    @property
    def num_left_out(self) -> int:
        """Of each epoch, other records every time."""
        return self.num_draws - min(self.num_draws, self.num_batches * self.batch_size)

    def place(self, step: int) -> Place:
        return Place(*divmod(step, self.num_batches))

    def step(self, place: Place) -> int:
        return place.epoch * self.num_batches + place.batch


class Planned(NamedTuple):
    """One batch: indices of records, row by row; batches of one class have records of like length."""

    rows: list[list[int]]
    class_number: int


def record_weights(
    records: Sequence[Mapping[str, Any]], weights: Sequence[tuple[str, float]]
) -> Float[np.ndarray, " records"]:
    """How often each record is seen in an epoch: the product of the weights given for its task and its source.

    Raises: InputError for a name that no record has, a weight below 0, and weights that leave nothing.
    """
    names = {record["task"] for record in records} | {record["source"] for record in records}
    for name, weight in weights:
        if name not in names:
            raise InputError(
                f"weights: {name!r} is no task or source of these records; known: {', '.join(sorted(names))}"
            )
        if not 0 <= weight < 1000:
            raise InputError(f"weights: {name!r} has {weight}; expected a number from 0 to 1000")
    given = dict(weights)
    out = np.array([given.get(record["task"], 1.0) * given.get(record["source"], 1.0) for record in records])
    if round(out.sum()) < 1:
        raise InputError("weights: no record is left; raise one of them")
    return out


def epoch_order(weights: Float[np.ndarray, " records"], seed: int, epoch: int) -> Int64[np.ndarray, " draws"]:
    """Indices of the records in the order of an epoch; record i occurs floor or ceil of weights[i] times.

    There are round(sum(weights)) of them, so that every epoch is equally long.
    """
    rng = np.random.default_rng([seed, epoch])
    num_draws = round(weights.sum())
    ends = np.cumsum(weights) * (num_draws / weights.sum())
    ends[-1] = num_draws
    drawn = np.searchsorted(ends, np.arange(num_draws) + rng.random(), side="right")
    return rng.permutation(drawn)


class Class(NamedTuple):
    """Records of up to `longest` tokens, and the number of rows that a batch of them has."""

    longest: int
    num_rows: int


def choose_classes(
    lengths: Lengths, *, batch_size: int, rows_multiple: int, max_row_tokens: int, rng: np.random.Generator
) -> list[Class]:
    """The classes of like length for a run whose first window holds records of these lengths.

    A class reaches up to a length that a shape may have, so that no slot of it is lost to rounding. Rows of a class: a
    multiple of `rows_multiple` that keeps those of the window within `max_row_tokens` and wastes least.
    """
    lengths = np.asarray(lengths)
    longest = np.sort(lengths)[min(batch_size, len(lengths)) - 1 :: batch_size]
    longest = -(-longest // packing.STEPS["seq"]) * packing.STEPS["seq"]
    edges = [int(longest[cut - 1]) for cut in class_cuts(longest)[1:]]
    members: list[list[np.ndarray]] = [[] for _ in edges]
    for number, batch in _compose(lengths, edges, batch_size, rng):
        members[number].append(lengths[batch])
    counts = [_count_rows(batches, rows_multiple, max_row_tokens) for batches in members]
    return [Class(edge, num_rows) for edge, num_rows in zip(edges, counts, strict=True)]


def plan_window(
    indices: Sequence[int],
    lengths: Lengths,
    classes: Sequence[Class],
    *,
    batch_size: int,
    rows_multiple: int,
    max_row_tokens: int,
    rng: np.random.Generator,
) -> list[Planned]:
    """Batches of `batch_size` records each (fewer only in a window smaller than that), every record once.

    Records of one class meet in a batch, by chance; the order of the batches is by chance too. A batch has its class's
    number of rows; where one of them would be longer than `max_row_tokens`, `rows_multiple` more. A longer record has a
    row of its own. Which records make up a batch depends neither on `rows_multiple` nor on `max_row_tokens`.
    """
    lengths = np.asarray(lengths)
    planned = []
    for number, batch in _compose(lengths, [longest for longest, _ in classes], batch_size, rng):
        for num_rows in itertools.count(classes[number].num_rows, rows_multiple):
            rows = fill_rows(lengths[batch], num_rows)
            if _is_short(lengths[batch], rows, max_row_tokens):
                break
        planned.append(Planned([[int(indices[batch[i]]) for i in row] for row in rows], number))
    return [planned[i] for i in rng.permutation(len(planned))]


def _compose(
    lengths: Lengths, edges: Sequence[int], batch_size: int, rng: np.random.Generator
) -> Iterator[tuple[int, Int64[np.ndarray, " batch"]]]:
    """(class, positions in `lengths`) of each batch. Class c holds lengths up to edges[c], the last one all others."""
    batch_size = min(batch_size, len(lengths))
    num_batches = len(lengths) // batch_size
    assert num_batches * batch_size == len(lengths), (len(lengths), batch_size)
    order = np.argsort(lengths, kind="stable")
    # Of the records that a class could hold, those that fill no batch move on to the next.
    cuts = [*(np.searchsorted(lengths[order], edges[:-1], side="right") // batch_size), num_batches]
    for number, (start, stop) in enumerate(itertools.pairwise([0, *cuts])):
        members = rng.permutation(order[start * batch_size : stop * batch_size])
        yield from ((number, batch) for batch in members.reshape(-1, batch_size))


def class_cuts(longest: Lengths) -> list[int]:
    """Where to cut batches, sorted by their longest record, into classes: first batch of each class, and the end.

    Every record of a class pays for the class's longest. As few classes as come close to the least padding of as many
    as are allowed.

    Example: longest records of 8 times 1 token and 9 times 50 tokens -> [0, 8, 17].
    """
    num = len(longest)
    most = max(1, min(MAX_CLASSES, num // _CLASS_BATCHES))
    # cost[k][j]: slots of the first j batches in k classes; last[k][j]: where the k-th begins.
    cost = np.full((most + 1, num + 1), np.inf)
    last = np.zeros((most + 1, num + 1), np.int64)
    cost[0, 0] = 0
    starts = np.arange(num)
    for k in range(1, most + 1):
        for j in range(1, num + 1):
            totals = cost[k - 1, :j] + (j - starts[:j]) * float(longest[j - 1])
            last[k, j] = np.argmin(totals)
            cost[k, j] = totals[last[k, j]]
    goal = cost[:, num].min() * (1 + _WORTH)
    k = int(np.argmax(cost[:, num] <= goal))
    cuts = [num]
    while k:
        cuts.insert(0, int(last[k, cuts[0]]))
        k -= 1
    return cuts


def _count_rows(batches: Sequence[np.ndarray], rows_multiple: int, max_row_tokens: int) -> int:
    """Rows for batches with these lengths: of the `_TRIED` smallest numbers that will do, the one with fewest slots."""
    found: list[tuple[int, int]] = []  # slots of a batch, rows
    for num_rows in itertools.count(rows_multiple, rows_multiple):
        if len(found) == _TRIED or (found and num_rows > max(map(len, batches))):
            return min(found)[1]
        filled = [(lengths, fill_rows(lengths, num_rows)) for lengths in batches]
        if all(_is_short(lengths, rows, max_row_tokens) for lengths, rows in filled):
            longest = max(int(lengths[row].sum()) for lengths, rows in filled for row in rows)
            found.append((num_rows * longest, num_rows))
    raise AssertionError("a row for each record always does")


def _is_short(lengths: Lengths, rows: Sequence[Sequence[int]], max_row_tokens: int) -> bool:
    return all(len(row) <= 1 or lengths[row].sum() <= max_row_tokens for row in rows)


def fill_rows(lengths: Lengths, num_rows: int) -> list[list[int]]:
    """Positions in `lengths`, row by row, so that rows are about equally long and hold about equally many.

    Longest first, each into the shortest row that has room; no row holds over ceil(records / rows) records.

    Example: lengths 5, 1, 4, 2 in two rows -> [[0, 1], [2, 3]].
    """
    most = -(-len(lengths) // num_rows)
    rows: list[list[int]] = [[] for _ in range(num_rows)]
    shortest = [(0, row) for row in range(num_rows)]  # a heap of those with room
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        filled, row = heapq.heappop(shortest)
        rows[row].append(i)
        if len(rows[row]) < most:
            heapq.heappush(shortest, (filled + int(lengths[i]), row))
    return [sorted(row) for row in rows]


def choose_shapes(planned: Sequence[Planned], needs: Sequence[packing.Bucket]) -> list[packing.Bucket]:
    """One shape for each class of a window, which holds its batches; `needs` are those of the batches.

    It leaves to the next class's shape those few batches for whose patches all others would pay. Classes whose shapes
    have as many slots for tokens share one.
    """
    classes: dict[int, list[packing.Bucket]] = collections.defaultdict(list)
    for batch, need in zip(planned, needs, strict=True):
        classes[batch.class_number].append(need)
    shapes: dict[tuple[int, int], packing.Bucket] = {}
    for number, own in classes.items():
        num_odd = 0 if number == max(classes) else round(len(own) * _ODD)
        usual = sorted(own, key=lambda need: need.patches)[: len(own) - num_odd]
        shape = functools.reduce(packing.union, usual)
        known = shapes.get((shape.rows, shape.seq))
        shapes[shape.rows, shape.seq] = packing.union(known, shape) if known else shape
    return [shapes[key] for key in sorted(shapes)]


def choose_shape(need: packing.Bucket, shapes: Sequence[packing.Bucket]) -> packing.Bucket:
    """The first shape with the fewest token slots that holds `need`; where none does, `need` itself."""
    fitting = [shape for shape in shapes if packing.holds(shape, need)]
    return min(fitting, key=lambda shape: shape.rows * shape.seq, default=need)


class Padding(NamedTuple):
    """Slots of the batches made so far, and how many hold something."""

    tokens: int = 0
    token_slots: int = 0
    patches: int = 0
    patch_slots: int = 0

    def add(self, sizes: Sequence[packing.Size], shape: packing.Bucket) -> "Padding":
        return Padding(
            self.tokens + sum(size.tokens for size in sizes),
            self.token_slots + shape.rows * shape.seq,
            self.patches + sum(size.patches for size in sizes),
            self.patch_slots + shape.rows * shape.patches,
        )

    @property
    def token_waste(self) -> float:
        """Share of token slots that hold nothing."""
        return 1 - self.tokens / max(self.token_slots, 1)

    @property
    def patch_waste(self) -> float:
        return 1 - self.patches / max(self.patch_slots, 1)


def data_hash(records: Sequence[Mapping[str, Any]], *settings: Any) -> str:
    """16 hex digits that change with any record or setting that a plan depends on; settings are JSON values."""
    digest = hashlib.sha256()
    for part in itertools.chain(records, settings):
        digest.update(json.dumps(part, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()[:16]

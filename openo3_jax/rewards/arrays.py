"""Parsed rows -> padded arrays of a few static shapes: what crosses from the host into `jit`."""

from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Float, Int


class Prediction(NamedTuple):
    """One completion, or with leading `rows` a batch of them. Lists on the host, padded arrays afterwards.

    A word is its number in the vocabulary of the ground truth, -1 if it does not occur there. Boxes are xyxy px.
    """

    words: Int[Array, "*rows words"]
    num_words: Int[Array, "*rows"]
    options: Int[Array, "*rows 4"]  # the answer as it stands, and with `X.` `(X)` `[X]` undone; 0 is the right one
    span_s: Float[Array, "*rows 2"]  # nan where there is none
    answer_box: Float[Array, "*rows 4"]  # nan where there is none
    times_s: Float[Array, "*rows times"]  # nan where it is no number
    time_valid: Bool[Array, "*rows times"]
    time_repeats: Bool[Array, "*rows times"]
    claim_times_s: Float[Array, "*rows claims"]
    claim_valid: Bool[Array, "*rows claims"]  # the time is a number and every box is JSON
    claim_repeats: Bool[Array, "*rows claims"]
    claim_names: Int[Array, "*rows claims"]  # number of the name among the objects of the ground truth, or -1
    boxes: Float[Array, "*rows boxes 4"]  # nan where it is not four numbers
    box_claim: Int[Array, "*rows boxes"]  # claim of a box; -1: in think, but in no claim
    num_objects: Int[Array, "*rows"]  # `<obj>` in think
    odd_time_claims: Int[Array, "*rows"]  # parsed claims whose time `times_s` leaves out, such as `<t>1e1</t>s`
    has_think: Bool[Array, "*rows"]
    has_answer: Bool[Array, "*rows"]
    balanced: Bool[Array, "*rows"]  # every tag that the format term counts is closed as often as opened
    num_time_tags: Int[Array, "*rows"]  # `<t>` in think
    has_each_tag: Bool[Array, "*rows"]  # `<obj>`, `<box>` and `<t>` occur in think
    adjacent_claim: Bool[Array, "*rows"]  # object, box and time touch somewhere in think
    adjacent_box: Bool[Array, "*rows"]  # object and box touch somewhere in think
    one_word_object: Bool[Array, "*rows"]  # they touch somewhere in the text, and the name is one word


class Truth(NamedTuple):
    """One record's ground truth, or with leading `rows` a batch, in the units of the record."""

    task: Int[Array, "*rows"]  # index into `tasks.TASKS`
    words: Int[Array, "*rows gold_words"]
    span_s: Float[Array, "*rows 2"]
    has_span: Bool[Array, "*rows"]
    has_answer: Bool[Array, "*rows"]  # an option, or words that ROUGE knows
    answer_box: Float[Array, "*rows 4"]  # px of the original picture
    original_hw: Float[Array, "*rows 2"]  # of that picture, px
    size_hw: Float[Array, "*rows 2"]  # of what the model saw, px
    has_box: Bool[Array, "*rows"]
    frame_times_s: Float[Array, "*rows frames"]
    frame_valid: Bool[Array, "*rows frames"]
    frame_has_items: Bool[Array, "*rows frames"]
    has_frames: Bool[Array, "*rows"]  # at least one, each at a finite time
    has_items: Bool[Array, "*rows"]  # every box is four finite numbers
    object_frame: Int[Array, "*rows objects"]  # key frame that shows the object; -1: padding
    object_names: Int[Array, "*rows objects"]
    gold_boxes: Float[Array, "*rows gold_boxes 4"]  # fractions of the frame
    gold_box_object: Int[Array, "*rows gold_boxes"]  # -1: padding


class Rows(NamedTuple):
    """Everything a score is made of. `progress` in [0, 1] is the share of training done."""

    prediction: Prediction
    truth: Truth
    progress: Float[Array, "*rows"]


class _Column(NamedTuple):
    """How a field is padded: the size that bounds it (None: one value; an int: that many), filler and type."""

    size: str | int | None
    fill: float
    dtype: type
    width: int = 1  # values per entry


_INT, _FLOAT, _BOOL = np.int32, np.float64, np.bool_
_PREDICTION = Prediction(
    words=_Column("words", -1, _INT),
    num_words=_Column(None, 0, _INT),
    options=_Column(4, -1, _INT),
    span_s=_Column(2, np.nan, _FLOAT),
    answer_box=_Column(4, np.nan, _FLOAT),
    times_s=_Column("times", np.nan, _FLOAT),
    time_valid=_Column("times", False, _BOOL),
    time_repeats=_Column("times", False, _BOOL),
    claim_times_s=_Column("claims", np.nan, _FLOAT),
    claim_valid=_Column("claims", False, _BOOL),
    claim_repeats=_Column("claims", False, _BOOL),
    claim_names=_Column("claims", -1, _INT),
    boxes=_Column("boxes", np.nan, _FLOAT, width=4),
    box_claim=_Column("boxes", -1, _INT),
    num_objects=_Column(None, 0, _INT),
    odd_time_claims=_Column(None, 0, _INT),
    has_think=_Column(None, False, _BOOL),
    has_answer=_Column(None, False, _BOOL),
    balanced=_Column(None, False, _BOOL),
    num_time_tags=_Column(None, 0, _INT),
    has_each_tag=_Column(None, False, _BOOL),
    adjacent_claim=_Column(None, False, _BOOL),
    adjacent_box=_Column(None, False, _BOOL),
    one_word_object=_Column(None, False, _BOOL),
)
_TRUTH = Truth(
    task=_Column(None, 0, _INT),
    words=_Column("words", -2, _INT),  # unlike the -1 of a prediction: padding never matches
    span_s=_Column(2, np.nan, _FLOAT),
    has_span=_Column(None, False, _BOOL),
    has_answer=_Column(None, False, _BOOL),
    answer_box=_Column(4, np.nan, _FLOAT),
    original_hw=_Column(2, 1, _FLOAT),
    size_hw=_Column(2, 1, _FLOAT),
    has_box=_Column(None, False, _BOOL),
    frame_times_s=_Column("frames", np.nan, _FLOAT),
    frame_valid=_Column("frames", False, _BOOL),
    frame_has_items=_Column("frames", False, _BOOL),
    has_frames=_Column(None, False, _BOOL),
    has_items=_Column(None, False, _BOOL),
    object_frame=_Column("objects", -1, _INT),
    object_names=_Column("objects", -2, _INT),
    gold_boxes=_Column("boxes", np.nan, _FLOAT, width=4),
    gold_box_object=_Column("boxes", -1, _INT),
)

# Entries per row at level 0; a row that needs more goes, with its like, to a level 4, 16, 64 .. times as wide.
PREDICTION_SIZES = {"words": 32, "times": 16, "claims": 8, "boxes": 8}
TRUTH_SIZES = {"words": 32, "frames": 8, "objects": 16, "boxes": 32}
_GROWTH = 4
_FEWEST_ROWS = 8
_MOST_CELLS = 1 << 16  # rows of level 0 that fit a bucket, about 1 GiB while they are scored; of wider ones fewer do


class Bucket(NamedTuple):
    """Rows of one static shape. `places[i]` is where row i of `rows` stands in the batch; padding follows."""

    places: Int[np.ndarray, " real"]
    rows: Rows


def make_buckets(
    predictions: Sequence[Prediction], truths: Sequence[Truth], progress: Float[np.ndarray, " rows"]
) -> list[Bucket]:
    """Pad rows to as few static shapes as their sizes allow; most batches need one.

    A shape depends on the number of rows (rounded up to a power of two) and on the widest level, never on contents,
    so one long answer costs a small bucket of its own instead of widening the batch. Memory is bounded: many wide
    rows are scored a few at a time.
    """
    prediction, truth = _transpose(_PREDICTION, predictions), _transpose(_TRUTH, truths)
    levels = np.stack(
        [
            _levels(_PREDICTION, PREDICTION_SIZES, prediction, len(truths)),
            _levels(_TRUTH, TRUTH_SIZES, truth, len(truths)),
        ]
    )
    buckets = []
    for wide, tall in np.unique(levels, axis=1).T.tolist():
        of_level = np.flatnonzero((levels[0] == wide) & (levels[1] == tall))
        most_rows = max(_FEWEST_ROWS, _MOST_CELLS // _GROWTH ** (wide + tall))
        for start in range(0, len(of_level), most_rows):
            places = of_level[start : start + most_rows]
            num_rows = max(_FEWEST_ROWS, 1 << (len(places) - 1).bit_length())
            rows = Rows(
                Prediction(*_stack(_PREDICTION, _sizes(PREDICTION_SIZES, wide), prediction, places, num_rows)),
                Truth(*_stack(_TRUTH, _sizes(TRUTH_SIZES, tall), truth, places, num_rows)),
                np.zeros(num_rows),
            )
            rows.progress[: len(places)] = progress[places]
            buckets.append(Bucket(places, rows))
    return buckets


def _sizes(base: dict[str, int], level: int) -> dict[str, int]:
    return {name: size * _GROWTH**level for name, size in base.items()}


class _Entries(NamedTuple):
    """One field of all rows, and where a row may hold any number of values, how many it holds."""

    of_rows: Sequence[Any]
    lengths: Int[np.ndarray, " rows"] | None


def _transpose(columns: Sequence[_Column], rows: Sequence[tuple]) -> list[_Entries]:
    entries = []
    for column, of_rows in zip(columns, zip(*rows, strict=True), strict=False):  # no fields at all for an empty batch
        counted = isinstance(column.size, str)
        entries.append(_Entries(of_rows, np.fromiter(map(len, of_rows), np.int64, len(rows)) if counted else None))
    return entries


def _levels(
    columns: Sequence[_Column], base: dict[str, int], fields: Sequence[_Entries], num_rows: int
) -> Int[np.ndarray, " rows"]:
    """For each row the smallest level whose sizes hold it."""
    longest = {name: np.zeros(num_rows, np.int64) for name in base}
    for column, (_, lengths) in zip(columns, fields, strict=False):
        if lengths is not None:
            np.maximum(longest[column.size], lengths, out=longest[column.size])
    growth = _GROWTH ** np.arange(16)
    return np.max([np.searchsorted(size * growth, longest[name]) for name, size in base.items()], axis=0)


def _stack(
    columns: Sequence[_Column],
    sizes: dict[str, int],
    fields: Sequence[_Entries],
    places: Int[np.ndarray, " real"],
    num_rows: int,
) -> list[np.ndarray]:
    """One padded array per field, `[num_rows, size]` or `[num_rows, size, width]`, of the rows at `places`."""
    stacked = []
    for column, (entries, lengths) in zip(columns, fields, strict=True):
        if len(places) < len(entries):
            entries = [entries[place] for place in places]
            lengths = None if lengths is None else lengths[places]
        if column.size is None:
            out = np.full(num_rows, column.fill, column.dtype)
            out[: len(places)] = entries
            stacked.append(out)
            continue
        size = column.size if isinstance(column.size, int) else sizes[column.size]
        out = np.full((num_rows, size) + (column.width,) * (column.width > 1), column.fill, column.dtype)
        values = chain.from_iterable(entries)
        flat = np.fromiter(chain.from_iterable(values) if column.width > 1 else values, column.dtype)
        if isinstance(column.size, int):
            out[: len(places)] = flat.reshape(-1, size)
        else:
            filled = np.arange(size) < lengths[:, None]
            out[: len(places)][filled] = flat.reshape(-1, *out.shape[2:])
        stacked.append(out)
    return stacked

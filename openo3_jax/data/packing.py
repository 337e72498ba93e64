"""Samples -> Batch: several samples to a row, rows padded to one of a few static shapes."""

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from openo3_jax import config as config_lib
from openo3_jax import types
from openo3_jax.data import windows
from openo3_jax.errors import InputError

LossOn = Literal["assistant", "released"]  # the assistant's tokens, or every token but the image placeholder
Ints = Int[np.ndarray, "..."]

MERGE_UNIT = 4  # patches that become one visual token in every Qwen2.5-VL

# Smallest step between two sizes of each field of a Bucket.
STEPS = {"seq": 128, "patches": 64, "windows": 8, "targets": 32}
_FRAME_STEPS = {"size": 16, "count": 2}
_FINE = ("seq", "patches")  # fields of which a shape may have any multiple of the smallest step


class Size(NamedTuple):
    """What a sample takes of a row: known before its pixels are. In a row it keeps the place of one without pixels."""

    tokens: int
    targets: int
    grids: tuple[types.VisionGrid, ...]

    @property
    def patches(self) -> int:
        return sum(grid.num_patches for grid in self.grids)


Placed = types.Sample | Size
Row = Sequence[Placed]


def size_of(sample: Placed, loss_on: LossOn, image_token_id: int) -> Size:
    """The room that a sample takes; `loss_on` says which of its tokens are targets."""
    if isinstance(sample, Size):
        return sample
    return Size(len(sample.tokens), int(_is_target(sample, loss_on, image_token_id).sum()), sample.grids)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bucket:
    """The static shape of a Batch; one program is compiled for each.

    `frames`: how many frames of up to how many patches a row may hold, {size: count}; pictures of different sizes
    do not pay for the largest.
    """

    rows: int
    seq: int
    patches: int
    windows: int
    frames: Mapping[int, int]
    targets: int

    def __post_init__(self):
        if self.patches % MERGE_UNIT:
            raise InputError(f"bucket: patches={self.patches} is not a multiple of {MERGE_UNIT}")

    @property
    def visual(self) -> int:
        """Merged visual tokens of a row."""
        return self.patches // MERGE_UNIT


def bucket_for(
    samples_per_row: Sequence[Row],
    vision: config_lib.VisionConfig,
    *,
    num_rows: int | None = None,
    fine: bool = False,
    loss_on: LossOn = "assistant",
    image_token_id: int = config_lib.ModelConfig.image_token_id,
) -> Bucket:
    """The smallest bucket that holds these rows; `num_rows`: of a larger batch, the rest being padding.

    Each size is rounded up to a multiple of a step: 128 tokens, 64 patches, 8 windows, 2 frames of a size, 16
    patches a frame, 32 targets, and from 4 steps on the largest power of two that is at most a quarter of the size. So
    there are four sizes to each doubling, and less than a quarter is padding. 0 stays 0. `fine`: tokens and
    patches in multiples of the smallest step, for a shape that is chosen once. Frames may take places of a larger size.
    """
    needs = [_needs(row, vision, loss_on, image_token_id) for row in samples_per_row]
    sizes = {field: round_up(max((need[field] for need in needs), default=0), step) for field, step in STEPS.items()}
    if fine:
        sizes |= {field: -(-max(need[field] for need in needs) // STEPS[field]) * STEPS[field] for field in _FINE}
    frames = _nest([_frame_counts(row) for row in samples_per_row])
    frames = {size: round_up(count, _FRAME_STEPS["count"]) for size, count in frames.items()}
    return Bucket(rows=len(samples_per_row) if num_rows is None else num_rows, frames=frames, **sizes)


def _frame_counts(row: Row) -> collections.Counter[int]:
    """How many frames of each size, rounded up, the row has."""
    counts: collections.Counter[int] = collections.Counter()
    for grid in _grids(row):
        counts[round_up(grid.height * grid.width, _FRAME_STEPS["size"])] += grid.frames
    return counts


def _nest(rows: Sequence[Mapping[int, int]]) -> dict[int, int]:
    """The fewest frames of each size that hold each of the rows, since a frame also fits a larger place.

    Example: rows {512: 16} and {512: 2, 640: 6} need {512: 10, 640: 6}.
    """
    nested: dict[int, int] = {}
    num_larger = 0
    for size in sorted({size for row in rows for size in row}, reverse=True):
        num = max(_num_from(row, size) for row in rows)
        nested[size] = num - num_larger
        num_larger = num
    return {size: count for size, count in sorted(nested.items()) if count}


def _num_from(frames: Mapping[int, int], least: int) -> int:
    """Frames of `least` patches or more."""
    return sum(count for size, count in frames.items() if size >= least)


def union(a: Bucket, b: Bucket) -> Bucket:
    """The smallest bucket that holds what either holds."""
    sizes = {field: max(getattr(a, field), getattr(b, field)) for field in ("rows", *STEPS)}
    return Bucket(**sizes, frames=_nest([a.frames, b.frames]))


def holds(bucket: Bucket, need: Bucket) -> bool:
    """Whether rows that need one bucket fit the other; a frame fits any class of at least its size."""
    if any(getattr(need, field) > getattr(bucket, field) for field in ("rows", *STEPS)):
        return False
    return all(_num_from(bucket.frames, size) >= _num_from(need.frames, size) for size in need.frames)


def make_batch(
    rows: Sequence[Row],
    bucket: Bucket,
    config: config_lib.ModelConfig,
    *,
    loss_on: LossOn = "assistant",
    pad_id: int = 0,
) -> types.Batch:
    """Rows of samples as numpy arrays of the bucket's shape; missing rows are all padding.

    Samples of a row stand one after the other as segments 1, 2, ..., each with its own positions. A `Size` leaves the
    place of a sample empty: padding, black patches that no token shows, no targets; nothing else moves. A target is
    predicted from the slot before it in its own sample, so no first token is one. `loss_on="released"` trains on
    all text, the questions too, as the reference does.

    Raises: InputError when a row needs more than the bucket has, and by how much; nothing is cut off.
    Source: Open-o3-Video src/r1-v/src/open_r1/sft_multi_task.py:387-396 (`released`).
    """
    assert config.vision.merge_unit == MERGE_UNIT
    if len(rows) > bucket.rows:
        raise InputError(f"batch: {len(rows)} rows, {len(rows) - bucket.rows} more than the bucket's {bucket.rows}")
    batch = _empty_batch(bucket, config.vision, pad_id)
    for index, row in enumerate(rows):
        layout = windows.patch_layout(_grids(row), config.vision)
        for field, need in _needs(row, config.vision, loss_on, config.image_token_id).items():
            if need > getattr(bucket, field):
                raise InputError(
                    f"row {index}: {field}={need}, {need - getattr(bucket, field)} more than the bucket's "
                    f"{getattr(bucket, field)}; use a larger bucket, fewer samples to a row, or fewer frames"
                )
        _fill_text(batch, index, row, loss_on, config.image_token_id)
        if layout.num_frames:
            _fill_vision(batch.vision, index, row, layout, bucket)
    return batch


def _grids(row: Row) -> list[types.VisionGrid]:
    return [grid for sample in row for grid in sample.grids]


def _is_target(sample: types.Sample, loss_on: LossOn, image_token_id: int) -> Bool[np.ndarray, " seq"]:
    """True for the tokens that the loss predicts; the first has nothing before it to be predicted from."""
    mask = sample.loss_mask if loss_on == "assistant" else sample.tokens != image_token_id
    return mask & (np.arange(len(sample.tokens)) > 0)


def _needs(row: Row, vision: config_lib.VisionConfig, loss_on: LossOn, image_token_id: int) -> dict[str, int]:
    """Sizes that the row fills, under the names of the Bucket's fields."""
    sizes = [size_of(sample, loss_on, image_token_id) for sample in row]
    return {
        "seq": sum(size.tokens for size in sizes),
        "patches": sum(size.patches for size in sizes),
        "windows": sum(windows.count_windows(grid, vision) for grid in _grids(row)),
        "targets": sum(size.targets for size in sizes),
    }


def _frame_sizes(layout: windows.PatchLayout) -> Int[np.ndarray, " frames"]:
    """Patches of each frame of the row."""
    return np.bincount(layout.frame, minlength=layout.num_frames)


def _place_frames(layout: windows.PatchLayout, bucket: Bucket, index: int) -> tuple[Ints, Ints]:
    """For each frame of row `index` the size class that takes it and its place in it: the tightest with room."""
    sizes = _frame_sizes(layout)
    classes = sorted(bucket.frames)
    used = dict.fromkeys(classes, 0)
    chosen, place = np.zeros(len(sizes), np.int64), np.zeros(len(sizes), np.int64)
    for frame in np.argsort(-sizes, kind="stable"):
        fits = [size for size in classes if size >= sizes[frame] and used[size] < bucket.frames[size]]
        if not fits:
            raise InputError(
                f"row {index}: no place for a frame of {sizes[frame]} patches in the bucket's frames "
                f"{dict(bucket.frames)} (size: count); use a larger bucket, or fewer or smaller frames"
            )
        chosen[frame], place[frame] = classes.index(fits[0]), used[fits[0]]
        used[fits[0]] += 1
    return chosen, place


def round_up(size: int, step: int) -> int:
    """The next multiple of the step, which doubles with every doubling of the size from eight steps on."""
    while size >= 8 * step:
        step *= 2
    return -(-size // step) * step


def _empty_batch(bucket: Bucket, vision: config_lib.VisionConfig, pad_id: int) -> types.Batch:
    def missing(*shape: int) -> Ints:
        return np.full((bucket.rows, *shape), -1, np.int32)

    def zeros(*shape: int) -> Ints:
        return np.zeros((bucket.rows, *shape), np.int32)

    return types.Batch(
        tokens=np.full((bucket.rows, bucket.seq), pad_id, np.int32),
        positions=zeros(3, bucket.seq),
        segments=zeros(bucket.seq),
        branches=zeros(bucket.seq),
        visual_tokens=missing(bucket.seq),
        visual_slots=missing(bucket.visual),
        target_slots=missing(bucket.targets),
        targets=missing(bucket.targets),
        vision=types.VisionBatch(
            patches=np.zeros((bucket.rows, bucket.patches, vision.patch_dim), np.float32),
            patch_hw=zeros(bucket.patches, 2),
            window_patches=missing(bucket.windows, vision.window_patches),
            window_slots=missing(bucket.patches),
            frame_patches=tuple(missing(count, size) for size, count in sorted(bucket.frames.items())),
            frame_slots=missing(bucket.patches),
        ),
    )


def _fill_text(batch: types.Batch, index: int, row: Row, loss_on: LossOn, image_token_id: int) -> None:
    start = num_visual = num_targets = 0
    for segment, sample in enumerate(row, start=1):
        if isinstance(sample, Size):
            start, num_visual = start + sample.tokens, num_visual + sample.patches // MERGE_UNIT
            continue
        stop = start + len(sample.tokens)
        batch.tokens[index, start:stop] = sample.tokens
        batch.positions[index, :, start:stop] = sample.positions
        batch.segments[index, start:stop] = segment

        visual = start + np.flatnonzero(sample.is_visual)
        numbers = num_visual + np.arange(len(visual))
        batch.visual_tokens[index, visual] = numbers
        batch.visual_slots[index, numbers] = visual
        num_visual += len(visual)

        targets = np.flatnonzero(_is_target(sample, loss_on, image_token_id))
        places = slice(num_targets, num_targets + len(targets))
        batch.target_slots[index, places] = start + targets - 1
        batch.targets[index, places] = sample.tokens[targets]
        num_targets += len(targets)
        start = stop


def _fill_vision(vision: types.VisionBatch, index: int, row: Row, layout: windows.PatchLayout, bucket: Bucket) -> None:
    number = np.arange(len(layout.hw))
    start = 0
    for sample in row:
        if isinstance(sample, Size):
            start += sample.patches
        else:
            vision.patches[index, start : start + len(sample.patches)] = sample.patches
            start += len(sample.patches)
    vision.patch_hw[index, : len(number)] = layout.hw
    vision.window_patches[index, layout.window, layout.window_rank] = number
    vision.window_slots[index, : len(number)] = layout.window * vision.window_patches.shape[-1] + layout.window_rank
    chosen, place = _place_frames(layout, bucket, index)
    start = 0
    for number_of_class, frames in enumerate(vision.frame_patches):
        count, size = frames.shape[1:]
        mine = np.flatnonzero(chosen[layout.frame] == number_of_class)
        at, rank = place[layout.frame[mine]], layout.frame_rank[mine]
        frames[index, at, rank] = mine
        vision.frame_slots[index, mine] = start + at * size + rank
        start += count * size

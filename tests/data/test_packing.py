"""Rows, buckets and batches: every index by hand on small samples, and invariants on random ones."""

import dataclasses

import numpy as np
import pytest

from openo3_jax import config as config_lib
from openo3_jax import types
from openo3_jax.data import packing, positions
from openo3_jax.errors import InputError

CONFIG = config_lib.QWEN2_5_VL["3b"]
IMAGE = CONFIG.image_token_id


def make_sample(parts, *, first_value: float = 0.0) -> types.Sample:
    """`parts`: text ids, or a grid for a picture; ids of 100 and more are the assistant's."""
    tokens, grids = [], []
    for part in parts:
        if isinstance(part, types.VisionGrid):
            tokens += [IMAGE] * (part.num_patches // 4)
            grids.append(part)
        else:
            tokens.append(part)
    tokens = np.array(tokens, np.int32)
    num_patches = sum(grid.num_patches for grid in grids)
    values = first_value + np.arange(num_patches, dtype=np.float32)
    return types.Sample(
        tokens=tokens,
        positions=positions.mrope_positions(tokens, grids, [None] * len(grids), CONFIG),
        loss_mask=(tokens >= 100) & (tokens < IMAGE),
        is_visual=tokens == IMAGE,
        patches=np.repeat(values[:, None], 1176, axis=1),
        grids=tuple(grids),
    )


def text_sample(length: int) -> types.Sample:
    return make_sample([5] * length)


SMALL = packing.Bucket(rows=2, seq=10, patches=16, windows=3, frames={4: 1, 10: 2}, targets=6)


def test_batch_by_hand():
    """Row 0: [1, picture of 1x2 tokens, 100, 101] and [2, picture of one token, 102]; row 1: [100, 3]."""
    first = make_sample([1, types.VisionGrid(1, 2, 4), 100, 101])
    second = make_sample([2, types.VisionGrid(1, 2, 2), 102], first_value=50)
    third = make_sample([100, 3])
    batch = packing.make_batch([[first, second], [third]], SMALL, CONFIG, pad_id=9)

    expected = {
        "tokens": [[1, IMAGE, IMAGE, 100, 101, 2, IMAGE, 102, 9, 9], [100, 3] + [9] * 8],
        "segments": [[1, 1, 1, 1, 1, 2, 2, 2, 0, 0], [1, 1] + [0] * 8],
        "branches": [[0] * 10] * 2,
        "visual_tokens": [[-1, 0, 1, -1, -1, -1, 2, -1, -1, -1], [-1] * 10],
        "visual_slots": [[1, 2, 6, -1], [-1] * 4],
        # 100 is predicted from the second picture token; the first token of row 1 is nobody's target.
        "target_slots": [[2, 3, 6, -1, -1, -1], [-1] * 6],
        "targets": [[100, 101, 102, -1, -1, -1], [-1] * 6],
    }
    for field, want in expected.items():
        np.testing.assert_array_equal(getattr(batch, field), want, err_msg=field)
        assert getattr(batch, field).dtype == np.int32
    # Each sample keeps its own positions: the 1x2 picture at 1 reaches column 2, text goes on at 3.
    np.testing.assert_array_equal(
        batch.positions[0],
        [[0, 1, 1, 3, 4, 0, 1, 2, 0, 0], [0, 1, 1, 3, 4, 0, 1, 2, 0, 0], [0, 1, 2, 3, 4, 0, 1, 2, 0, 0]],
    )

    vision = batch.vision
    np.testing.assert_array_equal(vision.patches[0, :, 7], [*range(8), 50, 51, 52, 53, 0, 0, 0, 0])
    np.testing.assert_array_equal(
        vision.patch_hw[0, :12].tolist(),
        [[0, 0], [0, 1], [1, 0], [1, 1], [0, 2], [0, 3], [1, 2], [1, 3], [0, 0], [0, 1], [1, 0], [1, 1]],
    )
    none = [-1] * 64
    assert vision.window_patches[0].tolist() == [[*range(8), *none[8:]], [8, 9, 10, 11, *none[4:]], none]
    assert vision.window_slots[0].tolist() == [*range(8), 64, 65, 66, 67, -1, -1, -1, -1]
    # The frame of 4 patches goes into the class of size 4, whose 4 slots come first, that of 8 into the class of 10.
    small, large = vision.frame_patches
    assert small[0].tolist() == [[8, 9, 10, 11]]
    assert large[0].tolist() == [[*range(8), -1, -1], [-1] * 10]
    assert vision.frame_slots[0].tolist() == [*range(4, 12), 0, 1, 2, 3, -1, -1, -1, -1]
    for array in (vision.window_patches, vision.window_slots, small, large, vision.frame_slots):
        assert (array[1] == -1).all() and array.dtype == np.int32
    assert not vision.patches[1].any() and vision.patches.dtype == np.float32


def test_released_loss_is_on_all_text():
    """Everything but the picture, the end of the first turn and the question included, never a first token."""
    row = [make_sample([1, types.VisionGrid(1, 2, 4), 100, 101]), make_sample([2, 3])]
    batch = packing.make_batch([row], SMALL, CONFIG, loss_on="released")
    np.testing.assert_array_equal(batch.target_slots[0], [2, 3, 5, -1, -1, -1])
    np.testing.assert_array_equal(batch.targets[0], [100, 101, 3, -1, -1, -1])


def test_no_pictures_at_all():
    bucket = packing.bucket_for([[text_sample(3)]], CONFIG.vision, num_rows=2)
    assert bucket == packing.Bucket(rows=2, seq=128, patches=0, windows=0, frames={}, targets=0)
    batch = packing.make_batch([[text_sample(3)]], bucket, CONFIG)
    assert batch.vision.patches.shape == (2, 0, 1176)
    assert batch.vision.window_patches.shape == (2, 0, 64)
    assert batch.visual_slots.shape == (2, 0)
    assert (batch.segments[1] == 0).all()


def random_rows(seed: int) -> list[list[types.Sample]]:
    rng = np.random.default_rng(seed)

    def part():
        if rng.random() < 0.3:
            return types.VisionGrid(int(rng.integers(1, 4)), *(2 * int(n) for n in rng.integers(1, 8, 2)))
        return int(rng.integers(3, 200))

    def sample():
        parts = [7]
        for _ in range(rng.integers(1, 12)):
            parts += [part(), 8]
        return make_sample(parts)

    return [[sample() for _ in range(rng.integers(0, 4))] for _ in range(3)]


@pytest.mark.parametrize("seed", range(5))
def test_invariants(seed):
    rows = random_rows(seed)
    bucket = packing.bucket_for(rows, CONFIG.vision)
    batch = packing.make_batch(rows, bucket, CONFIG)
    vision = batch.vision
    for r, row in enumerate(rows):
        num_patches = sum(len(sample.patches) for sample in row)
        frames = np.concatenate([of_size.reshape(len(rows), -1) for of_size in vision.frame_patches], axis=1)
        for slots, lists in ((vision.window_slots, vision.window_patches), (vision.frame_slots, frames)):
            # Both directions are each other's inverse, and together they hold every patch once.
            flat = lists[r].ravel()
            np.testing.assert_array_equal(flat[slots[r, :num_patches]], np.arange(num_patches))
            assert (slots[r, num_patches:] == -1).all()
            assert (flat >= 0).sum() == num_patches
        visual = np.flatnonzero(batch.tokens[r] == IMAGE)
        np.testing.assert_array_equal(batch.visual_slots[r, : len(visual)], visual)
        np.testing.assert_array_equal(batch.visual_tokens[r, visual], np.arange(len(visual)))
        assert len(visual) * 4 == num_patches
        # A target and the slot it is predicted from lie in one segment.
        at = batch.target_slots[r][batch.target_slots[r] >= 0]
        np.testing.assert_array_equal(batch.segments[r, at], batch.segments[r, at + 1])
        np.testing.assert_array_equal(batch.tokens[r, at + 1], batch.targets[r, : len(at)])
        wanted = [t for sample in row for t in sample.tokens[1:][sample.loss_mask[1:]]]
        assert batch.targets[r, : len(at)].tolist() == wanted


SIZES = {  # need: rounded up to steps of 128 and from 1024 on of an eighth of the next power of two
    1: 128,
    128: 128,
    129: 256,
    1000: 1024,
    1024: 1024,
    1025: 1280,
    2049: 2560,
    5000: 5120,
    9000: 10_240,
}


@pytest.mark.parametrize("need", SIZES)
def test_bucket_sizes(need):
    assert packing.bucket_for([[text_sample(need)]], CONFIG.vision).seq == SIZES[need]


def test_bucket_takes_the_largest_row():
    """Row 0: 2 stills of 4x6 patches, one window each; row 1: a video of 9 temporal patches of 2x20."""
    rows = [
        [make_sample([1, types.VisionGrid(1, 4, 6), 2, types.VisionGrid(1, 4, 6), 100])],
        [make_sample([1, types.VisionGrid(9, 2, 20), 2])],
    ]
    bucket = packing.bucket_for(rows, CONFIG.vision)
    # 360 patches, 9 * 3 windows, 9 frames of 40 patches, whose places stills of 24 take too, 1 target.
    assert bucket == packing.Bucket(rows=2, seq=128, patches=384, windows=32, frames={48: 10}, targets=32)
    assert bucket.visual == 96
    released = packing.bucket_for(rows, CONFIG.vision, loss_on="released")
    assert released == bucket  # 2 and 1 text targets, still 32


SHORTAGES = {  # field: (too small a size, what row 0 needs)
    "seq": (7, 8),
    "patches": (8, 12),
    "windows": (1, 2),
    "targets": (2, 3),
}


@pytest.mark.parametrize("field", SHORTAGES)
def test_rows_beyond_the_bucket_are_refused(field):
    size, need = SHORTAGES[field]
    row = [make_sample([1, types.VisionGrid(1, 2, 4), 100, 101]), make_sample([2, types.VisionGrid(1, 2, 2), 102])]
    fits = packing.Bucket(rows=1, seq=8, patches=12, windows=2, frames={8: 2}, targets=3)
    packing.make_batch([row], fits, CONFIG)
    short = dataclasses.replace(fits, **{field: size})
    with pytest.raises(InputError, match=f"row 0: {field}={need}, {need - size} more than the bucket's {size}"):
        packing.make_batch([row], short, CONFIG)
    with pytest.raises(InputError, match="2 rows, 1 more"):
        packing.make_batch([row, []], fits, CONFIG)


def test_frames_without_a_place_are_refused():
    """Frames of 8 and 4 patches: a larger class may take the smaller frame, never the other way round."""
    row = [make_sample([1, types.VisionGrid(1, 2, 4), 100, 101]), make_sample([2, types.VisionGrid(1, 2, 2), 102])]
    room = {"rows": 1, "seq": 8, "patches": 12, "windows": 2, "targets": 3}
    packing.make_batch([row], packing.Bucket(frames={8: 2}, **room), CONFIG)
    for frames, homeless in (({8: 1}, 4), ({4: 2}, 8), ({7: 2}, 8)):
        with pytest.raises(InputError, match=f"row 0: no place for a frame of {homeless} patches"):
            packing.make_batch([row], packing.Bucket(frames=frames, **room), CONFIG)


def test_union_holds_what_either_holds():
    a = packing.Bucket(rows=2, seq=128, patches=64, windows=8, frames={48: 10}, targets=32)
    b = packing.Bucket(rows=1, seq=256, patches=32, windows=16, frames={48: 4, 64: 2}, targets=32)
    expected = packing.Bucket(rows=2, seq=256, patches=64, windows=16, frames={48: 8, 64: 2}, targets=32)
    assert packing.union(a, b) == packing.union(b, a) == expected


def test_a_size_keeps_the_place_of_a_sample():
    """The second of three samples is missing: its tokens are padding, the others stand where they stood."""
    samples = [make_sample([1, types.VisionGrid(1, 4, 6), 100 + i]) for i in range(3)]
    size = packing.size_of(samples[1], "assistant", CONFIG.image_token_id)
    bucket = packing.bucket_for([samples], CONFIG.vision)
    assert bucket == packing.bucket_for([[samples[0], size, samples[2]]], CONFIG.vision)
    whole = packing.make_batch([samples], bucket, CONFIG)
    holed = packing.make_batch([[samples[0], size, samples[2]]], bucket, CONFIG)
    length = size.tokens
    gone = slice(length, 2 * length)
    np.testing.assert_array_equal(holed.segments[0, gone], 0)
    np.testing.assert_array_equal(holed.visual_tokens[0, gone], -1)
    for part in (slice(0, length), slice(2 * length, None)):
        for name in ("tokens", "segments", "visual_tokens"):
            np.testing.assert_array_equal(getattr(holed, name)[0, part], getattr(whole, name)[0, part])
        np.testing.assert_array_equal(holed.positions[0, :, part], whole.positions[0, :, part])
    assert not holed.vision.patches[0, 24:48].any() and holed.vision.patches[0, 48:72].any()
    np.testing.assert_array_equal(holed.vision.patches[0, 48:72], whole.vision.patches[0, 48:72])
    np.testing.assert_array_equal(holed.vision.window_slots, whole.vision.window_slots)


HOLDS = {  # name: (frames that are there, frames that are wanted, whether they fit)
    "a larger place": ({64: 2}, {32: 2}, True),
    "too few": ({64: 2}, {32: 3}, False),
    "too small": ({32: 9}, {64: 1}, False),
    "some of each": ({32: 1, 64: 1}, {32: 2}, True),
    "the large ones are taken": ({32: 1, 64: 1}, {32: 1, 64: 2}, False),
}


@pytest.mark.parametrize("name", HOLDS)
def test_holds(name):
    there, wanted, expected = HOLDS[name]
    sizes = {"rows": 1, "seq": 128, "patches": 64, "windows": 8, "targets": 32}
    assert packing.holds(packing.Bucket(**sizes, frames=there), packing.Bucket(**sizes, frames=wanted)) is expected
    longer = packing.Bucket(**sizes | {"seq": 256}, frames={})
    assert not packing.holds(packing.Bucket(**sizes, frames=there), longer)

import numpy as np
import pytest

from openo3_jax.config import QWEN2_5_VL
from openo3_jax.data import images, packing, plan
from openo3_jax.errors import InputError
from openo3_jax.types import VisionGrid

VISION = QWEN2_5_VL["7b"].vision


# ---- epochs ----


def test_epochs_cut_a_set_into_whole_batches():
    epochs = plan.Epochs(num_draws=10, batch_size=4)
    assert (epochs.num_batches, epochs.num_left_out) == (2, 2)
    assert [epochs.place(step) for step in range(4)] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [epochs.step(epochs.place(step)) for step in range(7)] == list(range(7))
    assert plan.Epochs(3, 4) == (3, 4) and plan.Epochs(3, 4).num_batches == 1 and plan.Epochs(3, 4).num_left_out == 0


def test_an_epoch_has_every_record_once():
    orders = [plan.epoch_order(np.ones(7), 3, epoch).tolist() for epoch in range(2)]
    assert [sorted(order) for order in orders] == [list(range(7))] * 2
    assert orders[0] != orders[1] and orders[0] == plan.epoch_order(np.ones(7), 3, 0).tolist()


def test_weights_say_how_often():
    weights = np.array([0.0, 1.0, 2.0, 0.5, 0.5])
    orders = [plan.epoch_order(weights, 0, epoch) for epoch in range(400)]
    counts = np.array([np.bincount(order, minlength=5) for order in orders])
    assert (counts.sum(1) == 4).all()
    assert (counts[:, :3] == [0, 1, 2]).all()
    np.testing.assert_allclose(counts[:, 3:].mean(0), 0.5, atol=0.08)


RECORDS = [{"task": "a", "source": "x"}, {"task": "a", "source": "y"}, {"task": "b", "source": "y"}]


def test_weights_of_task_and_source_multiply():
    assert plan.record_weights(RECORDS, [("a", 3.0), ("y", 0.5)]).tolist() == [3.0, 1.5, 0.5]
    assert plan.record_weights(RECORDS, []).tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("weights", "says"),
    [
        ([("c", 1.0)], "'c' is no task or source"),
        ([("a", -1.0)], "'a' has -1.0; expected"),
        ([("a", 0.0), ("b", 0.0)], "no record is left"),
    ],
)
def test_bad_weights(weights, says):
    with pytest.raises(InputError, match=says):
        plan.record_weights(RECORDS, weights)


# ---- classes and rows ----


def test_classes_are_cut_where_padding_is_saved():
    assert plan.class_cuts([1] * 8 + [50] * 9) == [0, 8, 17]
    assert plan.class_cuts([5] * 40) == [0, 40]  # one length needs one class
    assert plan.class_cuts([1, 1, 9, 9]) == [0, 4]  # too few for two


def test_rows_are_filled_evenly():
    assert plan.fill_rows([5, 1, 4, 2], 2) == [[0, 1], [2, 3]]
    assert plan.fill_rows([9, 1, 1, 1], 2) == [[0, 3], [1, 2]]  # as many in each row, though 9 alone is longer
    assert plan.fill_rows([3, 2], 4) == [[0], [1], [], []]


def window(lengths, *, batch_size, rows_multiple=1, max_row_tokens=1000, seed=0):
    settings = {"batch_size": batch_size, "rows_multiple": rows_multiple, "max_row_tokens": max_row_tokens}
    classes = plan.choose_classes(lengths, **settings, rng=np.random.default_rng(0))
    indices = [100 + i for i in range(len(lengths))]
    return classes, plan.plan_window(indices, lengths, classes, **settings, rng=np.random.default_rng(seed))


LENGTHS = [100] * 64 + [600] * 64


def test_a_window_has_every_record_once_in_batches_of_like_length():
    classes, planned = window(LENGTHS, batch_size=8)
    # 8 records of 100 tokens fill one row of 800; two of 600 do not fit into one of 1000. Rows grow by 128.
    assert classes == [(128, 1), (640, 8)]
    assert sorted(i for batch in planned for row in batch.rows for i in row) == [100 + i for i in range(128)]
    for batch in planned:
        lengths = {LENGTHS[i - 100] for row in batch.rows for i in row}
        assert len(lengths) == 1 and len(batch.rows) == (1 if lengths == {100} else 8)
        assert all(sum(LENGTHS[i - 100] for i in row) <= 1000 for row in batch.rows)


def test_devices_and_row_length_do_not_change_which_records_meet():
    def meetings(**settings):
        return [sorted(i for row in batch.rows for i in row) for batch in window(LENGTHS, batch_size=8, **settings)[1]]

    assert meetings() == meetings(rows_multiple=4) == meetings(max_row_tokens=3000) != meetings(seed=1)
    assert {len(batch.rows) for batch in window(LENGTHS, batch_size=8, rows_multiple=4)[1]} == {4, 8}


def test_records_that_fill_no_batch_move_up():
    lengths = [10] * 67 + [60] * 61  # 3 of the short ones are left over
    settings = {"batch_size": 8, "rows_multiple": 1, "max_row_tokens": 100}
    classes = [plan.Class(10, 1), plan.Class(60, 8)]
    planned = plan.plan_window(range(128), lengths, classes, **settings, rng=np.random.default_rng(0))
    mixed = [batch for batch in planned if len({lengths[i] for row in batch.rows for i in row}) == 2]
    assert all(batch.class_number == 1 for batch in mixed)
    assert sorted(i for batch in planned for row in batch.rows for i in row) == list(range(128))


def test_a_longer_record_has_a_row_of_its_own():
    _, planned = window([10, 10, 10, 250], batch_size=4, max_row_tokens=100)
    assert len(planned) == 1 and [3 + 100] in planned[0].rows


def test_a_small_window_is_one_batch():
    planned = window([5, 5, 5], batch_size=8)[1]
    assert len(planned) == 1 and sorted(i for row in planned[0].rows for i in row) == [100, 101, 102]


# ---- shapes ----


def bucket(rows, seq, frames, *, patches=64):
    return packing.Bucket(rows=rows, seq=seq, patches=patches, windows=8, frames=frames, targets=32)


def test_shapes():
    planned = [plan.Planned([], number) for number in (0, 0, 1, 2)]
    needs = [bucket(2, 128, {64: 2}), bucket(2, 256, {32: 4}), bucket(4, 512, {32: 1}), bucket(4, 512, {64: 1})]
    shapes = plan.choose_shapes(planned, needs)
    assert shapes == [bucket(2, 256, {32: 2, 64: 2}), bucket(4, 512, {64: 1})]
    assert plan.choose_shape(bucket(1, 128, {32: 3}), shapes) == shapes[0]
    assert plan.choose_shape(bucket(3, 128, {32: 1}), shapes) == shapes[1]
    other = bucket(4, 512, {32: 2})
    assert plan.choose_shape(other, shapes) == other


def test_a_shape_leaves_the_batch_with_most_patches_to_the_next_class():
    """16 batches of each class: one has three times the patches of its class; the last class must hold its own."""
    small = [bucket(2, 128, {64: 2})] * 15 + [bucket(2, 128, {64: 2}, patches=192)]
    large = [bucket(2, 256, {64: 4}, patches=256)] * 15 + [bucket(2, 256, {64: 4}, patches=768)]
    planned = [plan.Planned([], number) for number in [0] * 16 + [1] * 16]
    shapes = plan.choose_shapes(planned, [*small, *large])
    assert [shape.patches for shape in shapes] == [64, 768]
    assert plan.choose_shape(small[-1], shapes) == shapes[1]


# ---- padding, on lengths like those of the released records ----

MIX = {"general": 15_000, "temporal-spatial": 7_047, "visual": 5_000, "temporal": 4_119}  # rows of stage one


def simulated_sizes(draw):
    """Clips of half a second to minutes in the usual shapes, pictures of any, texts of some 250 tokens."""
    rng = np.random.default_rng(draw)
    share = np.array([*MIX.values()]) / sum(MIX.values())
    return [_simulated_size(kind, rng) for kind in rng.choice([*MIX], 4096, p=share)]


def _simulated_size(kind, rng):
    text = 100 + int(rng.gamma(6, 25))
    if kind == "visual":
        height, width = rng.integers(300, 1200, 2).tolist()
        height, width = images.smart_resize(height, width, **images.Area()._asdict())
        grids = (VisionGrid(1, height // 14, width // 14),)
        return packing.Size(grids[0].num_patches // 4 + text, 100, grids)
    num_frames = int(np.clip(2 * rng.lognormal(3.2, 1.0), 4, 16)) // 2 * 2
    num_frames += int(rng.integers(1, 6)) if kind == "temporal-spatial" else 0
    shape = [(16, 30), (20, 26), (30, 16), (20, 28)][rng.choice(4, p=[0.75, 0.15, 0.06, 0.04])]
    grids = (VisionGrid(1, *shape),) * num_frames
    return packing.Size(sum(grid.num_patches for grid in grids) // 4 + 14 * num_frames + text, 100, grids)


@pytest.mark.parametrize(
    ("batch_size", "rows_multiple", "max_row_tokens", "draw"),
    [
        (8, 8, 4096, 0),
        (8, 1, 4096, 0),
        (32, 8, 8192, 0),
        *(pytest.param(8, 8, 4096, draw, marks=pytest.mark.soak) for draw in (1, 2, 3)),
    ],
)
def test_little_padding_and_few_shapes_on_a_mix_like_the_released_one(batch_size, rows_multiple, max_row_tokens, draw):
    sizes = simulated_sizes(draw)
    per_window = plan.WINDOW_BATCHES * batch_size
    settings = {"batch_size": batch_size, "rows_multiple": rows_multiple, "max_row_tokens": max_row_tokens}
    padding, classes, shapes, others = plan.Padding(), [], [], set()
    for start in range(0, len(sizes) // batch_size * batch_size, per_window):
        indices = range(start, min(start + per_window, len(sizes)))
        lengths = [sizes[i].tokens for i in indices]
        classes = classes or plan.choose_classes(lengths, **settings, rng=np.random.default_rng(0))
        planned = plan.plan_window(indices, lengths, classes, **settings, rng=np.random.default_rng(start))
        rows = [[[sizes[i] for i in row] for row in batch.rows] for batch in planned]
        needs = [packing.bucket_for(batch, VISION, fine=True) for batch in rows]
        shapes = shapes or plan.choose_shapes(planned, needs)
        for batch, need in zip(rows, needs, strict=True):
            shape = plan.choose_shape(need, shapes)
            if shape not in shapes:
                shape = packing.bucket_for(batch, VISION)
                others.add((shape.rows, shape.seq, shape.patches, *shape.frames.items()))
            padding = padding.add([size for row in batch for size in row], shape)
    assert padding.tokens == sum(size.tokens for size in sizes)
    assert padding.token_waste < 0.10, padding.token_waste
    assert padding.patch_waste < 0.10, padding.patch_waste
    assert len(shapes) <= plan.MAX_CLASSES and len(others) <= 16, (len(shapes), len(others))

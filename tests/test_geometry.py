"""Overlap and units, worked by hand, for numpy and jax alike."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from openo3_jax import geometry

NAN, INF = float("nan"), float("inf")
BOXES = {  # name: (pred, gold, IoU worked out by hand)
    "same": ([0, 0, 4, 2], [0, 0, 4, 2], 1.0),
    "corner": ([0, 0, 2, 2], [1, 1, 3, 3], 1 / 7),
    "half": ([0, 0, 2, 4], [0, 0, 4, 4], 0.5),
    "apart": ([0, 0, 1, 1], [2, 2, 3, 3], 0.0),
    "touching": ([0, 0, 1, 1], [1, 0, 2, 1], 0.0),
    "inside": ([1, 1, 2, 2], [0, 0, 10, 10], 0.01),
    "reversed in x": ([2, 0, 0, 2], [0, 0, 2, 2], 0.0),
    "reversed in both": ([2, 2, 0, 0], [0, 0, 2, 2], 0.0),
    "empty": ([1, 1, 1, 1], [1, 1, 1, 1], 0.0),
    "nan": ([NAN, 0, 1, 1], [0, 0, 1, 1], 0.0),
    "infinite": ([0, 0, INF, INF], [0, 0, 1, 1], 0.0),
    "all infinite": ([-INF, -INF, INF, INF], [-INF, -INF, INF, INF], 0.0),
    "beyond float64 squared": ([0, 0, 1e200, 1e200], [0, 0, 1, 1], 0.0),
    "negative corner": ([-2, -2, 2, 2], [0, 0, 2, 2], 0.25),
}
SPANS = {  # name: (pred, gold, IoU worked out by hand)
    "same": ([4, 9], [4, 9], 1.0),
    "half over": ([0, 2], [1, 3], 1 / 3),
    "inside": ([2, 3], [0, 10], 0.1),
    "apart": ([0, 1], [5, 6], 0.0),
    "touching": ([0, 1], [1, 2], 0.0),
    "no length": ([2, 2], [2, 2], 0.0),
    "point in a span": ([2, 2], [0, 4], 0.0),
    "reversed": ([9, 4], [4, 9], 0.0),
    "nan": ([NAN, 2], [1, 3], 0.0),
    "endless": ([0, INF], [1, 3], 0.0),
}


@pytest.mark.parametrize("where", ["numpy", "jit"])
@pytest.mark.parametrize("name", BOXES)
def test_box_iou(name, where):
    pred, gold, expected = BOXES[name]
    with jax.enable_x64(True), np.errstate(all="ignore"):
        pred, gold = np.float64([pred]), np.float64([gold])
        found = jax.jit(geometry.box_iou)(pred, gold) if where == "jit" else geometry.box_iou(pred, gold)
        np.testing.assert_allclose(found, [expected], rtol=1e-12)
        np.testing.assert_allclose(geometry.box_iou(gold, pred), [expected], rtol=1e-12)


@pytest.mark.parametrize("where", ["numpy", "jit"])
@pytest.mark.parametrize("name", SPANS)
def test_span_iou(name, where):
    pred, gold, expected = SPANS[name]
    with jax.enable_x64(True), np.errstate(all="ignore"):
        pred, gold = np.float64([pred]), np.float64([gold])
        found = jax.jit(geometry.span_iou)(pred, gold) if where == "jit" else geometry.span_iou(pred, gold)
        np.testing.assert_allclose(found, [expected], rtol=1e-12)


def test_box_iou_of_every_pair():
    pred = jnp.float32([[0, 0, 2, 2], [0, 0, 4, 4]])
    gold = jnp.float32([[0, 0, 2, 2], [0, 0, 2, 4], [9, 9, 10, 10]])
    expected = [[1, 0.5, 0], [0.25, 0.5, 0]]
    np.testing.assert_allclose(geometry.box_iou(pred[:, None], gold), expected, rtol=1e-6)


def test_units_put_width_on_x():
    size_hw = np.array([28, 56])
    boxes_px = geometry.boxes_to_px(np.float64([[0.5, 0.5, 1, 1]]), size_hw)
    np.testing.assert_array_equal(boxes_px, [[28, 14, 56, 28]])
    np.testing.assert_array_equal(geometry.boxes_to_frac(boxes_px, size_hw), [[0.5, 0.5, 1, 1]])
    resized = geometry.resize_boxes(np.float64([10, 10, 20, 20]), np.array([100, 200]), np.array([50, 400]))
    np.testing.assert_array_equal(resized, [20, 5, 40, 10])

"""xyxy boxes and [start, end] spans: units and overlap. The only IoU; numpy and jax arrays alike."""

from typing import Any

from jaxtyping import Float, Real

Boxes = Float[Any, "*#batch 4"]  # leading dims broadcast
Spans = Float[Any, "*#batch 2"]
Sizes = Real[Any, "*#batch 2"]


def box_iou(pred: Boxes, gold: Boxes) -> Float[Any, "*#batch"]:
    """IoU in [0, 1] of xyxy boxes in one unit, pair by pair; leading dims broadcast.

    0 for reversed, empty, `nan` or infinite boxes.
    Source: src/r1-v/src/open_r1/reward_func.py:356-386.
    """
    xp = pred.__array_namespace__()
    sides = xp.minimum(pred[..., 2:], gold[..., 2:]) - xp.maximum(pred[..., :2], gold[..., :2])
    sides = xp.maximum(sides, 0.0)
    # IoU = |A n B| / (|A| + |B| - |A n B|)
    inter = sides[..., 0] * sides[..., 1]
    union = _signed_area(pred) + _signed_area(gold) - inter
    covered = (union > 0.0) & xp.isfinite(union)
    return xp.where(covered, inter / xp.where(covered, union, 1.0), 0.0)


def span_iou(pred_s: Spans, gold_s: Spans) -> Float[Any, "*#batch"]:
    """IoU in [0, 1] of [start, end] spans in seconds; 0 for apart, reversed, empty or `nan` spans.

    Source: src/r1-v/src/open_r1/reward_func.py:120-135.
    """
    xp = pred_s.__array_namespace__()
    start, end = pred_s[..., 0], pred_s[..., 1]
    gold_start, gold_end = gold_s[..., 0], gold_s[..., 1]
    # tIoU = overlap / (latest end - earliest start), which is the union wherever there is an overlap
    inter = xp.maximum(xp.minimum(end, gold_end) - xp.maximum(start, gold_start), 0.0)
    hull = xp.maximum(end, gold_end) - xp.minimum(start, gold_start)
    covered = (hull > 0.0) & xp.isfinite(hull)
    return xp.where(covered, inter / xp.where(covered, hull, 1.0), 0.0)


def boxes_to_px(boxes_frac: Boxes, size_hw: Sizes) -> Boxes:
    """Fractions of the frame -> pixels of a frame of `size_hw` (height, width).

    Example: `[.5, .5, 1, 1]` in a frame of 28 x 56 is `[28, 14, 56, 28]`.
    """
    return boxes_frac * _per_corner(size_hw, boxes_frac)


def boxes_to_frac(boxes_px: Boxes, size_hw: Sizes) -> Boxes:
    """Pixels of a frame of `size_hw` (height, width) -> fractions of it."""
    return boxes_px / _per_corner(size_hw, boxes_px)


def resize_boxes(boxes_px: Boxes, from_hw: Sizes, to_hw: Sizes) -> Boxes:
    """Pixels of a picture of `from_hw` -> pixels of the same picture after its resize to `to_hw`."""
    return boxes_px * (_per_corner(to_hw, boxes_px) / _per_corner(from_hw, boxes_px))


def _per_corner(size_hw: Sizes, like: Boxes) -> Boxes:
    """(height, width) -> (width, height, width, height), the factor of each coordinate of a box."""
    xp = like.__array_namespace__()
    height, width = size_hw[..., 0], size_hw[..., 1]
    return xp.stack([width, height, width, height], axis=-1).astype(like.dtype)


def _signed_area(boxes: Boxes) -> Float[Any, "*#batch"]:
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])

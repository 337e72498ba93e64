"""What each item earned -> the benchmarks' numbers, with intervals: numpy in, numpy out, fractions everywhere.

A V-STaR item is answered along two chains, 0 what-when-where and 1 what-where-when. Every item counts: one that was
not answered, or not in a readable form, has 0. `nan` means that a measure does not apply to the item.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from openo3_jax import geometry, tags

R1_THRESHOLDS = (0.3, 0.5, 0.7)
AP_THRESHOLDS = (0.1, 0.3, 0.5, 0.7, 0.9)
JOINT_TIOU, JOINT_VIOU = 0.3, 0.1  # from here on a span or a box counts as found in the combined counts
LOG_FLOOR = 1e-6  # LGM's cap: an accuracy of 1 counts 13.8 nats
CHAINS = (1, 2)  # as the tables number them
MEANS = ("acc", "tiou_1", "tiou_2", "viou_1", "viou_2")  # what the headline numbers are made of

Items = Float[np.ndarray, " items"]
ItemChains = Float[np.ndarray, "items 2"]
Statistic = Callable[[Float[np.ndarray, "*batch columns"]], Float[np.ndarray, "*batch"]]


# ---- one item ----


def tiou(pred_s: Float[np.ndarray, "*batch 2"], gold_s: Float[np.ndarray, "*batch 2"]) -> Float[Any, "*batch"]:
    """Overlap over hull of [start, end] spans in seconds, in [0, 1]; 0 where `pred_s` is `nan` (unreadable).

    Example: `tiou([0, 2], [1, 3])` is 1/3.
    Source: Open-o3-Video eval/test/eval_vstar.py.
    """
    return geometry.span_iou(pred_s, gold_s)


def box_ious(pred: Float[np.ndarray, "boxes preds 4"], gold: Float[np.ndarray, "boxes 4"]) -> Float[Any, " boxes"]:
    """For each true box the best IoU of the boxes predicted for its second; `nan` pads, without any it is 0.

    Source: Open-o3-Video eval/test/eval_vstar.py.
    """
    return geometry.box_iou(pred, gold[:, None]).max(axis=1, initial=0.0)


def viou(ious: Float[np.ndarray, " boxes"]) -> float:
    """Mean over the true boxes of one item; `nan` for an item without boxes."""
    return float(ious.mean()) if len(ious) else math.nan


def average_precision(
    ious: Float[np.ndarray, " boxes"], thresholds: Sequence[float] = AP_THRESHOLDS
) -> Float[np.ndarray, " thresholds"]:
    """Share of an item's true boxes found with at least each IoU; `nan` for an item without boxes."""
    if not len(ious):
        return np.full(len(thresholds), np.nan)
    return (ious[:, None] >= np.array(thresholds)).mean(axis=0)


# ---- all items ----


def recall_at_1(ious: Items, thresholds: Sequence[float] = R1_THRESHOLDS) -> Float[np.ndarray, " thresholds"]:
    """Share of the items whose one span has at least each tIoU."""
    return np.array([(ious >= threshold).mean() for threshold in thresholds])


def am(acc: Any, m_tiou: Any, m_viou: Any) -> Any:
    """Arithmetic mean of what, when and where, in [0, 1]."""
    return (acc + m_tiou + m_viou) / 3


def lgm(acc: Any, m_tiou: Any, m_viou: Any) -> Any:
    """Modified logarithmic geometric mean, in nats: `-ln(max(1 - x, 1e-6))` averaged over what, when and where.

    Capped, since the published formula is infinite where a share is 1.
    Source: V-STaR, arXiv:2503.11495; Open-o3-Video eval/test/eval_vstar.py.
    """
    return sum(-np.log(np.maximum(1 - np.asarray(x), LOG_FLOOR)) for x in (acc, m_tiou, m_viou)) / 3


def mam(means: Float[np.ndarray, "*batch 5"]) -> Float[Any, "*batch"]:
    """AM averaged over both chains; the columns are `MEANS`."""
    return _over_chains(am, means)


def mlgm(means: Float[np.ndarray, "*batch 5"]) -> Float[Any, "*batch"]:
    """LGM averaged over both chains; the columns are `MEANS`."""
    return _over_chains(lgm, means)


def _over_chains(formula: Callable[[Any, Any, Any], Any], means: np.ndarray) -> Any:
    return (
        formula(means[..., 0], means[..., 1], means[..., 3]) + formula(means[..., 0], means[..., 2], means[..., 4])
    ) / 2


def headline(means: Float[np.ndarray, "*batch 5"]) -> dict[str, Float[Any, "*batch"]]:
    """The columns `MEANS`, AM and LGM of each chain, mAM and mLGM. Fractions; published tables show 100 times these."""
    named = {name: means[..., i] for i, name in enumerate(MEANS)}
    for chain in CHAINS:
        parts = named["acc"], named[f"tiou_{chain}"], named[f"viou_{chain}"]
        named |= {f"am_{chain}": am(*parts), f"lgm_{chain}": lgm(*parts)}
    return named | {"mam": mam(means), "mlgm": mlgm(means)}


def joint_counts(correct: Bool[np.ndarray, " items"], tious: ItemChains, vious: ItemChains) -> dict[str, int]:
    """Items with several parts right at once, per chain: right answer, tIoU >= 0.3, vIoU >= 0.1.

    Source: Open-o3-Video eval/test/eval_vstar.py.
    """
    counts = {}
    for chain, when, where in zip(CHAINS, (tious >= JOINT_TIOU).T, (vious >= JOINT_VIOU).T, strict=True):
        counts |= {
            f"what_when_{chain}": int((correct & when).sum()),
            f"what_where_{chain}": int((correct & where).sum()),
            f"when_where_{chain}": int((when & where).sum()),
            f"what_when_where_{chain}": int((correct & when & where).sum()),
        }
    return counts


def column_means(values: Float[np.ndarray, "items columns"]) -> Float[np.ndarray, " columns"]:
    """Mean of each column over the items it applies to; `nan` where there are none."""
    return _weighted_means(np.ones((1, len(values))), values)[0]


def by_group(
    values: Float[np.ndarray, "items columns"], groups: Sequence[str]
) -> dict[str, tuple[int, Float[np.ndarray, " columns"]]]:
    """Group -> how many items have a value, and its column means; groups in the order they first appear."""
    labels = np.array(groups, dtype=object)
    chosen = {group: values[labels == group] for group in dict.fromkeys(groups)}
    return {group: (int(np.isfinite(rows).any(axis=1).sum()), column_means(rows)) for group, rows in chosen.items()}


def duration_bucket(duration_s: float | int) -> str:
    """`Short` below 60 s, `Medium` below 180 s, else `Long`. Source: Open-o3-Video eval/test/eval_vstar.py."""
    return "Short" if duration_s < 60 else "Medium" if duration_s < 180 else "Long"


# ---- form ----


def is_well_formed(text: str) -> bool:
    """Reasoning and answer stand in their tags, and every tag of the grammar is closed as often as opened."""
    has_both = tags.think_text(text) is not None and tags.answer_text(text) is not None
    return has_both and tags.counts_match(text, tags.THINK, tags.ANSWER, tags.OBJ, tags.BOX, tags.TIME)


def format_rate(texts: Sequence[str]) -> float:
    """Share of well-formed texts; `nan` without any."""
    return float(np.mean([is_well_formed(text) for text in texts])) if texts else math.nan


# ---- intervals ----


class Interval(NamedTuple):
    """A value over `n` items and the bootstrap percentiles around it."""

    value: float
    low: float
    high: float
    n: int


def bootstrap(
    values: Float[np.ndarray, "items columns"],
    statistic: Statistic,
    *,
    level: float = 0.95,
    resamples: int = 4000,
    seed: int = 0,
) -> Interval:
    """`statistic` of the column means, with the percentile interval over resampled items.

    `statistic` maps means [..., columns] to [...]: `mlgm`, or `lambda means: means[..., 0]`.
    """
    draws = statistic(_resampled_means(values, resamples, seed))
    return _interval(float(statistic(column_means(values))), draws, level, len(values))


def paired_bootstrap(
    a: Float[np.ndarray, "items columns"],
    b: Float[np.ndarray, "items columns"],
    statistic: Statistic,
    *,
    level: float = 0.95,
    resamples: int = 4000,
    seed: int = 0,
) -> Interval:
    """`statistic(b) - statistic(a)` over the same items in the same order, each resample shared by both sides."""
    value = float(statistic(column_means(b)) - statistic(column_means(a)))
    draws = statistic(_resampled_means(b, resamples, seed)) - statistic(_resampled_means(a, resamples, seed))
    return _interval(value, draws, level, len(a))


def means_of(values: Mapping[str, Items]) -> Float[np.ndarray, "items 5"]:
    """Columns by name -> the matrix `MEANS` that `mam`, `mlgm` and the bootstraps take."""
    return np.stack([values[name] for name in MEANS], axis=1)


def _interval(value: float, draws: np.ndarray, level: float, n: int) -> Interval:
    known = draws[np.isfinite(draws)]
    if n < 2 or not len(known):
        return Interval(value, math.nan, math.nan, n)
    low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high), n)


def _resampled_means(values: np.ndarray, resamples: int, seed: int, block: int = 500) -> np.ndarray:
    """[resamples, columns]; the draws depend on the number of items and the seed alone, so that pairs share them."""
    rng, n = np.random.default_rng(seed), len(values)
    blocks = [np.zeros((0, values.shape[1]))]
    for start in range(0, resamples if n else 0, block):
        size = min(block, resamples - start)
        drawn = rng.integers(0, n, (size, n)) + n * np.arange(size)[:, None]
        weights = np.bincount(drawn.ravel(), minlength=size * n).reshape(size, n).astype(np.float64)
        blocks.append(_weighted_means(weights, values))
    return np.concatenate(blocks)


def _weighted_means(weights: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Means over the items with a value: [resamples, items] x [items, columns] -> [resamples, columns]."""
    total, count = weights @ np.nan_to_num(values), weights @ np.isfinite(values).astype(np.float64)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)

"""Metrics against items worked by hand and every published row of V-STaR; intervals against known samples."""

import math

import numpy as np
import pytest

from openo3_jax.evals import metrics, published

LOG_CAP = -math.log(1e-6)

# Rows whose print contradicts itself: mAM and mLGM that their own columns give, in percent. All others agree.
SLIPS = {
    "Oryx-1.5-7B": (13.82, 15.10),  # the two are swapped in print
    "InternVL-2.5-8B": (17.62, 22.45),
    "Video-LLaMA3": (21.83, 27.02),
    "TRACE": (11.90, 13.11),
    "Qwen3-VL-32B": (30.60, 38.57),  # the accuracy of another row
}


def row_means(row):
    return np.array(row[:5]) / 100


@pytest.mark.parametrize("name", [name for name in published.VSTAR if name not in SLIPS])
def test_a_published_row_gives_its_own_means(name):
    row = published.VSTAR[name]
    assert abs(100 * metrics.mam(row_means(row)) - row.mam) < 0.1
    assert abs(100 * metrics.mlgm(row_means(row)) - row.mlgm) < 0.1


@pytest.mark.parametrize("name", SLIPS)
def test_a_row_that_contradicts_itself(name):
    row = published.VSTAR[name]
    found = 100 * metrics.mam(row_means(row)), 100 * metrics.mlgm(row_means(row))
    assert found == pytest.approx(SLIPS[name], abs=0.006)
    assert max(abs(found[0] - row.mam), abs(found[1] - row.mlgm)) >= 0.1


def test_the_32b_row_of_qwen3_needs_another_accuracy():
    row = published.VSTAR["Qwen3-VL-32B"]
    repaired = row_means(row._replace(acc=57.5))
    assert abs(100 * metrics.mam(repaired) - row.mam) < 0.1
    assert abs(100 * metrics.mlgm(repaired) - row.mlgm) < 0.1


# ---- by hand ----


def test_am_and_lgm_by_hand():
    """acc 1/2, tIoU 0, vIoU 1 - 1/e^2: AM is their mean, LGM (ln 2 + 0 + 2) / 3."""
    where = 1 - math.exp(-2)
    assert metrics.am(0.5, 0.0, where) == pytest.approx((1.5 - math.exp(-2)) / 3)
    assert metrics.lgm(0.5, 0.0, where) == pytest.approx((math.log(2) + 2) / 3)


def test_lgm_of_nothing_is_0_without_a_sign():
    assert str(float(metrics.lgm(0.0, 0.0, 0.0))) == "0.0"


def test_lgm_is_capped_where_a_share_is_1():
    assert metrics.lgm(1.0, 0.0, 0.0) == pytest.approx(LOG_CAP / 3)
    perfect = np.ones(5)
    assert metrics.mam(perfect) == 1.0
    assert metrics.mlgm(perfect) == pytest.approx(LOG_CAP)


def test_headline_averages_the_chains():
    found = metrics.headline(np.array([0.6, 0.3, 0.0, 0.3, 0.0]))
    assert (found["am_1"], found["am_2"], found["mam"]) == pytest.approx((0.4, 0.2, 0.3))
    assert found["lgm_2"] == pytest.approx(-math.log(0.4) / 3)
    assert found["mlgm"] == pytest.approx((found["lgm_1"] + found["lgm_2"]) / 2)


SPANS = {  # name: pred, gold, tIoU
    "half over": ([0, 2], [1, 3], 1 / 3),
    "same": ([4, 9], [4, 9], 1.0),
    "apart": ([0, 1], [5, 6], 0.0),
    "unreadable": ([math.nan, math.nan], [5, 6], 0.0),
    "reversed": ([6, 5], [5, 6], 0.0),
}


def test_tiou():
    preds, golds, expected = (np.array(column, np.float64) for column in zip(*SPANS.values(), strict=True))
    np.testing.assert_allclose(metrics.tiou(preds, golds), expected)


def test_box_ious_takes_the_best_of_a_second():
    """First true box: a quarter and a half of it; second: nothing was predicted."""
    gold = np.array([[0.0, 0, 4, 4], [0, 0, 4, 4]])
    nothing = [math.nan] * 4
    preds = np.array([[[0.0, 0, 2, 2], [0, 0, 4, 2]], [nothing, nothing]])
    ious = metrics.box_ious(preds, gold)
    np.testing.assert_allclose(ious, [0.5, 0.0])
    assert metrics.viou(ious) == 0.25
    np.testing.assert_allclose(metrics.average_precision(ious), [0.5, 0.5, 0.5, 0, 0])


def test_box_ious_without_predictions_or_boxes():
    np.testing.assert_array_equal(metrics.box_ious(np.zeros((2, 0, 4)), np.ones((2, 4))), [0, 0])
    none = metrics.box_ious(np.zeros((0, 0, 4)), np.zeros((0, 4)))
    assert math.isnan(metrics.viou(none)) and np.isnan(metrics.average_precision(none)).all()


def test_recall_at_1_counts_the_threshold_itself():
    np.testing.assert_allclose(metrics.recall_at_1(np.array([0.3, 0.5, 0.0, 0.9])), [0.75, 0.5, 0.25])


def test_joint_counts():
    correct = np.array([True, True, False])
    tious = np.array([[0.3, 0.0], [0.2, 0.9], [1.0, 1.0]])
    vious = np.array([[0.1, 0.0], [0.9, 0.05], [0.0, 0.5]])
    assert metrics.joint_counts(correct, tious, vious) == {
        "what_when_1": 1,
        "what_where_1": 2,
        "when_where_1": 1,
        "what_when_where_1": 1,
        "what_when_2": 1,
        "what_where_2": 0,
        "when_where_2": 1,
        "what_when_where_2": 0,
    }


def test_by_group_keeps_order_and_ignores_what_does_not_apply():
    values = np.array([[1.0, math.nan], [0.0, 0.5], [1.0, math.nan], [math.nan, math.nan]])
    table = metrics.by_group(values, ["b", "a", "b", "b"])
    assert list(table) == ["b", "a"]
    assert table["b"][0] == 2
    np.testing.assert_array_equal(table["b"][1], [1.0, math.nan])
    np.testing.assert_array_equal(table["a"][1], [0.0, 0.5])


@pytest.mark.parametrize(
    ("seconds", "bucket"), [(0, "Short"), (59.9, "Short"), (60, "Medium"), (179, "Medium"), (180, "Long")]
)
def test_duration_bucket(seconds, bucket):
    assert metrics.duration_bucket(seconds) == bucket


FORMS = {
    "<think>a</think><answer>b</answer>": True,
    "<think><obj>x</obj><box>[1,2,3,4]</box>at<t>1</t>s</think>\n<answer>b</answer>": True,
    "<think>a</think>": False,
    "<answer>b</answer>": False,
    "<think><obj>x</think><answer>b</answer>": False,
    "": False,
}


@pytest.mark.parametrize("text", FORMS)
def test_is_well_formed(text):
    assert metrics.is_well_formed(text) is FORMS[text]


def test_format_rate():
    assert metrics.format_rate(list(FORMS)) == pytest.approx(2 / 6)
    assert math.isnan(metrics.format_rate([]))


# ---- intervals ----


def first(means):
    return means[..., 0]


def test_the_interval_of_a_share_is_the_binomial_one():
    """100 of 400 right: standard error sqrt(.25 * .75 / 400) = 0.0217, so 1.96 of them to each side."""
    values = np.zeros((400, 1))
    values[:100] = 1
    found = metrics.bootstrap(values, first)
    assert (found.value, found.n) == (0.25, 400)
    assert found.low == pytest.approx(0.25 - 1.96 * 0.02165, abs=0.005)
    assert found.high == pytest.approx(0.25 + 1.96 * 0.02165, abs=0.005)


def test_a_paired_difference_has_no_width_where_every_item_gains_alike():
    """Unpaired resampling would give these columns an interval as wide as their own spread."""
    a = np.linspace(0, 0.5, 50)[:, None]
    found = metrics.paired_bootstrap(a, a + 0.25, first)
    assert found.value == pytest.approx(0.25)
    assert found.low == pytest.approx(0.25) and found.high == pytest.approx(0.25)


def test_a_paired_difference_of_mlgm():
    a, b = np.zeros((10, 5)), np.full((10, 5), 1 - math.exp(-1))
    assert metrics.paired_bootstrap(a, b, metrics.mlgm)[:2] == pytest.approx((1.0, 1.0))


def test_few_items_have_no_interval():
    assert metrics.bootstrap(np.ones((1, 1)), first)[:1] == (1.0,)
    assert math.isnan(metrics.bootstrap(np.ones((1, 1)), first).low)
    assert math.isnan(metrics.bootstrap(np.zeros((0, 1)), first).value)


def test_what_does_not_apply_is_left_out_of_every_resample():
    values = np.array([[1.0], [math.nan], [1.0]])
    assert metrics.bootstrap(values, first) == metrics.Interval(1.0, 1.0, 1.0, 3)

"""Charts: averaging, ticks, places worked by hand, gaps, names that are markup."""

import math
import re

import pytest

from openo3_jax.report import curves
from openo3_jax.report.curves import Point, Series


def test_long_lines_are_averaged():
    assert curves.shorten(Series([1, 2, 3, 4], [0.0, 2.0, 4.0, 6.0]), 2) == [Point(1.5, 1, 0, 2), Point(3.5, 5, 4, 6)]
    assert len(curves.shorten(Series(range(5000), [float(i) for i in range(5000)]))) == curves.MOST_POINTS


def test_values_that_are_not_finite_are_left_out():
    assert curves.shorten(Series([1, 2, 3], [1.0, math.nan, math.inf])) == [Point(1, 1, 1, 1)]
    assert curves.chart("t", {"a": Series([1], [math.nan])}, {"a": 0}) == ""


TICKS = {
    (0.0, 0.93): [0, 0.25, 0.5, 0.75, 1.0],
    (0.0, 1.0): [0, 0.25, 0.5, 0.75, 1.0],
    (0.0, 0.0): [0, 0.25, 0.5, 0.75, 1.0],
    (5.0, 5.0): [4.5, 4.75, 5, 5.25, 5.5],
    (-3.0, 7.0): [-5, -2.5, 0, 2.5, 5, 7.5],
    (1e-6, 3e-6): [1e-6, 1.5e-6, 2e-6, 2.5e-6, 3e-6],
}


@pytest.mark.parametrize("ends", TICKS)
def test_ticks(ends):
    assert curves.nice_ticks(*ends) == pytest.approx(TICKS[ends])


def test_a_line_goes_from_corner_to_corner():
    """Steps 1 to 3, values 0 to 1: the drawing's inner corners, x from 52 to 450, y from 194 up to 10."""
    text = str(curves.chart("t", {"a": Series([1, 2, 3], [0.0, 0.5, 1.0])}, {"a": 3}))
    assert 'class="line curve-3" d="M52.0 194.0L251.0 102.0L450.0 10.0"' in text
    assert "band" not in text


def test_one_step_is_a_dot():
    text = str(curves.chart("t", {"a": Series([7], [2.0])}, {"a": 0}))
    assert "<circle" in text and "NaN" not in text and "nan" not in text


def test_names_are_escaped():
    text = str(curves.chart("<b>", {"<script>": Series([1, 2], [0.0, 1.0])}, {"<script>": 0}))
    assert not re.search("<script|<b>", text) and "&lt;script&gt;" in text

"""Statistics of a data set -> one HTML page: how answers are distributed, and what guessing without looking scores."""

import io
from collections.abc import Sequence

import jinja2
import matplotlib
import numpy as np
from matplotlib.figure import Figure

from openo3_jax.data.stats import Statistics

_MOST_NAMES = 25

# What is drawn: field of Statistics, title, label of the axis, upper end of the axis (None: that of the values).
_PLOTS: Sequence[tuple[str, str, str, float | None]] = (
    ("span_centre", "centre of the answer's span", "share of the clip", 1.0),
    ("span_length", "length of the answer's span", "share of the clip", 1.0),
    ("key_time", "time of key frames", "share of the clip", 1.0),
    ("clip_s", "length of clips", "seconds", None),
    ("box_x", "centre of true boxes, across", "share of the width", 1.0),
    ("box_y", "centre of true boxes, down", "share of the height", 1.0),
    ("box_area", "area of true boxes", "share of the frame", 1.0),
    ("key_frames", "key frames of a record", "number", None),
    ("boxes", "true boxes of a record", "number", None),
    ("claims", "claims in a reasoning", "number", None),
    ("answer_words", "words of an answer", "number", None),
)


def render(statistics: Sequence[Statistics], title: str) -> str:
    """The page, with everything in it: no file beside it, nothing from the network."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("openo3_jax.report", "."), autoescape=True, undefined=jinja2.StrictUndefined
    )
    return environment.get_template("data_page.jinja").render(
        title=title,
        stages=[
            {
                "name": one.stage,
                "total": sum(one.counts.values()),
                "counts": sorted(one.counts.items(), key=lambda item: -item[1]),
                "num_without_clip": one.num_without_clip,
                "plots": _plots(one),
                "places": _places(one),
                "guesses": one.guesses,
                "names": sorted(one.names.items(), key=lambda item: (-item[1], item[0]))[:_MOST_NAMES],
                "num_names": len(one.names),
                "letters": sorted(one.letters.items()),
                "num_letters": sum(one.letters.values()),
                "quantiles": _quantiles(one),
            }
            for one in statistics
        ],
    )


def _quantiles(one: Statistics) -> list[tuple[str, str, int, list[float]]]:
    """Title, unit, number of values, and their 5, 25, 50, 75 and 95 % points."""
    shown = [(title, unit, getattr(one, field)) for field, title, unit, _ in _PLOTS]
    points = (5, 25, 50, 75, 95)
    return [(title, unit, len(v), np.percentile(v, points).tolist()) for title, unit, v in shown if len(v)]


def _plots(one: Statistics) -> list[str]:
    return [
        _histogram(getattr(one, field), title, unit, top)
        for field, title, unit, top in _PLOTS
        if len(getattr(one, field))
    ]


def _histogram(values: np.ndarray, title: str, unit: str, top: float | None) -> str:
    figure = Figure(figsize=(3.6, 2.2), layout="constrained")
    axes = figure.subplots()
    # A few very long clips or answers would leave the rest in one bar.
    end = top or float(np.percentile(values, 99)) + 1
    axes.hist(np.clip(values, 0, end), bins=20, range=(0, end), color="#4878a8")
    axes.set(title=title, xlabel=unit, yticks=[])
    return _svg(figure)


def _places(one: Statistics) -> str | None:
    """Where the centres of boxes lie in the frame."""
    if not len(one.box_x):
        return None
    figure = Figure(figsize=(3.6, 2.4), layout="constrained")
    axes = figure.subplots()
    axes.hist2d(one.box_x, one.box_y, bins=16, range=((0, 1), (0, 1)), cmap="Blues")
    axes.invert_yaxis()
    axes.set(title="centres of boxes in the frame", xlabel="left to right", ylabel="top to bottom")
    return _svg(figure)


def _svg(figure: Figure) -> str:
    """The figure as an element of the page; the same values give the same bytes."""
    with matplotlib.rc_context({"svg.hashsalt": "openo3", "svg.fonttype": "none"}):
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    _, opening, rest = text.getvalue().partition("<svg")
    return opening + rest

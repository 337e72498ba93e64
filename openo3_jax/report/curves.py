"""Numbers of a run over its steps -> line charts as SVG elements that follow the page's colours."""

import html
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

WIDTH, HEIGHT = 460, 220  # px of the drawing, which scales with the page
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 10, 26
MOST_POINTS = 200  # of a line; longer ones are averaged
NUM_COLORS = 7


class Series(NamedTuple):
    """One metric: a value for each step that has it, nan where it was not finite."""

    steps: Sequence[int]
    values: Sequence[float]


class Point(NamedTuple):
    """Neighbouring steps: their middle, and mean, least and greatest value."""

    step: float
    mean: float
    low: float
    high: float


def shorten(series: Series, most: int = MOST_POINTS) -> list[Point]:
    """At most `most` points, each over as many steps as the next; steps without a finite value are left out.

    Example: `shorten(Series([1, 2, 3, 4], [0.0, 2.0, 4.0, 6.0]), 2)` is `[Point(1.5, 1, 0, 2), Point(3.5, 5, 4, 6)]`.
    """
    steps, values = np.array(series.steps, float), np.array(series.values, float)
    steps, values = steps[np.isfinite(values)], values[np.isfinite(values)]
    if not len(steps):
        return []
    parts = np.array_split(np.arange(len(steps)), min(most, len(steps)))
    return [
        Point(float(steps[p].mean()), float(values[p].mean()), float(values[p].min()), float(values[p].max()))
        for p in parts
    ]


def chart(title: str, lines: Mapping[str, Series], colors: Mapping[str, int]) -> str:
    """A chart with one line per name and a band where points stand for several steps; empty without a finite value.

    `colors`: of each name, in [0, NUM_COLORS).
    """
    points = {name: found for name, series in lines.items() if (found := shorten(series))}
    if not points:
        return ""
    every = [point for found in points.values() for point in found]
    first, last = min(p.step for p in every), max(p.step for p in every)
    ticks = nice_ticks(min(p.low for p in every), max(p.high for p in every))

    def x(step: float) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * ((step - first) / (last - first) if last > first else 0.5), 1)

    def y(value: float) -> float:
        return round(HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - ticks[0]) / (ticks[-1] - ticks[0]), 1)

    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title)}">',
        *(
            f'<path class="grid" d="M{LEFT} {y(t)}H{WIDTH - RIGHT}"/><text x="{LEFT - 6}" y="{y(t) + 4}" '
            f'text-anchor="end">{t:g}</text>'
            for t in ticks
        ),
        *(
            f'<text x="{x(step)}" y="{HEIGHT - 8}" text-anchor="{anchor}">{label}{step:g}</text>'
            for step, anchor, label in dict.fromkeys([(first, "start", "step "), (last, "end", "")])
        ),
    ]
    for name, found in points.items():
        color = f"curve-{colors[name]}"
        if any(p.high > p.low for p in found):
            edge = [f"{x(p.step)} {y(p.high)}" for p in found] + [f"{x(p.step)} {y(p.low)}" for p in reversed(found)]
            parts.append(f'<path class="band {color}" d="M{"L".join(edge)}Z"/>')
        hint = f"<title>{html.escape(name)}: {found[-1].mean:.4g} at the end</title>"
        if len(found) == 1:
            parts.append(
                f'<circle class="{color}" cx="{x(found[0].step)}" cy="{y(found[0].mean)}" r="4">{hint}</circle>'
            )
        else:
            line = "L".join(f"{x(p.step)} {y(p.mean)}" for p in found)
            parts.append(f'<path class="line {color}" d="M{line}">{hint}</path>')
    return "".join([*parts, "</svg>"])


def nice_ticks(low: float, high: float) -> list[float]:
    """Three to seven round values that hold both.

    Example: `nice_ticks(0.0, 0.93)` is `[0.0, 0.2, 0.4, 0.6, 0.8, 1.0]`.
    """
    if high <= low:
        room = abs(low) * 0.1
        low, high = low - room, (high + room) or 1.0
    exact = (high - low) / 4
    size = 10.0 ** math.floor(math.log10(exact))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= exact * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]

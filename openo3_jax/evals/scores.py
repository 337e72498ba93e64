"""What each item earned, by measure -> values with intervals, tables by group, the published numbers beside them."""

import dataclasses
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from rich import box, console
from rich import table as rich_table

from openo3_jax.errors import InputError
from openo3_jax.evals import metrics, store

SCORES = "scores.jsonl"
RESULTS = "results.json"
TABLE = "table.txt"
UNREAD = ("no_option", "no_span")  # measures of which less is better: answers that could not be read


@dataclasses.dataclass(frozen=True)
class Measure:
    """A number of the table: `statistic` of the means of `columns`. `scale`: 100 prints percent."""

    name: str
    columns: tuple[str, ...]
    statistic: metrics.Statistic
    scale: float = 100.0


def mean_of(column: str, scale: float = 100.0) -> Measure:
    """The mean of one column, under its name."""
    return Measure(column, (column,), lambda means: means[..., 0], scale)


@dataclasses.dataclass(frozen=True)
class Scores:
    """A row of `columns` for each item, in the order of `ids`; `nan` where a measure does not apply.

    `groups`: dimension -> value for each item. `notes`: what a reader of the table must know.
    """

    ids: tuple[str, ...]
    columns: Mapping[str, Float[np.ndarray, " items"]]
    groups: tuple[Mapping[str, str], ...]
    notes: tuple[str, ...] = ()

    def matrix(self, measure: Measure) -> Float[np.ndarray, "items columns"]:
        return np.stack([self.columns[name] for name in measure.columns], axis=1)

    def take(self, rows: Sequence[int]) -> "Scores":
        """These rows only, in this order."""
        index = np.array(rows, int)
        columns = {name: values[index] for name, values in self.columns.items()}
        return Scores(tuple(self.ids[i] for i in rows), columns, tuple(self.groups[i] for i in rows), self.notes)


def value_of(scores: Scores, measure: Measure) -> metrics.Interval:
    """The measure over all items that it applies to, with its interval, times its scale; `n` counts those items."""
    values = scores.matrix(measure)
    applies = np.isfinite(values).any(axis=1)
    found = metrics.bootstrap(values[applies], measure.statistic)
    return _scaled(found, measure.scale)


def differences(a: Scores, b: Scores, measures: Sequence[Measure]) -> tuple[dict[str, metrics.Interval], list[str]]:
    """b - a over the items that both have, paired; and what was left out. Raises InputError where they share none."""
    places = {item: i for i, item in enumerate(b.ids)}
    shared = [item for item in a.ids if item in places]
    if not shared:
        raise InputError("compare: the two runs share no item; expected runs of one benchmark")
    first = a.take([i for i, item in enumerate(a.ids) if item in places])
    second = b.take([places[item] for item in shared])
    found = {}
    for measure in measures:
        if not set(measure.columns) <= a.columns.keys() & b.columns.keys():
            continue
        left, right = first.matrix(measure), second.matrix(measure)
        both = (np.isfinite(left) & np.isfinite(right)).any(axis=1)
        if both.any():
            interval = metrics.paired_bootstrap(left[both], right[both], measure.statistic)
            found[measure.name] = _scaled(interval, measure.scale)
    alone = len(a.ids) + len(b.ids) - 2 * len(shared)
    return found, [f"{alone} items that only one run has were left out"] if alone else []


def _scaled(interval: metrics.Interval, scale: float) -> metrics.Interval:
    return metrics.Interval(scale * interval.value, scale * interval.low, scale * interval.high, interval.n)


# ---- files ----


def save(scores: Scores, file: Path) -> None:
    """One line per item: id, values, groups."""
    lines = []
    for i, item in enumerate(scores.ids):
        values = {name: _finite(float(values[i])) for name, values in scores.columns.items()}
        lines.append(json.dumps({"item": item, "scores": values, "groups": dict(scores.groups[i])}))
    store.replace_text(file, "".join(line + "\n" for line in lines))


def load(directory: Path) -> Scores:
    """The scores of an evaluation's directory. Raises InputError where it has none."""
    file = directory / SCORES
    if not file.is_file():
        raise InputError(f"{file}: no such file; expected the --out of a finished evaluation")
    rows = store.read_lines(file)
    names = list(rows[0]["scores"]) if rows else []
    values = [[math.nan if row["scores"][name] is None else row["scores"][name] for name in names] for row in rows]
    columns = dict(zip(names, np.array(values, np.float64).reshape(len(rows), len(names)).T, strict=True))
    return Scores(tuple(row["item"] for row in rows), columns, tuple(row["groups"] for row in rows))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def without_nan(value: Any) -> Any:
    """The same with None for every number that is not finite, as JSON wants it."""
    if isinstance(value, Mapping):
        return {key: without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [without_nan(inner) for inner in value]
    return _finite(value) if isinstance(value, float) else value


# ---- tables ----


def by_group(scores: Scores, measures: Sequence[Measure]) -> dict[str, dict[str, dict[str, float | int]]]:
    """Dimension -> group -> how many items count, and the value of each measure. An item may lack a dimension."""
    found: dict[str, dict[str, dict[str, float | int]]] = {}
    for dimension in dict.fromkeys(name for groups in scores.groups for name in groups):
        rows = [i for i, groups in enumerate(scores.groups) if dimension in groups]
        part, labels = scores.take(rows), [scores.groups[i][dimension] for i in rows]
        table: dict[str, dict[str, float | int]] = {label: {} for label in sorted(set(labels))}
        for measure in measures:
            for label, (n, means) in metrics.by_group(part.matrix(measure), labels).items():
                n = max(n, table[label].get("n", 0))
                table[label] |= {"n": n, measure.name: measure.scale * float(measure.statistic(means))}
        found[dimension] = table
    return found


def render(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str] = ()) -> str:
    """A plain text table: the first column to the left, numbers to the right, notes below."""
    lines = rich_table.Table(box=box.SIMPLE)
    for i, name in enumerate(header):
        lines.add_column(name, justify="right" if i else "left")
    for row in rows:
        lines.add_row(*row)
    page = console.Console(file=io.StringIO(), width=160, color_system=None, markup=False, highlight=False)
    with page.capture() as text:
        page.print(lines)
    plain = "\n".join(line.rstrip() for line in text.get().splitlines())
    return "\n".join([title, plain, *(f"  {note}" for note in notes)]) + "\n"


def show(value: float | int | None, decimals: int = 1) -> str:
    """The number, "-" where there is none."""
    return "-" if value is None or not math.isfinite(value) else f"{value:.{decimals}f}"


def show_interval(found: metrics.Interval, decimals: int = 1) -> str:
    return f"{show(found.low, decimals)} .. {show(found.high, decimals)}"

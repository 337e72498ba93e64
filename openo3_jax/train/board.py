"""The numbers of a run on a terminal: a live table with rate and time left, plain lines where there is no terminal."""

import math
import time
from collections.abc import Mapping

from rich import console, live, table, text

REPORT_EVERY_S = 10.0  # of plain lines
ROWS = 12  # of the table


class Board:
    """Shows the last step's metrics in columns, a group in each. A context manager.

    `start`: steps made before; they count for what is left, not for the rate.
    """

    def __init__(self, screen: console.Console, what: str, headline: str, *, start: int, total: int):
        self._console = screen
        self._what = what
        self._headline = headline
        self._start = start
        self._total = total
        self._reported_s = -math.inf
        self._live = live.Live(console=screen, refresh_per_second=2, transient=True) if screen.is_terminal else None

    def __enter__(self) -> "Board":
        self._started_s = time.monotonic()
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def update(self, done: int, values: Mapping[str, float]) -> None:
        now_s = time.monotonic()
        if self._live is not None:
            self._live.update(self._render(done, values))
        elif now_s - self._reported_s >= REPORT_EVERY_S or done == self._total:
            self._reported_s = now_s
            self._console.print(self.line(done, values), highlight=False, markup=False, soft_wrap=True)

    def line(self, done: int, values: Mapping[str, float]) -> str:
        """Example: `sft: 12/300 sft/loss 1.234, 0.51 s/step, 2:27 left`"""
        shown = f"{self._headline} {values.get(self._headline, math.nan):.4g}"
        step_s = (time.monotonic() - self._started_s) / max(1, done - self._start)
        left_s = round(step_s * (self._total - done))
        left = (
            f"{left_s // 3600}:{left_s // 60 % 60:02}:{left_s % 60:02}"
            if left_s >= 3600
            else f"{left_s // 60}:{left_s % 60:02}"
        )
        return f"{self._what}: {done}/{self._total} {shown}, {step_s:.2f} s/step, {left} left"

    def _render(self, done: int, values: Mapping[str, float]) -> console.Group:
        groups: dict[str, list[str]] = {}
        for name, value in sorted(values.items()):
            group, _, rest = name.partition("/")
            groups.setdefault(group, []).append(f"{rest} {value:.4g}")
        grid = table.Table(box=None, pad_edge=False)
        for group in groups:
            grid.add_column(group)
        for row in range(min(ROWS, max(map(len, groups.values()), default=0))):
            grid.add_row(*(text.Text(cells[row] if row < len(cells) else "") for cells in groups.values()))
        return console.Group(text.Text(self.line(done, values)), grid)

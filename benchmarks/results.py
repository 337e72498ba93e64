"""The result of a benchmark: a row that says what was measured, against what, what it should reach and whether it does.

Every script of `make bench` takes `--quick` (tiny sizes: it runs, outputs are equal; no ratio is judged) and
`--json FILE`, prints its table, and exits with 3 where a row does not hold. `run.py` reads the files.

    parser = results.make_parser(__doc__)
    args = parser.parse_args()
    rows = [results.compare("prefill", "transformers", ours=1.2, theirs=2.0, unit="s", most=0.8, judged=not args.quick)]
    return results.finish(rows, args)
"""

import argparse
import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """`ratio` is ours / theirs in the unit given; `holds` is None where nothing is claimed or nothing was judged."""

    work: str
    against: str
    ours: float
    theirs: float | None
    unit: str
    ratio: float | None
    reach: str
    holds: bool | None
    compile_s: float | None = None
    note: str = ""


def compare(
    work: str,
    against: str,
    *,
    ours: float,
    theirs: float | None,
    unit: str,
    most: float | None = None,
    least: float | None = None,
    judged: bool = True,
    compile_s: float | None = None,
    note: str = "",
) -> Row:
    """A row whose ours / theirs should be at most `most`, or at least `least`; without `judged` nobody looks.

    Without `theirs` the bound is one of `ours` itself, in its unit.
    """
    ours, theirs = float(ours), None if theirs is None else float(theirs)  # JSON knows no numbers of numpy
    ratio = None if theirs is None else ours / theirs
    value = ours if ratio is None else ratio
    bound = "".join(f"at {word} {at:g}" for word, at in (("most", most), ("least", least)) if at is not None)
    holds = (most is None or value <= most) and (least is None or value >= least) if bound and judged else None
    return Row(
        work=work,
        against=against,
        ours=ours,
        theirs=theirs,
        unit=unit,
        ratio=ratio,
        reach=bound,
        holds=holds,
        compile_s=compile_s,
        note=note,
    )


def make_parser(doc: str | None) -> argparse.ArgumentParser:
    """The arguments that every benchmark of `make bench` takes; `doc` is the script's docstring."""
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it works; no ratio is judged")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the rows there as well")
    return parser


def finish(rows: Sequence[Row], args: argparse.Namespace) -> int:
    """Print the table, write the file that was asked for; the exit code: 3 where a row does not hold."""
    print(table(rows), flush=True)
    if args.json is not None:
        args.json.write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=1) + "\n")
    return exit_code(rows)


def exit_code(rows: Sequence[Row]) -> int:
    return 3 if any(row.holds is False for row in rows) else 0


def load(path: pathlib.Path) -> list[Row]:
    """What `finish` wrote."""
    return [Row(**values) for values in json.loads(path.read_text())]


HEAD = ("work", "against", "ours", "theirs", "unit", "ours / theirs", "reach", "holds", "compilation s", "note")
VERDICT = {None: "", True: "yes", False: "**no**"}


def table(rows: Sequence[Row], columns: Sequence[str] = (), extra: Sequence[Sequence[str]] = ()) -> str:
    """The rows as a Markdown table that reads as plain text too; `columns` and `extra` (a line for each row) follow."""
    lines = [[*HEAD, *columns]]
    for number, row in enumerate(rows):
        cells = [_cell(getattr(row, field.name)) for field in dataclasses.fields(row)]
        lines.append([*cells, *(extra[number] if columns else ())])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


def _cell(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return VERDICT[value]
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return str(value)

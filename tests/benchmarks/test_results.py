"""Rows of `make bench`: what holds, the exit code, and the way through a file."""

import sys

import pytest

import standalone

results = standalone.load("benchmarks/results.py")

CASES = {  # name: (ours, theirs, bounds, ratio, holds), worked out by hand
    "below": (3.0, 4.0, {"most": 0.8}, 0.75, True),
    "on the bound": (4.0, 5.0, {"most": 0.8}, 0.8, True),
    "above": (9.0, 10.0, {"most": 0.8}, 0.9, False),
    "four times": (400.0, 100.0, {"least": 4}, 4.0, True),
    "less": (390.0, 100.0, {"least": 4}, 3.9, False),
    "alone": (1.4, None, {"most": 1.5}, None, True),
    "no claim": (2.0, 1.0, {}, 2.0, None),
}


def make_row(name: str, **more) -> results.Row:
    ours, theirs, bounds, _, _ = CASES[name]
    return results.compare(name, "theirs", ours=ours, theirs=theirs, unit="s", **bounds, **more)


@pytest.mark.parametrize("name", CASES)
def test_compare(name):
    *_, ratio, holds = CASES[name]
    row = make_row(name)
    assert (row.ratio, row.holds) == (ratio, holds)
    assert make_row(name, judged=False).holds is None


@pytest.mark.parametrize(("names", "code"), [(["below", "no claim"], 0), (["below", "above"], 3)])
def test_finish(names, code, tmp_path, capsys):
    rows = [make_row(name) for name in names]
    args = results.make_parser("What it does.\n\nMore.").parse_args(["--json", str(tmp_path / "rows.json")])
    assert results.finish(rows, args) == code
    assert results.load(tmp_path / "rows.json") == rows
    head, line, *body = capsys.readouterr().out.splitlines()
    assert head.startswith("| work") and set(line) == set("| -") and len(body) == len(rows)
    assert ("**no**" in body[-1]) == (code == 3)


def test_one_benchmark_again_keeps_the_rows_of_the_others(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "results", results)
    run = standalone.load("benchmarks/run.py")
    here, out = {"machine": "two cores", "versions": {"jax": "1"}}, tmp_path / "RESULTS.md"
    runs = {"rewards": {"date": "1 May 2026", "command": "python rewards.py", "rows": [make_row("above")]}}
    run.write(out, here | {"runs": runs})
    assert "two cores" in out.read_text() and "| 1 May 2026 | python rewards.py |" in out.read_text()
    assert run.kept_runs(out, here) == runs
    assert run.kept_runs(out, here | {"machine": "four cores"}) == {}
    assert run.kept_runs(tmp_path / "none.md", here) == {}

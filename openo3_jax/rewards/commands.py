"""What the reward verbs of the command line do: plain arguments in, the text to print out."""

import dataclasses
import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple, SupportsFloat

import numpy as np

from openo3_jax import tasks
from openo3_jax.config import AdvantageConfig
from openo3_jax.errors import InputError
from openo3_jax.rewards import explain as explanations
from openo3_jax.rewards import own, parse, rubric, score, statistics
from openo3_jax.rewards import redteam as attacks
from openo3_jax.rewards.rules import PRESETS, TERMS, change_rules, get_rules
from openo3_jax.rewards.score import Rewards
from openo3_jax.rewards.truth import SizeFinder

_SHORT_TASKS = dict(zip(tasks.TASKS, ("spatial", "visual", "temporal", "t-mcq", "mcq", "free"), strict=True))
_FEWEST_FOR_DRIFT = 20  # rows on either side; fewer say nothing
_MOST_ROWS = 60  # printed one by one; more are summed up by task


class Lines(NamedTuple):
    """A file of records with completions, one JSON object per line."""

    records: list[dict]
    completions: list[str]
    progress: list[float]
    groups: list[str | None]
    numbers: list[int]  # of the lines in the file, from 1


def score_file(
    path: str,
    *,
    rules: str = "paper",
    explain: bool = False,
    what_if: Sequence[str] = (),
    json_out: str | None = None,
    sizes: SizeFinder | None = None,
) -> str:
    """Score the completions of a JSONL file, term by term; the text is a table.

    A line is a record with `completion`, and perhaps `group` (rows that answer one prompt) and `step_percent`.
    `explain` adds the reasons, `what_if` (`FIELD=VALUE`) a second scoring under changed rules, `json_out` a file
    with everything.
    Raises: InputError for a line or a rule that cannot be used.
    """
    lines = read_lines(path)
    base = get_rules(rules)
    wanted = change_rules(base, what_if)
    try:
        parsed = parse.parse(lines.records, lines.completions, lines.progress, sizes)
    except InputError as error:
        raise InputError(_name_line(path, str(error), lines.numbers)) from error
    rewards = score.score_parsed(parsed, base)
    advantage = group_advantages(rewards.total, lines.groups)
    reasons = explanations.explain(parsed, lines.completions, base) if explain else None
    found = statistics.evidence_statistics(parsed)
    warnings = statistics.alarms(found) + _drift(parsed, lines.progress)
    result: dict[str, Any] = {
        "rules": dataclasses.asdict(base),
        "rows": [_row_json(i, lines, rewards, advantage, reasons) for i in range(len(lines.records))],
        "statistics": {name: _finite(value) for name, value in dataclasses.asdict(found).items()},
        "alarms": warnings,
    }
    text = [_score_table(lines, rewards, advantage, reasons), "", _statistics_table(found, warnings)]
    if what_if:
        changed = score.score_parsed(parsed, wanted)
        shifts = _compare(lines, rewards, changed)
        result["what_if"] = {"changes": list(what_if), "groups": shifts}
        text += ["", f"What if {', '.join(what_if)}", _what_if_table(shifts)]
    if json_out is not None:
        pathlib.Path(json_out).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        text += ["", f"written: {json_out}"]
    return "\n".join(text)


def redteam(*, rules: Sequence[str] = tuple(PRESETS), reward: str | None = None, json_out: str | None = None) -> str:
    """The shipped adversarial answers beside honest ones, under rule sets and a reward of one's own.

    `reward`: `module:function`, see `own.make_reward`. A positive number says that the exploit earns
    that much more than the honest answer. `closed by`: single options that end it, on top of the first rules it
    beats.
    Raises: InputError for unknown rules or a reward that cannot be used.
    """
    user = None if reward is None else own.load(reward)
    findings = attacks.attack({name: get_rules(name) for name in rules}, user)
    names = list(findings[0].gain)
    rows = [
        [
            finding.exploit.name,
            *(f"{finding.gain[name]:+.3f}{' !' if attacks.pays(finding.gain[name]) else '  '}" for name in names),
            ", ".join(finding.closed_by) or "-",
        ]
        for finding in findings
    ]
    paying = {name: sum(attacks.pays(finding.gain[name]) for finding in findings) for name in names}
    text = [
        "Gain of an adversarial answer over an honest one ('!' pays)",
        table(["exploit", *names, "closed by"], rows),
        "; ".join(f"{name}: {number} of {len(findings)} pay" for name, number in paying.items()),
    ]
    if json_out is not None:
        found = [
            {
                "exploit": finding.exploit.name,
                "gain": finding.gain,
                "closed_by": finding.closed_by,
                "honest": finding.exploit.honest,
                "adversarial": finding.exploit.adversarial,
            }
            for finding in findings
        ]
        pathlib.Path(json_out).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        text.append(f"written: {json_out}")
    return "\n".join(text)


def read_lines(path: str) -> Lines:
    """Read a JSONL file of records with completions. Raises: InputError with file and line number."""
    try:
        text = pathlib.Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); expected a JSONL file") from error
    lines = Lines([], [], [], [], [])
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}:{number}: not JSON ({error}); expected one record per line") from error
        if not isinstance(record, dict) or not isinstance(record.get("completion"), str):
            raise InputError(f"{path}:{number}: no 'completion' string; a line is a record with the model's text")
        share = record.get("step_percent", 1.0)
        if not isinstance(share, int | float) or isinstance(share, bool):
            raise InputError(f"{path}:{number}: step_percent={share!r}; expected a number in [0, 1]")
        group = record.get("group")
        lines.records.append(record)
        lines.completions.append(record["completion"])
        lines.progress.append(float(share))
        lines.groups.append(None if group is None else str(group))
        lines.numbers.append(number)
    if not lines.records:
        raise InputError(f"{path}: holds no record; expected one JSON object per line")
    return lines


def _name_line(path: str, message: str, numbers: Sequence[int]) -> str:
    """`record 2: ..` -> `file:4: ..`, where empty lines stand between."""
    where, colon, rest = message.partition(": ")
    word, _, index = where.partition(" ")
    if word == "record" and colon and index.isdecimal():
        return f"{path}:{numbers[int(index)]}: {rest}"
    return f"{path}: {message}"


def group_advantages(
    total: np.ndarray, groups: Sequence[str | None], config: AdvantageConfig | None = None
) -> np.ndarray:
    """Advantage of each row within its group; nan for rows without one. Groups may differ in size."""
    members: dict[str, list[int]] = {}
    for place, group in enumerate(groups):
        if group is not None:
            members.setdefault(group, []).append(place)
    advantage = np.full(len(groups), np.nan, np.float32)
    for size in sorted({len(places) for places in members.values()}):
        places = np.array([places for places in members.values() if len(places) == size])
        advantage[places] = rubric.advantages(total[places], config or AdvantageConfig()).advantage
    return advantage


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def _score_table(lines: Lines, rewards: Rewards, advantage: np.ndarray, reasons: list[list[str]] | None) -> str:
    header = ["line", "task", *TERMS, "total", "advantage"]
    if len(lines.records) > _MOST_ROWS and reasons is None:
        return table(["task", "rows", *TERMS, "total"], _task_means(lines, rewards))
    rows = [
        [
            str(lines.numbers[i]),
            _SHORT_TASKS[record["task"]],
            *(_number(rewards.terms[term][i]) if rewards.applies[term][i] else "-" for term in TERMS),
            _number(rewards.total[i]),
            _number(advantage[i]),
        ]
        for i, record in enumerate(lines.records)
    ]
    text = table(header, rows)
    if reasons is None:
        return text
    detail = [f"line {lines.numbers[i]}\n" + "\n".join(f"  {line}" for line in row) for i, row in enumerate(reasons)]
    return "\n\n".join([text, *detail])


def _task_means(lines: Lines, rewards: Rewards) -> list[list[str]]:
    rows = []
    for task in tasks.TASKS:
        of_task = np.array([record["task"] == task for record in lines.records])
        if not of_task.any():
            continue
        cells = []
        for term in TERMS:
            counted = of_task & rewards.applies[term]
            cells.append(_number(rewards.terms[term][counted].mean()) if counted.any() else "-")
        rows.append([_SHORT_TASKS[task], str(of_task.sum()), *cells, _number(rewards.total[of_task].mean())])
    return rows


def _statistics_table(found: statistics.EvidenceStatistics, warnings: Sequence[str]) -> str:
    rows = [[name.replace("_", " "), _number(value)] for name, value in dataclasses.asdict(found).items()]
    return "\n".join([table(["evidence", "mean"], rows), *(f"alarm: {warning}" for warning in warnings)])


def _drift(parsed: parse.Parsed, progress: Sequence[float]) -> list[str]:
    """Alarms between the first and the last third of training, where the rows come from both."""
    early = [i for i, share in enumerate(progress) if share < 1 / 3]
    late = [i for i, share in enumerate(progress) if share >= 2 / 3]
    if min(len(early), len(late)) < _FEWEST_FOR_DRIFT:
        return []
    first, last = (statistics.evidence_statistics(parsed, places) for places in (early, late))
    return [f"drift: {line}" for line in statistics.drift_alarms(first, last)]


def _compare(lines: Lines, before: Rewards, after: Rewards) -> list[dict[str, Any]]:
    """Per group (rows without one form a group of their own): how totals, advantages and the best row changed."""
    old_advantage = group_advantages(before.total, lines.groups)
    new_advantage = group_advantages(after.total, lines.groups)
    members: dict[str | None, list[int]] = {}
    for place, group in enumerate(lines.groups):
        members.setdefault(group, []).append(place)
    shifts = []
    for group, of_group in members.items():
        places = np.array(of_group)
        moved = np.abs(new_advantage[places] - old_advantage[places])
        shifts.append(
            {
                "group": group,
                "rows": len(places),
                "total_before": float(before.total[places].mean()),
                "total_after": float(after.total[places].mean()),
                "rows_changed": int((before.total[places] != after.total[places]).sum()),
                "largest_advantage_change": _finite(moved.max()),
                "best_line_before": lines.numbers[places[before.total[places].argmax()]],
                "best_line_after": lines.numbers[places[after.total[places].argmax()]],
            }
        )
    return shifts


def _what_if_table(shifts: Sequence[dict[str, Any]]) -> str:
    header = ["group", "rows", "changed", "total", "then", "advantage by", "best line", "then"]
    rows = [
        [
            shift["group"] or "(none)",
            str(shift["rows"]),
            str(shift["rows_changed"]),
            _number(shift["total_before"]),
            _number(shift["total_after"]),
            _number(shift["largest_advantage_change"]),
            str(shift["best_line_before"]),
            str(shift["best_line_after"]),
        ]
        for shift in shifts
    ]
    return table(header, rows)


def _row_json(
    place: int, lines: Lines, rewards: Rewards, advantage: np.ndarray, reasons: list[list[str]] | None
) -> dict[str, Any]:
    row = {
        "line": lines.numbers[place],
        "group": lines.groups[place],
        "task": lines.records[place]["task"],
        "terms": {term: float(rewards.terms[term][place]) for term in TERMS},
        "applies": {term: bool(rewards.applies[term][place]) for term in TERMS},
        "total": float(rewards.total[place]),
        "advantage": _finite(advantage[place]),
    }
    return row if reasons is None else row | {"explain": reasons[place]}


def _number(value: SupportsFloat | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{float(value):.3f}"


def _finite(value: SupportsFloat) -> float | None:
    return float(value) if math.isfinite(value) else None

"""A run -> one page: its course, what looks wrong, before and after, answers with evidence, its settings."""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from openo3_jax import tasks
from openo3_jax.errors import InputError
from openo3_jax.evals import benchmarks, scores, store
from openo3_jax.report import curves, embed, evidence, pages, run_files, signatures
from openo3_jax.report.curves import Series
from openo3_jax.rewards import parse

MOST_SAMPLES = 12
# Small enough that a dozen fit on a page.
SAMPLE_LIMITS = embed.Limits(max_bytes=2 * 2**20, max_pixels=400 * 300, fps=8.0, max_frames=240)

# Title, what it shows, names or beginnings of names ("reward/format/") of its lines, where to look.
_CHARTS: Sequence[tuple[str, tuple[str, ...], str]] = (
    (
        "loss",
        ("sft/loss", "gspo/loss"),
        "SFT's falls; that of GSPO stays near zero and says little: look at the reward",
    ),
    ("reward", ("reward/total", "reward/total/"), "mean over answers; its slope is what stage two is for"),
    ("ans_acc", ("reward/ans_acc/",), "the answer itself; falls when general ability is forgotten"),
    ("ans_tiou", ("reward/ans_tiou/",), "the answer's span"),
    ("ans_viou", ("reward/ans_viou/",), "the answer's box"),
    ("thk_temporal_point", ("reward/thk_temporal_point/",), "cited times near key frames; sags while sigma narrows"),
    ("thk_temporal_segment", ("reward/thk_temporal_segment/",), "cited times inside the true span"),
    ("thk_spatial", ("reward/thk_spatial/",), "boxes of claims whose time passes the gate"),
    ("format", ("reward/format/",), "tags; should reach 1 early"),
    ("spread within a group", ("reward/group_std",), "near zero: nothing to learn from"),
    ("length in tokens", ("gspo/length",), "rising without reward: repetition"),
    ("cut by the limit", ("gspo/cut",), "share of answers"),
    ("KL to the reference", ("gspo/kl",), "nats per token"),
    ("clip fraction", ("gspo/clip_fraction",), "share of tokens; 0 at the first update of a rollout"),
    ("ratio", ("gspo/ratio",), "of new to old policy"),
    ("entropy", ("gspo/entropy",), "nats per token; a fall to zero ends exploration"),
    ("groups without a difference", ("gspo/all_wrong", "gspo/all_right", "gspo/all_equal"), "shares"),
    ("sampler against trainer", ("gspo/logp_gap_mean", "gspo/logp_gap_max"), "nats; far from 0: not one model"),
    ("gradient norm", ("sft/grad_norm", "gspo/grad_norm"), "before clipping"),
    ("learning rate", ("sft/learning_rate", "gspo/learning_rate"), ""),
    ("evaluations", ("eval/",), "as the run measured them"),
    ("seconds per step", ("time/total_s",), "the first step compiles"),
)


class Report(NamedTuple):
    page: str
    findings: list[signatures.Finding]


def make_report(
    directory: Path, *, root: Path | None = None, before: Path | None = None, after: Path | None = None
) -> Report:
    """The page of a run, finished or not; media of its samples come from the data root.

    `before`, `after`: directories of two evaluations, compared pair by pair.
    Raises: InputError where there is no run, or evaluations that cannot be compared.
    """
    run = run_files.load(directory)
    if root is not None and not root.is_dir():
        raise InputError(f"{root}: no such directory; expected the data root of the run")
    compared = _compare(before, after)
    findings = signatures.find(run.metrics, _last_answers(run), run.stage)
    answers, notes = _answers(run, root)
    page = (
        evidence.environment()
        .get_template("run_report.jinja")
        .render(
            title=f"Run {directory.resolve().name}",
            run=run,
            state=_state(run),
            findings=findings,
            charts=_charts(run.metrics),
            course=_course(run.metrics),
            compared=compared,
            samples=[evidence.view(answer, place) for place, answer in enumerate(answers)],
            sample_notes=notes,
            settings=list(flatten(run.config)),
        )
    )
    return Report(page, findings)


def _state(run: run_files.Run) -> str:
    """One line: how far the run came."""
    planned = run.config.get("steps")
    if not run.num_steps:
        return "no step has been recorded yet"
    saved = "a checkpoint is saved" if run.has_checkpoint else "nothing is saved yet"
    if isinstance(planned, int) and run.num_steps < planned:
        return f"unfinished or stopped early: {run.num_steps} of {planned} steps are recorded, {saved}"
    of = f" of {planned}" if isinstance(planned, int) else ""
    return f"{run.num_steps}{of} steps, {saved}"


# ---- metrics ----


def _charts(metrics: Mapping[str, Series]) -> list[dict[str, Any]]:
    """Those that the run has numbers for."""
    made = []
    for title, names, note in _CHARTS:
        lines, is_named = {}, False
        for name in metrics:
            start = next((n for n in names if name == n or (n.endswith("/") and name.startswith(n))), None)
            if start is not None:
                is_named |= start != name
                label = name.removeprefix(start).replace("_", " ") if start != name else name.rpartition("/")[2]
                lines[label] = metrics[name]
        lines = {label: series for label, series in lines.items() if any(map(math.isfinite, series.values))}
        if lines:
            colors = _colors(list(lines))
            key = sorted((color, label) for label, color in colors.items()) if is_named or len(lines) > 1 else []
            lost = sum(not math.isfinite(v) for series in lines.values() for v in series.values)
            drawn = curves.chart(title, lines, colors)
            made.append({"title": title, "note": note, "svg": drawn, "key": key, "lost": lost})
    return made


def _colors(labels: Sequence[str]) -> dict[str, int]:
    """A task has one color on every chart; other lines take the ones that are left."""
    fixed = {label: tasks.TASKS.index(label) for label in labels if label in tasks.TASKS}
    free = [color for color in reversed(range(curves.NUM_COLORS)) if color not in fixed.values()]
    others = [label for label in labels if label not in fixed]
    return fixed | {label: free[i % len(free)] for i, label in enumerate(others)}


def _course(metrics: Mapping[str, Series]) -> list[tuple[str, int, list[float]]]:
    """Every metric: how many values, and first fifth, last fifth, least and greatest; nan where there is none."""
    rows = []
    for name in sorted(metrics):
        values = [value for value in metrics[name].values if math.isfinite(value)]
        if values:
            part = max(len(values) // signatures.SHARE, 1)
            first, last = values[:part], values[-part:]
            rows.append((name, len(values), [sum(first) / part, sum(last) / part, min(values), max(values)]))
    return rows


# ---- evaluations ----


def _compare(before: Path | None, after: Path | None) -> dict[str, Any] | None:
    """Each measure of two evaluations and their paired difference."""
    if before is None and after is None:
        return None
    if before is None or after is None:
        raise InputError("report: got one of --before and --after; expected both, or none")
    names = [str(store.read_json(place / store.SETTINGS).get("benchmark")) for place in (before, after)]
    if names[0] != names[1]:
        raise InputError(f"report: {before} is of {names[0]}, {after} of {names[1]}; expected one benchmark")
    measures = benchmarks.of(names[0]).measures
    old, new = scores.load(before), scores.load(after)
    gains, notes = scores.differences(old, new, measures)
    rows = [
        (m.name, scores.value_of(old, m), scores.value_of(new, m), gains[m.name]) for m in measures if m.name in gains
    ]
    return {"benchmark": names[0], "before": str(before), "after": str(after), "rows": rows, "notes": notes}


# ---- samples ----


def _last_answers(run: run_files.Run) -> signatures.Samples:
    """The answers of the end, read against their records; else why not."""
    if run.gap:
        return signatures.Samples(None, run.gap)
    try:
        return signatures.Samples(parse.parse(run.late, [line["completion"] for line in run.late]))
    except InputError as error:
        return signatures.Samples(None, f"the samples cannot be read as records ({error})")


def choose(run: run_files.Run, most: int = MOST_SAMPLES) -> list[tuple[str, dict[str, Any]]]:
    """Where a sample stands and the sample: two thirds from the end, the rest from the beginning, tasks in turn.

    Of the end the best and the worst of each task by turns, of the beginning the best.
    """
    if not run.late:
        return []
    num_late = min(len(run.late), most - min(len(run.early), most // 3))
    late = _in_turn(run.late, num_late, with_worst=True)
    early = _in_turn(run.early, most - len(late), with_worst=False)
    return [*(("end", line) for line in late), *(("beginning", line) for line in early)]


def _in_turn(lines: Sequence[dict[str, Any]], most: int, *, with_worst: bool) -> list[dict[str, Any]]:
    by_task: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        by_task.setdefault(line["task"], []).append(line)
    for of_task in by_task.values():
        of_task.sort(key=_reward)
    chosen, takes_worst = [], False
    while len(chosen) < most and any(by_task.values()):
        for task in sorted(by_task):
            if by_task[task] and len(chosen) < most:
                chosen.append(by_task[task].pop(0 if takes_worst else -1))
        takes_worst = with_worst and not takes_worst
    return chosen


def _reward(line: Mapping[str, Any]) -> float:
    value = line.get("total")
    return float(value) if type(value) in (int, float) and math.isfinite(value) else 0.0


def _answers(run: run_files.Run, root: str | os.PathLike | None) -> tuple[list[evidence.Answer], list[str]]:
    """The chosen samples, scored under the run's rules; those that cannot be scored are left out and named."""
    rules = run.config.get("rules", "paper")
    chosen = choose(run)
    lines = [line for _, line in chosen]
    titles = [f"From the {where}, step {line.get('step', '?')}" for where, line in chosen]
    facts = [_facts(line) for line in lines]
    if not lines:
        return [], []
    try:
        settings = {"rules": rules, "root": root, "limits": SAMPLE_LIMITS}
        return pages.record_answers(lines, titles, facts=facts, **settings), []
    except InputError:  # one by one, to leave out those that it speaks of
        answers, notes = [], []
        for line, title, fact in zip(lines, titles, facts, strict=True):
            try:
                answers += pages.record_answers([line], [title], facts=[fact], **settings)
            except InputError as error:
                notes.append(f"{title}: left out, {error}")
        return answers, notes


def _facts(line: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What training noted beside an answer."""
    facts = [("reward in training", f"{_reward(line):.3f}")]
    if type(line.get("advantage")) in (int, float):
        facts.append(("advantage", f"{line['advantage']:+.2f}"))
    if line.get("finished") is False:
        facts.append(("cut by the limit", "yes"))
    return facts


# ---- settings ----


def flatten(settings: Mapping[str, Any], above: str = "") -> list[tuple[str, Any]]:
    """`{"video": {"fps": 2.0}}` -> `[("video.fps", 2.0)]`."""
    rows = []
    for name, value in settings.items():
        place = f"{above}.{name}" if above else str(name)
        rows += flatten(value, place) if isinstance(value, dict) else [(place, value)]
    return rows

"""The order of events of an evaluation: load, ask, judge, vote, score, write the table."""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from openo3_jax.config import SamplingConfig, VideoConfig
from openo3_jax.errors import InputError
from openo3_jax.evals import (
    benchmarks,
    items,
    judge,
    metrics,
    predict,
    published,
    relevance,
    scores,
    store,
    vstar,
    wording,
)
from openo3_jax.evals.config import EvalConfig

Answerers = Callable[[SamplingConfig], contextlib.AbstractContextManager[predict.Answerer]]


def sampling_of(config: EvalConfig, benchmark: benchmarks.Benchmark) -> SamplingConfig:
    """How tokens are drawn. Raises InputError for several samples of a benchmark without options."""
    if config.num_samples > 1 and not benchmark.votes:
        raise InputError(f"eval: {benchmark.name} has no options to vote on; expected num_samples=1")
    return SamplingConfig(
        num_samples=config.num_samples,
        temperature=config.temperature,
        max_new_tokens=config.max_new_tokens or benchmark.max_new_tokens,
    )


def video_of(config: EvalConfig, benchmark: benchmarks.Benchmark) -> VideoConfig:
    """The benchmark's frames, with what the flags say instead."""
    flags = {"max_frames": config.max_frames, "min_pixels": config.min_pixels, "max_pixels": config.max_pixels}
    given = {name: value for name, value in flags.items() if value is not None}
    video = benchmark.video
    if given.get("max_frames", video.max_frames) < video.min_frames:
        given["min_frames"] = given["max_frames"]
    return dataclasses.replace(video, **given)


def run(
    benchmark: benchmarks.Benchmark,
    *,
    data: Path,
    out: Path,
    answerers: Answerers,
    judged_by: judge.Judge,
    config: EvalConfig,
    words: wording.Wording,
    model: str = "",
) -> str:
    """Ask what is open, judge, score; returns the table. `out` may hold an earlier part of the same run.

    Writes settings.json, predictions.jsonl, judgements.jsonl, scores.jsonl, results.json and table.txt.
    Raises: InputError for data, settings or an `out` that cannot be used.
    """
    loaded = benchmark.load(data, words)
    asked = loaded.items[: config.limit]
    sampling = sampling_of(config, benchmark)
    with answerers(sampling) as answerer:
        store.open_run(out, {"benchmark": benchmark.name, "model": model, "seed": config.seed, **answerer.settings})
        with store.Predictions(out / store.PREDICTIONS) as predictions:
            calls = items.calls_of(asked)
            predict.predict(
                answerer, calls, predictions, seed=config.seed, batch_size=config.batch_size, what=benchmark.name
            )
            said = dict(predictions.known)
    weights = None
    if config.num_samples > 1 and config.vote != "majority":
        with answerers(SamplingConfig(temperature=0.0, max_new_tokens=relevance.MAX_REPLY_TOKENS)) as scorer:
            weights = relevance.weigh(scorer, asked, said, words, out, config)
    questions = {item.id: benchmark.questions(item, said) for item in asked}
    questions = {item: question for item, question in questions.items() if question is not None}
    verdicts = judge.judge_all(judged_by, questions, out / judge.JUDGEMENTS) if questions else {}
    context = benchmarks.Context(verdicts=verdicts, weights=weights, boxes_in=config.boxes)
    found = benchmark.score(asked, said, context)
    failed = [said[call.key] for call in calls if said[call.key].error is not None]
    notes = [*found.notes, *_notes(loaded.rejected, failed, judged_by.name if questions else None)]
    return write_report(benchmark, dataclasses.replace(found, notes=tuple(notes)), out, loaded.rejected, model)


def _notes(rejected: Sequence[str], failed: Sequence[items.Prediction], judge_name: str | None) -> list[str]:
    notes = [] if judge_name is None else [f"judge of the open answers: {judge_name}; right from 2 of 3"]
    if failed:
        notes.append(f"{len(failed)} calls could not be asked and are left out; the first: {failed[0].error}")
    if rejected:
        notes.append(f"{len(rejected)} items could not be used, see results.json; the first: {rejected[0]}")
    return notes


def write_report(
    benchmark: benchmarks.Benchmark, found: scores.Scores, out: Path, rejected: Sequence[str], model: str
) -> str:
    """Values with intervals, tables by group; into files, and as text."""
    values = {measure.name: scores.value_of(found, measure) for measure in benchmark.measures}
    groups = scores.by_group(found, benchmark.group_measures)
    results = {
        "benchmark": benchmark.name,
        "model": model,
        "commit": store.project_commit(),
        "items": len(found.ids),
        "values": {name: value._asdict() for name, value in values.items()},
        "groups": groups,
        "notes": list(found.notes),
        "rejected": list(rejected),
    }
    text = _render(benchmark, found, values, groups, model)
    if benchmark.name == "vstar":
        results["joint_counts"] = vstar.joint_counts(found)
        text += _render_joint(results["joint_counts"])
    scores.save(found, out / scores.SCORES)
    store.replace_text(out / scores.RESULTS, json.dumps(scores.without_nan(results), indent=2) + "\n")
    store.replace_text(out / scores.TABLE, text)
    return text


def _render(
    benchmark: benchmarks.Benchmark,
    found: scores.Scores,
    values: Mapping[str, metrics.Interval],
    groups: Mapping[str, Mapping[str, Mapping[str, float | int]]],
    model: str,
) -> str:
    beside = (published.OURS, published.BASE)
    rows = []
    for name, value in values.items():
        known = benchmark.published(name)
        paper = [scores.show(known.get(other)) for other in beside]
        rows.append([name, scores.show(value.value), scores.show_interval(value), str(value.n), *paper])
    title = f"{benchmark.name}: {model or 'model'}, {len(found.ids)} items, {store.project_commit()}"
    header = ["measure", "value", "95 % interval", "n", *(f"paper: {name}" for name in beside)]
    text = scores.render(title, header, rows, found.notes)
    for dimension, table in groups.items():
        names = [measure.name for measure in benchmark.group_measures]
        rows = []
        for group, row in table.items():
            known = benchmark.published(f"{dimension}: {group}")
            paper = [scores.show(known.get(other)) for other in beside]
            rows.append([group, str(row["n"]), *(scores.show(row[name]) for name in names), *paper])
        has_paper = any(cell != "-" for row in rows for cell in row[-2:])
        header = [dimension, "n", *names, *(f"paper: {name}" for name in beside)]
        rows, header = (rows, header) if has_paper else ([row[:-2] for row in rows], header[:-2])
        text += scores.render(f"\nby {dimension}", header, rows)
    return text


def _render_joint(counts: Mapping[str, int]) -> str:
    kinds = ("what_when", "what_where", "when_where", "what_when_where")
    rows = [[kind, *(str(counts[f"{kind}_{chain}"]) for chain in metrics.CHAINS)] for kind in kinds]
    return scores.render("\nright at once (items)", ["parts", "chain 1", "chain 2"], rows)


# ---- two runs ----


def compare(a: Path, b: Path) -> str:
    """b - a for every measure of their benchmark, paired over the items that both have.

    Raises: InputError where one is no finished evaluation, or the benchmarks differ.
    """
    names = [store.read_json(run / store.SETTINGS).get("benchmark") for run in (a, b)]
    if names[0] != names[1]:
        raise InputError(f"compare: {a} is of {names[0]}, {b} of {names[1]}; expected one benchmark")
    found, notes = scores.differences(scores.load(a), scores.load(b), benchmarks.of(names[0]).measures)
    rows = [
        [name, f"{value.value:+.1f}", scores.show_interval(value), str(value.n), _verdict(value)]
        for name, value in found.items()
    ]
    title = f"{names[0]}: {b} minus {a}"
    return scores.render(title, ["measure", "difference", "95 % interval", "n", "differs"], rows, notes)


def _verdict(value: metrics.Interval) -> str:
    return "yes" if value.low > 0 or value.high < 0 else "no"

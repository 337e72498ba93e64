"""The order of events of an evaluation: load, ask, judge, vote, score, write the table."""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from openo3_jax.config import SamplingConfig, VideoConfig
from openo3_jax.errors import InputError
from openo3_jax.evals import (
    benchmarks,
    faithfulness,
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

PAPER = (published.OURS, published.BASE)  # whose numbers stand beside ours
Answerers = Callable[[SamplingConfig], contextlib.AbstractContextManager[predict.Answerer]]


def sampling_of(config: EvalConfig, benchmark: benchmarks.Benchmark) -> SamplingConfig:
    """How tokens are drawn. Raises InputError for votes and hidden evidence where there are no options."""
    if config.evidence and not benchmark.votes:
        raise InputError(f"eval: {benchmark.name} has no options; --evidence compares the options that are chosen")
    if config.num_samples > 1 and not benchmark.votes:
        raise InputError(f"eval: {benchmark.name} has no options to vote on; expected num_samples=1")
    most, penalty = config.max_new_tokens, config.repetition_penalty
    return SamplingConfig(
        num_samples=config.num_samples,
        temperature=config.temperature,
        max_new_tokens=benchmark.max_new_tokens if most is None else most,
        repetition_penalty=benchmark.repetition_penalty if penalty is None else penalty,
    )


def video_of(config: EvalConfig, benchmark: benchmarks.Benchmark) -> VideoConfig:
    """The benchmark's frames, with what the flags say instead; a smaller upper limit takes the lower one with it.

    Raises: InputError as `VideoConfig` does.
    """
    flags = {"max_frames": config.max_frames, "min_pixels": config.min_pixels, "max_pixels": config.max_pixels}
    given = {name: value for name, value in flags.items() if value is not None}
    for lower, upper in (("min_frames", "max_frames"), ("min_pixels", "max_pixels")):
        if upper in given:
            given.setdefault(lower, min(getattr(benchmark.video, lower), given[upper]))
    return dataclasses.replace(benchmark.video, **given)


def run(
    benchmark: benchmarks.Benchmark,
    *,
    data: Path,
    out: Path,
    answerers: Answerers,
    judged_by: judge.Judge,
    config: EvalConfig,
    words: wording.Wording,
    reply_scorer: Callable[[], contextlib.AbstractContextManager[predict.Answerer]] | None = None,
    model: str = "",
) -> str:
    """Ask what is open, judge, score; returns the table. `out` may hold an earlier part of the same run.

    Writes settings.json, predictions.jsonl, judgements.jsonl, scores.jsonl, results.json and table.txt.
    `reply_scorer`: who scores given replies, for `config.evidence`.
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
            said = {call.key: predictions.known[call.key] for call in calls}
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
    judged = judge.notes_of(judged_by.name, verdicts) if questions else []
    notes = [*found.notes, *judged, *_notes(loaded.rejected, failed)]
    text = write_report(benchmark, dataclasses.replace(found, notes=tuple(notes)), out, loaded.rejected, model)
    if config.evidence:
        with answerers(sampling) as answerer, reply_scorer() as scorer:
            text += faithfulness.run(asked, said, answerer, scorer, out, config)
    return text


def _notes(rejected: Sequence[str], failed: Sequence[items.Prediction]) -> list[str]:
    notes = []
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
    store.replace_json(out / scores.RESULTS, scores.without_nan(results))
    store.replace_text(out / scores.TABLE, text)
    return text


def _render(
    benchmark: benchmarks.Benchmark,
    found: scores.Scores,
    values: Mapping[str, metrics.Interval],
    groups: Mapping[str, Mapping[str, Mapping[str, float | int]]],
    model: str,
) -> str:
    rows = [
        [name, scores.show(value.value), scores.show_interval(value), str(value.n), *_paper(benchmark, name)]
        for name, value in values.items()
    ]
    title = f"{benchmark.name}: {model or 'model'}, {len(found.ids)} items, {store.project_commit()}"
    text = scores.render(title, *_beside(["measure", "value", "95 % interval", "n"], rows), found.notes)
    for dimension, table in groups.items():
        names = [measure.name for measure in benchmark.group_measures]
        rows = [
            [
                group,
                str(row["n"]),
                *(scores.show(row[name]) for name in names),
                *_paper(benchmark, f"{dimension}: {group}"),
            ]
            for group, row in table.items()
        ]
        text += scores.render(f"\nby {dimension}", *_beside([dimension, "n", *names], rows))
    return text


def _paper(benchmark: benchmarks.Benchmark, name: str) -> list[str]:
    """The paper's numbers for its model and for the model that it started from."""
    known = benchmark.published(name)
    return [scores.show(known.get(model)) for model in PAPER]


def _beside(header: list[str], rows: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    """Header and rows with the paper's columns, the last ones of each row, where they say something."""
    if any(cell != "-" for row in rows for cell in row[-len(PAPER) :]):
        return [*header, *(f"paper: {model}" for model in PAPER)], rows
    return header, [row[: -len(PAPER)] for row in rows]


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

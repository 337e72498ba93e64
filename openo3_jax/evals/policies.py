"""A policy in memory -> its scores on a benchmark: what the command line, training and the demo call."""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path

from openo3_jax.config import SamplingConfig
from openo3_jax.evals import benchmarks, evaluate, faithfulness, judge, predict, store, wording
from openo3_jax.evals import scores as scores_lib
from openo3_jax.evals.config import EvalConfig
from openo3_jax.policy import Policy
from openo3_jax.train import loop


def evaluate_policy(
    policy: Policy,
    benchmark: benchmarks.Benchmark,
    *,
    data: Path,
    out: Path,
    judged_by: judge.Judge,
    config: EvalConfig | None = None,
    words: wording.Wording | None = None,
    model: str = "",
) -> str:
    """The table of `evaluate.run` for this policy, which is shown clips as the benchmark and `config` say."""
    config = config or EvalConfig()
    shown = dataclasses.replace(
        policy,
        video=evaluate.video_of(config, benchmark),
        video_mode=config.video_mode or benchmark.video_mode,
    )

    @contextlib.contextmanager
    def answerers(sampling: SamplingConfig) -> Iterator[predict.Answerer]:
        with predict.PolicyAnswerer(shown, sampling, rows=config.batch_size) as answerer:
            yield answerer

    return evaluate.run(
        benchmark,
        data=data,
        out=out,
        answerers=answerers,
        judged_by=judged_by,
        config=config,
        words=words or wording.load_wording(),
        reply_scorer=lambda: faithfulness.ReplyScorer(shown, rows=config.batch_size),
        model=model,
    )


def make_evaluator(
    name: str, data: Path, out: Path, config: EvalConfig | None = None, *, every: int = 1, rule: str = "rouge"
) -> loop.Evaluator:
    """For a training loop: `eval/{name}/{measure}` after each `every` steps, without a judging model.

    Open answers are judged by words (`rule` "rouge" or "exact"). Each evaluation has a directory of its own,
    `out/{name}_{step}`. Measures that apply to no item are left out.
    """
    benchmark, judged_by = benchmarks.of(name), judge.WordJudge(rule)

    def evaluator(policy: Policy, step: int) -> dict[str, float]:
        if step % every:
            return {}
        directory = out / f"{name}_{step:06d}"
        evaluate_policy(policy, benchmark, data=data, out=directory, judged_by=judged_by, config=config)
        values = store.read_json(directory / scores_lib.RESULTS)["values"]
        return {f"eval/{name}/{m}": found["value"] for m, found in values.items() if found["value"] is not None}

    return evaluator

"""`openo3 eval`: directories and flags -> a table."""

from collections.abc import Mapping
from pathlib import Path

from openo3_jax import policy as policy_lib
from openo3_jax.errors import InputError
from openo3_jax.evals import benchmarks, evaluate, judge, policies, wording
from openo3_jax.evals.config import EvalConfig


def run(
    name: str,
    *,
    model: Path | None,
    data: Path | None,
    out: Path | None,
    judge_spec: str,
    judge_model: str | None,
    judge_key: str | None,
    prompts: Path | None,
    mesh: Mapping[str, int] | None,
    config: EvalConfig,
) -> str:
    """Evaluate `model` on the benchmark `name` with the files under `data`; returns the table.

    Raises: InputError for anything that is missing or cannot be used.
    """
    missing = [flag for flag, value in (("--model", model), ("--data", data), ("--out", out)) if value is None]
    if missing:
        raise InputError(f"eval {name}: {', '.join(missing)} missing; expected --model DIR --data ROOT --out DIR")
    benchmark = benchmarks.of(name)
    words = wording.load_wording(prompts)
    # Mistakes are told before the weights are read, which may take minutes.
    evaluate.sampling_of(config, benchmark)
    evaluate.video_of(config, benchmark)
    if not data.exists():
        raise InputError(f"{data}: no such data; expected the benchmark's directory, or a JSONL file")
    judged_by = judge.make_judge(judge_spec, model=judge_model, key_variable=judge_key)
    return policies.evaluate_policy(
        policy_lib.load_pretrained(model, mesh=mesh, dtype=config.dtype),
        benchmark,
        data=data,
        out=out,
        judged_by=judged_by,
        config=config,
        words=words,
        model=str(model),
    )

"""What the temporal reward's adaptive width and the spatial reward's gate are good for: the paper's ablation, small."""

import dataclasses
import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from openo3_jax import config_json, recipes
from openo3_jax import policy as policy_lib
from openo3_jax.config import GSPOConfig
from openo3_jax.demo import held_out, story
from openo3_jax.errors import InputError, Stopped
from openo3_jax.evals import sampled, store
from openo3_jax.experiments import Outcome
from openo3_jax.policy import Policy
from openo3_jax.rewards.rules import PAPER, RewardRules
from openo3_jax.train import gspo, metrics, run

TERMS = ("thk_temporal_point", "thk_spatial")  # what the figure shows, by the paper's rules at the end of training
ARMS: Mapping[str, RewardRules] = {
    "adaptive, gated (paper)": PAPER,
    "sigma 1 s": dataclasses.replace(PAPER, sigma_start_s=1.0, sigma_end_s=1.0),
    "sigma 4 s": dataclasses.replace(PAPER, sigma_start_s=4.0, sigma_end_s=4.0),
    "no gate": dataclasses.replace(PAPER, gate_s=float("inf")),
}
POINTS = 8  # of a curve, the start apart


class Curve(NamedTuple):
    """Of one run: after how many steps, and the mean of each of `TERMS` over held-out answers."""

    steps: list[int]
    values: Float[np.ndarray, "points 2"]


def ablation(*, start: Path, out: Path, steps: int = 40, seeds: int = 3, prompts: int = 96) -> Outcome:
    """Stage two from the demo in `start` under each of `ARMS`, `seeds` times each, all else alike.

    Writes a run for each into `out`, `out/ablation.json` and `out/ablation.png`: the two thinking rewards of sampled
    answers to at most `prompts` held-out questions, mean and standard deviation over seeds. Whatever is found is said;
    the claim is only that every run was made. Source: arXiv:2510.20579, section 4.3.
    Raises: as `compare` does.
    """
    every = max(1, steps // POINTS)
    found = compare(ARMS, start=start, out=out, steps=steps, seeds=seeds, prompts=prompts, measure_every=every)
    kept = {
        arm: {
            "rules": rule_changes(ARMS[arm]),
            "curves": [{"steps": curve.steps, "values": curve.values.tolist()} for curve in curves],
        }
        for arm, curves in found.items()
    }
    store.replace_json(out / "ablation.json", {"terms": TERMS, "arms": kept})
    _plot(found, out / "ablation.png")
    return Outcome(f"{_sentences(found)}\nfigure: {out / 'ablation.png'}", True)


def compare(
    arms: Mapping[str, RewardRules],
    *,
    start: Path,
    out: Path,
    steps: int,
    seeds: int,
    prompts: int,
    measure_every: int,  # steps
) -> dict[str, list[Curve]]:
    """The curves of each arm, one for each seed; runs of the same seed see the same questions in the same order.

    Answers are measured at the start, every `measure_every` steps and at the end. `out` gets a directory for each run
    and, once that is finished, a file with its curve. Called again it goes on where it was interrupted.
    Raises: InputError for numbers below 1, a `start` without a model after stage one, an `out` that holds something
    else or was begun with other settings, and too few `prompts` to measure by; Stopped after a signal, with the state
    saved.
    """
    for flag, value in (("steps", steps), ("seeds", seeds), ("prompts", prompts)):
        if value < 1:
            raise InputError(f"--{flag} {value}: expected at least 1")
    for needed in (start / "sft_model", start / "data", start / "held_out"):
        if not needed.is_dir():
            raise InputError(f"{needed}: no such directory; expected --start to be what `openo3 demo` has made")
    recipe = dataclasses.replace(recipes.demo_gspo(steps=steps), rules="paper")  # what the arms' rules are changes of
    store.open_run(out, _settings(arms, start, recipe, seeds, prompts))
    policy = policy_lib.load_pretrained(start / "sft_model", video=recipe.video)
    asked = held_out.load(start / "held_out", policy, recipe.video, story.PROMPTS)
    measure = _measure(held_out.Questions(asked.records[:prompts], asked.samples[:prompts]), recipe)
    first = _once(out / "start.json", lambda: {"step": 0, **measure(policy)})

    def evaluate(policy: Policy, done: int) -> dict[str, float]:
        return measure(policy) if done % measure_every == 0 or done == steps else {}

    def train(name: str, rules: RewardRules, seed: int) -> dict[str, Any]:
        try:
            gspo.run_gspo(
                model=start / "sft_model",
                data=start / "data",
                out=out / name,
                config=dataclasses.replace(recipe, seed=seed, rules=",".join(["paper", *rule_changes(rules)])),
                prompts_file=story.PROMPTS,
                resume=True,
                evaluate=evaluate,
            )
        except Stopped:
            raise Stopped(f"{out / name}: stopped, and what was learned is saved; the same command goes on") from None
        lines = [first, *metrics.read_lines(out / name / run.METRICS)]
        measured = [line for line in lines if _metric(TERMS[0]) in line]
        values = [[line[_metric(term)] for term in TERMS] for line in measured]
        return {"rules": rule_changes(rules), "steps": [line["step"] for line in measured], "values": values}

    found: dict[str, list[Curve]] = {arm: [] for arm in arms}
    for arm, rules in arms.items():
        for seed in range(seeds):
            name = _run_name(arm, seed)
            kept = _once(out / f"{name}.json", lambda name=name, rules=rules, seed=seed: train(name, rules, seed))
            found[arm].append(Curve(kept["steps"], np.array(kept["values"])))
    return found


def rule_changes(rules: RewardRules) -> list[str]:
    """What differs from the paper's rules, as `rules.change_rules` reads it: `["gate_s=inf"]`."""
    values = {field.name: getattr(rules, field.name) for field in dataclasses.fields(rules)}
    return [f"{name}={value}" for name, value in values.items() if value != getattr(PAPER, name)]


def _settings(
    arms: Mapping[str, RewardRules], start: Path, recipe: GSPOConfig, seeds: int, prompts: int
) -> dict[str, Any]:
    """All that the curves follow from."""
    weights = hashlib.sha256((start / "sft_model" / "model.safetensors").read_bytes()).hexdigest()
    settings = {"start": str(start.resolve()), "weights": weights, "steps": recipe.steps}
    settings |= {"seeds": seeds, "prompts": prompts}
    settings |= {f"arm {arm}": rule_changes(rules) for arm, rules in arms.items()}
    return settings | {f"gspo.{name}": value for name, value in config_json.to_json(recipe).items()}


def _once(file: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `file` keeps; made and written down, whole or not at all, if it is not there."""
    if not file.is_file():
        store.replace_json(file, make())
    return store.read_json(file)


def _run_name(arm: str, seed: int) -> str:
    """Example: `adaptive-gated-paper-seed0`."""
    return f"{re.sub(r'[^a-z0-9.]+', '-', arm.lower()).strip('-')}-seed{seed}"


def _metric(term: str) -> str:
    """Its name in the metrics of a run."""
    return f"eval/{term}"


def _measure(asked: held_out.Questions, recipe: GSPOConfig) -> Callable[[Policy], dict[str, float]]:
    """Mean of each of `TERMS` over sampled answers, by the paper's rules as they are at the end of training."""
    sampling = dataclasses.replace(recipe.sampling, num_samples=2)

    def measure(policy: Policy) -> dict[str, float]:
        found = sampled.sample_rewards(policy, asked.samples, asked.records, sampling, seed=held_out.SEED).rewards
        for term in TERMS:
            if not found.applies[term].any():
                raise InputError(f"--prompts {len(asked.records)}: {term} applies to no answer; expected more of them")
        return {_metric(term): float(found.terms[term][found.applies[term]].mean()) for term in TERMS}

    return measure


def _sentences(found: Mapping[str, Sequence[Curve]]) -> str:
    """What each arm ended with, and whether the paper's is ahead by more than the seeds scatter."""
    ends = {arm: np.stack([curve.values[-1] for curve in curves]) for arm, curves in found.items()}
    lines = [f"start: {_numbers(next(iter(found.values()))[0].values[0])}"]
    lines += [
        f"{arm}: {_numbers(values.mean(0))} (deviation {_numbers(values.std(0))})" for arm, values in ends.items()
    ]
    paper, *others = ends
    for column, term in enumerate(TERMS):
        best = max(others, key=lambda arm: ends[arm][:, column].mean())
        ahead = ends[paper][:, column].mean() - ends[best][:, column].mean()
        scatter = float(np.hypot(ends[paper][:, column].std(), ends[best][:, column].std()))
        verdict = _verdict(ahead, scatter, len(ends[paper]))
        lines.append(f"{term}: {paper} {ahead:+.3f} against the best other, {best}; {verdict}")
    return "\n".join(lines)


def _verdict(ahead: float, scatter: float, seeds: int) -> str:
    if seeds == 1:
        return "one seed does not tell how far seeds scatter"
    if abs(ahead) <= scatter:
        return f"the difference is within the scatter of seeds ({scatter:.3f})"
    return f"the paper's choice is {'ahead' if ahead > 0 else 'behind'} by more than seeds scatter ({scatter:.3f})"


def _numbers(values: Float[np.ndarray, " terms"]) -> str:
    return ", ".join(f"{term} {value:.3f}" for term, value in zip(TERMS, values, strict=True))


def _plot(found: Mapping[str, Sequence[Curve]], file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    for column, (axes, term) in enumerate(zip(figure.subplots(1, len(TERMS)), TERMS, strict=True)):
        for arm, curves in found.items():
            values = np.stack([curve.values[:, column] for curve in curves])
            mean, deviation = values.mean(0), values.std(0)
            (line,) = axes.plot(curves[0].steps, mean, label=arm)
            axes.fill_between(curves[0].steps, mean - deviation, mean + deviation, color=line.get_color(), alpha=0.15)
        axes.set(xlabel="step of stage two", ylabel=term, title="held out, by the paper's rules")
    axes.legend(fontsize="small")
    figure.savefig(file, dpi=120)

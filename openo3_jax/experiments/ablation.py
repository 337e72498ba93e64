"""What the temporal reward's adaptive width and the spatial reward's gate are good for: the paper's ablation, small."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from openo3_jax import policy as policy_lib
from openo3_jax import recipes
from openo3_jax.config import GSPOConfig
from openo3_jax.demo import held_out, story
from openo3_jax.errors import InputError
from openo3_jax.evals import sampled
from openo3_jax.experiments import Outcome
from openo3_jax.policy import Policy
from openo3_jax.rewards import score
from openo3_jax.rewards.rules import PAPER, RewardRules
from openo3_jax.train import gspo, run

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
    answers to `prompts` held-out questions, mean and standard deviation over seeds. Whatever is found is said; the
    claim is only that every run was made. Source: arXiv:2510.20579, section 4.3.
    Raises: InputError where `start` has no model after stage one.
    """
    found = compare(ARMS, start=start, out=out, steps=steps, seeds=seeds, prompts=prompts)
    kept = {arm: [{"steps": c.steps, "values": c.values.tolist()} for c in curves] for arm, curves in found.items()}
    (out / "ablation.json").write_text(json.dumps({"terms": TERMS, "arms": kept}, indent=1) + "\n")
    _plot(found, out / "ablation.png")
    return Outcome(f"{_sentences(found)}\nfigure: {out / 'ablation.png'}", True)


def compare(
    arms: Mapping[str, RewardRules], *, start: Path, out: Path, steps: int, seeds: int, prompts: int
) -> dict[str, list[Curve]]:
    """A run of stage two for each arm and seed; `out` is new. Every run sees the same questions in the same order."""
    model, data = start / "sft_model", start / "data"
    for needed in (model, data, start / "held_out"):
        if not needed.is_dir():
            raise InputError(f"{needed}: no such directory; expected --start to be what `openo3 demo` has made")
    run.check_new(out)
    out.mkdir(parents=True, exist_ok=True)
    recipe = recipes.demo_gspo(steps=steps)
    policy = policy_lib.load_pretrained(model, video=recipe.video)
    asked = held_out.load(start / "held_out", policy, recipe.video, story.PROMPTS)
    measure = _measure(held_out.Questions(asked.records[:prompts], asked.samples[:prompts]), recipe)
    at_start = measure(policy)
    found: dict[str, list[Curve]] = {}
    for number, (arm, rules) in enumerate(arms.items()):
        for seed in range(seeds):
            curve = [(0, at_start)]

            def evaluate(policy: Policy, done: int, curve=curve) -> dict[str, float]:
                if done % max(1, steps // POINTS) == 0 or done == steps:
                    curve.append((done, measure(policy)))
                return {}

            gspo.run_gspo(
                model=model,
                data=data,
                out=out / f"{number}_{seed}",
                config=dataclasses.replace(recipe, seed=seed),
                prompts_file=story.PROMPTS,
                reward=lambda records, texts, progress, rules=rules: score.score(
                    records, texts, progress=progress, rules=rules
                ),
                evaluate=evaluate,
            )
            found.setdefault(arm, []).append(Curve([at for at, _ in curve], np.array([value for _, value in curve])))
    return found


def _measure(asked: held_out.Questions, recipe: GSPOConfig) -> Callable[[Policy], list[float]]:
    """Mean of each of `TERMS` over sampled answers, by the paper's rules as they are at the end of training."""
    sampling = dataclasses.replace(recipe.sampling, num_samples=2)

    def measure(policy: Policy) -> list[float]:
        found = sampled.sample_rewards(policy, asked.samples, asked.records, sampling, seed=held_out.SEED).rewards
        return [float(found.terms[term][found.applies[term]].mean()) for term in TERMS]

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
        verdict = (
            "the difference is within the scatter of seeds"
            if abs(ahead) <= scatter
            else ("the paper's choice is ahead" if ahead > 0 else "the paper's choice is behind")
        )
        lines.append(f"{term}: {paper} {ahead:+.3f} against the best other, {best}; {verdict} ({scatter:.3f})")
    return "\n".join(lines)


def _numbers(values: Sequence[float]) -> str:
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

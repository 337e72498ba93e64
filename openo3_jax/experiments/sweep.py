"""How much the proximity's width and the gate matter: a heat map over sigma's start and end, and over the gate."""

import dataclasses
import itertools
from pathlib import Path

import numpy as np

from openo3_jax.evals import store
from openo3_jax.experiments import Outcome, ablation
from openo3_jax.rewards.rules import PAPER, RewardRules

SIGMAS_S = (0.5, 1.0, 2.0, 4.0)  # start and end
GATES_S = (0.5, 1.0, 3.0, float("inf"))


def sweep(*, start: Path, out: Path, steps: int = 20, seeds: int = 1, prompts: int = 48) -> Outcome:
    """Stage two from the demo in `start` for each pair of sigmas, start not below end, and for each gate.

    Writes a run for each distinct set of rules into `out`, `out/sweep.json` and `out/sweep.png`: the mean of the two
    thinking rewards of held-out answers at the end, by the paper's rules. The claim is only that every run was made.
    Raises: as `ablation.compare` does.
    """
    pairs = [(first, last) for first, last in itertools.product(SIGMAS_S, SIGMAS_S) if first >= last]
    widths = [dataclasses.replace(PAPER, sigma_start_s=first, sigma_end_s=last) for first, last in pairs]
    gates = [dataclasses.replace(PAPER, gate_s=gate) for gate in GATES_S]
    arms = {_name(rules): rules for rules in (*widths, *gates)}  # the paper's rules are among both
    found = ablation.compare(arms, start=start, out=out, steps=steps, seeds=seeds, prompts=prompts, measure_every=steps)
    at_start = float(found[_name(PAPER)][0].values[0].mean())
    ends = {arm: float(np.mean([curve.values[-1] for curve in curves])) for arm, curves in found.items()}
    kept = {arm: {"rules": ablation.rule_changes(rules), "value": ends[arm]} for arm, rules in arms.items()}
    store.replace_json(out / "sweep.json", {"terms": ablation.TERMS, "start": at_start, "arms": kept})
    grid = np.full((len(SIGMAS_S), len(SIGMAS_S)), np.nan)
    for (first, last), rules in zip(pairs, widths, strict=True):
        grid[SIGMAS_S.index(first), SIGMAS_S.index(last)] = ends[_name(rules)]
    _plot(grid, np.array([[ends[_name(rules)] for rules in gates]]), out / "sweep.png")
    lines = [f"{arm}: {value:.3f}" for arm, value in {"start": at_start, **ends}.items()]
    best = max(ends, key=ends.__getitem__)
    return Outcome("\n".join([*lines, f"best: {best}", f"figure: {out / 'sweep.png'}"]), True)


def _name(rules: RewardRules) -> str:
    """Equal for equal widths and gate."""
    return f"sigma {rules.sigma_start_s:g} to {rules.sigma_end_s:g} s, gate {rules.gate_s:g} s"


def _plot(grid: np.ndarray, gates: np.ndarray, file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    low, high = np.nanmin([np.nanmin(grid), gates.min()]), np.nanmax([np.nanmax(grid), gates.max()])
    for axes, values in ((left, grid), (right, gates)):
        image = axes.imshow(values, vmin=low, vmax=high, cmap="viridis")
        for (row, column), value in np.ndenumerate(values):
            if np.isfinite(value):
                color = "black" if value > (low + high) / 2 else "white"
                axes.text(column, row, f"{value:.3f}", ha="center", va="center", color=color)
    left.set(xlabel="sigma at the end, s", ylabel="sigma at the start, s", title="mean thinking reward, held out")
    left.set_xticks(range(len(SIGMAS_S)), [f"{value:g}" for value in SIGMAS_S])
    left.set_yticks(range(len(SIGMAS_S)), [f"{value:g}" for value in SIGMAS_S])
    right.set(xlabel="gate, s", title="sigma 4 to 1 s")
    right.set_xticks(range(len(GATES_S)), [f"{value:g}" for value in GATES_S])
    right.set_yticks([])
    figure.colorbar(image, ax=(left, right))
    figure.savefig(file, dpi=120)

"""How much the proximity's width and the gate matter: a heat map over sigma's start and end, and over the gate."""

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np

from openo3_jax.experiments import Outcome, ablation
from openo3_jax.rewards.rules import PAPER

SIGMAS_S = (0.5, 1.0, 2.0, 4.0)  # start and end
GATES_S = (0.5, 1.0, 3.0, float("inf"))


def sweep(*, start: Path, out: Path, steps: int = 20, seeds: int = 1, prompts: int = 48) -> Outcome:
    """Stage two from the demo in `start` for each pair of sigmas, start not below end, and for each gate.

    Writes `out/sweep.json` and `out/sweep.png`: the mean of the two thinking rewards of held-out answers, by the
    paper's rules. The claim is only that every run was made. Raises: InputError as `ablation.ablation` does.
    """
    pairs = [(first, last) for first, last in itertools.product(SIGMAS_S, SIGMAS_S) if first >= last]
    arms = {
        f"sigma {first:g} to {last:g} s": dataclasses.replace(PAPER, sigma_start_s=first, sigma_end_s=last)
        for first, last in pairs
    } | {f"gate {gate:g} s": dataclasses.replace(PAPER, gate_s=gate) for gate in GATES_S}
    found = ablation.compare(arms, start=start, out=out, steps=steps, seeds=seeds, prompts=prompts)
    ends = {arm: float(np.mean([curve.values[-1] for curve in curves])) for arm, curves in found.items()}
    (out / "sweep.json").write_text(json.dumps(ends, indent=1) + "\n")
    grid = np.full((len(SIGMAS_S), len(SIGMAS_S)), np.nan)
    for first, last in pairs:
        grid[SIGMAS_S.index(first), SIGMAS_S.index(last)] = ends[f"sigma {first:g} to {last:g} s"]
    gates = np.array([[ends[f"gate {gate:g} s"] for gate in GATES_S]])
    _plot(grid, gates, out / "sweep.png")
    best = max(ends, key=ends.__getitem__)
    lines = [f"{arm}: {value:.3f}" for arm, value in ends.items()]
    return Outcome("\n".join([*lines, f"best: {best}", f"figure: {out / 'sweep.png'}"]), True)


def _plot(grid: np.ndarray, gates: np.ndarray, file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    low, high = np.nanmin([np.nanmin(grid), gates.min()]), np.nanmax([np.nanmax(grid), gates.max()])
    for axes, values in ((left, grid), (right, gates)):
        image = axes.imshow(values, vmin=low, vmax=high, cmap="viridis")
        for (row, column), value in np.ndenumerate(values):
            if np.isfinite(value):
                axes.text(column, row, f"{value:.3f}", ha="center", va="center", color="white")
    left.set(xlabel="sigma at the end, s", ylabel="sigma at the start, s", title="mean thinking reward, held out")
    left.set_xticks(range(len(SIGMAS_S)), [f"{value:g}" for value in SIGMAS_S])
    left.set_yticks(range(len(SIGMAS_S)), [f"{value:g}" for value in SIGMAS_S])
    right.set(xlabel="gate, s", title="sigma 4 to 1 s")
    right.set_xticks(range(len(GATES_S)), [f"{value:g}" for value in GATES_S])
    right.set_yticks([])
    figure.colorbar(image, ax=(left, right))
    figure.savefig(file, dpi=120)

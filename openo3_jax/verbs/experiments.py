"""The demo and the experiments: each ends with a claim, and with exit code 3 where it does not hold."""

from pathlib import Path

from openo3_jax.errors import InputError
from openo3_jax.verbs import shared


def demo(*, out: Path = Path("demo_run"), quick: bool = False, full: bool = False) -> int:
    """Render clips, teach a tiny model to answer with evidence, sharpen it, measure it: the whole story here.

    Interrupted, it goes on where it was when called again.

    Args:
        out: the directory for everything that is made.
        quick: a few steps, to see that all parts work; nothing is claimed then.
        full: more clips and more steps, 20 to 45 minutes on 2 cores.
    """
    if quick and full:
        raise InputError("--quick and --full: choose one of them")
    shared.split_cpu()
    from openo3_jax.demo import story

    return shared.claim(*story.run_demo(out, size="quick" if quick else "full" if full else "demo"))


def overfit(*, out: Path, data: Path | None = None, steps: int = 400, seed: int = 0) -> int:
    """Learn a handful of records by heart, from random weights.

    Args:
        out: a new directory for the run, the curve, the answers and the exported model.
        data: a data root; without it clips are rendered.
        steps: at most so many.
        seed: of weights, clips and order.
    """
    from openo3_jax.experiments import overfit

    return shared.claim(*overfit.overfit(data=data, out=out, steps=steps, seed=seed))


def sharpen(*, data: Path, out: Path, steps: int = 50, seed: int = 0) -> int:
    """Stage two after an unfinished stage one, on a handful of questions: does the sampled reward rise?

    Args:
        data: a data root with a few records of both stages.
        out: a new directory for both runs and the exported model.
        steps: of stage two.
        seed: of weights, order and sampling.
    """
    from openo3_jax.experiments import sharpen

    return shared.claim(*sharpen.sharpen(data=data, out=out, steps=steps, seed=seed))


def rewards(*, out: Path = Path("rewards_page")) -> int:
    """Mock predictions against values worked by hand, difficulty curves and the red team, on one page.

    Args:
        out: a directory for index.html and its figures.
    """
    from openo3_jax.report import rewards_page

    return shared.claim(*rewards_page.experiment_rewards(str(out)))


def ablation(*, start: Path, out: Path, steps: int = 40, seeds: int = 3, prompts: int = 96) -> int:
    """Adaptive proximity and the gate against fixed widths and none: stage two, several seeds, one figure.

    Interrupted, it goes on where it was when called again.

    Args:
        start: the directory that `openo3 demo` has made: its model after stage one, its clips.
        out: the directory for all runs, the figure and its numbers.
        steps: of each run.
        seeds: runs of each kind.
        prompts: at most so many held-out questions that the curves are measured on.
    """
    shared.split_cpu()
    from openo3_jax.experiments import ablation

    return shared.claim(*ablation.ablation(start=start, out=out, steps=steps, seeds=seeds, prompts=prompts))


def sweep(*, start: Path, out: Path, steps: int = 20, seeds: int = 1, prompts: int = 48) -> int:
    """The width of the proximity and of the gate, as a heat map.

    Interrupted, it goes on where it was when called again.

    Args:
        start: the directory that `openo3 demo` has made: its model after stage one, its clips.
        out: the directory for all runs, the figure and its numbers.
        steps: of each run.
        seeds: runs of each kind.
        prompts: at most so many held-out questions that the runs are compared on.
    """
    shared.split_cpu()
    from openo3_jax.experiments import sweep

    return shared.claim(*sweep.sweep(start=start, out=out, steps=steps, seeds=seeds, prompts=prompts))

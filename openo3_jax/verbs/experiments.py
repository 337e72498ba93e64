"""The demo and the experiments: each ends with a claim, and with exit code 3 where it does not hold."""

from pathlib import Path

from openo3_jax.verbs import shared


def demo(*, out: Path = Path("demo_run"), quick: bool = False) -> int:
    """Render clips, train a tiny model, ask it about clips it never saw: the whole story on this machine.

    Args:
        out: a new directory for everything that is made.
        quick: a few steps, to see that all parts work; nothing is claimed then.
    """
    from openo3_jax import demo

    return shared.claim(*demo.run_demo(out, quick=quick))


def overfit(*, out: Path, data: Path | None = None, steps: int = 400, seed: int = 0) -> int:
    """Learn a handful of records by heart, from random weights.

    Args:
        out: a new directory for the run, the curve, the answers and the exported model.
        data: a data root; without it clips are rendered.
        steps: at most so many.
        seed: of weights, clips and order.
    """
    from openo3_jax import experiments

    return shared.claim(*experiments.overfit(data=data, out=out, steps=steps, seed=seed))


def sharpen(*, data: Path, out: Path, steps: int = 50, seed: int = 0) -> int:
    """Stage two after an unfinished stage one, on a handful of questions: does the sampled reward rise?

    Args:
        data: a data root with a few records of both stages.
        out: a new directory for both runs and the exported model.
        steps: of stage two.
        seed: of weights, order and sampling.
    """
    from openo3_jax import experiments

    return shared.claim(*experiments.sharpen(data=data, out=out, steps=steps, seed=seed))


def rewards(*, out: Path = Path("rewards_page")) -> int:
    """Mock predictions against values worked by hand, difficulty curves and the red team, on one page.

    Args:
        out: a directory for index.html and its figures.
    """
    from openo3_jax.report import rewards_page

    return shared.claim(*rewards_page.experiment_rewards(str(out)))

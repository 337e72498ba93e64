"""The page of the rewards: mock predictions against hand-worked values, difficulty curves, the red team."""

import io
import pathlib
from collections.abc import Mapping, Sequence

import jinja2
import matplotlib
import numpy as np
from matplotlib.figure import Figure

from openo3_jax import tags, tasks
from openo3_jax.errors import InputError
from openo3_jax.rewards import mocks, redteam, score
from openo3_jax.rewards.rules import PRESETS, TERMS

_POINTS = 121  # of a curve
_SHARES = (0.0, 0.25, 0.5, 0.75)  # of training; from 0.75 on nothing changes


def experiment_rewards(out: str) -> tuple[str, bool]:
    """Write `out/index.html` and its figures; returns what to print and whether every mock got its value.

    Raises: InputError if `out` cannot be written.
    """
    folder = pathlib.Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        figures = write_figures(folder)
        outcomes = mocks.run_mocks()
        page = _render(outcomes, figures, redteam.attack(PRESETS))
        (folder / "index.html").write_text(page, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error})") from error
    wrong = [outcome for outcome in outcomes if not outcome.holds]
    lines = [f"{len(outcomes) - len(wrong)} of {len(outcomes)} mock predictions got the value worked by hand"]
    lines += [f"  {outcome.mock.name} under {outcome.rules}: {_differences(outcome)}" for outcome in wrong]
    return "\n".join([*lines, f"page: {folder / 'index.html'}"]), not wrong


def write_figures(folder: pathlib.Path) -> dict[str, str]:
    """Draw the difficulty of the terms into `folder`; returns the SVG texts by file name."""
    figures = {
        "reward_time.svg": _draw(
            "seconds after the key frame", "thk_temporal_point", *_point_curves(), note="sigma narrows from 4 s to 1 s"
        ),
        "reward_gate.svg": _draw("seconds after the key frame", "thk_spatial", *_gate_curves(), note="a perfect box"),
        "reward_box.svg": _draw("shift to the right, share of the box", "reward", *_box_curves(), note="a box in time"),
        "reward_span.svg": _draw(
            "shift of the span, share of its length", "reward", *_span_curves(), note="temporal QA"
        ),
    }
    for name, text in figures.items():
        (folder / name).write_text(text, encoding="utf-8")
    return figures


Curves = tuple[np.ndarray, Mapping[str, np.ndarray]]


def _point_curves() -> Curves:
    errors_s = np.linspace(-12, 12, _POINTS)
    record = mocks.SPATIAL | {"key_frames": [{"idx": 1, "time": 20.0}]}
    texts = [_claim_at(20 + error_s) for error_s in errors_s]
    curves = {}
    for share in _SHARES:
        rewards = score.score([record] * len(texts), texts, progress=share)
        curves[f"{share:.0%} of training"] = rewards.terms["thk_temporal_point"]
    return errors_s, curves


def _gate_curves() -> Curves:
    errors_s = np.linspace(-8, 8, _POINTS)
    record = mocks.SPATIAL | {"key_frames": [{"idx": 1, "time": 20.0}]}
    texts = [_claim_at(20 + error_s) for error_s in errors_s]
    rules = ("paper", "released")
    return errors_s, {
        name: score.score([record] * len(texts), texts, rules=name).terms["thk_spatial"] for name in rules
    }


def _box_curves() -> Curves:
    shifts = np.linspace(-1.2, 1.2, _POINTS)
    texts = [
        tags.render_think_answer(
            tags.render_claim("cat", [20 * shift, 0, 20 + 20 * shift, 20], 10), "a cat meets a dog"
        )
        for shift in shifts
    ]
    curves = {
        name: score.score([mocks.SPATIAL] * len(texts), texts, rules=name).terms["thk_spatial"]
        for name in ("paper", "hardened")
    }
    # One of the two key frames is cited: under the hardened rules its recall of 1/2 is a factor.
    return shifts, {"paper": curves["paper"], "hardened (half of the key frames cited)": curves["hardened"]}


def _span_curves() -> Curves:
    shifts = np.linspace(-1.2, 1.2, _POINTS)
    record = {"task": tasks.TEMPORAL, "answer": "[10, 20]"}
    texts = []
    for shift in shifts:
        start_s, end_s = 10 + 10 * shift, 20 + 10 * shift
        times = "".join(tags.render_time(time_s) for time_s in np.linspace(start_s, end_s, 5))
        texts.append(tags.render_think_answer(times, tags.render_span(start_s, end_s)))
    rewards = score.score([record] * len(texts), texts)
    return shifts, {term: rewards.terms[term] for term in ("ans_tiou", "thk_temporal_segment")}


def _claim_at(time_s: float) -> str:
    claim = f"<obj>cat</obj>{tags.render_box(mocks.CAT)}at<t>{time_s:.3f}</t>s"
    return tags.render_think_answer(claim, "a cat meets a dog")


def _draw(x_label: str, y_label: str, x: np.ndarray, curves: Mapping[str, np.ndarray], note: str) -> str:
    """An SVG with one line per curve; the same input gives the same bytes."""
    with matplotlib.rc_context({"svg.hashsalt": "openo3", "svg.fonttype": "none"}):
        figure = Figure(figsize=(6.4, 3.2), layout="constrained")
        axes = figure.subplots()
        for name, y in curves.items():
            axes.plot(x, y, label=name)
        axes.set(xlabel=x_label, ylabel=y_label, ylim=(-0.03, 1.05), title=note)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()


def _render(outcomes: Sequence[mocks.Outcome], figures: Mapping[str, str], findings: Sequence[redteam.Finding]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("openo3_jax.report", "."), autoescape=True, undefined=jinja2.StrictUndefined
    )
    return environment.get_template("rewards_page.jinja").render(
        outcomes=outcomes,
        differences=_differences,
        figures=list(figures),
        findings=findings,
        rules=list(findings[0].gain),
        pays=redteam.pays,
        terms=TERMS,
    )


def _differences(outcome: mocks.Outcome) -> str:
    wrong = [term for term in TERMS if abs(outcome.expected[term] - outcome.found[term]) > 1e-6]
    return "; ".join(f"{term} {outcome.found[term]:.4f}, expected {outcome.expected[term]:.4f}" for term in wrong)

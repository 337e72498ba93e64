"""Mock predictions with the reward that each must get, worked by hand: the rewards' own unit test."""

import math
from typing import NamedTuple

import numpy as np

from openo3_jax import tags, tasks
from openo3_jax.rewards import score
from openo3_jax.rewards.rules import TERMS


class Mock(NamedTuple):
    """`paper` and `released`: the terms that are not 0, by name."""

    name: str
    record: dict
    completion: str
    paper: dict[str, float]
    released: dict[str, float]
    progress: float = 1.0


class Outcome(NamedTuple):
    mock: Mock
    rules: str
    expected: dict[str, float]
    found: dict[str, float]

    @property
    def holds(self) -> bool:
        return all(abs(self.expected[term] - self.found[term]) <= 1e-6 for term in TERMS)


# A frame of 100 x 100 px: a cat of 20 x 20 px at 10 s; a dog of 50 x 50 px, and a ball twice, at 20 s.
SPATIAL = {
    "task": tasks.TEMPORAL_SPATIAL,
    "answer": "a cat meets a dog",
    "key_frames": [{"idx": 1, "time": 10.0, "path": "1.jpg"}, {"idx": 2, "time": 20.0, "path": "2.jpg"}],
    "key_items": {
        "1": {"cat": [[0, 0, 0.2, 0.2]]},
        "2": {"dog": [[0.5, 0.5, 1, 1]], "ball": [[0, 0, 0.1, 0.1], [0.2, 0, 0.3, 0.1]]},
    },
    "image_size": [100, 100],
}
# The original is 200 x 100 px, the model saw 100 x 50: the box is [10, 10, 30, 30] there.
VISUAL = {
    "task": tasks.VISUAL,
    "answer": "<obj>cup</obj><box>[20,20,60,60]</box>",
    "image_size": [200, 100],
    "image_size_refine": [100, 50],
}
TEMPORAL = {"task": tasks.TEMPORAL, "answer": "[10, 20]"}
TEMPORAL_MCQ = {"task": tasks.TEMPORAL_MCQ, "answer": "B\n[10, 20]"}
MCQ = {"task": tasks.GENERAL_MCQ, "answer": "B"}
FREE_FORM = {"task": tasks.GENERAL_FREE_FORM, "answer": "a b c"}
CAT = [0, 0, 20, 20]


def mocks() -> list[Mock]:
    """Right, nearly right and wrong predictions for every task, and where the paper and its code part ways."""
    claim, turn = tags.render_claim, tags.render_think_answer
    reply = "a cat meets a dog"
    full = {"ans_acc": 1.0, "format": 1.0}
    cat = claim("cat", CAT, 10)
    e = math.exp
    span = tags.render_span
    cup, half_cup = "<obj>cup</obj><box>[10,10,30,30]</box>", "<obj>cup</obj><box>[10,10,30,20]</box>"
    two_times = tags.render_time(12) + tags.render_time(25)
    return [
        _same("perfect evidence", SPATIAL, turn(cat, reply), full | {"thk_temporal_point": 1, "thk_spatial": 1}),
        _same("half the box", SPATIAL, turn(claim("cat", [0, 0, 20, 10], 10), reply),
              full | {"thk_temporal_point": 1, "thk_spatial": 0.5}),
        _same("right answer, no evidence", SPATIAL, turn("it is clear", reply), {"ans_acc": 1, "format": 0.5}),
        _same("nothing right", SPATIAL, "I do not know", {}),
        Mock("2 s early", SPATIAL, turn(claim("cat", CAT, 8), reply),
             full | {"thk_temporal_point": e(-2), "thk_spatial": 1}, full | {"thk_temporal_point": e(-2)}),
        Mock("2 s early, start of training", SPATIAL, turn(claim("cat", CAT, 8), reply),
             full | {"thk_temporal_point": e(-1 / 8), "thk_spatial": 1}, full | {"thk_temporal_point": e(-1 / 8)}, 0.0),
        Mock("4 s late", SPATIAL, turn(claim("cat", CAT, 14), reply),
             full | {"thk_temporal_point": e(-8)}, full | {"thk_temporal_point": e(-8), "thk_spatial": 1}),
        Mock("one of an object's two boxes", SPATIAL, turn(claim("ball", [0, 0, 10, 10], 20), reply),
             full | {"thk_temporal_point": 1, "thk_spatial": 1}, full | {"thk_temporal_point": 1, "thk_spatial": 0.5}),
        Mock("a bare time beside the claim", SPATIAL, turn(cat + tags.render_time(20), reply),
             full | {"thk_temporal_point": 1, "thk_spatial": 0.5}, full | {"thk_temporal_point": 1, "thk_spatial": 1}),
        Mock("a box that is no list", SPATIAL, turn(cat + cat.replace("[0,", "[zero,"), reply),
             full | {"thk_temporal_point": 1, "thk_spatial": 0.5}, full | {"thk_temporal_point": 1, "thk_spatial": 1}),
        Mock("tags apart", SPATIAL, turn("<obj>cat</obj> <box>[0,0,20,20]</box> at <t>10</t>s", reply),
             {"ans_acc": 1, "thk_temporal_point": 1, "format": 0.5}, full | {"thk_temporal_point": 1}),
        Mock("perfect box", VISUAL, turn(cup, cup), {"ans_viou": 1, "format": 1},
             {"ans_viou": 1, "thk_spatial": 1, "format": 1}),
        Mock("half the box", VISUAL, turn("it is there", half_cup), {"ans_viou": 0.5, "format": 0.5},
             {"ans_viou": 0.5, "format": 1}),
        _same("perfect span", TEMPORAL, turn(two_times.replace("25", "15"), span(10, 20)),
              {"ans_tiou": 1, "thk_temporal_segment": 1, "format": 1}),
        _same("half the span, one time outside", TEMPORAL, turn(two_times, span(10, 15)),
              {"ans_tiou": 0.5, "thk_temporal_segment": 0.5, "format": 1}),
        _same("span reversed", TEMPORAL, turn(tags.render_time(12), span(20, 10)),
              {"thk_temporal_segment": 1, "format": 0.5}),
        _same("letter and span", TEMPORAL_MCQ, turn(two_times, span(10, 15) + " Correct Option: (B)"),
              {"ans_acc": 1, "ans_tiou": 0.5, "thk_temporal_segment": 0.5, "format": 1}),
        _same("wrong letter", TEMPORAL_MCQ, turn(two_times, span(10, 15) + " Correct Option: C"),
              {"ans_tiou": 0.5, "thk_temporal_segment": 0.5, "format": 1}),
        _same("letter", MCQ, turn("", "B."), {"ans_acc": 1, "format": 1}),
        _same("letter with text", MCQ, turn("", "B, the cat"), {"format": 1}),
        _same("words in another order", FREE_FORM, turn("", "a c b"), {"ans_acc": (1 + 0 + 2 / 3) / 3, "format": 1}),
    ]  # fmt: skip


def run_mocks() -> list[Outcome]:
    """Score every mock under both presets."""
    cases = mocks()
    outcomes = []
    for rules in ("paper", "released"):
        rewards = score.score(
            [mock.record for mock in cases],
            [mock.completion for mock in cases],
            progress=np.array([mock.progress for mock in cases]),
            rules=rules,
        )
        for place, mock in enumerate(cases):
            expected = dict.fromkeys(TERMS, 0.0) | (mock.paper if rules == "paper" else mock.released)
            found = {term: float(rewards.terms[term][place]) for term in TERMS}
            outcomes.append(Outcome(mock, rules, expected, found))
    return outcomes


def _same(name: str, record: dict, completion: str, expected: dict) -> Mock:
    return Mock(name, record, completion, expected, expected)

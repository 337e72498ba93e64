"""No text and no number breaks a score: finite, in [0, 1], 0 where it does not apply. `FUZZ_BATCHES` sets how many."""

import os

import numpy as np
import reward_cases as cases
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from openo3_jax import tasks
from openo3_jax.rewards import rules, score

BATCHES = int(os.environ.get("FUZZ_BATCHES", 1563))  # of 64 completions each: 10^5
ROWS = 64

RECORDS = [
    cases.spatial_record(),
    cases.visual_record(),
    cases.temporal_record(),
    cases.temporal_mcq_record(),
    cases.mcq_record(),
    cases.free_form_record(),
]
MALFORMED = [
    cases.spatial_record(key_items={}),
    cases.spatial_record(key_frames=[], key_items={}),
    cases.spatial_record(key_frames=[{"idx": 1, "time": float("inf")}]),
    cases.visual_record(answer="<box>[1,2]</box>"),
    cases.temporal_record(answer="[20, 10]"),
    cases.temporal_mcq_record(answer=""),
]
PIECES = [
    *("<think>", "</think>", "<answer>", "</answer>", "<obj>", "</obj>", "<box>", "</box>", "<t>", "</t>s", "at"),
    *("</obj><box>[", "]</box>at<t>", "Correct Option:", " B", "(B)", "a red car", "\n", " to ", ",", "[", "]"),
    *("nan", "inf", "-1", "1e308", "9" * 400, "0", "15", "10.5", "null", '"7"', "true", "\u0661", "\ud800", "\x00"),
    *("[0,0,20,20]", "[20,20,0,0]", "[1e308,-1e308,1e308,1e308]", "[NaN,Infinity,-Infinity,0]", "[[1,2,3,4]]", "[1,2]"),
    *(
        cases.claim("cat", cases.CAT, 10),
        cases.claim("dog", "[NaN,0,1,1]", "nan"),
        "<t>12</t>s to <t>15</t>s",
        "<box>[10,10,30,20]</box>",
    ),
]
# Every byte of a Hypothesis example picks one piece: one draw for a batch, so that examples stay cheap.
PIECE_BYTES = st.binary(min_size=ROWS, max_size=24 * ROWS)


def completions_of(choices: bytes) -> list[str]:
    """64 texts out of one string of bytes; half of them inside well-formed tags."""
    texts = []
    for row, part in enumerate(np.array_split(np.frombuffer(choices, np.uint8), ROWS)):
        text = "".join(PIECES[byte % len(PIECES)] for byte in part)
        middle = len(text) // 2
        texts.append(text if row % 2 else f"<think>{text[:middle]}</think><answer>{text[middle:]}</answer>")
    return texts


@settings(
    max_examples=BATCHES,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(PIECE_BYTES, st.sampled_from(["paper", "released", "hardened"]), st.sampled_from([0.0, 0.4, 0.75, 1.0]))
def test_every_score_is_finite_and_in_range(choices, preset, progress):
    records = [(RECORDS + MALFORMED)[row % 12] for row in range(ROWS)]
    rewards = score.score(records, completions_of(choices), progress=progress, rules=preset)
    terms = np.stack([rewards.terms[term] for term in rules.TERMS])
    applies = np.stack([rewards.applies[term] for term in rules.TERMS])
    assert np.isfinite(terms).all() and np.isfinite(rewards.total).all()
    assert (terms >= 0).all() and (terms <= 1 + 1e-6).all()
    assert (terms[~applies] == 0).all()
    np.testing.assert_allclose(terms.sum(0), rewards.total, atol=1e-5)


def test_the_fuzz_reaches_every_term():
    """The alphabet is not so wild that all scores are 0."""
    rng = np.random.default_rng(0)
    best = dict.fromkeys(rules.TERMS, 0.0)
    for _ in range(20):
        texts = completions_of(rng.integers(0, 256, 24 * ROWS).astype(np.uint8).tobytes())
        rewards = score.score([(RECORDS)[row % 6] for row in range(ROWS)], texts, rules="released")
        best = {term: max(value, float(rewards.terms[term].max())) for term, value in best.items()}
    assert {term for term, value in best.items() if value > 0} >= set(rules.TERMS)
    assert {row["task"] for row in RECORDS} == set(tasks.TASKS)

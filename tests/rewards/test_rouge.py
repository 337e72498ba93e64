"""ROUGE on arrays against `rouge_score` on text."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score import rouge_scorer

from openo3_jax import tasks
from openo3_jax.rewards import answer, parse, rules, score
from openo3_jax.rewards.words import Stemmer

KINDS = ("rouge1", "rouge2", "rougeL")
WORDS = st.sampled_from(
    [
        "the",
        "a",
        "cat",
        "cats",
        "running",
        "runs",
        "run",
        "Ran",
        "dog's",
        "generalization",
        "skies",
        "\u00e9",
        "42",
        "x-y",
        "dying",
    ]
)
TEXTS = st.lists(WORDS, max_size=24).map(" ".join)


@jax.jit
def _all_kinds(rows, under):
    prediction, truth, _ = rows
    return jax.vmap(lambda p, t: answer.rouge(p.words, p.num_words, t.words, under))(prediction, truth)


def ours(pairs: list[tuple[str, str]], kind: str) -> np.ndarray:
    records = [{"task": tasks.GENERAL_FREE_FORM, "answer": gold} for gold, _ in pairs]
    texts = [f"<answer>{reply}</answer>" for _, reply in pairs]
    (bucket,) = parse.parse(records, texts).buckets()
    with score.double_precision():
        found = _all_kinds(bucket.rows, rules.RewardRules(rouge=kind).numbers())
    return np.asarray(found)[np.argsort(bucket.places)]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=8, max_size=8))
def test_equals_rouge_score(pairs):
    scorer = rouge_scorer.RougeScorer(list(KINDS), use_stemmer=True)
    expected = [scorer.score(*pair) for pair in pairs]
    for kind in KINDS:
        np.testing.assert_allclose(ours(pairs, kind), [row[kind].fmeasure for row in expected], atol=1e-12)


LONG = "a b c " * 200


@pytest.mark.parametrize("pair", [(LONG, "c b a " * 150), (LONG, "b"), ("b", LONG), ("", LONG), (LONG, "")])
def test_long_texts(pair):
    scorer = rouge_scorer.RougeScorer(list(KINDS), use_stemmer=True)
    for kind in KINDS:
        np.testing.assert_allclose(ours([pair], kind)[0], scorer.score(*pair)[kind].fmeasure, atol=1e-12)


def test_words():
    assert Stemmer().words("The cats, RUNNING!\tdans l'été") == ["the", "cat", "run", "dan", "l", "t"]


def test_words_of_any_length_are_stemmed():
    assert Stemmer().words("x" * 50 + "ing " + "b" * 99_990 + "eds") == ["x" * 50 + "ing", "b" * 99_990 + "ed"]
    assert Stemmer().words("ab" * 50_000 + "ing") == ["ab" * 50_000]


def test_a_run_of_one_letter_is_cheap():
    """The stemmer alone recurses over a run of y."""
    assert Stemmer().words("y" * 100_000) == ["y" * 100_000]

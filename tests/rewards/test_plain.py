"""`released` against a plain implementation (benchmarks/plain_rewards.py) on texts that no table holds."""

import random

import pytest
import reward_cases as cases

import standalone
from openo3_jax.rewards import score
from openo3_jax.rewards.rules import TERMS

NOISE = [
    *(
        "<think>",
        "</think>",
        "<answer>",
        "</answer>",
        "<obj>",
        "</obj>",
        "<box>",
        "</box>",
        "<t>",
        "</t>",
        "</t>s",
        "at",
    ),
    *(
        "[",
        "]",
        ",",
        " ",
        "\n",
        ".",
        "x",
        "nan",
        "1",
        "-",
        "s",
        "Correct Option: ",
        "<box>[1,2,3,4]</box>",
        "</t>s to <t>",
    ),
]


@pytest.fixture(scope="module")
def plain():
    return standalone.load("benchmarks/plain_rewards.py")


def mutate(rng: random.Random, text: str) -> str:
    """A few pieces cut, doubled or put in, at random places."""
    for _ in range(rng.randint(0, 4)):
        start = rng.randrange(len(text) + 1)
        end = min(len(text), start + rng.choice([0, 1, 1, 3, 10]))
        piece = rng.choice([rng.choice(NOISE), rng.choice(NOISE), "", text[start:end] * 2])
        text = text[:start] + piece + text[end:]
    return text


def test_equals_the_plain_functions_on_mutated_texts(plain):
    """5,000 of the table's completions with a few pieces cut, doubled or put in."""
    rng = random.Random(0)
    golden = [row for row in cases.read_golden() if not row["raised"]]
    rows = []
    for number in range(5000):
        row = golden[number % len(golden)]
        rows.append(row | {"completion": mutate(rng, row["completion"])})
    rewards = score.score(
        rows, [row["completion"] for row in rows], progress=[row["step_percent"] for row in rows], rules="released"
    )
    wrong = []
    for place, row in enumerate(rows):
        for term in TERMS:
            name = "format_reward" if term == "format" else term
            try:
                expected = getattr(plain, name)(row)
            except (ValueError, AttributeError, TypeError):  # the released functions raise on a broken truth
                expected = 0.0
            if abs(float(rewards.terms[term][place]) - expected) > 1e-6:
                wrong.append((row["id"], row["kind"], term, expected, rewards.terms[term][place], row["completion"]))
    assert not wrong

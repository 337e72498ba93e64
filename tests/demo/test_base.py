"""The base that the package carries: small, the one of its log, and it sees."""

import hashlib
import json

import pytest

from openo3_jax import policy as policy_lib
from openo3_jax.demo import base, story

MOST_BYTES = 8_000_000


@pytest.fixture(scope="module")
def log():
    *steps, last = map(json.loads, (story.BASE / "log.jsonl").read_text().splitlines())
    return steps[-1], last


def test_it_is_small_and_the_one_of_its_log(log):
    assert sum(file.stat().st_size for file in story.BASE.iterdir()) <= MOST_BYTES
    weights = (story.BASE / "model.safetensors").read_bytes()
    assert hashlib.sha256(weights).hexdigest() == log[1]["sha256"]


@pytest.mark.parametrize("number", [1, 2, 3])
def test_it_sees(number, log):
    """What its log says, but for the rounding to bfloat16, also with words around the question."""
    policy = policy_lib.load_pretrained(story.BASE)
    for words, name in ((0, ""), (8, "_with_words")):
        sight = base.measure(policy, number, words=words)
        assert sight.box_iou == pytest.approx(log[0][f"box_iou_{number}{name}"], abs=0.03)
        assert sight.names == pytest.approx(log[0][f"names_{number}{name}"], abs=0.05)
        assert sight.box_iou > 0.4 and sight.names > 0.4  # the best constant box has 0.25, the best constant name 0.17

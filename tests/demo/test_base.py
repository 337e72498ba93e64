"""The base that the package carries: small, the one of its log, and it sees."""

import hashlib
import json

import pytest

import standalone
from openo3_jax import policy as policy_lib
from openo3_jax.demo import base, story

MOST_BYTES = 8_000_000


@pytest.fixture(scope="module")
def log():
    """What it saw in the end, and how it was made."""
    *lines, last = map(json.loads, (story.BASE / "log.jsonl").read_text().splitlines())
    return [line for line in lines if "step" in line][-1], last


def test_it_is_small_and_the_one_of_its_log(log):
    assert sum(file.stat().st_size for file in story.BASE.iterdir()) <= MOST_BYTES
    weights = (story.BASE / "model.safetensors").read_bytes()
    assert hashlib.sha256(weights).hexdigest() == log[1]["sha256"]


def test_it_was_made_by_the_script_as_it_stands(log):
    script = standalone.load("scripts/train_tiny_base.py")
    assert {name: log[1][name] for name in script.SETTINGS} == json.loads(json.dumps(script.SETTINGS))
    last = script.PARTS[-1]
    assert (log[0]["lesson"], log[0]["step"]) == (last.name, last.steps)


@pytest.mark.parametrize(
    ("number", "kind", "how"), [(2, "", {}), (1, "_with_words", {"words": 8}), (3, "_of_several", {"pictures": 6})]
)
def test_it_sees(number, kind, how, log):
    """What its log says, but for the rounding to bfloat16: a picture, words around the question, one of several."""
    sight = base.measure(policy_lib.load_pretrained(story.BASE), number, **how)
    assert sight.box_iou == pytest.approx(log[0][f"box_iou_{number}{kind}"], abs=0.03)
    assert sight.names == pytest.approx(log[0][f"names_{number}{kind}"], abs=0.05)
    assert sight.box_iou > 0.4 and sight.names > 0.4  # the best constant box has 0.25, the best constant name 0.17

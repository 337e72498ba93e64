"""Held-out records: format, answer, span and box of each answer, worked by hand; constants that look at nothing."""

import math

import numpy as np
import pytest

from openo3_jax import tasks
from openo3_jax.errors import InputError
from openo3_jax.evals import records

CLIP = {
    "task": tasks.TEMPORAL_SPATIAL,
    "question": "Which object appears first?",
    "answer": "A red circle",
    "image_size": [112, 84],
    "key_frames": [{"idx": 0, "time": 1.0, "path": "a.jpg"}, {"idx": 1, "time": 3.0, "path": "b.jpg"}],
    "key_items": {"0": {"red circle": [[0.0, 0.0, 0.5, 0.5]]}, "1": {"red circle": [[0.5, 0.5, 1.0, 1.0]]}},
}
PICTURE = {
    "task": tasks.VISUAL,
    "question": "Where is the star?",
    "answer": "<obj>star</obj><box>[0,0,56,42]</box>",
    "image_size": [112, 84],
    "image_size_refine": [56, 42],  # shown at half its size
}
SPAN = {"task": tasks.TEMPORAL, "question": "When?", "answer": "[1.0, 3.0]"}
CHOICE = {"task": tasks.GENERAL_MCQ, "question": "What color?\nA. red\nB. blue", "answer": "B"}
BOTH = {"task": tasks.TEMPORAL_MCQ, "question": "What color?\nA. red\nB. blue", "answer": "B\n[0.0, 2.0]"}
OPEN = {"task": tasks.GENERAL_FREE_FORM, "question": "Which way?", "answer": "To the left"}

nan = math.nan
FIRST = "<obj>red circle</obj><box>[0,0,56,42]</box>at<t>1.0</t>s"
CASES = {  # name: record, text, (format, acc, tiou, viou)
    "both frames": (
        CLIP,
        f"<think>I see {FIRST}, then <obj>Red Circle</obj><box>[56,42,112,84]</box>at<t>3.2</t>s.</think>"
        "<answer>A red circle</answer>",
        (1, 1, nan, 1),
    ),
    "one frame, half a box": (
        CLIP,
        "<think><obj>red circle</obj><box>[0,0,28,42]</box>at<t>1.5</t>s</think><answer>A red square</answer>",
        (1, 0, nan, 0.25),
    ),
    "too far in time": (
        CLIP,
        "<think><obj>red circle</obj><box>[0,0,56,42]</box>at<t>1.6</t>s</think><answer>red circle</answer>",
        (1, 1, nan, 0),
    ),
    "another name": (
        CLIP,
        "<think><obj>circle</obj><box>[0,0,56,42]</box>at<t>1.0</t>s</think><answer>red circle</answer>",
        (1, 1, nan, 0),
    ),
    "no reasoning": (CLIP, f"{FIRST}<answer>red circle</answer>", (0, 1, nan, 0)),
    "the nearer of two claims": (
        CLIP,
        f"<think>{FIRST}<obj>red circle</obj><box>[0,0,1,1]</box>at<t>1.2</t>s</think><answer>red circle</answer>",
        (1, 1, nan, 0.5),
    ),
    "picture at half its size": (
        PICTURE,
        "<think>There.</think><answer><obj>star</obj><box>[0,0,28,21]</box></answer>",
        (1, nan, nan, 1),
    ),
    "picture without a box": (PICTURE, "<think>There.</think><answer>star</answer>", (1, nan, nan, 0)),
    "span": (
        SPAN,
        "<think>So.</think><answer>From <t>2.0</t>s to <t>4.0</t>s</answer>",
        (1, nan, 1 / 3, nan),
    ),
    "no span": (SPAN, "<think>So.</think><answer>never</answer>", (1, nan, 0, nan)),
    "letter": (CHOICE, "<think>So.</think><answer>B</answer>", (1, 1, nan, nan)),
    "no letter": (CHOICE, "<think>So.</think><answer>either</answer>", (1, 0, nan, nan)),
    "span and letter": (
        BOTH,
        "<think>So.</think><answer>From <t>0.0</t>s to <t>1.0</t>s\nCorrect Option: B</answer>",
        (1, 1, 0.5, nan),
    ),
    "span without letter": (
        BOTH,
        "<think>So.</think><answer>From <t>0.0</t>s to <t>1.0</t>s</answer>",
        (1, 0, 0.5, nan),
    ),
    "open": (OPEN, "<think>So.</think><answer>to the Left.</answer>", (1, 1, nan, nan)),
    "cut off": (OPEN, "<think>to the left", (0, 0, nan, nan)),
}


@pytest.mark.parametrize("name", CASES)
def test_columns_by_hand(name):
    record, text, expected = CASES[name]
    np.testing.assert_allclose(records.judge([record], [text])[0], expected, atol=1e-12)


def test_means_have_one_chain_twice():
    columns = np.array([[1, 1, nan, 0.5], [1, nan, 0.2, nan]])
    np.testing.assert_array_equal(records.means(columns), [[1, nan, nan, 0.5, 0.5], [nan, 0.2, 0.2, nan, nan]])


def test_constants_by_hand():
    spans = [SPAN, {**SPAN, "answer": "[1.0, 2.0]"}, {**SPAN, "answer": "[5.0, 6.0]"}]
    # [1, 3] earns (1 + 1/2 + 0) / 3, as does [1, 2]; nothing earns more
    assert records.constant_span([*spans, CHOICE]) == pytest.approx(0.5)
    # either corner is all of one box and nothing of the other; so is the picture a quarter of both
    assert records.constant_box([CLIP]) == pytest.approx(0.5)
    for find, asked in ((records.constant_span, "span"), (records.constant_box, "box")):
        with pytest.raises(InputError, match=f"records: none of 1 asks for a {asked}"):
            find([CHOICE])

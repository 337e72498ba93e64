"""Held-out records: format, answer, span and box of each answer, worked by hand; constants that look at nothing."""

import math

import numpy as np
import pytest

from openo3_jax import tags, tasks
from openo3_jax.errors import InputError
from openo3_jax.evals import metrics, records

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
CROWD = {  # several objects in a frame, several boxes of one, none of another
    **CLIP,
    "key_items": {
        "0": {"red circle": [[0.0, 0.0, 0.5, 0.5], [0.25, 0.5, 1.0, 1.0]], "cat": [[0.0, 0.5, 0.5, 1.0]], "dog": []},
        "1": {"cat": [[0.5, 0.0, 1.0, 0.5]]},
    },
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
    "several objects": (  # the second box of the first one, half a cat, no dog to find, no cat later
        CROWD,
        "<think><obj>red circle</obj><box>[28,42,112,84]</box>at<t>1.0</t>s, "
        "<obj>cat</obj><box>[0,42,28,84]</box><box>[0,0,1,1]</box>at<t>1.0</t>s, "
        "<obj>dog</obj><box>[0,0,9,9]</box>at<t>1.0</t>s</think><answer>A red circle</answer>",
        (1, 1, nan, 1.5 / 4),
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
    assert records.constant_span([{**SPAN, "answer": "[1.13, 2.41]"}]) == 1.0
    # either corner is all of one box and nothing of the other; so is the picture a quarter of both
    assert records.constant_box([CLIP]) == pytest.approx(0.5)
    # the first corner: half of the clip's question, all of the picture's; of the three boxes it would be 2/3
    assert records.constant_box([CLIP, PICTURE, SPAN]) == pytest.approx(0.75)
    # edges in 72nds, between those of the first grid
    fine = {**PICTURE, "image_size": [72, 72], "answer": "<obj>star</obj><box>[5,10,31,47]</box>"}
    assert records.constant_box([fine]) == pytest.approx(1.0)
    for find, asked in ((records.constant_span, "span"), (records.constant_box, "box")):
        with pytest.raises(InputError, match=f"records: none of 1 asks for a {asked}"):
            find([CHOICE])


def constant_answer(record, box):
    """Of a model that gives one box, in fractions of the picture, whatever it is asked and shown."""
    width, height = record.get("image_size_refine", record["image_size"])
    box_px = [side * fraction for side, fraction in zip((width, height) * 2, box, strict=True)]
    claims = [
        tags.render_claim(name, box_px, frame["time"])
        for frame in record.get("key_frames", [])
        for name in record["key_items"][str(frame["idx"])]
    ]
    return tags.render_think_answer(f"I see {', '.join(claims)}.", f"<obj>it</obj>{tags.render_box(box_px)}")


def judged(asked, box):
    columns = records.judge(asked, [constant_answer(record, box) for record in asked])
    return metrics.column_means(columns)[records.COLUMNS.index("viou")]


def test_the_constant_box_is_what_its_text_earns():
    assert judged([CLIP, PICTURE], (0.0, 0.0, 0.5, 0.5)) == pytest.approx(records.constant_box([CLIP, PICTURE]))
    asked = [CLIP, PICTURE, CROWD]
    for box in ((0.0, 0.0, 0.5, 0.5), (0.0, 0.0, 1.0, 1.0), (0.25, 0.5, 1.0, 1.0), (0.125, 0.25, 0.625, 0.75)):
        earned = records._boxes(asked).vious(np.array([box]))[0]
        assert judged(asked, box) == pytest.approx(earned, abs=1e-12)
        assert 0 < earned <= records.constant_box(asked) + 1e-12

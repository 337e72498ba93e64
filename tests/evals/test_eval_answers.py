"""Options, spans and open answers out of text: worked cases, no default, never an exception, linear time."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openo3_jax.evals import answers, boxes, choice, faithfulness, items, judge

OPTIONS = {"A": "a dog", "B": "a cat", "C": "Two men", "D": ""}

LETTERS = {
    "<think>A?</think><answer>B</answer>": "B",
    "<answer> b </answer>": "B",
    "<answer>B. a cat</answer>": "B",
    "<answer>(C)</answer>": "C",
    "<answer>[D] nothing": "D",
    "<answer>**B**: a cat</answer>": "B",
    "<answer>The answer is (B) because of the tail.</answer>": "B",
    "<answer>A cat.</answer>": "B",  # the option's own words
    "<answer>\\boxed{C}</answer>": "C",
    "<think>I think B.</think>\nD": "D",
    "C)": "C",
    # nothing stated: never "A"
    "": None,
    "<answer></answer>": None,
    "<answer>A man walks.</answer>": None,
    "<answer>The answer is A man.</answer>": None,
    "<answer>E</answer>": None,
    "<answer>A or B</answer>": None,
    "<answer>Option A or option B</answer>": None,
    "<answer>Option A and option B</answer>": None,
    "<answer>The answer is B or C</answer>": None,
    "<answer>Answer: (B), (C)</answer>": None,
    "<answer>(A) or (B)</answer>": None,
    "<answer>A. a dog B. a cat C. two men</answer>": None,
    "<answer>The answer is B, a cat</answer>": "B",
    "<answer>Answer: B. And A is wrong</answer>": "B",
    "<answer>e.g. a cat</answer>": None,
    "<think>The answer is B": None,
    "I cannot tell.": None,
}


@pytest.mark.parametrize("text", LETTERS)
def test_parse_letter(text):
    assert answers.parse_letter(text, OPTIONS) == LETTERS[text]


SPANS = {
    "<answer>From <t>1.5</t>s to <t>20</t>s</answer>": (1.5, 20.0),
    "<think>From <t>9</t>s to <t>10</t>s</think><answer>1 2</answer>": (1.0, 2.0),
    "<answer>0:05 to 1:02.5</answer>": (5.0, 62.5),
    "<answer>1:00:00 to 1:00:01</answer>": (3600.0, 3601.0),
    "<answer>12s - 15.5sec</answer>": (12.0, 15.5),
    "<answer>[3, 4]</answer>": (3.0, 4.0),
    "<answer>9 to 3</answer>": (9.0, 3.0),
    "<answer>Event 2 lasts from 3 to 4</answer>": None,  # three numbers
    "<answer>From 5 on</answer>": None,
    "<answer>the 2nd of 3 at 4</answer>": (3.0, 4.0),
    f"<answer>{'9' * 400} 3</answer>": None,
    "": None,
}


@pytest.mark.parametrize("text", SPANS)
def test_parse_span(text):
    assert answers.parse_span(text) == SPANS[text]


OPEN = {
    ("<think>7</think><answer>It is 3.14159</answer>", "3.14"): True,
    ("<answer>1,200 dollars</answer>", "1200"): True,
    ("<answer>-5</answer>", "5"): False,
    ("<answer>5 of 6</answer>", "5"): False,  # the last number is the answer
    ("<answer>The red Car!</answer>", "red car"): True,
    ("<answer>redcar</answer>", "red car"): False,
    ("<think>red car</think><answer>blue</answer>", "red car"): False,
    ("<answer>anything</answer>", ""): False,
    ("", "red"): False,
}


@pytest.mark.parametrize(("text", "gold"), OPEN)
def test_matches_open(text, gold):
    assert answers.matches_open(text, gold) is OPEN[text, gold]


def test_final_text_of_an_answer_that_was_cut_off():
    assert answers.final_text("<think>a</think><answer>From 3 to") == "From 3 to"
    assert answers.final_text("<think>From 3 to 5") == ""


# ---- boxes ----

NESTED = '{"3": [[1, 2, 3, 4], [5, 6, 7, 8]], "4.0": [9, 9, 10, 10]}'
BOXES = {
    '<answer>{"3": [1, 2, 3, 4]}</answer>': {3: [(1, 2, 3, 4)]},
    NESTED: {3: [(1, 2, 3, 4), (5, 6, 7, 8)], 4: [(9, 9, 10, 10)]},
    f"Here:\n```json\n{NESTED}\n```\nThat is [all].": {3: [(1, 2, 3, 4), (5, 6, 7, 8)], 4: [(9, 9, 10, 10)]},
    "```\n{'0:03': (1, 2, 3, 4),}": {3: [(1, 2, 3, 4)]},
    '[{"3": [1, 2, 3, 4]}, {"3s": [5, 6, 7, 8]}]': {3: [(1, 2, 3, 4), (5, 6, 7, 8)]},
    '[["3", [1, 2, 3, 4]], [4, [5, 6, 7, 8]]]': {3: [(1, 2, 3, 4)], 4: [(5, 6, 7, 8)]},
    '[{"time": 3, "bbox_2d": [1, 2, 3, 4], "label": "cat"}]': {3: [(1, 2, 3, 4)]},
    '{"boxes": {"3": [1, 2, 3, 4]}}': {3: [(1, 2, 3, 4)]},
    '{"<t>3.0</t>s": [-1, .5, 3e1, 4]}': {3: [(-1, 0.5, 30, 4)]},
    "{3: [1, 2, 3, 4]}": {3: [(1, 2, 3, 4)]},
    # cut off, or closed by the wrong bracket
    '{"3": [1, 2, 3, 4], "4": [5, 6, 7': {3: [(1, 2, 3, 4)]},
    '{"3": [[1, 2, 3, 4], [5, 6, 7, 8], "4": [9, 9, 10, 10]}': {
        3: [(1, 2, 3, 4), (5, 6, 7, 8)],
        4: [(9, 9, 10, 10)],
    },
    '{"3": [[1, 2, 3, 4}': {3: [(1, 2, 3, 4)]},
    '[{"3": [1, 2, 3, 4]': {3: [(1, 2, 3, 4)]},
    # evidence as it is taught
    "<answer><obj>cat</obj><box>[1,2,3,4]</box>at<t>3.0</t>s</answer>": {3: [(1, 2, 3, 4)]},
    # nothing that has a second and a box
    "": None,
    "[1, 2, 3, 4]": None,
    '{"3": [1, 2, 3]}': None,
    '{"3": [1, 2, 3, "x"]}': None,
    '{"3": [1, 2, 3, 1e999]}': None,
    '{"cat": [1, 2, 3, 4]}': None,
    "no brackets": None,
}


@pytest.mark.parametrize("text", BOXES)
def test_parse_boxes(text):
    assert boxes.parse_boxes(text) == BOXES[text]


def test_at_seconds_pads_with_nan():
    said = boxes.at_seconds({3.0: [(1.0, 2.0, 3.0, 4.0), (5.0, 6.0, 7.0, 8.0)], 4.0: [(0.0, 0.0, 1.0, 1.0)]}, [3, 5, 4])
    assert said.shape == (3, 2, 4)
    assert said[0].tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert said[2, 0].tolist() == [0, 0, 1, 1]
    assert str(said[1, 0, 0]) == str(said[2, 1, 3]) == "nan"
    assert boxes.at_seconds(None, [1, 2]).shape == (2, 0, 4)


# ---- whatever the text is ----

PIECES = [
    *("<think>", "</think>", "<answer>", "</answer>", "<obj>", "</obj><box>[", "]</box>at<t>", "</t>s", "<t>", " to "),
    *("```json", "```", "[", "]", "{", "}", "(", ")", ":", ",", '"', "'", "\n", " ", "\\", "\x00", "\ud800"),
    *("<obj>cat</obj><box>[1,2,30,40]</box>at<t>1</t>s", "<box>[-1e308,0,1e308,9]</box>", "at<t>1e308</t>s"),
    *("3", "-1", ".5", "1e308", "9" * 400, "nan", "Infinity", "1:05", "²", "\u0661", "3s"),
    *("A", "B.", "(C)", "The answer is", "\\boxed{", "option", "time", "bbox_2d", "[1, 2, 3, 4]", '"3": '),
]
TEXTS = st.one_of(st.lists(st.sampled_from(PIECES), max_size=60).map("".join), st.text(max_size=200))


def cited(text):
    said = items.Prediction("i", choice.CALL, "", 0, "", texts=(text,), shown_hw=(50, 60))
    return faithfulness.cited(said, "a.mp4", seed=0)


@settings(max_examples=500, deadline=None)
@given(TEXTS)
def test_no_text_raises(text):
    letter = answers.parse_letter(text, OPTIONS)
    assert letter is None or letter in OPTIONS
    span = answers.parse_span(text)
    assert span is None or (span.start_s >= 0 and span.end_s < float("inf"))
    found = boxes.parse_boxes(text)
    assert found is None or all(len(box) == 4 for said in found.values() for box in said)
    answers.matches_open(text, "3")
    answers.matches_open("<answer>3</answer>", text)
    assert judge.parse_score(text) in (None, 0, 1, 2, 3)
    evidence = cited(text)
    regions = [] if evidence is None else [*evidence.cited, *evidence.random]
    assert all(0 <= x1 < x2 <= 60 and 0 <= y1 < y2 <= 50 for x1, y1, x2, y2 in (region["box"] for region in regions))


LONG = ["[", "{", '"', "'", "9", "1:", "<t>", "```", "(", "<answer>", "</think>", "option ", " ", "{[", '{"3":', "<t>1"]
LONG += ["2 ", "<obj>", "<obj>a</obj><box>[", "<obj>a</obj><box>[1,2,3,4]</box>at<t>1</t>s"]
PARSERS = {
    "letter": lambda text: answers.parse_letter(text, OPTIONS),
    "span": answers.parse_span,
    "boxes": boxes.parse_boxes,
    "open": lambda text: answers.matches_open(text, "3"),
    "score": judge.parse_score,
    "evidence": lambda text: cited(f"<think>{text}</think>"),
}


def seconds_for(parse, text):
    """CPU time, the best of two."""
    found = []
    for _ in range(2):
        start = time.process_time()
        parse(text)
        found.append(time.process_time() - start)
    return min(found)


@pytest.mark.parametrize("name", PARSERS)
@pytest.mark.parametrize("piece", LONG)
def test_time_is_linear(name, piece):
    """Four times the text takes four times as long; 16 times would be quadratic. Below 10 ms nothing is said."""
    short, long = (piece * (size // len(piece)) for size in (16_000, 64_000))
    assert seconds_for(PARSERS[name], long) < 9 * max(seconds_for(PARSERS[name], short), 0.01)


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ("{", "}"), ("[", "}"), ("{[", "]"), ('{"3":[', "]}")])
def test_deep_brackets_take_linear_time(opening, closing):
    short, long = (opening * size + closing * size for size in (4_000, 16_000))
    assert seconds_for(boxes.parse_boxes, long) < 9 * max(seconds_for(boxes.parse_boxes, short), 0.01)


def test_the_measurement_sees_a_quadratic_parser():
    def quadratic(text):
        return [text.count("<answer>", i) for i in range(0, len(text), 4)]

    short, long = ("[" * size for size in (16_000, 64_000))
    assert seconds_for(quadratic, long) > 9 * max(seconds_for(quadratic, short), 0.01)

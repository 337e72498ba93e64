"""The grammar: hand-worked texts, regular expressions as oracle on short ones, and time on hostile ones."""

import json
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openo3_jax import tags
from openo3_jax.errors import InputError

PIECES = st.sampled_from(
    [
        *("<think>", "</think>", "<answer>", "</answer>", "<obj>", "</obj>", "<box>", "</box>", "<t>", "</t>", "</t>s"),
        *("</obj><box>[", "]</box>at<t>", "<box>[0,0,9,9]</box>", "[1,2,3,4]", "[[1,2,3,4]]", "[1,2]", "[", "]", "at"),
        *("cat", "man_2", " to ", "5", "5.", ".5", "1.2.3", "-3", "nan", "٣", " ", "\n", ", "),
    ]
)
SHORT_TEXTS = st.lists(PIECES, max_size=25).map("".join)


def test_render():
    assert tags.render_claim("cat", [1, 2.0, 30, 4], 12.34) == "<obj>cat</obj><box>[1,2,30,4]</box>at<t>12.3</t>s"
    assert tags.render_box([0.5, 0.25, 0.12345, 1.0]) == "<box>[0.5,0.25,0.123,1]</box>"
    assert tags.render_span(1, 2.5) == "From <t>1.0</t>s to <t>2.5</t>s"
    assert tags.render_think_answer("why", "what") == "<think>why</think>\n<answer>what</answer>"


def test_rendered_text_parses_back():
    claim = tags.render_claim("a cat", [1, 2, 30, 4], 12.3)
    (parsed,) = tags.parse_claims("x " + claim)
    assert parsed == tags.Claim("a cat", ((1.0, 2.0, 30.0, 4.0),), "12.3", 12.3, 2, 2 + len(claim))
    assert tags.parse_span(tags.render_span(1, 2.5)) == (1.0, 2.5)
    text = tags.render_think_answer(" why ", "what\n")
    assert (tags.think_text(text), tags.answer_text(text)) == ("why", "what")


REWRITES = {  # name: (text, times 10 and rounded)
    "floats": ("<box>[.15, 0.25,1,2e0]</box>", "<box>[2,2,10,20]</box>"),  # 1.5 -> 2 and 2.5 -> 2: half to even
    "two": ("a<box>[0,0,1,1]</box>b<box>[1,1,2,2]</box>c", "a<box>[0,0,10,10]</box>b<box>[10,10,20,20]</box>c"),
    "over lines": ("<box>[0,0,\n1,1]</box>", "<box>[0,0,10,10]</box>"),
    "nested stays": ("<box>[[0,0,1,1]]</box>", "<box>[[0,0,1,1]]</box>"),
    "open stays": ("<box>[0,0,1,1]", "<box>[0,0,1,1]"),
    "empty stays": ("<box>[]</box>", "<box>[]</box>"),
    "opened twice": (
        "<box>[ <box>[0,0,1,1] </box><box>[0,0,1,1]</box>",
        "<box>[ <box>[0,0,1,1] </box><box>[0,0,10,10]</box>",
    ),
}


@pytest.mark.parametrize("name", REWRITES)
def test_rewrite_boxes(name):
    text, expected = REWRITES[name]
    assert tags.rewrite_boxes(text, lambda box: [10 * value for value in box]) == expected


@pytest.mark.parametrize("content", ["1,2,3", "1,2,3,4,5", "1,2,3,x", "[1,2,3,4", "1,2,3,nan", " "])
def test_rewrite_refuses_what_is_no_box(content):
    with pytest.raises(InputError, match="four numbers"):
        tags.rewrite_boxes(f"<box>[{content}]</box>", lambda box: box)


ONE = ((1, 2, 3, 4),)
TWO = ((1, 2, 3, 4), (5, 6, 7, 8))
CLAIMS = {  # name: (text, [(name, boxes, time)])
    "plain": ("<obj>cat</obj><box>[1,2,3,4]</box>at<t>5</t>s", [("cat", ONE, 5)]),
    "two boxes": ("<obj>a</obj><box>[1,2,3,4]</box><box>[5,6,7,8]</box>at<t>5</t>s", [("a", TWO, 5)]),
    "two in one tag": ("<obj>a</obj><box>[1,2,3,4],[5,6,7,8]</box>at<t>5</t>s", [("a", TWO, 5)]),
    "nested": ("<obj>a</obj><box>[[1,2,3,4]]</box>at<t>5</t>s", [("a", None, 5)]),
    "no JSON": ("<obj>a</obj><box>[1,2,x,4]</box>at<t>5</t>s", [("a", None, 5)]),
    "three numbers": ("<obj>a</obj><box>[1,2,3]</box>at<t>5</t>s", [("a", (None,), 5)]),
    "strings": ('<obj>a</obj><box>["1","2",true,null]</box>at<t>5</t>s', [("a", ("1 2 1 nan",), 5)]),
    "words": ('<obj>a</obj><box>["a","b","c","d"]</box>at<t>5</t>s', [("a", (None,), 5)]),
    "line break in box": ("<obj>a</obj><box>[1,2,\n3,4]</box>at<t>5</t>s", [("a", (), 5)]),
    "bad time": ("<obj>a</obj><box>[1,2,3,4]</box>at<t>0:05</t>s", [("a", ONE, None)]),
    "odd times": ("<obj>a</obj><box>[1,2,3,4]</box>at<t> -1e1 </t>s", [("a", ONE, -10)]),
    "stray object": ("<obj>x</obj> and <obj>y</obj><box>[1,2,3,4]</box>at<t>5</t>s", [("x</obj> and <obj>y", ONE, 5)]),
    "space between": ("<obj>a</obj> <box>[1,2,3,4]</box>at<t>5</t>s", []),
    "space before at": ("<obj>a</obj><box>[1,2,3,4]</box> at<t>5</t>s", []),
    "no s": ("<obj>a</obj><box>[1,2,3,4]</box>at<t>5</t>", []),
    "box run over text": ("<obj>a</obj><box>[1,2,3,4]</box>x<box>[5,6,7,8]</box>at<t>5</t>s", [("a", TWO, 5)]),
}  # fmt: skip


@pytest.mark.parametrize("name", CLAIMS)
def test_parse_claims(name):
    text, expected = CLAIMS[name]
    parsed = tags.parse_claims(text)
    if name == "strings":  # nan is not equal to itself
        (claim,) = parsed
        assert claim.boxes is not None and claim.boxes[0] is not None
        assert " ".join(f"{value:g}" for value in claim.boxes[0]) == "1 2 1 nan"
        return
    assert [(claim.name, claim.boxes, claim.time_s) for claim in parsed] == expected


def test_infinite_and_huge_numbers_are_numbers():
    digits = "9" * 400
    (claim,) = tags.parse_claims(f"<obj>a</obj><box>[-{digits},0,{digits},NaN]</box>at<t>inf</t>s")
    assert claim.boxes is not None and claim.boxes[0] is not None
    assert [str(value) for value in claim.boxes[0]] == ["-inf", "0.0", "inf", "nan"]
    assert claim.time_s == float("inf")


# The released grammar as regular expressions (src/r1-v/src/open_r1/reward_func.py), exact but exponential.
CLAIM = re.compile(r"<obj>(.*?)</obj>((?:<box>\[.*?\]</box>)+)at<t>(.*?)</t>s", re.DOTALL)


@settings(max_examples=1500, deadline=None)
@given(SHORT_TEXTS)
def test_scanners_equal_the_regular_expressions(text):
    think = re.search(r"<think>(.*?)</think>", text, re.DOTALL)
    answer = re.search(r"<answer>\s*(.*?)\s*</answer>", text, re.DOTALL)
    assert tags.think_text(text) == (think and think.group(1).strip())
    assert tags.answer_text(text) == (answer and answer.group(1).strip())
    assert [(claim.start, claim.end) for claim in tags.parse_claims(text)] == [m.span() for m in CLAIM.finditer(text)]
    for claim, (name, run, time_text) in zip(tags.parse_claims(text), CLAIM.findall(text), strict=True):
        assert (claim.name, claim.time_text) == (name, time_text)
        boxes = re.findall(r"\[.*?\]", run)
        assert (claim.boxes is None) == any(not _is_json(box) for box in boxes)
        assert claim.boxes is None or len(claim.boxes) == len(boxes)
    assert len(tags.parse_times(text)) == len(re.findall(r"<t>([\d.]+)</t>s", text))
    span = re.search(r"<t>(\d+\.?\d*)</t>s to <t>(\d+\.?\d*)</t>s", text)
    assert tags.parse_span(text) == (span and tuple(map(float, span.groups())))
    box = re.search(r"<box>(\[.*?\])</box>", text)
    assert tags.first_box_content(text) == (box and box.group(1))
    assert len(tags.parse_boxes(text)) == sum(map(_is_json, re.findall(r"<box>(\[.*?\])</box>", text)))
    assert tags.has_one_word_box(text) == bool(re.search(r"<obj>(\w+)</obj><box>(\[.*?\])</box>", text))
    assert tags.has_adjacent_box(text) == bool(re.search(r"<obj>.*?</obj><box>\[.*?\]</box>", text, re.DOTALL))
    assert tags.counts_match(text, "t", "obj") == (
        text.count("<t>") == text.count("</t>") and text.count("<obj>") == text.count("</obj>")
    )


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


HOSTILE = {
    "obj": "<obj>",
    "box": "<box>[",
    "obj box": "<obj></obj><box>[",
    "closed boxes": "<box>[]</box>",
    "boxes without end": "<obj></obj><box>[]</box>x",
    "box, line": "<box>[\n",
    "t": "<t>",
    "digits": "<t>1",
    "span": "<t>1</t>s to ",
    "brackets": "[",
    "claim without s": "<obj>a</obj><box>[1,2,3,4]</box>at<t>5</t>",
    "one-word": "<obj>a</obj><box>[",
    "think": "<think>",
}


@pytest.mark.parametrize("ending", ["", "]</box>at<t>1</t>s", "\n]</box>"])
@pytest.mark.parametrize("name", HOSTILE)
def test_time_is_linear_in_hostile_text(name, ending):
    """Four times the text in at most nine times the time (quadratic would be sixteen), after the faster of two."""

    def seconds(length: int) -> float:
        text = (HOSTILE[name] * (length // len(HOSTILE[name]) + 1))[:length] + ending
        taken = []
        for _ in range(2):
            start = time.process_time()
            for parse in (
                tags.think_text, tags.answer_text, tags.parse_claims, tags.parse_times, tags.parse_span,
                tags.parse_boxes, tags.parse_first_box, tags.has_adjacent_box, tags.has_one_word_box,
            ):  # fmt: skip
                parse(text)
            tags.counts_match(text, "think", "answer", "obj", "box", "t")
            taken.append(time.process_time() - start)
        return min(taken)

    # The constant keeps the ratio of two tiny times from meaning anything.
    assert seconds(100_000) < 9 * seconds(25_000) + 5e-3

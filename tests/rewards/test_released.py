"""The rule set `released`: the table of the released code, and its semantics case by case, worked by hand."""

import math

import numpy as np
import pytest
import reward_cases as cases

from openo3_jax.rewards import score
from openo3_jax.rewards.rules import TERMS

claim, completion = cases.claim, cases.completion


def test_equals_the_released_table():
    rows = cases.read_golden()
    rewards = score.score(
        rows, [row["completion"] for row in rows], progress=[row["step_percent"] for row in rows], rules="released"
    )
    wrong = []
    for index, row in enumerate(rows):
        for term in TERMS:
            expected, found = row["expected"][term], float(rewards.terms[term][index])
            raised = expected is None
            if abs(found - (expected or 0.0)) > 1e-6 or (raised and rewards.applies[term][index]):
                wrong.append((row["id"], row["kind"], term, expected, found))
    assert not wrong
    assert len(rows) == 482


def released(record: dict, text: str, term: str, progress: float = 1.0) -> float:
    return float(score.score([record], [text], progress=progress, rules="released").terms[term][0])


SPATIAL = {  # name: (think, thk_spatial worked by hand)
    "perfect": (claim("cat", cases.CAT, 10), 1.0),
    "just inside the gate": (claim("cat", cases.CAT, 9.01), 1.0),
    "at the gate": (claim("cat", cases.CAT, 9), 0.0),
    "late": (claim("cat", cases.CAT, 14.9), 1.0),
    "late, nearer to the gated frame": (claim("cat", cases.CAT, 15.1), 1.0),
    "last moment before the second frame": (claim("cat", cases.CAT, 18.9), 1.0),
    "very late": (claim("dog", cases.DOG, 500), 1.0),
    "infinitely late is nearest to the first": (claim("cat", cases.CAT, "inf"), 1.0),
    "nan": (claim("cat", cases.CAT, "nan"), 0.0),
    "half of the box": (claim("cat", "[0,0,20,10]", 10), 0.5),
    "another name": (claim("sofa", cases.CAT, 10), 1.0),
    "one of two gold boxes": (claim("ball", "[0,0,10,10]", 20), 0.5),
    "both gold boxes": (claim("ball", "[0,0,10,10],[20,0,30,10]", 20), 1.0),
    "best object": (claim("ball", cases.DOG + ",[0,0,10,10]", 20), 1.0),
    "no numbers": (claim("cat", '["a","b","c","d"]', 10), 0.0),
    "dropped for its box": (claim("cat", cases.CAT, 10) + claim("cat", "[1,2,x]", 10), 1.0),
    "dropped for its time": (claim("cat", cases.CAT, 10) + claim("cat", cases.CAT, "0:10"), 1.0),
    "counted with three numbers": (claim("cat", cases.CAT, 10) + claim("cat", "[1,2,3]", 10), 0.5),
    "counted though gated": (claim("cat", cases.CAT, 10) + claim("cat", cases.CAT, 1), 0.5),
    "box over two lines": (claim("cat", "[0,0,\n20,20]", 10), 0.0),
    "strings": (claim("cat", '["0","0","20","20"]', 10), 1.0),
    "null": (claim("cat", "[0,null,20,20]", 10), 0.0),
    "reversed": (claim("cat", "[20,20,0,0]", 10), 0.0),
    "time in other digits": (claim("cat", cases.CAT, "\u0661\u0660"), 1.0),
}


@pytest.mark.parametrize("name", SPATIAL)
def test_thk_spatial(name):
    think, expected = SPATIAL[name]
    assert released(cases.spatial_record(), completion(think), "thk_spatial") == pytest.approx(expected, abs=1e-6)


def test_thk_spatial_needs_an_answer():
    text = f"<think>{claim('cat', cases.CAT, 10)}</think>"
    assert released(cases.spatial_record(), text, "thk_spatial") == 0.0


def test_a_key_frame_at_minus_one_is_unusable():
    record = cases.spatial_record(key_frames=[{"idx": 1, "time": -1}, {"idx": 2, "time": 20}])
    assert released(record, completion(claim("cat", cases.CAT, -1)), "thk_spatial") == 0.0


def test_the_first_of_two_frames_at_one_time():
    record = cases.spatial_record(key_frames=[{"idx": 2, "time": 20}, {"idx": 1, "time": 20}])
    text = completion(claim("dog", cases.DOG, 20) + claim("cat", cases.CAT, 20))
    # Both meet frame 2: the dog earns 1, the cat's box (1/4 + 0) / 2 with the two of the ball.
    assert released(record, text, "thk_spatial") == pytest.approx((1 + 1 / 8) / 2)


def test_a_frame_without_objects_and_an_object_without_boxes_earn_nothing():
    record = cases.spatial_record(key_items={"1": {}, "2": {"dog": [], "cat": None}})
    rewards = score.score([record], [completion(claim("cat", cases.CAT, 10))], rules="released")
    assert rewards.terms["thk_spatial"][0] == 0.0 and rewards.applies["thk_spatial"][0]


def test_a_frame_that_is_missing_in_the_record_voids_the_term_only_when_cited():
    record = cases.spatial_record()
    del record["key_items"]["1"]
    texts = [completion(claim("cat", cases.CAT, 10)), completion(claim("dog", cases.DOG, 20))]
    rewards = score.score([record] * 2, texts, rules="released")
    assert rewards.applies["thk_spatial"].tolist() == [False, True]
    assert rewards.terms["thk_spatial"].tolist() == [0.0, 1.0]


VISUAL = {  # name: (text, ans_viou, thk_spatial, format); the true box is [10,10,30,30] of what the model saw
    "perfect": (completion("<obj>cup</obj><box>[10,10,30,30]</box>", "<box>[10,10,30,30]</box>"), 1, 1, 1),
    "half": (completion("no box", "<box>[10,10,30,20]</box>"), 0.5, 0, 0.5),
    "best box in think": (completion("<box>[10,10,30,20]</box> <box>[0,0,1,1]</box> <box>[x]</box>"), 0, 0.5, 0.5),
    "first box in the answer": (completion("", "<box>[0,0,1,1]</box><box>[10,10,30,30]</box>"), 0, 0, 0.5),
    "nested": (completion("<box>[[10,10,30,30]]</box>", "<box>[[10,10,30,30]]</box>"), 0, 0, 0.5),
    "two words": (completion("<obj>red cup</obj><box>[10,10,30,30]</box>"), 0, 1, 0.5),
    "two words and a time": (completion("<obj>red cup</obj><box>[10,10,30,30]</box>at<t>1</t>s"), 0, 1, 1),
    "one word in the answer": (completion("", "<obj>cup</obj><box>[10,10,30,30]</box>"), 1, 0, 1),
    "no answer": ("<think><obj>cup</obj><box>[10,10,30,30]</box></think>", 0, 0, 0),
}  # fmt: skip


@pytest.mark.parametrize("name", VISUAL)
def test_visual(name):
    text, *expected = VISUAL[name]
    rewards = score.score([cases.visual_record()], [text], rules="released")
    found = [float(rewards.terms[term][0]) for term in ("ans_viou", "thk_spatial", "format")]
    assert found == pytest.approx(expected, abs=1e-6)


TEMPORAL = {  # name: (text, ans_tiou, thk_temporal_segment); the truth is 10 to 20 s
    "perfect": (completion("<t>10</t>s <t>20.0</t>s", "From <t>10</t>s to <t>20</t>s"), 1, 1),
    "half": (completion("<t>5</t>s <t>15</t>s", "<t>15.</t>s to <t>20</t>s"), 0.5, 0.5),
    "reversed": (completion("", "<t>20</t>s to <t>10</t>s"), 0, 0),
    "no digit before the point": (completion("", "<t>.5</t>s to <t>20</t>s"), 0, 0),
    "two spaces": (completion("", "<t>10</t>s  to <t>20</t>s"), 0, 0),
    "second pair": (completion("", "<t>10</t>s, <t>10</t>s to <t>15</t>s"), 0.5, 0),
    "one bad number voids": (completion("<t>15</t>s <t>1.2.3</t>s"), 0, 0),
    "minus is no time": (completion("<t>15</t>s <t>-3</t>s"), 0, 1),
    "times in the answer do not count": (completion("", "<t>15</t>s"), 0, 0),
    "no length": (completion("", "<t>15</t>s to <t>15</t>s"), 0, 0),
}


@pytest.mark.parametrize("name", TEMPORAL)
def test_temporal(name):
    text, *expected = TEMPORAL[name]
    for record in (cases.temporal_record(), cases.temporal_record(answer="(10, 20.0)"), cases.temporal_mcq_record()):
        rewards = score.score([record], [text], rules="released")
        found = [float(rewards.terms[term][0]) for term in ("ans_tiou", "thk_temporal_segment")]
        assert found == pytest.approx(expected, abs=1e-6)


POINT = {  # name: (think, progress, thk_temporal_point); key frames at 10 and 20 s
    "at a frame": ("<t>10</t>s", 0.0, 1.0),
    "one sigma at the end": ("<t>21</t>s", 1.0, math.exp(-0.5)),
    "one sigma at the start": ("<t>24</t>s", 0.0, math.exp(-0.5)),
    "half way, sigma is 2": ("<t>8</t>s", 0.5, math.exp(-0.5)),
    "sigma stays 1 from three quarters on": ("<t>8</t>s", 0.75, math.exp(-2)),
    "mean": ("<t>10</t>s <t>15</t>s", 1.0, (1 + math.exp(-12.5)) / 2),
    "none": ("10 s", 1.0, 0.0),
    "void": ("<t>10</t>s <t>.</t>s", 1.0, 0.0),
    "too large for a float": (f"<t>{'9' * 400}</t>s", 1.0, 0.0),
}


@pytest.mark.parametrize("name", POINT)
def test_thk_temporal_point(name):
    think, progress, expected = POINT[name]
    found = released(cases.spatial_record(), completion(think), "thk_temporal_point", progress)
    assert found == pytest.approx(expected, rel=1e-6)


OPTIONS = {  # name: (general answer, does it count)
    **{f"form {text}": (text, 1) for text in ("B", "B.", "(B)", "[B]", "  B\n")},
    **{f"not {text}": (text, 0) for text in ("b", "(B).", "[B)", "(B", "B. yes", "Option B", "", "()", "A")},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_ans_acc_of_options(name):
    text, expected = OPTIONS[name]
    assert released(cases.mcq_record(), completion("", text), "ans_acc") == expected
    header = f"<t>1</t>s to <t>2</t>s. Correct Option: {text}"
    assert released(cases.temporal_mcq_record(), completion("", header), "ans_acc") == expected
    assert released(cases.temporal_mcq_record(), completion("", header + " Correct Option: C"), "ans_acc") == expected
    assert released(cases.temporal_mcq_record(), completion("", text), "ans_acc") == 0  # no header


FORMAT = {  # name: (record, text, format)
    "general": (cases.mcq_record(), completion("", "B"), 1),
    "no think": (cases.mcq_record(), "<answer>B</answer>", 0),
    "think after answer": (cases.mcq_record(), "<answer>B</answer><think></think>", 1),
    "think opened twice": (cases.mcq_record(), "<think>" + completion("", "B"), 0),
    "obj not closed in think": (cases.mcq_record(), completion("<obj>", "B"), 0),
    "obj not closed in the answer": (cases.mcq_record(), completion("", "<obj>B"), 1),
    "two times": (cases.temporal_record(), completion("<t>1</t>s <t>2</t>"), 1),
    "one time": (cases.temporal_record(), completion("<t>1</t>s"), 0.5),
    "each tag, apart": (cases.spatial_record(), completion("<obj>a</obj> <box></box> <t></t>"), 1),
    "no box": (cases.spatial_record(), completion("<obj>a</obj> <t></t>"), 0.5),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMAT)
def test_format(name):
    record, text, expected = FORMAT[name]
    assert released(record, text, "format") == expected


def test_maxima_per_task():
    """The sum of a perfect answer: 4, 3, 3, 4, 2 and 2 of the seven terms can be earned at all."""
    box = "<obj>cup</obj><box>[10,10,30,30]</box>"
    times, span = "<t>10</t>s <t>20</t>s", "<t>10</t>s to <t>20</t>s"
    perfect = [
        (cases.spatial_record(), completion(claim("cat", cases.CAT, 10), "A cat meets a dog.")),
        (cases.visual_record(), completion(box, box)),
        (cases.temporal_record(), completion(times, span)),
        (cases.temporal_mcq_record(), completion(times, span + " Correct Option: B")),
        (cases.mcq_record(), completion("", "B")),
        (cases.free_form_record(), completion("", "A red car drives away!")),
    ]
    rewards = score.score(*zip(*perfect, strict=True), rules="released")
    np.testing.assert_allclose(rewards.total, [4, 3, 3, 4, 2, 2], rtol=1e-6)
    assert [sum(rewards.applies[term][i] for term in TERMS) for i in range(6)] == [4, 3, 3, 4, 2, 2]

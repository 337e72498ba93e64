"""The rule set `paper`, worked by hand; and every field of the rules turned alone."""

import dataclasses
import math

import pytest
import reward_cases as cases

from openo3_jax.errors import InputError
from openo3_jax.rewards import rules, score
from openo3_jax.rewards.rules import HARDENED, PAPER, RELEASED, TERMS, Weight

claim, completion = cases.claim, cases.completion


def term(record: dict, text: str, name: str, under: rules.RewardRules = PAPER, progress: float = 1.0) -> float:
    return float(score.score([record], [text], progress=progress, rules=under).terms[name][0])


SPATIAL = {  # name: (think, thk_spatial under the paper's rules, worked by hand)
    "perfect": (claim("cat", cases.CAT, 10), 1.0),
    "3 s early": (claim("cat", cases.CAT, 7), 1.0),
    "3 s late": (claim("cat", cases.CAT, 13), 1.0),
    "more than 3 s early": (claim("cat", cases.CAT, 6.9), 0.0),
    "more than 3 s late": (claim("cat", cases.CAT, 13.1), 0.0),
    "very late": (claim("dog", cases.DOG, 500), 0.0),
    "nearest of all frames, then the gate": (claim("cat", cases.CAT, 15.1), 0.0),
    "a tie goes to the first": (claim("cat", cases.CAT, 15), 0.0),  # frame 10 s, 5 s away
    "nan": (claim("cat", cases.CAT, "nan"), 0.0),
    "best of all boxes of the frame": (claim("ball", "[0,0,10,10]", 20), 1.0),
    "best of the claim's boxes": (claim("x", f"[0,0,1,1],{cases.DOG}", 20), 1.0),
    "another name": (claim("sofa", cases.CAT, 10), 1.0),
    "a bare time counts": (claim("cat", cases.CAT, 10) + " then <t>20</t>s", 0.5),
    "a dropped claim's time counts": (claim("cat", cases.CAT, 10) + claim("cat", "[1,2,x]", 10), 0.5),
    "a bad time does not count": (claim("cat", cases.CAT, 10) + "<t>1.2.3</t>s", 1.0),
    "an odd time of a claim counts": (claim("cat", cases.CAT, 10) + claim("cat", cases.CAT, "-1e9"), 0.5),
    "no claim": ("<t>10</t>s", 0.0),
    "no time": ("a cat", 0.0),
}


@pytest.mark.parametrize("name", SPATIAL)
def test_thk_spatial(name):
    think, expected = SPATIAL[name]
    assert term(cases.spatial_record(), completion(think), "thk_spatial") == pytest.approx(expected, abs=1e-6)


def test_a_tie_goes_to_the_first_frame():
    record = cases.spatial_record(key_frames=[{"idx": 1, "time": 10}, {"idx": 2, "time": 14}])
    assert term(record, completion(claim("cat", cases.CAT, 12)), "thk_spatial") == 1.0
    assert term(record, completion(claim("dog", cases.DOG, 12)), "thk_spatial") == 0.0


def test_visual_qa_has_no_think_term():
    text = completion("<obj>cup</obj><box>[10,10,30,30]</box>", "<box>[10,10,30,30]</box>")
    rewards = score.score([cases.visual_record()], [text])
    assert not rewards.applies["thk_spatial"][0]
    assert rewards.total[0] == 2.0  # ans_viou and format


def test_temporal_mcq_keeps_both_terms():
    text = completion("<t>10</t>s <t>15</t>s", "<t>10</t>s to <t>15</t>s Correct Option: B")
    rewards = score.score([cases.temporal_mcq_record()], [text])
    assert [float(rewards.terms[name][0]) for name in TERMS] == [1, 0.5, 0, 0, 1, 0, 1]


FORMAT = {  # name: (record, think, format)
    "claim": (cases.spatial_record(), claim("cat", "[1,2,3,4]", 5), 1.0),
    "not adjacent": (cases.spatial_record(), "<obj>a</obj> <box>[1,2,3,4]</box>at<t>5</t>s", 0.5),
    "no at": (cases.spatial_record(), "<obj>a</obj><box>[1,2,3,4]</box><t>5</t>s", 0.5),
    "apart": (cases.spatial_record(), "<obj>a</obj> <box>[1,2,3,4]</box> <t>5</t>s", 0.5),
    "visual": (cases.visual_record(), "<obj>a cup</obj><box>[1,2,3,4]</box>", 1.0),
    "visual, apart": (cases.visual_record(), "<obj>cup</obj> <box>[1,2,3,4]</box> <t>5</t>s", 0.5),
    "temporal": (cases.temporal_record(), "<t>1</t>s <t>2</t>s", 1.0),
    "temporal, one": (cases.temporal_record(), "<t>1</t>s", 0.5),
    "general": (cases.free_form_record(), "", 1.0),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMAT)
def test_format(name):
    record, think, expected = FORMAT[name]
    assert term(record, completion(think), "format") == expected


def test_the_one_word_rule_is_gone():
    text = completion("", "<obj>cup</obj><box>[1,2,3,4]</box>")
    assert (term(cases.visual_record(), text, "format"), term(cases.visual_record(), text, "format", RELEASED)) == (
        0.5,
        1,
    )


# Every field alone: (changed field, record, think, term, value in the paper's rules, value with the change).
PERFECT, SPATIAL_RECORD = claim("cat", cases.CAT, 10), cases.spatial_record()
FIELDS = {
    "gate": ({"gate": "early_only"}, SPATIAL_RECORD, claim("dog", cases.DOG, 24), "thk_spatial", 0, 1),
    "gate_s": ({"gate_s": 1.0}, SPATIAL_RECORD, claim("cat", cases.CAT, 12), "thk_spatial", 1, 0),
    "no gate": ({"gate_s": math.inf}, SPATIAL_RECORD, claim("dog", cases.DOG, 500), "thk_spatial", 0, 1),
    # 15.1 is nearest to 20, 4.9 s away; with a gate of 5.5 s first, both survive and 20 still wins.
    "match": (
        {"match": "gate_then_nearest", "gate": "early_only"},
        SPATIAL_RECORD, claim("cat", cases.CAT, 15.1), "thk_spatial", 0, 1,
    ),
    "box_overlap": ({"box_overlap": "object_mean"}, SPATIAL_RECORD, claim("b", "[0,0,10,10]", 20), "thk_spatial",
                    1, 0.5),
    "claim_denominator": ({"claim_denominator": "claims"}, SPATIAL_RECORD, PERFECT + "<t>1</t>s", "thk_spatial",
                          0.5, 1),
    "visual_thk_spatial": (
        {"visual_thk_spatial": True}, cases.visual_record(), "<box>[10,10,30,20]</box>", "thk_spatial", 0, 0.5,
    ),
    "sigma_start_s": ({"sigma_start_s": 2.0}, SPATIAL_RECORD, "<t>8</t>s", "thk_temporal_point",
                      math.exp(-0.125), math.exp(-0.5)),
    "sigma_end_s": ({"sigma_end_s": 4.0}, SPATIAL_RECORD, "<t>8</t>s", "thk_temporal_point",
                    math.exp(-0.125), math.exp(-0.125)),
    "format_evidence": (
        {"format_evidence": "counts"}, SPATIAL_RECORD, "<obj>a</obj> <box></box> <t></t>", "format", 0.5, 1,
    ),
    "format_one_word_object": (
        {"format_one_word_object": True}, cases.visual_record(), "<obj>a</obj><box>[]</box>", "format", 1, 1,
    ),
    "malformed_in_denominator": (
        {"malformed_in_denominator": True}, SPATIAL_RECORD, PERFECT + "<obj>dog</obj>", "thk_spatial", 1, 0.5,
    ),
    "repeats_once": ({"repeats_once": True}, SPATIAL_RECORD, PERFECT * 3 + claim("cat", "[0,0,1,1]", 5), "thk_spatial",
                     0.75, 0.5),
    "repeated times": ({"repeats_once": True}, cases.temporal_record(), "<t>15</t>s <t>15</t>s <t>5</t>s",
                       "thk_temporal_segment", 2 / 3, 0.5),
    "times of a half second": ({"repeats_once": True}, cases.temporal_record(), "<t>15</t>s <t>15.4</t>s <t>5</t>s",
                               "thk_temporal_segment", 2 / 3, 0.5),
    "once_per_box": ({"once_per_box": True}, SPATIAL_RECORD, PERFECT + claim("cat", "[0,0,20,19]", 10.1) * 2,
                     "thk_spatial", (1 + 0.95 * 2) / 3, 1 / 3),
    "a box that has not earned": ({"once_per_box": True}, SPATIAL_RECORD, claim("cat", "[60,0,80,20]", 10) + PERFECT,
                                  "thk_spatial", 0.5, 0.5),
    "another box": ({"once_per_box": True}, SPATIAL_RECORD, PERFECT + claim("dog", cases.DOG, 20), "thk_spatial", 1, 1),
    "parsed claim": ({"format_evidence": "parsed"}, SPATIAL_RECORD, PERFECT, "format", 1, 1),
    "no number as time": ({"format_evidence": "parsed"}, SPATIAL_RECORD, claim("cat", cases.CAT, "time"), "format", 1,
                          0.5),
    "no box in the claim": ({"format_evidence": "parsed"}, SPATIAL_RECORD, claim("cat", "[]", 10), "format", 1, 0.5),
    "parsed box": ({"format_evidence": "parsed"}, cases.visual_record(), "<obj>a</obj><box>[1,2,3,4]</box>", "format",
                   1, 1),
    "letters as box": ({"format_evidence": "parsed"}, cases.visual_record(), "<obj>a</obj><box>[x1,y1,x2,y2]</box>",
                       "format", 1, 0.5),
    "parsed times": ({"format_evidence": "parsed"}, cases.temporal_record(), "<t>1</t>s <t>2</t>s", "format", 1, 1),
    "empty times": ({"format_evidence": "parsed"}, cases.temporal_record(), "<t></t>s <t></t>s", "format", 1, 0.5),
    "nothing asked": ({"format_evidence": "parsed"}, cases.mcq_record(), "", "format", 1, 1),
    "key_frame_recall": ({"key_frame_recall": True}, SPATIAL_RECORD, PERFECT, "thk_spatial", 1, 0.5),
    "recall of times": ({"key_frame_recall": True}, SPATIAL_RECORD, "<t>10</t>s", "thk_temporal_point", 1, 0.5),
    "compare_names": ({"compare_names": True}, SPATIAL_RECORD, claim("sofa", cases.CAT, 10), "thk_spatial", 1, 0),
    "names in any case": ({"compare_names": True}, SPATIAL_RECORD, claim(" CAT ", cases.CAT, 10), "thk_spatial", 1, 1),
    "one_box_per_claim": ({"one_box_per_claim": True}, SPATIAL_RECORD, claim("cat", f"[0,0,1,1],{cases.CAT}", 10)
                          + claim("cat", cases.CAT, 10), "thk_spatial", 1, (1 / 400 + 1) / 2),
    "min_iou": ({"min_iou": 0.3}, SPATIAL_RECORD, claim("cat", "[0,0,20,5]", 10), "thk_spatial", 0.25, 0),
    "one_bad_time_voids": (
        {"one_bad_time_voids": False}, cases.temporal_record(), "<t>15</t>s <t>..</t>s", "thk_temporal_segment", 0, 1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FIELDS)
def test_each_field_alone(name):
    change, record, think, name_of_term, before, after = FIELDS[name]
    changed = dataclasses.replace(PAPER, **change)
    progress = 0.0
    assert term(record, completion(think), name_of_term, PAPER, progress) == pytest.approx(before, abs=1e-6)
    assert term(record, completion(think), name_of_term, changed, progress) == pytest.approx(after, abs=1e-6)


def test_sigma_end():
    """At the end of training sigma is what the field says: one sigma away is exp(-1/2)."""
    for end_s in (1.0, 4.0):
        changed = dataclasses.replace(PAPER, sigma_end_s=end_s)
        found = term(SPATIAL_RECORD, completion(f"<t>{10 - end_s}</t>s"), "thk_temporal_point", changed)
        assert found == pytest.approx(math.exp(-0.5), rel=1e-6)
    late = dataclasses.replace(PAPER, sigma_end_progress=1.0)
    found = term(SPATIAL_RECORD, completion("<t>7.5</t>s"), "thk_temporal_point", late, progress=0.5)
    assert found == pytest.approx(math.exp(-0.5), rel=1e-6)  # sigma(1/2) = 2.5 s


def test_one_word_rule_and_letter_alone():
    text = completion("", "<obj>cup</obj><box>[1,2,3,4]</box>")
    assert term(cases.visual_record(), text, "format", dataclasses.replace(PAPER, format_one_word_object=True)) == 1
    text = completion("", "<t>10</t>s to <t>20</t>s Correct Option: B")
    rewards = score.score(
        [cases.temporal_mcq_record()], [text], rules=dataclasses.replace(PAPER, temporal_mcq_terms="letter")
    )
    assert not rewards.applies["ans_tiou"][0] and rewards.terms["ans_acc"][0] == 1


# "a b c" against "a c b": unigrams 3/3, bigrams 0/2, longest common subsequence 2/3.
@pytest.mark.parametrize(("which", "expected"), [("rouge1", 1), ("rouge2", 0), ("rougeL", 2 / 3), ("mean", 5 / 9)])
def test_rouge(which, expected):
    changed = dataclasses.replace(PAPER, rouge=which)
    found = term(cases.free_form_record(answer="a b c"), completion("", "a c b"), "ans_acc", changed)
    assert found == pytest.approx(expected, rel=1e-6)


GATES = {  # name: (rules, annotated s, cited s, thk_spatial in float64); float32 says the opposite
    "32.91 - 31.91 is 1 - 3.6e-15": (RELEASED, 32.91, 31.91, 1.0),
    "16.39 - 15.39 is 1": (RELEASED, 16.39, 15.39, 0.0),
    "16.29 - 13.29 is 3": (PAPER, 16.29, 13.29, 1.0),
    "16.01 - 13.01 is 3 + 1.8e-15": (PAPER, 16.01, 13.01, 0.0),
}


@pytest.mark.parametrize("name", GATES)
def test_gates_are_float64(name):
    under, annotated_s, cited_s, expected = GATES[name]
    record = cases.spatial_record(key_frames=[{"idx": 1, "time": annotated_s}])
    assert term(record, completion(claim("cat", cases.CAT, cited_s)), "thk_spatial", under) == expected


def test_weights():
    weights = (Weight("format", "*", 0.5), Weight("format", cases.mcq_record()["task"], 2.0))
    rewards = score.score(
        [cases.mcq_record(), cases.free_form_record()],
        [completion("", "B"), completion("", "nothing alike")],
        rules=dataclasses.replace(PAPER, weights=weights),
    )
    assert rewards.total.tolist() == [3.0, 0.5]
    assert rewards.terms["format"].tolist() == [1.0, 1.0]


def test_options_against_gaming_are_off_in_both_presets():
    fields = ("malformed_in_denominator", "repeats_once", "once_per_box", "key_frame_recall", "compare_names")
    for field in (*fields, "one_box_per_claim"):
        assert not getattr(PAPER, field) and not getattr(RELEASED, field) and getattr(HARDENED, field)


def test_change_rules():
    changed = rules.change_rules(RELEASED, ["gate_s=2", "compare_names=true", "rouge=rougeL", "weight.format=0"])
    assert changed == dataclasses.replace(
        RELEASED, gate_s=2.0, compare_names=True, rouge="rougeL", weights=(Weight("format", "*", 0.0),)
    )


@pytest.mark.parametrize(
    "change",
    ["gate_s", "gate=sideways", "tau=3", "gate_s=soon", "compare_names=1", "weight.speed=1", "weight.format@here=1",
     "gate_s=-1", "sigma_end_s=0", "min_iou=2", "weight.format=inf"],
)  # fmt: skip
def test_change_rules_refuses(change):
    with pytest.raises(InputError, match=change.partition("=")[0].partition(".")[0].partition("@")[0]):
        rules.change_rules(PAPER, [change])


def test_unknown_rules_are_named():
    with pytest.raises(InputError, match="paper, released, hardened"):
        score.score([cases.mcq_record()], [""], rules="strict")


def test_rules_are_a_preset_and_changes():
    assert rules.get_rules("released") is rules.RELEASED
    expected = rules.change_rules(PAPER, ["gate_s=1", "weight.format=0.5"])
    assert rules.get_rules("paper,gate_s=1,weight.format=0.5") == expected != PAPER
    with pytest.raises(InputError, match="change 'gate'"):
        rules.get_rules("paper,gate")
    with pytest.raises(InputError, match="rules='gate_s=1'; expected paper, released, hardened"):
        rules.get_rules("gate_s=1")

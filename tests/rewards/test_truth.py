"""Records: what is missing is refused by index and field, what is malformed makes its term not apply."""

from collections.abc import Sequence

import pytest
import reward_cases as cases

from openo3_jax.errors import InputError
from openo3_jax.rewards import score
from openo3_jax.rewards.rules import RELEASED

GOOD = cases.mcq_record()


def without(record: dict, field: str) -> dict:
    return {name: value for name, value in record.items() if name != field}


REFUSED = {  # name: (record, what the message names)
    "no dict": (["task"], "list"),
    "no task": (without(GOOD, "task"), "task"),
    "unknown task": (cases.mcq_record(task="video QA"), "General video QA MCQ"),
    "task of the wrong type": (cases.mcq_record(task=["General video QA MCQ"]), "task"),
    "no answer": (without(GOOD, "answer"), "answer"),
    "null answer": (cases.mcq_record(answer=None), "answer"),
    "no key frames": (without(cases.spatial_record(), "key_frames"), "key_frames"),
    "null key frames": (cases.spatial_record(key_frames=None), "key_frames"),
    "no key items": (without(cases.spatial_record(), "key_items"), "key_items"),
    "null key items": (cases.spatial_record(key_items=None), "key_items"),
    "key frame without time": (cases.spatial_record(key_frames=[{"idx": 1}]), "key_frames.0.*time"),
    "key frame of the wrong type": (cases.spatial_record(key_frames=[3]), "key_frames.0"),
    "time in words": (cases.spatial_record(key_frames=[{"idx": 1, "time": "ten"}]), "time"),
    "items of the wrong type": (cases.spatial_record(key_items={"1": [1]}), "key_items"),
    "boxes of the wrong type": (cases.spatial_record(key_items={"1": {"cat": "box"}}), "cat"),
    "no size": (without(cases.spatial_record(), "image_size"), "image_size"),
    "no size after the resize": (without(cases.visual_record(), "image_size_refine"), "image_size_refine"),
    "size of one number": (cases.spatial_record(image_size=[100]), "image_size"),
    "size zero": (cases.spatial_record(image_size=[0, 100]), "image_size"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_index_and_field(name):
    record, message = REFUSED[name]
    with pytest.raises(InputError, match=f"record 1.*{message}"):
        score.score([GOOD, record], ["", ""])


MALFORMED = {  # name: (record, terms that do not apply)
    "no span": (cases.temporal_record(answer="from 1 to 2"), {"ans_tiou", "thk_temporal_segment"}),
    "three numbers": (cases.temporal_record(answer="[1, 2, 3]"), {"ans_tiou", "thk_temporal_segment"}),
    "span in words": (cases.temporal_record(answer="['1', '2']"), {"ans_tiou", "thk_temporal_segment"}),
    "no second line": (cases.temporal_mcq_record(answer="B"), {"ans_tiou", "thk_temporal_segment"}),
    "span backwards": (cases.temporal_record(answer="[20, 10]"), {"ans_tiou", "thk_temporal_segment"}),
    "span of no length": (cases.temporal_mcq_record(answer="B\n[5, 5]"), {"ans_tiou", "thk_temporal_segment"}),
    "no option": (cases.temporal_mcq_record(answer="\n[10, 20]"), {"ans_acc"}),
    "no letters": (cases.spatial_record(answer="猫"), {"ans_acc"}),
    "box of no area": (cases.visual_record(answer="<box>[1,2,1,4]</box>"), {"ans_viou", "thk_spatial"}),
    "no box": (cases.visual_record(answer="cup"), {"ans_viou", "thk_spatial"}),
    "bad box": (cases.visual_record(answer="<box>[1,2,three,4]</box>"), {"ans_viou", "thk_spatial"}),
    "three sides": (cases.visual_record(answer="<box>[1,2,3]</box>"), {"ans_viou", "thk_spatial"}),
    "no key frame": (cases.spatial_record(key_frames=[]), {"thk_temporal_point", "thk_spatial"}),
    "key frame at nan": (
        cases.spatial_record(key_frames=[{"idx": 1, "time": float("nan")}]),
        {"thk_temporal_point", "thk_spatial"},
    ),
    "key frame beyond any float": (
        cases.spatial_record(key_frames=[{"idx": 1, "time": 10**400}]),
        {"thk_temporal_point", "thk_spatial"},
    ),
    "key box of three": (cases.spatial_record(key_items={"1": {"cat": [[1, 2, 3]]}}), {"thk_spatial"}),
    "key box at infinity": (cases.spatial_record(key_items={"1": {"cat": [[0, 0, 1, 1e999]]}}), {"thk_spatial"}),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_truth_does_not_apply(name):
    record, void = MALFORMED[name]
    think = cases.claim("cat", cases.CAT, 10) + "<t>10</t>s"
    text = cases.completion(think, "B <box>[1,2,3,4]</box><t>1</t>s to <t>2</t>s Correct Option: B")
    good = {"temporal QA": cases.temporal_record, "temporal QA (MCQ)": cases.temporal_mcq_record}.get(
        record["task"], cases.visual_record if record["task"] == "visual QA" else cases.spatial_record
    )()
    expected = score.score([good], [text], rules=RELEASED)
    rewards = score.score([record], [text], rules=RELEASED)
    lost = {term for term in rewards.applies if expected.applies[term][0] and not rewards.applies[term][0]}
    assert lost == void
    assert all(rewards.terms[term][0] == 0.0 for term in void)


def test_arrow_nulls_in_key_items_are_absent():
    record = cases.spatial_record(
        key_items={"1": {"cat": [[0, 0, 0.2, 0.2]], "dog": None}, "2": None, "9": None},
    )
    text = cases.completion(cases.claim("cat", cases.CAT, 10))
    rewards = score.score([record], [text], rules=RELEASED)
    assert rewards.terms["thk_spatial"][0] == 1.0


def test_sizes_are_asked_for_only_where_a_term_needs_them():
    asked = []

    def sizes(record):
        asked.append(record["task"])
        return {"image_size": [100, 100]}

    records = [without(cases.spatial_record(), "image_size"), cases.spatial_record(), GOOD]
    text = cases.completion(cases.claim("cat", cases.CAT, 10))
    rewards = score.score(records, [text] * 3, sizes=sizes)
    assert asked == [records[0]["task"]]
    assert rewards.terms["thk_spatial"].tolist() == [1.0, 1.0, 0.0]


def test_media_that_cannot_be_found_are_named_with_the_record():
    def sizes(record):
        raise InputError("source=None; expected a text")

    with pytest.raises(InputError, match="record 1: source=None"):
        score.score([GOOD, without(cases.spatial_record(), "image_size")], ["", ""], sizes=sizes)


class Letters(Sequence):
    """A sequence that makes its records as it is asked for them, as data sets on disk do."""

    def __len__(self):
        return 40

    def __getitem__(self, index):
        if index >= len(self):
            raise IndexError(index)
        return cases.mcq_record(answer="ABCD"[index % 4])


def test_records_made_on_the_way_are_not_confused():
    """A record that is gone leaves its id to the next one."""
    texts = [cases.completion("", letter) for letter in "ABCD" * 10]
    assert score.score(Letters(), texts).terms["ans_acc"].tolist() == [1.0] * 40


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(records=[GOOD], completions=[]), "1 records for 0 completions"),
        (dict(records=[GOOD], completions=[None]), "completion 0"),
        (dict(records=[GOOD], completions=[""], progress=1.5), "progress=1.5"),
        (dict(records=[GOOD], completions=[""], progress=float("nan")), "progress=nan"),
        (dict(records=[GOOD], completions=[""], progress=[0.1, 0.2]), "progress has shape"),
        (dict(records=[GOOD], completions=[""], rules="papers"), "paper, released, hardened"),
    ],
)
def test_arguments(arguments, message):
    with pytest.raises(InputError, match=message):
        score.score(**arguments)

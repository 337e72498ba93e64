"""The verbs: tables, reasons, second thoughts and adversaries, as text and as JSON."""

import dataclasses
import json
import sys

import numpy as np
import pytest
import reward_cases as cases

from openo3_jax.errors import InputError
from openo3_jax.rewards import commands, explain, own, parse, redteam, score, statistics
from openo3_jax.rewards.rules import PAPER, PRESETS, RELEASED

PERFECT = cases.completion(cases.claim("cat", cases.CAT, 10), "A cat meets a dog.")
LATE = cases.completion(cases.claim("cat", cases.CAT, 12), "A cat meets a dog.")


@pytest.fixture
def jsonl(tmp_path):
    def write(*rows) -> str:
        path = tmp_path / "rows.jsonl"
        path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
        return str(path)

    return write


def row(completion: str, **more) -> dict:
    return cases.spatial_record(completion=completion) | more


def test_score_file(jsonl, tmp_path):
    out = tmp_path / "out.json"
    path = jsonl(row(PERFECT, group=7), "", row(LATE, group=7, step_percent=0.0), row("", group="x"))
    text = commands.score_file(path, json_out=str(out))
    result = json.loads(out.read_text())
    assert [line["line"] for line in result["rows"]] == [1, 3, 4]
    # Perfect: ROUGE 1, point 1, spatial 1, format 1. Two seconds late at sigma 4: exp(-1/8) for the point.
    totals = [4.0, 3 + np.exp(-1 / 8), 0.0]
    np.testing.assert_allclose([line["total"] for line in result["rows"]], totals, rtol=1e-6)
    gap = (totals[0] - totals[1]) / 2
    np.testing.assert_allclose(result["rows"][0]["advantage"], gap / (gap * 2**0.5 + 1e-4), rtol=1e-4)
    assert result["rows"][2]["advantage"] == 0.0
    assert result["rows"][0]["applies"]["thk_spatial"] and not result["rows"][0]["applies"]["ans_tiou"]
    first = next(line for line in text.splitlines() if line.startswith("1 "))
    assert first.split() == ["1", "spatial", "1.000", "-", "-", "1.000", "-", "1.000", "1.000", "4.000", "0.706"]


def test_explain_names_frame_difference_sigma_gate_and_iou(jsonl):
    half = cases.completion(cases.claim("cat", "[0,0,20,10]", 12) + cases.claim("cat", "[1,2,x]", 5))
    text = commands.score_file(jsonl(row(half, step_percent=0.5)), explain=True)
    assert "claim 1: 'cat' at 12 s: key frame at 10 s, dt +2.000 s, passes the gate (|dt| <= 3 s), earns 0.500" in text
    assert "box 1 with 'cat': IoU 0.500" in text
    assert "claim 2: 'cat' at 5 s: not parsed, a box is no JSON list" in text
    assert "time 12 s: nearest key frame 10 s, dt +2.000 s, sigma 2.00 s, proximity 0.607" in text


EXPLAINED = {  # name: (record, completion, what the reasons say)
    "span": (cases.temporal_record(), cases.completion("", "<t>10</t>s to <t>15</t>s"), "expected 10 to 20 s, IoU 0.5"),
    "no span": (cases.temporal_record(), cases.completion("<t>5</t>s", "10-15"), "no '<t>start</t>s to <t>end</t>s'"),
    "outside": (cases.temporal_record(), cases.completion("<t>5</t>s", ""), "time 5 s: outside 10 to 20 s"),
    "bad time": (cases.temporal_record(), cases.completion("<t>5.5.5</t>s", ""), "not a number, voids all times"),
    "box": (cases.visual_record(), cases.completion("", "<box>[10,10,30,20]</box>"), "[10, 10, 30, 30], IoU 0.500"),
    "option": (cases.mcq_record(), cases.completion("", "C"), "expected 'B'; wrong"),
    "no answer": (cases.mcq_record(), "<think></think>", "there is no <answer>"),
    "unbalanced": (cases.mcq_record(), cases.completion("<obj>", "B"), "not closed as often as opened"),
    "late": (cases.spatial_record(), cases.completion(cases.claim("cat", cases.CAT, 50)), "+30.000 s, fails the gate"),
    "no frames": (cases.spatial_record(key_frames=[]), PERFECT, "the record has no key frame"),
    "endless box": (cases.visual_record(), cases.completion("", "<box>[0,0,1e999,1]</box>"), "IoU 0.000"),
}  # fmt: skip


@pytest.mark.parametrize("name", EXPLAINED)
def test_explain(name, jsonl):
    record, completion, expected = EXPLAINED[name]
    assert expected in commands.score_file(jsonl(record | {"completion": completion}), explain=True)


def test_explain_names_the_nearest_frame_where_none_passes(jsonl):
    text = cases.completion(cases.claim("dog", cases.DOG, 26))
    parsed = parse.parse([cases.spatial_record()], [text])
    both_sides = dataclasses.replace(PAPER, match="gate_then_nearest")
    assert "key frame at 20 s, dt +6.000 s, fails the gate" in explain.explain(parsed, [text], both_sides)[0][1]


def test_what_if(jsonl, tmp_path):
    out = tmp_path / "out.json"
    path = jsonl(row(PERFECT, group="a"), row(LATE, group="a"), row(PERFECT))
    text = commands.score_file(path, what_if=["gate_s=1", "weight.format=0.5"], json_out=str(out))
    grouped, single = json.loads(out.read_text())["what_if"]["groups"]
    late = 3 + np.exp(-2)  # sigma 1 s, 2 s away
    np.testing.assert_allclose(grouped["total_before"], (4 + late) / 2, rtol=1e-6)
    np.testing.assert_allclose(grouped["total_after"], (3.5 + late - 1.5) / 2, rtol=1e-6)
    assert (grouped["rows_changed"], grouped["best_line_after"], single["rows"]) == (2, 1, 1)
    assert single["largest_advantage_change"] is None
    assert "What if gate_s=1, weight.format=0.5" in text


BAD_LINES = {
    "no JSON": ("{", ":1: not JSON"),
    "no completion": (json.dumps(cases.mcq_record()), ":1: no 'completion'"),
    "bad progress": (json.dumps(row("", step_percent="half")), ":1: step_percent='half'"),
    "progress beyond 1": (json.dumps(row("", step_percent=2)), "progress=2"),
    "bad record": (json.dumps({"task": "?", "answer": "", "completion": ""}), ":1: task='?'"),
    "bad record after an empty line": (f"\n\n{json.dumps(row('', key_items=3))}", ":3: key_items is int"),
    "nothing": ("", "holds no record"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_bad_lines(name, jsonl):
    line, message = BAD_LINES[name]
    with pytest.raises(InputError) as error:
        commands.score_file(jsonl(line))
    assert message in str(error.value)


def test_only_line_feeds_end_a_line(tmp_path):
    """Other separators of Unicode may stand in a model's text as they are."""
    path = tmp_path / "rows.jsonl"
    rows = [cases.mcq_record(completion=cases.completion("\u2028 \x85 \u2029", "B"))] * 2
    path.write_bytes("\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode())
    assert [line.split()[:3] for line in commands.score_file(str(path)).splitlines()[2:4]] == [
        ["1", "mcq", "1.000"],
        ["2", "mcq", "1.000"],
    ]


def test_missing_file():
    with pytest.raises(InputError, match="cannot be read"):
        commands.score_file("/no/such/file.jsonl")


def test_long_files_are_summed_up_by_task(jsonl):
    text = commands.score_file(jsonl(*[row(PERFECT)] * 70, *[row("")] * 30))
    (line,) = [line for line in text.splitlines() if line.startswith("spatial")]
    assert line.split()[:3] == ["spatial", "100", "0.700"]


def test_statistics_by_hand():
    think = cases.claim("cat", "[0,0,50,100]", 10) * 2 + "<obj>dog</obj><t>3</t>s"
    texts = [cases.completion(think), cases.completion("")]
    parsed = parse.parse([cases.spatial_record(video_duration=39.0)] * 2, texts)
    found = statistics.evidence_statistics(parsed)
    assert found.boxes_per_answer == 1.0  # two boxes in two answers
    assert found.times_per_answer == 1.5
    assert found.box_area == 0.5
    assert found.repeated_times == pytest.approx(1 / 3)
    assert found.repeated_claims == 0.5
    assert found.malformed_claims == pytest.approx(1 / 3)
    others = parse.parse([cases.spatial_record(), *[cases.visual_record()] * 9], [texts[0], *[PERFECT] * 9])
    assert statistics.evidence_statistics(others).malformed_claims == pytest.approx(1 / 3)
    assert found.clip_cited == 2 / 40  # seconds 3 and 10 of 0 to 39
    assert found.format_broken == 0.0
    assert statistics.alarms(found) == [
        "repeated_claims is 0.50, more than 0.3",
        "malformed_claims is 0.33, more than 0.2",
    ]


def test_drift(jsonl):
    small, whole = cases.claim("cat", cases.CAT, 10), cases.claim("cat", "[0,0,100,100]", 10)
    rows = [row(cases.completion(small), step_percent=0.1)] * 20 + [row(cases.completion(whole), step_percent=0.9)] * 20
    assert "alarm: drift: box_area went from 0.04 to 1.00" in commands.score_file(jsonl(*rows))
    assert "drift" not in commands.score_file(jsonl(*rows[:20]))


def test_redteam_hardened_rules_leave_nothing_to_gain():
    findings = redteam.attack(PRESETS)
    assert not [finding.exploit.name for finding in findings if redteam.pays(finding.gain["hardened"])]
    beaten = {finding.exploit.name: finding for finding in findings if redteam.pays(finding.gain["released"])}
    assert "repeats_once" in beaten["one sure claim, repeated"].closed_by
    assert "malformed_in_denominator" in beaten["malformed where unsure"].closed_by
    assert "gate=both_sides" in beaten["cited long after the clip"].closed_by
    assert "compare_names" in beaten["the right box under a wrong name"].closed_by
    assert "key_frame_recall" in beaten["only the easiest frame"].closed_by
    assert all(finding.closed_by for finding in beaten.values())


def test_redteam_gains_are_differences_of_scores():
    (finding, *_) = redteam.attack({"paper": PAPER, "released": RELEASED})
    exploit = finding.exploit
    totals = score.score([exploit.record] * 2, [exploit.honest, exploit.adversarial], rules="released").total
    assert finding.gain["released"] == pytest.approx(float(totals[1] - totals[0]), abs=1e-6)


def longest_wins(records, completions):
    return [float(len(text)) for text in completions]


def one_number(records, completions):
    return 1.0


def test_redteam_of_ones_own_reward(monkeypatch):
    text = commands.redteam(rules=["paper"], reward=f"{__name__}:longest_wins")
    (line,) = [line for line in text.splitlines() if line.startswith("every second as time ")]
    assert "!" in line
    assert "own reward" in text


def test_redteam_finds_a_reward_in_the_working_directory(monkeypatch, tmp_path):
    source = (
        "def always(records, completions):\n    import helper_of_mine\n    return [helper_of_mine.ONE] * len(records)\n"
    )
    (tmp_path / "reward_of_mine.py").write_text(source)
    (tmp_path / "helper_of_mine.py").write_text("ONE = 1\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert own.load("reward_of_mine:always")([{}] * 2, ["", ""], 1.0).total.tolist() == [1, 1]


@pytest.mark.parametrize(
    "name", ["longest_wins", ":f", "no_such_module:f", f"{__name__}:no_such", f"{__name__}:PERFECT"]
)
def test_redteam_refuses_what_is_no_reward(name):
    with pytest.raises(InputError, match="--reward"):
        commands.redteam(rules=["paper"], reward=name)


def test_redteam_refuses_a_reward_of_the_wrong_shape():
    with pytest.raises(InputError, match=r"gave shape \(\) for \d+ completions; expected one number each"):
        commands.redteam(rules=["paper"], reward=f"{__name__}:one_number")


def test_a_reward_with_terms_and_progress():
    def reward(records, completions, progress):
        ones = np.ones(len(records), np.float32)
        return score.Rewards(terms={"mine": progress * ones}, applies={"mine": ones > 0}, total=2 * progress * ones)

    found = own.make_reward(reward)([{}] * 2, ["", ""], 0.25)
    assert found.terms["mine"].tolist() == [0.25] * 2 and found.applies["mine"].tolist() == [True] * 2
    assert found.total.tolist() == [0.5] * 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("ab", "reward: gave str; expected one number for each completion"),
        ([[1], [1, 2]], "reward: gave list; expected one number"),
        ({"total": 1}, "reward: gave dict; expected one number"),
        (score.Rewards({"mine": np.ones(2)}, {}, np.ones(2)), "terms mine but applies -; expected both"),
        (
            score.Rewards({"mine": np.ones(3)}, {"mine": np.ones(3) > 0}, np.ones(3)),
            r"term mine: gave shape \(3,\) for 2",
        ),
    ],
)
def test_a_reward_that_gives_something_else(given, message):
    with pytest.raises(InputError, match=message):
        own.make_reward(lambda records, completions: given)([{}] * 2, ["", ""], 1.0)

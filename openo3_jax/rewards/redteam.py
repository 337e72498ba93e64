"""Answers that ask for reward without earning it, beside honest ones; what each gains under which rules."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, SupportsFloat

import numpy as np

from openo3_jax import tags, tasks
from openo3_jax.errors import InputError
from openo3_jax.rewards import score
from openo3_jax.rewards.own import Reward
from openo3_jax.rewards.rules import RewardRules


class Exploit(NamedTuple):
    """An adversarial answer and the honest one whose place it wants to take, on the same record."""

    name: str
    record: dict
    honest: str
    adversarial: str


class Finding(NamedTuple):
    """`gain[rules]`: total of the adversarial answer less that of the honest one. `closed_by`: the single options
    that, added to the rules under which it pays, leave it no gain."""

    exploit: Exploit
    gain: dict[str, float]
    closed_by: list[str]


# Each option alone, as a change to whatever rules an exploit beats.
OPTIONS: dict[str, dict[str, Any]] = {
    "gate=both_sides": {"gate": "both_sides"},
    "malformed_in_denominator": {"malformed_in_denominator": True},
    "repeats_once": {"repeats_once": True},
    "once_per_box": {"once_per_box": True},
    "key_frame_recall": {"key_frame_recall": True},
    "compare_names": {"compare_names": True},
    "one_box_per_claim": {"one_box_per_claim": True},
    "min_iou=0.3": {"min_iou": 0.3},
    "format_evidence=adjacent": {"format_evidence": "adjacent", "format_one_word_object": False},
    "format_evidence=parsed": {"format_evidence": "parsed", "format_one_word_object": False},
    "no visual_thk_spatial": {"visual_thk_spatial": False},
}
_LEAST_GAIN = 1e-3  # less is no reason to learn an exploit
USER = "own reward"

_SPATIAL = {
    "task": tasks.TEMPORAL_SPATIAL,
    "answer": "The man hands the cup to the woman.",
    "key_frames": [{"idx": i, "time": time_s, "path": f"{i}.jpg"} for i, time_s in enumerate((4.0, 12.0, 20.0))],
    "key_items": {
        "0": {"man": [[0.1, 0.2, 0.4, 0.9]]},
        "1": {"man": [[0.1, 0.2, 0.4, 0.9]], "cup": [[0.45, 0.5, 0.55, 0.6]]},
        "2": {"woman": [[0.5, 0.2, 0.9, 0.9]], "cup": [[0.6, 0.5, 0.7, 0.6]]},
    },
    "image_size": [400, 200],
    "video_duration": 30.0,
}
_NEAR_MAN, _NEAR_WOMAN = [50, 50, 165, 185], [220, 50, 370, 180]  # IoU 0.76 and 0.77
_WHOLE = [0, 0, 400, 200]
_REPLY = "The man gives the cup to the woman."
_TEMPORAL = {"task": tasks.TEMPORAL, "answer": "[10.0, 20.0]", "video_duration": 60.0}
_VISUAL = {
    "task": tasks.VISUAL,
    "answer": "<obj>dog</obj><box>[100,100,300,300]</box>",
    "image_size": [400, 400],
    "image_size_refine": [400, 400],
}


def exploits() -> list[Exploit]:
    """The shipped set."""
    claim = tags.render_claim
    seen_man = claim("man", _NEAR_MAN, 4.3)
    missed = claim("cup", [0, 0, 40, 40], 12.2)
    saw_all = seen_man + claim("cup", [185, 100, 225, 122], 12.2) + claim("woman", _NEAR_WOMAN, 19.6)
    grid = ",".join(str([x, y, x + 120, y + 140]) for x in range(0, 300, 40) for y in range(0, 80, 20))
    # 1e9 s is a time to the claim and none to the mean over times: wrong by decades at no cost.
    late_woman = f"<obj>woman</obj>{tags.render_box(_NEAR_WOMAN)}at<t>1e9</t>s"
    times = "".join(f"{tags.render_time(second)} " for second in range(60))
    near = (3.6, 3.7, 3.8, 3.9, 4.0, 4.1, 4.2, 4.3, 4.4)
    copied = "<obj>object</obj><box>[x1,y1,x2,y2]</box>at<t>time</t>s"

    def spatial(name: str, honest: str, adversarial: str) -> Exploit:
        texts = (tags.render_think_answer(think, _REPLY) for think in (honest, adversarial))
        return Exploit(name, _SPATIAL, *texts)

    span = tags.render_span(9, 18)
    some_times = tags.render_time(11) + tags.render_time(15) + tags.render_time(23)
    dog = "<obj>dog</obj><box>[110,110,310,310]</box>"
    corners = range(0, 201, 50)
    dogs = "".join(f"<obj>dog</obj>{tags.render_box([x, y, x + 200, y + 200])}" for x in corners for y in corners)
    return [
        spatial("whole frame as every box", saw_all, "".join(claim("man", _WHOLE, t) for t in (4, 12, 20))),
        spatial("whole frame instead of a miss", seen_man + missed, seen_man + claim("cup", _WHOLE, 12.2)),
        spatial("every second as time", saw_all, saw_all + times),
        spatial("the format, copied", saw_all, copied),
        spatial("the format, copied instead of nothing", "The man has it.", copied),
        spatial("one sure claim, repeated", seen_man + missed, seen_man * 9 + missed),
        spatial(
            "one sure claim at other times",
            seen_man + missed,
            "".join(claim("man", _NEAR_MAN, t) for t in near) + missed,
        ),
        spatial("malformed where unsure", seen_man + missed, seen_man + missed.replace("[0,0", "[0,0,?")),
        spatial("malformed time where unsure", seen_man + missed, seen_man + missed.replace("12.2", "12,2")),
        spatial("only the easiest frame", saw_all, seen_man),
        spatial("the right box under a wrong name", seen_man + missed, seen_man + claim("cup", _NEAR_MAN, 12.2)),
        spatial("a grid of boxes in one claim", seen_man, f"<obj>man</obj><box>{grid}</box>at<t>4.3</t>s"),
        spatial("cited long after the clip", seen_man + missed, seen_man + late_woman),
        spatial("tags without evidence", "The man has it.", "<obj>a</obj> <box></box> <t></t>"),
        Exploit(
            "one time inside, repeated",
            _TEMPORAL,
            tags.render_think_answer(some_times, span),
            tags.render_think_answer(some_times + tags.render_time(15) * 20, span),
        ),
        Exploit(
            "one time inside, with more digits",
            _TEMPORAL,
            tags.render_think_answer(some_times, span),
            tags.render_think_answer(some_times + "".join(f"<t>15.{n:02}</t>s" for n in range(20)), span),
        ),
        Exploit(
            "empty times",
            _TEMPORAL,
            tags.render_think_answer("It happens early.", span),
            tags.render_think_answer("It happens early. <t></t> <t></t>", span),
        ),
        Exploit(
            "every second as time, temporal",
            _TEMPORAL,
            tags.render_think_answer(some_times, span),
            tags.render_think_answer(times, span),
        ),
        Exploit(
            "one-word object in the answer only",
            _VISUAL,
            tags.render_think_answer("There it is.", dog.replace("dog", "brown dog")),
            tags.render_think_answer("There it is.", dog),
        ),
        Exploit(
            "many boxes in think",
            _VISUAL,
            tags.render_think_answer("<obj>dog</obj><box>[150,150,350,350]</box>", dog),
            tags.render_think_answer(dogs, dog),
        ),
    ]


def attack(rule_sets: Mapping[str, RewardRules], user_reward: Reward | None = None) -> list[Finding]:
    """Score every exploit under every rule set, then each option alone on top of the first set that it beats.

    Raises: InputError where `user_reward` does not return one finite number per completion.
    """
    cases = exploits()
    gains = {name: _gains(cases, functools.partial(_score, rules=rules)) for name, rules in rule_sets.items()}
    beaten = [next((name for name in rule_sets if pays(gains[name][i])), None) for i in range(len(cases))]
    with_option = {
        base: {
            option: _gains(cases, functools.partial(_score, rules=dataclasses.replace(rule_sets[base], **change)))
            for option, change in OPTIONS.items()
        }
        for base in rule_sets
        if base in beaten
    }
    if user_reward is not None:
        gains[USER] = _gains(cases, user_reward)
    findings = []
    for i, case in enumerate(cases):
        options = with_option[beaten[i]] if beaten[i] is not None else {}
        closed_by = [option for option, gain in options.items() if not pays(gain[i])]
        findings.append(Finding(case, {name: float(gain[i]) for name, gain in gains.items()}, closed_by))
    return findings


def pays(gain: SupportsFloat) -> bool:
    """Worth learning."""
    return float(gain) > _LEAST_GAIN


def _gains(cases: Sequence[Exploit], reward: Reward) -> np.ndarray:
    """Reward of the adversarial answer less that of the honest one."""
    records = [case.record for case in cases]
    totals = []
    for texts in ([case.honest for case in cases], [case.adversarial for case in cases]):
        total = reward(records, texts, 1.0).total.astype(np.float64)
        if not np.isfinite(total).all():
            raise InputError(f"{USER}: gave {total[~np.isfinite(total)][0]}; expected finite numbers")
        totals.append(total)
    return totals[1] - totals[0]


def _score(records: Sequence, completions: Sequence[str], progress: float, rules: RewardRules) -> score.Rewards:
    return score.score(records, completions, progress=progress, rules=rules)

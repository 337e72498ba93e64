"""Each rule on a run made to show it, and on one that does not; numbers beside the limits, worked by hand."""

import math

import pytest

from openo3_jax import tags, tasks
from openo3_jax.report import signatures
from openo3_jax.report.curves import Series
from openo3_jax.report.signatures import Samples
from openo3_jax.rewards import parse

NONE = Samples(None, "no answers here")
SPATIAL = "reward/thk_spatial/temporal-spatial_free-form_QA"
POINT = "reward/thk_temporal_point/temporal-spatial_free-form_QA"
RECORD = {
    "task": tasks.TEMPORAL_SPATIAL,
    "answer": "a cat",
    "key_frames": [{"idx": 0, "time": 4.0, "path": "a.jpg"}],
    "key_items": {"0": {"cat": [[0.0, 0.0, 0.5, 0.5]]}},
    "image_size": [100, 100],
    "video_duration": 9.5,
}


def ramp(first, last, steps=20):
    """A metric that is `first` for the first half of the run and `last` for the second."""
    return Series(list(range(1, steps + 1)), [first] * (steps // 2) + [last] * (steps - steps // 2))


def verdicts(metrics, samples=NONE, stage="gspo"):
    return {one.name: one for one in signatures.find(metrics, samples, stage)}


METRICS = {  # metrics -> the only finding that is seen (None: none)
    "boxes lost": ({SPATIAL: ramp(0.4, 0.19), POINT: ramp(0.8, 0.8)}, "spatial collapse"),
    "boxes never found": ({SPATIAL: ramp(0.0, 0.049)}, "spatial collapse"),
    "boxes half kept": ({SPATIAL: ramp(0.4, 0.21)}, None),
    "boxes found": ({SPATIAL: ramp(0.0, 0.06)}, None),
    "format lost": ({"reward/format/x": ramp(1.0, 0.89)}, "format errors"),
    "format low": ({"reward/format/x": ramp(0.69, 0.69)}, "format errors"),
    "format kept": ({"reward/format/x": ramp(1.0, 0.91)}, None),
    "answers lost": ({"reward/ans_acc/General_video_QA_MCQ": ramp(0.6, 0.49)}, "forgetting"),
    "answers kept": ({"reward/ans_acc/General_video_QA_MCQ": ramp(0.6, 0.51)}, None),
    "evaluation lost": ({"eval/mam": Series([5, 10, 15], [0.3, 0.4, 0.35])}, "forgetting"),
    "evaluation kept": ({"eval/mam": Series([5, 10, 15], [0.3, 0.4, 0.37])}, None),
    "answers grow": ({"gspo/length": ramp(100.0, 151.0)}, "length explosion"),
    "answers grow a little": ({"gspo/length": ramp(100.0, 149.0)}, None),
    "answers cut": ({"gspo/cut": ramp(0.0, 0.26)}, "length explosion"),
    "far from the reference": ({"gspo/kl": ramp(0.0, 0.51)}, "runaway policy"),
    "near the reference": ({"gspo/kl": ramp(0.0, 0.49)}, None),
    "clipped": ({"gspo/clip_fraction": ramp(0.0, 0.51)}, "clipped away"),
    "all alike": ({"gspo/all_equal": ramp(0.0, 0.81)}, "nothing to learn from"),
    "two models": ({"gspo/logp_gap_mean": ramp(0.0, 0.011)}, "sampler and trainer differ"),
}


@pytest.mark.parametrize("name", METRICS)
def test_rules_on_metrics(name):
    metrics, expected = METRICS[name]
    found = verdicts(metrics)
    assert [one.name for one in found.values() if one.verdict == "seen"] == ([expected] if expected else [])
    assert [one.verdict for one in found.values()].count("not seen") == (expected is None)
    assert all(one.rule and one.advice and one.numbers for one in found.values())


def test_fewer_answers_that_cannot_be_read_are_no_forgetting():
    unread = {
        f"eval/{name}": Series([5, 10, 15], [40.0, 20.0, 2.0]) for name in ("vstar/no_option", "tvgbench/no_span")
    }
    assert verdicts(unread)["forgetting"].verdict == "cannot tell"


def test_spatial_collapse_says_whether_times_or_boxes_are_to_blame():
    blamed = {0.1: "times miss the key frames", 0.3: "times are precise, boxes are not"}
    for point, said in blamed.items():
        found = verdicts({SPATIAL: ramp(0.4, 0.1), POINT: ramp(0.8, point)})
        assert found["spatial collapse"].numbers == (
            f"thk_spatial went from 0.4 to 0.1, thk_temporal_point went from 0.8 to {point}: {said}"
        )


@pytest.mark.parametrize("stage", ["sft", "gspo"])
def test_few_steps_tell_nothing(stage):
    short = {SPATIAL: ramp(0.4, 0.0, 9), "sft/loss": ramp(1.0, 9.0, 9), "gspo/length": ramp(1.0, 9.0, 9)}
    assert {one.verdict for one in verdicts(short, stage=stage).values()} == {"cannot tell"}
    assert {one.verdict for one in verdicts({}, stage=stage).values()} == {"cannot tell"}


def test_the_loss_of_stage_one():
    def of(series):
        return verdicts({"sft/loss": series}, stage="sft")["diverging loss"]

    assert of(ramp(1.0, 1.21)).verdict == "seen" and of(ramp(1.0, 1.19)).verdict == "not seen"
    broken = of(Series([1, 2, 3], [1.0, math.nan, 1.0]))
    assert (broken.verdict, broken.numbers) == ("seen", "not finite at step 2")


def late(*thinks, record=RECORD):
    texts = [tags.render_think_answer(think, "a cat") for think in thinks]
    return Samples(parse.parse([record] * len(texts), texts))


def claim(box, time_s=4):
    return tags.render_claim("cat", box, time_s)


GOOD = claim([0, 0, 50, 50])
WHOLE = claim([0, 0, 100, 95])  # 95 % of the frame
SAMPLES = {  # the last answers -> what is seen
    "honest": ([GOOD] * 4, set()),
    "a quarter of the boxes": ([GOOD, GOOD, GOOD, WHOLE], set()),
    "more than a quarter": ([GOOD, GOOD, WHOLE, WHOLE], {"reward hacking: whole-frame boxes"}),
    "large boxes": ([claim([0, 0, 100, 71])] * 3, {"reward hacking: whole-frame boxes"}),
    "half of the seconds": ([GOOD + "".join(tags.render_time(t) for t in (1, 2, 3, 5))], set()),
    "six of ten seconds": (
        [GOOD + "".join(tags.render_time(t) for t in (1, 2, 3, 5, 6))],
        {"reward hacking: every second cited"},
    ),
    "said again": ([GOOD + claim([1, 1, 9, 9], 5) + GOOD], {"reward hacking: repeated or malformed claims"}),
    "unreadable": (
        [GOOD + GOOD.replace("[0,0", "[0,?").replace(">4", ">5")],
        {"reward hacking: repeated or malformed claims"},
    ),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_rules_on_samples(name):
    thinks, expected = SAMPLES[name]
    found = verdicts({}, late(*thinks))
    assert {one.name for one in found.values() if one.verdict == "seen"} == expected


def test_broken_answers_are_format_errors():
    texts = [tags.render_think_answer(GOOD, "a cat")] * 6 + ["no tags"] * 4
    found = verdicts({}, Samples(parse.parse([RECORD] * 10, texts)))["format errors"]
    assert (found.verdict, found.numbers) == ("seen", "40% of the last answers lack think or answer or balanced tags")


def test_without_samples_the_gap_is_named():
    found = verdicts({})
    for name in ("whole-frame boxes", "every second cited", "repeated or malformed claims"):
        assert found[f"reward hacking: {name}"].numbers == "no answers here"


def test_what_is_seen_comes_first_and_what_cannot_be_told_next():
    found = signatures.find({"gspo/all_equal": ramp(0.0, 0.9), "gspo/kl": ramp(0.0, 0.1)}, NONE, "gspo")
    assert found[0].name == "nothing to learn from" and found[-1].name == "runaway policy"
    assert {one.verdict for one in found[1:-1]} == {"cannot tell"}

"""Several samples of one question: majority, evidence that is looked at, ties and silence handled openly."""

import json

import fake_answerer
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

import small
from openo3_jax import tags
from openo3_jax.config import SamplingConfig
from openo3_jax.data import synthetic, video
from openo3_jax.errors import InputError
from openo3_jax.evals import edits, items, predict, relevance, voting
from openo3_jax.evals.config import EvalConfig

VOTES = {  # letters, weights -> winners
    (("A", "B", "B"), None): ("B",),
    (("A", "B", None), None): ("A", "B"),
    ((None, None), None): (),
    (("B", "A", "A"), (1.0, 0.2, 0.2)): ("B",),
    (("B", "A", "A"), (0.6, 0.2, 0.4)): ("A", "B"),  # 0.2 + 0.4 is not quite 0.6
    (("A", "B"), (0.0, 0.0)): ("A", "B"),  # both without reasoning
    ((None, "B"), (1.0, 0.2)): ("B",),
}


@pytest.mark.parametrize("case", VOTES)
def test_count(case):
    letters, weights = case
    assert voting.count(letters, weights).winners == VOTES[case]


def test_a_tie_earns_its_share_and_silence_nothing():
    assert voting.Vote(("A", "B")).share_of("B") == 0.5
    assert voting.Vote(("A", "B")).share_of("C") == 0
    assert voting.Vote(()).share_of("A") == 0


# ---- evidence ----


def claim(box, time_s=1):
    return f"<obj>cat</obj><box>{box}</box>at<t>{time_s}</t>s"


CROPS = {
    claim("[1,2,30,40]"): [[1, 2, 30, 40]],
    claim("[1.5,2.5,30.5,40.5]"): [[1, 2, 31, 41]],
    claim("[-9,-9,900,900]"): [[0, 0, 60, 50]],  # cut at the frame of 50 x 60
    claim("[70,0,80,10]"): [],  # outside
    claim("[30,40,1,2]"): [],  # reversed
    claim("[1,2,3,4],[5,6,7,8]"): [],  # two boxes
    claim("[1,2,3]"): [],
    claim("[1,2,NaN,4]"): [],
    claim("[1,2,30,40]", "soon"): [],
    claim("[1,2,30,40]", "inf"): [],
    claim("[1,2,30,40]") + claim("[5,6,7,8]", 2.5): [[1, 2, 30, 40], [5, 6, 7, 8]],
    "no evidence": [],
}


@pytest.mark.parametrize("text", CROPS)
def test_cited_crops(text):
    assert [crop["box"] for crop in relevance.cited_crops(text, "a.mp4", (50, 60))] == CROPS[text]
    assert relevance.cited_crops(text, None, None) == []


REPLIES = {("2",): 1.0, ("1",): 0.6, ("0",): 0.2, ("2 of 2",): 0.2, (): 0.2, ("2", "0"): 0.6, (" 2\n",): 1.0}


@pytest.mark.parametrize("replies", REPLIES)
def test_sample_weight(replies):
    assert relevance.sample_weight("<think>x</think>", replies) == pytest.approx(REPLIES[replies])
    assert relevance.sample_weight("<answer>A</answer>", replies) == 0


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Two questions about one clip."""
    root = tmp_path_factory.mktemp("vote")
    base = {"videoID": "v", "options": ["red", "blue"], "answer": "A", "duration": "short"}
    rows = [{**base, "question_id": str(i), "question": f"Which? {i}"} for i in range(2)]
    (root / "data").mkdir()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), root / "test-0.parquet")
    synthetic.render_clip(root / "data" / "v.mp4", seed=0, num_frames=8)
    return root


def sample(letter, *claims):
    return f"<think>{' '.join(claims)}</think><answer>{letter}</answer>"


SHOWN = claim("[0,0,10,10]", 0.5), claim("[20,20,30,30]", 0.5)
GROUP = [sample("B"), sample("B"), sample("A", SHOWN[0])]  # two samples without evidence against one with


def score_evidence(asked):
    """The crop at 0, 0 decides the question, the other one does not help."""
    boxes = [part["box"] for part in asked[-1]["content"] if part["type"] == "crop"]
    return "2" if boxes[0] == [0, 0, 10, 10] else "0"


def vote(root, out, group, rule):
    config = EvalConfig(num_samples=len(group), temperature=1.0, vote=rule)
    options = {"score": score_evidence, "shown_hw": (50, 60), "config": config}
    return fake_answerer.evaluate_with("videomme", root, out, lambda item, call: group, **options)


@pytest.mark.parametrize(("rule", "expected"), [("majority", 0.0), ("confidence", 100.0), ("released", 100.0)])
def test_evidence_outweighs_numbers(root, tmp_path, rule, expected):
    """Majority: 2 to 1 for B. Weighted: 0.4 for B, 1.0 for A."""
    _, results = vote(root, tmp_path / "out", GROUP, rule)
    assert results["values"]["accuracy"]["value"] == expected


def test_the_papers_mean_and_the_released_single_look(root, tmp_path):
    """Two objects, one useful: the mean is 0.6, one look says 2. Against three samples that weigh 0.2 each: 0.6."""
    group = [sample("A", *SHOWN), sample("B"), sample("B"), sample("B")]
    text, results = vote(root, tmp_path / "a", group, "confidence")
    assert results["values"]["accuracy"]["value"] == 50  # tied
    assert "2 votes were tied" in text
    _, results = vote(root, tmp_path / "b", group, "released")
    assert results["values"]["accuracy"]["value"] == 100
    looks = [
        len((tmp_path / name / relevance.RELEVANCE.format(rule=rule)).read_text().splitlines())
        for name, rule in (("a", "confidence"), ("b", "released"))
    ]
    assert looks == [4, 2]  # two questions: a look per object, a look per sample


def test_released_looks_at_nothing_beyond_ten(root, tmp_path):
    group = [sample("A", *[SHOWN[0]] * 11), sample("B"), sample("B")]
    _, results = vote(root, tmp_path / "a", group, "released")
    assert results["values"]["accuracy"]["value"] == 0
    _, results = vote(root, tmp_path / "b", group, "confidence")
    assert results["values"]["accuracy"]["value"] == 100


def test_all_samples_invalid_is_no_a(root, tmp_path):
    _, results = vote(root, tmp_path / "out", ["?", "E", ""], "confidence")
    assert results["values"]["accuracy"]["value"] == 0
    assert results["values"]["no_option"]["value"] == 100


def test_greedy_samples_are_refused():
    with pytest.raises(InputError, match="all the same"):
        EvalConfig(num_samples=8)


@pytest.mark.parametrize("rule", ["confidence", "released"])
def test_one_sample_has_nothing_to_vote_with(rule):
    with pytest.raises(InputError, match=f"--vote {rule} weighs several samples"):
        EvalConfig(vote=rule)


# ---- pixels ----


def tiny_clip():
    frames = np.arange(2 * 28 * 56 * 3, dtype=np.uint64).reshape(2, 28, 56, 3) % 251
    return video.Video(frames.astype(np.uint8), np.array([0.0, 1.0]), 2.0, (28, 56))


def test_a_crop_is_stretched_to_the_frame():
    clip = tiny_clip()
    whole = edits.crop(clip, {"time_s": 0.8, "box": [0, 0, 56, 28]})
    np.testing.assert_array_equal(whole, clip.frames[1])
    one = edits.crop(clip, {"time_s": 0.2, "box": [3, 4, 4, 5]})
    assert one.shape == (28, 56, 3)
    np.testing.assert_array_equal(one, np.broadcast_to(clip.frames[0, 4, 3], one.shape))


def test_hide_paints_one_region_of_one_frame():
    clip = tiny_clip()
    hidden = edits.hide(clip, [{"time_s": 0.9, "box": [10, 5, 20, 8]}])
    changed = (hidden.frames != clip.frames).any(-1)
    assert changed[1, 5:8, 10:20].mean() > 0.99  # a pixel may have been grey
    changed[1, 5:8, 10:20] = False
    assert not changed.any()
    assert (hidden.frames[1, 5:8, 10:20] == edits.GREY).all()
    assert edits.hide(clip, []) is clip


def test_a_policy_sees_crops_and_hidden_regions(tmp_path, one_device):
    synthetic.render_clip(tmp_path / "v.mp4", seed=0, num_frames=8)
    policy = small.make_policy(tmp_path, one_device)
    with predict.PolicyAnswerer(policy, SamplingConfig(max_new_tokens=1), rows=1) as answerer:
        plain = answerer.prompt(items.ask("q", video=tmp_path / "v.mp4"))
        region = {"time_s": 0.0, "box": [0, 0, *reversed(plain.shown_hw)]}
        asked = items.ask("q", video=tmp_path / "v.mp4")
        asked[-1]["content"][0]["hidden"] = [region]
        hidden = answerer.prompt(asked)
        crop = {"type": "crop", "video": tmp_path / "v.mp4", **region}
        cropped = answerer.prompt([{"role": "user", "content": [crop, {"type": "text", "text": "q"}]}])
    per_frame = len(plain.sample.patches) // len(plain.sample.grids)
    differs = (plain.sample.patches != hidden.sample.patches).any(1)
    assert differs[:per_frame].all() and not differs[per_frame:].any()
    assert len(np.unique(hidden.sample.patches[:per_frame])) == 1  # one grey
    assert len(cropped.sample.grids) == 1 and cropped.shown_hw is None


def test_claims_of_the_grammar_are_the_ones_that_are_looked_at():
    text = tags.render_claim("cat", [1, 2, 30, 40], 1.0)
    assert len(relevance.cited_crops(text, "a.mp4", (50, 60))) == 1
    assert json.dumps(relevance.cited_crops(text, "a.mp4", (50, 60)))

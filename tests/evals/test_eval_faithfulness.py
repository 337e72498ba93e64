"""Evidence hidden or moved: what is changed, what is scored, and a world where only one crop decides."""

import json
import math

import fake_answerer
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

import small
from openo3_jax import tags
from openo3_jax.data import synthetic
from openo3_jax.errors import InputError
from openo3_jax.evals import benchmarks, choice, evaluate, faithfulness, items, judge, predict, wording
from openo3_jax.evals.config import EvalConfig

SHOWN_HW = (50, 60)


def claim(box, time_s=1):
    return f"<obj>cat</obj><box>{box}</box>at<t>{time_s}</t>s"


CITED = f"{claim('[70,0,80,10]')} and {claim('[1,2,31,42]')}, {claim('[5,5,9,9]', 3)}"  # the first lies outside
REPLY = f"<think>I see {CITED}.</think>\n<answer>A</answer>"


def prediction(text, **fields):
    return items.Prediction("i", choice.CALL, "", 0, "", texts=(text,), shown_hw=SHOWN_HW, **fields)


def test_random_regions_are_as_large_and_lie_inside():
    found = faithfulness.cited(prediction(REPLY), "a.mp4", seed=0)
    assert [region["box"] for region in found.cited] == [[1, 2, 31, 42], [5, 5, 9, 9]]
    assert (found.num_boxes, found.num_times) == (2, 2)
    for region, other in zip(found.cited, found.random, strict=True):
        (x1, y1, x2, y2), (a1, b1, a2, b2) = region["box"], other["box"]
        assert (a2 - a1, b2 - b1) == (x2 - x1, y2 - y1)
        assert a1 >= 0 and a2 <= 60 and b1 >= 0 and b2 <= 50 and 0 <= other["time_s"] <= 3
    again = faithfulness.cited(prediction(REPLY), "a.mp4", seed=0)
    assert again == found
    assert faithfulness.cited(prediction(REPLY), "a.mp4", seed=1).random != found.random


def test_moved_changes_the_claims_that_can_be_hidden_and_nothing_else():
    found = faithfulness.cited(prediction(REPLY), "a.mp4", seed=0)
    first, second = found.random
    claims = tags.parse_claims(found.moved_text)
    assert [list(c.boxes[0]) for c in claims] == [[70, 0, 80, 10], first["box"], second["box"]]
    assert [c.time_s for c in claims] == [1.0, first["time_s"], second["time_s"]]
    assert found.moved_text.startswith("<think>I see <obj>cat</obj>")
    assert found.moved_text.endswith(".</think>\n<answer>A</answer>")


@pytest.mark.parametrize("text", ["", "<think>x</think><answer>A</answer>", claim("[1,2,31,42]")])
def test_an_answer_without_evidence_is_left_out(text):
    assert faithfulness.cited(prediction(text), "a.mp4", seed=0) is None


def test_a_failed_call_has_no_evidence():
    failed = items.Prediction("i", choice.CALL, "", 0, "", error="no clip")
    assert faithfulness.cited(failed, "a.mp4", seed=0) is None


def test_hidden_regions_go_to_the_clip_only():
    asked = items.ask("q", video="a.mp4", system="s")
    hidden = faithfulness.with_hidden(asked, [{"type": "crop", "video": "a.mp4", "time_s": 1.0, "box": [0, 0, 1, 1]}])
    assert hidden[1]["content"][0] == {
        "type": "video",
        "video": "a.mp4",
        "hidden": [{"time_s": 1.0, "box": [0, 0, 1, 1]}],
    }
    assert hidden[0] == asked[0] and hidden[1]["content"][1] == asked[1]["content"][1]
    assert "hidden" not in asked[1]["content"][0]


def test_answer_tokens():
    pieces = ["<think>", "x", "</think>", "\n<", "answer", ">", "A", "</answer>", ""]

    def decode(tokens):
        return "".join(pieces[i] for i in tokens)

    assert faithfulness.answer_tokens(range(9), decode) == 6
    assert faithfulness.answer_tokens(range(3), decode) == 3


# ---- the whole measure ----


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("hidden")
    base = {"videoID": "v", "options": ["red", "blue"], "answer": "A", "duration": "short"}
    rows = [{**base, "question_id": str(i), "question": f"Which? {i}"} for i in range(5)]
    (root / "data").mkdir()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), root / "test-0.parquet")
    synthetic.render_clip(root / "data" / "v.mp4", seed=0, num_frames=8)
    return root


class Scorer(fake_answerer.FakeAnswerer):
    """The answer loses 3 nats where the cited region is hidden, 1 where another is, 2 where the words are moved."""

    def reply(self, prompts, seeds):
        return [predict.Reply(("",), (-50.0, self.logp(prompt.sample)), (True,)) for prompt in prompts]

    def logp(self, asked):
        hidden = asked[-2]["content"][0].get("hidden")
        if hidden is None:
            return -1.0 if "[0,0,10,10]" in asked[-1]["content"] else -3.0
        return -4.0 if hidden[0]["box"] == [0, 0, 10, 10] else -2.0


def test_a_world_where_only_the_cited_region_decides(root, tmp_path):
    """Four of five answers cite [0,0,10,10]; with it hidden the model says B, with another one it stays with A."""

    def say(asked):
        hidden = asked[-1]["content"][0].get("hidden")
        text = fake_answerer.text_of(asked)
        if "Which? 4" in text:
            return "<think>no evidence</think><answer>A</answer>"
        letter = "B" if hidden and hidden[0]["box"] == [0, 0, 10, 10] else "A"
        return f"<think>{claim('[0,0,10,10]', 0.5)}</think><answer>{letter}</answer>"

    import contextlib

    def run():
        answerer = fake_answerer.FakeAnswerer(say, shown_hw=SHOWN_HW)
        text = evaluate.run(
            benchmarks.of("videomme"),
            data=root,
            out=tmp_path / "out",
            answerers=lambda sampling: contextlib.nullcontext(answerer),
            judged_by=judge.make_judge("exact"),
            config=EvalConfig(evidence=True),
            words=wording.load_wording(),
            reply_scorer=lambda: contextlib.nullcontext(Scorer(None)),
        )
        return text, answerer

    text, answerer = run()
    assert len(answerer.asked) == 5 + 8
    values = json.loads((tmp_path / "out" / faithfulness.FILES[0]).read_text())["values"]
    assert {name: value["value"] for name, value in values.items()} == pytest.approx(
        {
            "accuracy": 100,
            "accuracy_cited": 0,
            "accuracy_random": 100,
            "cited minus random": -100,
            "changed_cited": 100,
            "changed_random": 0,
            "changed: cited minus random": 100,
            "logp_cited": -3,
            "logp_random": -1,
            "logp_moved": -2,
            "logp: cited minus random": -2,
            "boxes": 1,
            "times": 1,
        }
    )
    assert values["accuracy"]["n"] == 4
    assert "4 of 5 answers cite" in text and "66.0" in text
    again, answerer = run()
    assert again == text and answerer.asked == []


def test_answers_without_evidence_give_an_empty_table(tmp_path):
    item = items.Item("i", {choice.CALL: items.ask("q", video="a.mp4")}, choice.Truth("q", {"A": "x"}, "A"), {})
    nobody = fake_answerer.FakeAnswerer(None)
    said = {("i", choice.CALL): prediction("<think>x</think><answer>A</answer>")}
    text = faithfulness.run([item], said, nobody, nobody, tmp_path, EvalConfig(evidence=True))
    assert "0 of 1 answers cite" in text and "nan" not in text
    assert json.loads((tmp_path / faithfulness.FILES[0]).read_text())["values"]["accuracy"]["value"] is None


@pytest.mark.parametrize("fields", [{"num_samples": 2, "temperature": 1.0}, {"temperature": 0.5}])
def test_only_greedy_answers_are_compared(fields):
    with pytest.raises(InputError, match="compares greedy answers"):
        EvalConfig(evidence=True, **fields)


def test_only_where_there_are_options():
    with pytest.raises(InputError, match="vstar has no options"):
        evaluate.sampling_of(EvalConfig(evidence=True), benchmarks.of("vstar"))


# ---- with a model ----


def test_scored_replies_equal_the_logits(tmp_path, one_device):
    policy = small.make_policy(tmp_path, one_device)
    texts = ["<think>ab</think>\n<answer>A</answer>", "no tags"]
    asked = [[{"role": "user", "content": "Which?"}, {"role": "assistant", "content": text}] for text in texts]
    with faithfulness.ReplyScorer(policy, rows=2) as scorer:
        prompts = [scorer.prompt(one) for one in asked]
        replies = scorer.reply(prompts, [0, 0])
    for text, one, prompt, reply in zip(texts, asked, prompts, replies, strict=True):
        logits = policy.logits([one])[0].astype(np.float64)
        logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        slots = np.flatnonzero(prompt.sample.loss_mask)
        each = logp[slots - 1, prompt.sample.tokens[slots]]
        assert reply.logp[0] == pytest.approx(each.sum(), abs=1e-3)
        if "<answer>" in text:
            tail = policy.processor.decode(
                prompt.sample.tokens[
                    slots[-faithfulness.answer_tokens(prompt.sample.tokens[slots].tolist(), policy.processor.decode) :]
                ]
            )
            assert tail.lstrip("\n") == "<answer>A</answer>"
            assert each.sum() < reply.logp[1] < 0 and not math.isclose(reply.logp[0], reply.logp[1])
        else:
            assert reply.logp[0] == pytest.approx(reply.logp[1])

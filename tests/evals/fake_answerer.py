"""Answerers that need no model: a function of the prompt, and what goes wrong on the way."""

import contextlib
import json

import jax

from openo3_jax.errors import InputError
from openo3_jax.evals import benchmarks, evaluate, items, judge, predict, scores, wording
from openo3_jax.evals.config import EvalConfig


class FakeAnswerer:
    """Answers with `say(conversation)`, a text or several samples; keeps what it was asked.

    A conversation whose text is in `unreadable` cannot be opened; one in `too_large` does not fit the device.
    """

    def __init__(self, say, *, unreadable=(), too_large=(), die_after=None, shown_hw=None):
        self.say, self.unreadable, self.too_large = say, unreadable, too_large
        self.asked, self.seeds, self.batches = [], [], []
        self.die_after, self.shown_hw = die_after, shown_hw
        self.settings = {"fake": 1}

    def prompt(self, conversation):
        text = text_of(conversation)
        if text in self.unreadable:
            raise InputError(f"{text}: no such video file")
        return predict.Prompt(conversation, self.shown_hw, self.shown_hw)

    def reply(self, prompts, seeds):
        if self.die_after is not None and len(self.asked) >= self.die_after:
            raise KeyboardInterrupt
        texts = [text_of(prompt.sample) for prompt in prompts]
        self.batches.append(len(texts))
        if set(texts) & set(self.too_large):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
        self.asked += texts
        self.seeds += seeds
        said = [self.say(prompt.sample) for prompt in prompts]
        return [predict.Reply(tuple([one] if isinstance(one, str) else one), (-1.0,), (True,)) for one in said]


def text_of(conversation):
    content = conversation[-1]["content"]
    return content if isinstance(content, str) else "".join(item.get("text", "") for item in content)


def full(answer):
    return f"<think>I see it.</think><answer>{answer}</answer>"


def evaluate_with(name, root, out, say, *, judged_by="exact", config=None, score=None, **options):
    """The whole evaluation with `say(item, name of the call)` as the model, and `score(conversation)` as the scorer of
    evidence; the table and results.json. `judged_by`: a judge, or what `make_judge` takes."""
    words, chosen = wording.load_wording(), benchmarks.of(name)
    known = {
        items.hash_of(asked): (item, call)
        for item in chosen.load(root, words).items
        for call, asked in item.calls.items()
    }

    def answer(asked):
        key = items.hash_of(asked)
        return say(*known[key]) if key in known else score(asked)

    answerer = FakeAnswerer(answer, **options)
    text = evaluate.run(
        chosen,
        data=root,
        out=out,
        answerers=lambda sampling: contextlib.nullcontext(answerer),
        judged_by=judge.make_judge(judged_by) if isinstance(judged_by, str) else judged_by,
        config=config or EvalConfig(),
        words=words,
        model="oracle",
    )
    return text, json.loads((out / scores.RESULTS).read_text())

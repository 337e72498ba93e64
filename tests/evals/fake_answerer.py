"""Answerers that need no model: a function of the prompt, and what goes wrong on the way."""

import jax

from openo3_jax.errors import InputError
from openo3_jax.evals import predict


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

"""Does the answer rest on the evidence it cites? That is hidden, or as much elsewhere, or it is moved in the words.

Three comparisons for every answer that cites a box at a time, all against the answer as it was given:

- `cited`: the cited regions are painted over in the frames cited, and the question is asked again;
- `random`: the same for regions of the same size, at random places of random frames;
- `moved`: the frames stay, but the reasoning cites those random places and times instead (log-probability only).

Every call is run from its beginning; frames before the first changed one are not reused. Source: arXiv:2510.20579,
table 6 (150 questions of VideoMME), which hides and counts; log-probabilities are ours.
"""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float

from openo3_jax import tags
from openo3_jax.config import SamplingConfig
from openo3_jax.evals import answers, choice, items, predict, published, relevance, scores, store
from openo3_jax.evals.config import EvalConfig
from openo3_jax.policy import Policy
from openo3_jax.train import losses
from openo3_jax.types import Array, Batch

ANSWERS, LOGPS = "hidden_answers.jsonl", "hidden_logps.jsonl"
FILES = ("faithfulness.json", "faithfulness.txt")
HIDDEN = ("cited", "random")
Regions = list[dict[str, Any]]


def _minus(a: str, b: str, name: str, scale: float) -> scores.Measure:
    return scores.Measure(name, (a, b), lambda means: means[..., 0] - means[..., 1], scale)


MEASURES = (
    *(scores.mean_of(name) for name in ("accuracy", "accuracy_cited", "accuracy_random")),
    _minus("accuracy_cited", "accuracy_random", "cited minus random", 100.0),
    *(scores.mean_of(name) for name in ("changed_cited", "changed_random")),
    _minus("changed_cited", "changed_random", "changed: cited minus random", 100.0),
    *(scores.mean_of(name, 1.0) for name in ("logp_cited", "logp_random", "logp_moved")),
    _minus("logp_cited", "logp_random", "logp: cited minus random", 1.0),
    *(scores.mean_of(name, 1.0) for name in ("boxes", "times")),
)


class ReplyScorer(predict.PolicyAnswerer):
    """Scores what the assistant says last instead of answering: `logp` is (whole reply, its answer part), in nats."""

    def __init__(self, policy: Policy, *, rows: int):
        super().__init__(policy, SamplingConfig(), rows=rows)

    @property
    def settings(self) -> Mapping[str, object]:
        return {name: value for name, value in super().settings.items() if name != "sampling"}

    def reply(self, prompts: Sequence[predict.Prompt], seeds: Sequence[int]) -> list[predict.Reply]:
        policy, replies = self._policy, []
        batch = policy.batch(self.fill([prompt.sample for prompt in prompts]))
        logps = np.asarray(_target_logps(policy.graphdef, policy.params, batch))
        for prompt, logp in zip(prompts, logps, strict=False):
            said = prompt.sample.tokens[prompt.sample.loss_mask]
            num_answer = answer_tokens(said.tolist(), policy.processor.decode)
            own = logp[: len(said)]
            replies.append(predict.Reply(("",), (float(own.sum()), float(own[-num_answer:].sum())), (True,)))
        return replies


@functools.partial(jax.jit, static_argnums=0)
def _target_logps(graphdef: nnx.GraphDef, params: nnx.State, batch: Batch) -> Float[Array, "rows num_targets"]:
    """Nats of each token that the assistant says, 0 for padding."""
    model = nnx.merge(graphdef, params)
    hidden, _ = model.hidden(batch)
    return losses.target_scores(hidden, model.head, batch.target_slots, batch.targets, mesh=model.mesh).logp


def answer_tokens(said: Sequence[int], decode: Callable[[Sequence[int]], str]) -> int:
    """How many of the last tokens hold the text from `<answer>` on; all where there is none."""
    if "<answer>" not in decode(said):
        return len(said)
    return next(count for count in range(1, len(said) + 1) if "<answer>" in decode(said[-count:]))


def run(
    asked: Sequence[items.Item],
    said: Mapping[items.Key, items.Prediction],
    answerer: predict.Answerer,
    scorer: predict.Answerer,
    out: Path,
    config: EvalConfig,
) -> str:
    """Ask and score with regions hidden or moved; returns the table, which also lands in `out`."""
    evidence = {
        item.id: found
        for item in asked
        if (found := cited(said[item.id, choice.CALL], items.clip_of(item.calls[choice.CALL]), config.seed)) is not None
    }
    own = [item for item in asked if item.id in evidence]
    calls = [
        items.Call(item.id, kind, with_hidden(item.calls[choice.CALL], getattr(evidence[item.id], kind)))
        for item in own
        for kind in HIDDEN
    ]
    with store.Predictions(out / ANSWERS) as kept:
        predict.predict(answerer, calls, kept, seed=config.seed, batch_size=config.batch_size, what="hidden")
        again = dict(kept.known)
    forced = [call for item in own for call in _forced(item, said[item.id, choice.CALL].text, evidence[item.id])]
    with store.Predictions(out / LOGPS) as kept:
        predict.predict(scorer, forced, kept, seed=config.seed, batch_size=config.batch_size, what="log-probabilities")
        logps = dict(kept.known)
    found = score(own, said, again, logps, evidence)
    notes = (
        f"{len(own)} of {len(asked)} answers cite a box at a time",
        "logp: change of the log-probability of the answer part, its reasoning given, in nats",
        f"paper, 150 questions of VideoMME: {published.EVIDENCE_HIDDEN}",
    )
    values = {measure.name: scores.value_of(found, measure) for measure in MEASURES}
    rows = [
        [name, scores.show(value.value, 2), scores.show_interval(value, 2), str(value.n)]
        for name, value in values.items()
    ]
    text = scores.render("\nevidence hidden", ["measure", "value", "95 % interval", "n"], rows, notes)
    results = {"values": {name: value._asdict() for name, value in values.items()}, "notes": list(notes)}
    store.replace_json(out / FILES[0], scores.without_nan(results))
    store.replace_text(out / FILES[1], text)
    return text


# ---- regions ----


@dataclasses.dataclass(frozen=True)
class Evidence:
    """The regions an answer cites, as many random ones of the same size, and its reply with those cited instead."""

    cited: Regions
    random: Regions
    moved_text: str
    num_boxes: int
    num_times: int


def cited(prediction: items.Prediction, clip: object, seed: int) -> Evidence | None:
    """None for an answer that failed or cites nothing that can be hidden."""
    reasoning = tags.think_text(prediction.text) or ""
    regions = relevance.cited_crops(reasoning, clip, prediction.shown_hw)
    if not regions:
        return None
    digest = hashlib.sha256(f"{seed} {prediction.item}".encode()).digest()
    rng = np.random.default_rng(list(digest[:16]))
    latest_s = max(region["time_s"] for region in regions)
    random = [elsewhere(region, prediction.shown_hw, latest_s, rng) for region in regions]
    return Evidence(
        regions,
        random,
        moved(prediction.text, random, prediction.shown_hw),
        num_boxes=len(regions),
        num_times=len({region["time_s"] for region in regions}),
    )


def elsewhere(
    region: Mapping[str, Any], shown_hw: tuple[int, int], latest_s: float, rng: np.random.Generator
) -> dict[str, Any]:
    """A region as large at a random place, at a random time up to `latest_s` or 1 s, whichever is later."""
    x1, y1, x2, y2 = region["box"]
    left = int(rng.integers(0, shown_hw[1] - (x2 - x1) + 1))
    top = int(rng.integers(0, shown_hw[0] - (y2 - y1) + 1))
    time_s = round(float(rng.uniform(0.0, max(latest_s, 1.0))), 1)
    return {**region, "time_s": time_s, "box": [left, top, left + x2 - x1, top + y2 - y1]}


def moved(text: str, random: Regions, shown_hw: tuple[int, int]) -> str:
    """The reply with each claim of its reasoning that can be hidden citing its random region; all else stays."""
    before, opening, rest = text.partition("<think>")
    reasoning, closing, after = rest.partition("</think>")
    pieces, done, waiting = [before, opening], 0, iter(random)
    for claim in tags.parse_claims(reasoning):
        if relevance.region_of(claim, shown_hw) is not None:
            region = next(waiting)
            pieces += [reasoning[done : claim.start], tags.render_claim(claim.name, region["box"], region["time_s"])]
            done = claim.end
    return "".join([*pieces, reasoning[done:], closing, after])


def with_hidden(asked: items.Conversation, regions: Regions) -> items.Conversation:
    """The conversation with these regions of its clip painted over."""
    *before, user = asked
    regions = [{"time_s": region["time_s"], "box": region["box"]} for region in regions]
    content = [{**part, "hidden": regions} if part["type"] == "video" else part for part in user["content"]]
    return [*before, {**user, "content": content}]


def _forced(item: items.Item, text: str, evidence: Evidence) -> list[items.Call]:
    """The reply as it was given, under each condition, and with its evidence moved."""
    asked = item.calls[choice.CALL]
    conditions = {
        "given": (asked, text),
        "cited": (with_hidden(asked, evidence.cited), text),
        "random": (with_hidden(asked, evidence.random), text),
        "moved": (asked, evidence.moved_text),
    }
    return [
        items.Call(item.id, name, [*conversation, {"role": "assistant", "content": reply}])
        for name, (conversation, reply) in conditions.items()
    ]


# ---- scores ----


def score(
    own: Sequence[items.Item],
    said: Mapping[items.Key, items.Prediction],
    again: Mapping[items.Key, items.Prediction],
    logps: Mapping[items.Key, items.Prediction],
    evidence: Mapping[str, Evidence],
) -> scores.Scores:
    """One row per answer with evidence; `nan` where a call failed."""
    rows = []
    for item in own:
        before = _outcome(item, said[item.id, choice.CALL])
        row = {"accuracy": before[0], "boxes": evidence[item.id].num_boxes, "times": evidence[item.id].num_times}
        for kind in HIDDEN:
            accuracy, answer = _outcome(item, again[item.id, kind])
            row |= {f"accuracy_{kind}": accuracy, f"changed_{kind}": float(answer != before[1]) if answer else math.nan}
        given = logps[item.id, "given"]
        for kind in (*HIDDEN, "moved"):
            other = logps[item.id, kind]
            both = given.error is None and other.error is None
            row[f"logp_{kind}"] = other.logp[1] - given.logp[1] if both else math.nan
        rows.append(row)
    names = list(dict.fromkeys(name for measure in MEASURES for name in measure.columns))
    columns = {name: np.array([row[name] for row in rows], np.float64) for name in names}
    return scores.Scores(tuple(item.id for item in own), columns, tuple({} for _ in own))


def _outcome(item: items.Item, prediction: items.Prediction) -> tuple[float, tuple[str | None] | None]:
    """Accuracy, and what was answered (a letter, or the text), which is None where the call failed."""
    if prediction.error is not None:
        return math.nan, None
    accuracy = float(choice.score([item], {(item.id, choice.CALL): prediction}).columns["accuracy"][0])
    if item.truth.options:
        return accuracy, (answers.parse_letter(prediction.text, item.truth.options),)
    return accuracy, (answers.final_text(prediction.text),)

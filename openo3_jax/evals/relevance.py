"""How far the evidence that a sample cites helps to answer: the model looks at its crops and says 0, 1 or 2."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from openo3_jax import tags
from openo3_jax.evals import choice, items, predict, store, wording
from openo3_jax.evals.config import EvalConfig

RELEVANCE = "evidence_{rule}.jsonl"
WEIGHTS: Mapping[str, float] = {"2": 1.0, "1": 0.6, "0": 0.2}  # source: Open-o3-Video eval/tts.py
NO_EVIDENCE = 0.2  # of a sample that cites nothing that can be shown, and of a reply that is no score
MAX_CROPS = 10  # the released code shows none where there are more
MAX_REPLY_TOKENS = 16


def weigh(
    scorer: predict.Answerer,
    asked: Sequence[items.Item],
    said: Mapping[items.Key, items.Prediction],
    words: wording.Wording,
    out: Path,
    config: EvalConfig,
) -> dict[str, list[float]]:
    """Item -> the weight of each of its samples; the looks are kept in a file of `out`.

    `config.vote` "confidence", the paper's rule, looks at each cited object by itself and takes the mean; "released"
    looks at all of them at once, and at none where there are more than ten. Without reasoning a sample weighs 0.
    Source: arXiv:2510.20579, test-time scaling; Open-o3-Video eval/tts.py.
    """
    looks: dict[items.Key, list[items.Call]] = {}
    for item in asked:
        prediction = said[item.id, choice.CALL]
        for number, text in enumerate(prediction.texts if item.truth.options else ()):
            looks[item.id, str(number)] = _looks(item, number, text, prediction, words, config.vote)
    calls = [call for own in looks.values() for call in own]
    with store.Predictions(out / RELEVANCE.format(rule=config.vote)) as kept:
        predict.predict(scorer, calls, kept, seed=config.seed, batch_size=config.batch_size, what="evidence")
        replies = {call.key: kept.known[call.key].text for call in calls}
    weights: dict[str, list[float]] = {}
    for (item, number), own in looks.items():
        text = said[item, choice.CALL].texts[int(number)]
        weights.setdefault(item, []).append(sample_weight(text, [replies[call.key] for call in own]))
    return weights


def sample_weight(text: str, replies: Sequence[str]) -> float:
    """0 without reasoning, 0.2 without evidence, else the mean over the replies: 2 is 1.0, 1 is 0.6, all else 0.2."""
    if tags.think_text(text) is None:
        return 0.0
    return float(np.mean([WEIGHTS.get(reply.strip(), NO_EVIDENCE) for reply in replies])) if replies else NO_EVIDENCE


def _looks(
    item: items.Item, number: int, text: str, prediction: items.Prediction, words: wording.Wording, rule: str
) -> list[items.Call]:
    """One call per cited object, or one for all."""
    clip = items.clip_of(item.calls[choice.CALL])
    crops = cited_crops(tags.think_text(text) or "", clip, prediction.shown_hw)
    listed = "\n".join(f"{letter}. {option}" for letter, option in item.truth.options.items())
    question = f"{item.truth.question}\n{listed}"
    at_once = [crops] if 0 < len(crops) <= MAX_CROPS else []
    together = at_once if rule == "released" else [[crop] for crop in crops]
    return [
        items.Call(item.id, f"{number}.{i}", words["relevance"].show(shown, question=question))
        for i, shown in enumerate(together)
    ]


def cited_crops(reasoning: str, clip: object, shown_hw: tuple[int, int] | None) -> list[dict[str, object]]:
    """A crop for each claim with a time and a single box that has an area inside the frame of `shown_hw` (px)."""
    if clip is None or shown_hw is None:
        return []
    height, width = shown_hw
    crops = []
    for claim in tags.parse_claims(reasoning):
        box = claim.boxes[0] if claim.parsed and len(claim.boxes) == 1 else None
        if box is None or not all(map(math.isfinite, (*box, claim.time_s))):
            continue
        x1, x2 = (int(min(max(value, 0), width)) for value in (math.floor(box[0]), math.ceil(box[2])))
        y1, y2 = (int(min(max(value, 0), height)) for value in (math.floor(box[1]), math.ceil(box[3])))
        if x2 > x1 and y2 > y1:
            crops.append({"type": "crop", "video": clip, "time_s": claim.time_s, "box": [x1, y1, x2, y2]})
    return crops

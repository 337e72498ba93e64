"""Completions and records -> rows of numbers, once, on the host; everything after this runs under `jit`."""

import math
from collections.abc import Hashable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Real

from openo3_jax import tags, tasks
from openo3_jax.errors import InputError
from openo3_jax.rewards import arrays, truth
from openo3_jax.rewards.arrays import Bucket, Prediction
from openo3_jax.rewards.truth import Gold, SizeFinder
from openo3_jax.rewards.words import Stemmer

# Share of training done, in [0, 1]: for all rows, or one number (int or float) per row.
Progress = float | int | Sequence[float | int] | np.number | Real[Any, ""] | Real[Any, " rows"]

_NO_BOX = (math.nan,) * 4
_NO_SPAN = (math.nan,) * 2
_OPTION_HEADER = "Correct Option:"


class Parsed(NamedTuple):
    """A batch, read: one prediction and one ground truth per row (rows of a group share theirs)."""

    predictions: list[Prediction]
    golds: list[Gold]
    progress: Float[np.ndarray, " rows"]

    def buckets(self) -> list[Bucket]:
        return arrays.make_buckets(self.predictions, [gold.truth for gold in self.golds], self.progress)


def parse(
    records: Sequence[Any],
    completions: Sequence[Any],
    progress: Progress = 1.0,
    sizes: SizeFinder | None = None,
) -> Parsed:
    """Read every completion against its record, tasks mixed freely. Linear in the text; no text raises.

    `progress` in [0, 1] is the share of training done, for all rows or one per row. A record that stands for
    several rows (the same object) is read once.

    Raises: InputError for a record or argument that cannot be used, with its index and field.
    """
    if len(records) != len(completions):
        raise InputError(f"{len(records)} records for {len(completions)} completions; expected one for each")
    shares = np.asarray(progress, np.float64)
    if shares.ndim > 1 or (shares.ndim == 1 and len(shares) != len(records)):
        raise InputError(f"progress has shape {shares.shape}; expected a number or one for each completion")
    shares = np.broadcast_to(shares, (len(records),))
    for index in np.flatnonzero(~((shares >= 0) & (shares <= 1)))[:1]:
        raise InputError(f"record {index}: progress={shares[index]}; expected the share of training done, in [0, 1]")
    stemmer = Stemmer()
    read: dict[int, Gold] = {}
    golds, predictions = [], []
    for index, (record, completion) in enumerate(zip(records, completions, strict=True)):
        if not isinstance(completion, str):
            raise InputError(f"completion {index} is {type(completion).__name__}; expected a string")
        gold = read.get(id(record))
        if gold is None:
            gold = read[id(record)] = truth.read_record(record, index, stemmer, sizes)
        golds.append(gold)
        predictions.append(parse_completion(completion, gold, stemmer))
    return Parsed(predictions, golds, shares)


def parse_completion(text: str, gold: Gold, stemmer: Stemmer) -> Prediction:
    """Everything a score asks of one completion, its words and names numbered as in `gold`."""
    think, answer = tags.think_text(text), tags.answer_text(text)
    inner, reply = think or "", answer or ""
    options = [-1] * 4
    span, box, words, num_words = None, None, [], 0
    times, claims, loose_boxes = [], [], []
    task = gold.task
    if task == tasks.GENERAL_MCQ:
        options = _read_options(reply, gold.option)
    if task == tasks.TEMPORAL_MCQ:
        _, header, option = reply.partition(_OPTION_HEADER)
        if header:
            options = _read_options(option.partition(_OPTION_HEADER)[0], gold.option)
    if task == tasks.VISUAL:
        box, loose_boxes = tags.parse_first_box(reply), tags.parse_boxes(inner)
    if task == tasks.TEMPORAL_SPATIAL:
        claims = tags.parse_claims(inner)
    if task in (tasks.TEMPORAL, tasks.TEMPORAL_MCQ):
        span = tags.parse_span(reply)
    if task in (tasks.TEMPORAL, tasks.TEMPORAL_MCQ, tasks.TEMPORAL_SPATIAL):
        times = tags.parse_times(inner)
    if task in (tasks.TEMPORAL_SPATIAL, tasks.GENERAL_FREE_FORM):
        found = stemmer.words(reply)
        words, num_words = [gold.word_ids.get(word, -1) for word in found], len(found)
    names = [truth.normal_name(claim.name) for claim in claims]
    boxes = [
        (_NO_BOX if box is None else box, number)
        for number, claim in enumerate(claims)
        if claim.parsed
        for box in claim.boxes or ()
    ]
    return Prediction(
        words=words,
        num_words=num_words,
        options=options,
        span_s=span or _NO_SPAN,
        answer_box=box or _NO_BOX,
        times_s=[math.nan if time is None else time for time in times],
        time_valid=[True] * len(times),
        time_repeats=_repeats(times),
        claim_times_s=[math.nan if claim.time_s is None else claim.time_s for claim in claims],
        claim_valid=[claim.parsed for claim in claims],
        claim_repeats=_repeats((name, claim[1:3]) for name, claim in zip(names, claims, strict=True)),
        claim_names=[gold.name_ids.get(name, -1) for name in names],
        boxes=[box for box, _ in boxes] + [box or _NO_BOX for box in loose_boxes],
        box_claim=[number for _, number in boxes] + [-1] * len(loose_boxes),
        num_objects=inner.count("<obj>"),
        odd_time_claims=sum(claim.parsed and not tags.is_plain_number(claim.time_text) for claim in claims),
        has_think=think is not None,
        has_answer=answer is not None,
        balanced=tags.counts_match(text, "think", "answer") and tags.counts_match(inner, "obj", "t", "box"),
        num_time_tags=inner.count("<t>"),
        has_each_tag=all(tag in inner for tag in ("<obj>", "<box>", "<t>")),
        adjacent_claim=len(claims) > 0,
        adjacent_box=task == tasks.VISUAL and tags.has_adjacent_box(inner),
        one_word_object=task == tasks.VISUAL and tags.has_one_word_box(text),
    )


def _read_options(reply: str, option: str) -> list[int]:
    """The four ways to read a reply, `X`, `X.`, `(X)` and `[X]`: 0 where the right option is left, 1 elsewhere.

    Source: src/r1-v/src/open_r1/reward_func.py:30-57.
    """
    reply = reply.strip()
    bare = [reply] * 4
    if reply.endswith("."):
        bare[1] = reply[:-1]
    for place, (opening, closing) in enumerate((("(", ")"), ("[", "]")), start=2):
        if len(reply) > 1 and reply.startswith(opening) and reply.endswith(closing):
            bare[place] = reply[1:-1]
    return [0 if text == option else 1 for text in bare]


def _repeats(values: Iterable[Hashable]) -> list[bool]:
    """True where an equal value came before."""
    seen: set[Hashable] = set()
    repeats = []
    for value in values:
        repeats.append(value in seen)
        seen.add(value)
    return repeats

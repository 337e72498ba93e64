"""Completions and records -> rows of numbers, once, on the host; everything after this runs under `jit`."""

import contextlib
import gc
import math
from collections.abc import Hashable, Iterable, Iterator, Sequence
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
_NOTHING = Prediction(
    words=(),
    num_words=0,
    options=(-1,) * 4,
    span_s=_NO_SPAN,
    answer_box=_NO_BOX,
    times_s=(),
    time_valid=(),
    time_repeats=(),
    claim_times_s=(),
    claim_valid=(),
    claim_repeats=(),
    claim_names=(),
    boxes=(),
    box_claim=(),
    num_objects=0,
    odd_time_claims=0,
    has_think=False,
    has_answer=False,
    balanced=False,
    num_time_tags=0,
    has_each_tag=False,
    adjacent_claim=False,
    adjacent_box=False,
    one_word_object=False,
)
_OPTION_HEADER = "Correct Option:"


class Parsed(NamedTuple):
    """A batch, read: one prediction and one ground truth per row (rows of a group share theirs)."""

    predictions: list[Prediction]
    golds: list[Gold]
    progress: Float[np.ndarray, " rows"]

    def buckets(self) -> list[Bucket]:
        """The rows as padded arrays, those of like size together."""
        with no_collection():
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
    # The record itself is kept beside its reading: a sequence may make records as it goes, and ids are used again.
    read: dict[int, tuple[Any, Gold]] = {}
    golds, predictions = [], []
    with no_collection():
        for index, (record, completion) in enumerate(zip(records, completions, strict=True)):
            if not isinstance(completion, str):
                raise InputError(f"completion {index} is {type(completion).__name__}; expected a string")
            if id(record) not in read:
                read[id(record)] = (record, truth.read_record(record, index, stemmer, sizes))
            gold = read[id(record)][1]
            golds.append(gold)
            predictions.append(parse_completion(completion, gold, stemmer))
    return Parsed(predictions, golds, shares)


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """Pause the cyclic garbage collector: thousands of small lists make it walk the heap, a third of the time.

    No cycle is made in between, so nothing waits for it. Best around all of their life: none is left to walk then.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def parse_completion(text: str, gold: Gold, stemmer: Stemmer) -> Prediction:
    """Everything a score asks of one completion, its words and names numbered as in `gold`."""
    task = gold.task
    think, answer = tags.think_text(text), tags.answer_text(text)
    inner, reply = think or "", answer or ""
    tagged = inner if "<" in inner else ""  # six counts of the whole text less, where there is no tag at all
    opened = {name: tagged.count(f"<{name}>") for name in (tags.OBJ, tags.BOX, tags.TIME)}
    found: dict[str, Any] = {
        "num_objects": opened[tags.OBJ],
        "has_think": think is not None,
        "has_answer": answer is not None,
        "balanced": tags.counts_match(text, tags.THINK, tags.ANSWER)
        and all(tagged.count(f"</{name}>") == number for name, number in opened.items()),
        "num_time_tags": opened[tags.TIME],
        "has_each_tag": all(opened.values()),
    }
    if task == tasks.GENERAL_MCQ:
        found["options"] = _read_options(reply, gold.option)
    elif task == tasks.TEMPORAL_MCQ:
        _, header, option = reply.partition(_OPTION_HEADER)
        if header:
            found["options"] = _read_options(option.partition(_OPTION_HEADER)[0], gold.option)
    elif task == tasks.VISUAL:
        boxes = tags.parse_boxes(inner)
        found |= {
            "answer_box": tags.parse_first_box(reply) or _NO_BOX,
            "boxes": [box or _NO_BOX for box in boxes],
            "box_claim": [-1] * len(boxes),
            "adjacent_box": tags.has_adjacent_box(inner),
            "one_word_object": tags.has_one_word_box(text),
        }
    elif task == tasks.TEMPORAL_SPATIAL:
        found |= _read_claims(tags.parse_claims(inner), gold)
    if task in (tasks.TEMPORAL, tasks.TEMPORAL_MCQ):
        found["span_s"] = tags.parse_span(reply) or _NO_SPAN
    if task in (tasks.TEMPORAL, tasks.TEMPORAL_MCQ, tasks.TEMPORAL_SPATIAL):
        times = tags.parse_times(inner)
        found["times_s"] = [math.nan if time is None else time for time in times]
        found["time_valid"] = [True] * len(times)
        found["time_repeats"] = _repeats(map(_half_second, times))
    if task in (tasks.TEMPORAL_SPATIAL, tasks.GENERAL_FREE_FORM):
        words = stemmer.words(reply)
        found["words"] = [gold.word_ids.get(word, -1) for word in words]
        found["num_words"] = len(words)
    return _NOTHING._replace(**found)


def _read_claims(claims: Sequence[tags.Claim], gold: Gold) -> dict[str, Any]:
    """Fields of a prediction that come from its claims; an unparsed claim has no boxes."""
    if not claims:
        return {}
    names = [truth.normal_name(claim.name) for claim in claims]
    boxes = [(box or _NO_BOX, number) for number, claim in enumerate(claims) if claim.parsed for box in claim.boxes]
    return {
        "claim_times_s": [math.nan if claim.time_s is None else claim.time_s for claim in claims],
        "claim_valid": [claim.parsed for claim in claims],
        "claim_repeats": _repeats((name, claim.boxes, claim.time_s) for name, claim in zip(names, claims, strict=True)),
        "claim_names": [gold.name_ids.get(name, -1) for name in names],
        "boxes": [box for box, _ in boxes],
        "box_claim": [number for _, number in boxes],
        "odd_time_claims": sum(claim.parsed and not tags.is_plain_number(claim.time_text) for claim in claims),
        "adjacent_claim": True,
    }


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


def _half_second(time_s: float | None) -> Hashable:
    """The same for times that differ by less than the frames that are shown do."""
    return math.floor(2 * time_s) if time_s is not None and math.isfinite(time_s) else time_s


def _repeats(values: Iterable[Hashable]) -> list[bool]:
    """True where an equal value came before."""
    values = list(values)
    seen: set[Hashable] = set(values)
    if len(seen) == len(values):
        return [False] * len(values)
    seen.clear()
    repeats = []
    for value in values:
        repeats.append(value in seen)
        seen.add(value)
    return repeats

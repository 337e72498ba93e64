"""What a model wrote about places -> boxes by second: JSON in fences, lists, dictionaries, brackets that were cut off.

The reader is one pass over the tokens with a stack of its own: linear in the text, whatever the text is.
"""

import itertools
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float64

from openo3_jax import tags
from openo3_jax.evals import answers

BoxesBySecond = dict[float, list[tags.Box]]  # seconds from the start of the clip -> xyxy boxes

_TOKEN = re.compile(r"[\[\]{}():,]|\"[^\"\n]*+\"?|'[^'\n]*+'?|[-+]?\.?\d[\w.+-]*+(?::\d++)*+|[^\W\d]\w*+")
_CLOSING = {"[": "]", "{": "}", "(": ")"}
_END = ""  # after the last token, which is never empty
_OPENING = {closing: opening for opening, closing in _CLOSING.items()}
_TIME_WORDS = frozenset(("time", "timestamp", "second", "seconds", "sec", "t", "frame"))
_BOX_WORDS = frozenset(("box", "boxes", "bbox", "bboxes", "bbox_2d", "box_2d"))
_SECOND = re.compile(r"(?:<t>)?\s{0,3}(\d++(?::\d++){0,2}+(?:\.\d++)?+)\s{0,3}(?:</t>)?\s{0,3}(?:s|sec|seconds?)?")


def parse_boxes(text: str) -> BoxesBySecond | None:
    """The boxes of each second that the answer names; None where it holds no box with a second.

    Understood are `{"3": [x1, y1, x2, y2]}` and several boxes in a list, lists of such dictionaries, lists of
    `[second, box]`, dictionaries with `time` and `bbox_2d`, and evidence as it is taught, `<obj>..</obj><box>..</box>
    at<t>3.0</t>s`. Seconds may be `3`, `"3.0"`, `"3s"` or `"0:03"`. Coordinates stay as written.

    Source: Open-o3-Video eval/test/test_vstar_multi_images.py:375-449.
    """
    answer = answers.final_text(text)
    found: BoxesBySecond = {}
    for second, box in _pairs(read_literal(_fenced(answer))):
        found.setdefault(second, []).append(box)
    if not found:
        for claim in tags.parse_claims(answer):
            if claim.parsed and math.isfinite(claim.time_s):
                boxes = [box for box in claim.boxes if box is not None and all(map(math.isfinite, box))]
                found.setdefault(claim.time_s, []).extend(boxes)
    return {second: boxes for second, boxes in found.items() if boxes} or None


def at_seconds(found: BoxesBySecond | None, seconds: Sequence[float | int]) -> Float64[np.ndarray, "boxes preds 4"]:
    """The boxes said for each of `seconds`, padded with `nan`."""
    said = [(found or {}).get(float(second), []) for second in seconds]
    padded = np.full((len(said), max(map(len, said), default=0), 4), np.nan)
    for row, boxes in zip(padded, said, strict=True):
        row[: len(boxes)] = np.reshape(boxes, (-1, 4))
    return padded


def _fenced(text: str) -> str:
    """What stands in the first ```json fence, else in the first fence, else all; a fence may lack its end."""
    for fence in ("```json", "```"):
        start = text.find(fence)
        if start >= 0:
            return text[start + len(fence) :].partition("```")[0]
    return text


# ---- text -> lists, dictionaries, numbers and words ----


class _Dict(list):
    """Pairs of key and value in the order they were written, repetitions included."""


def read_literal(text: str) -> Any:
    """The first list or dictionary of `text`, read leniently; None without one.

    Either kind of quotes, words without quotes, trailing commas and `(..)` for lists are taken. Brackets that are
    missing are closed: at the end, before the closing bracket of what they stand in, and before the next key of a
    dictionary. A dictionary comes back as a `_Dict`.
    """
    start = min((at for at in (text.find("["), text.find("{")) if at >= 0), default=-1)
    if start < 0:
        return None
    stack: list[list[Any]] = []  # what is open; a dictionary holds keys and values in turn until it is closed
    kinds: list[str] = []
    num_open = dict.fromkeys(_CLOSING, 0)
    done = None
    for token in itertools.chain(_TOKEN.findall(text, start), (_END,)):
        keys: list[Any] = []  # what stands before a ":" that closes the list around it
        if token in _CLOSING:
            stack.append([])
            kinds.append(token)
            num_open[token] += 1
            continue
        if token == _END:
            num_closed = len(stack)
        elif token in _OPENING:
            kind, num_closed = _OPENING[token], 1
            while num_open[kind] and kinds[-num_closed] != kind:
                num_closed += 1
        elif token == ":":
            is_in_list = kinds[-1] == "[" and kinds[-2:-1] == ["{"]
            if not is_in_list or not stack[-1] or isinstance(stack[-1][-1], list):
                continue
            keys, num_closed = [stack[-1].pop()], 1
        else:
            if token != ",":
                stack[-1].append(_scalar(token))
            continue
        for _ in range(num_closed):
            kind, values = kinds.pop(), stack.pop()
            num_open[kind] -= 1
            done = _to_pairs(values) if kind == "{" else values
            if stack:
                stack[-1].append(done)
        if not stack:
            return done
        stack[-1] += keys
    return done


def _to_pairs(values: list[Any]) -> _Dict:
    pairs, key = _Dict(), None
    for value in values:
        if key is None or (isinstance(key, list) and not isinstance(value, list)):
            key = value  # a list without a key before it: what follows is the next key
        else:
            pairs.append((key, value))
            key = None
    return pairs


def _scalar(token: str) -> float | str:
    if token[0] in "\"'":
        return token.strip("\"'")
    try:
        return float(token)
    except ValueError:
        return token


# ---- values -> (second, box) ----


def _pairs(value: Any) -> Iterator[tuple[float, tags.Box]]:
    """Every second with a box, in a value that is a dictionary, a list of them, or a list of [second, box]."""
    pending = [value]
    while pending:
        value = pending.pop()
        if isinstance(value, _Dict):
            yield from _of_dictionary(value)
            pending += [inner for _, inner in value if isinstance(inner, list) and not _boxes(inner)]
        elif isinstance(value, list):
            second = _second(value[0]) if len(value) == 2 else None
            if second is not None:
                yield from ((second, box) for box in _boxes(value[1]))
            else:
                pending += [inner for inner in reversed(value) if isinstance(inner, list)]


def _of_dictionary(value: _Dict) -> Iterator[tuple[float, tags.Box]]:
    named = [(key.casefold(), inner) for key, inner in value if isinstance(key, str)]
    times = [_second(inner) for key, inner in named if key in _TIME_WORDS]
    if len(times) == 1 and times[0] is not None:
        yield from ((times[0], box) for key, inner in named if key in _BOX_WORDS for box in _boxes(inner))
        return
    for key, inner in value:
        second = _second(key)
        if second is not None:
            yield from ((second, box) for box in _boxes(inner))


def _second(value: Any) -> float | None:
    if isinstance(value, float):
        return value if math.isfinite(value) and value >= 0 else None
    found = _SECOND.fullmatch(value.strip()) if isinstance(value, str) else None
    second = answers.to_seconds(found[1]) if found is not None else math.nan
    return second if math.isfinite(second) else None


def _boxes(value: Any) -> list[tags.Box]:
    """Four numbers, or a list of such lists; whatever else stands in it is passed over."""
    if not isinstance(value, list) or isinstance(value, _Dict):
        return []
    box = _box(value)
    return [box] if box is not None else [box for box in map(_box, value) if box is not None]


def _box(value: Any) -> tags.Box | None:
    if not isinstance(value, list) or isinstance(value, _Dict) or len(value) != 4:
        return None
    box = tags.box_from_json(value)
    return box if box is not None and all(map(math.isfinite, box)) else None

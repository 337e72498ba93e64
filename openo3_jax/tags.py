"""`<think> <answer> <obj> <box> <t>`: values -> text and text -> values. The only grammar of evidence.

Every scanner walks forward and asks no question twice of a character, so its time
is linear in the text whatever the text is; no scanner raises on model text.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

from openo3_jax.errors import InputError

Box = tuple[float, float, float, float]  # x1, y1, x2, y2
Number = float | int

THINK, ANSWER, OBJ, BOX, TIME = ("think", "answer", "obj", "box", "t")
_JSON = json.JSONDecoder()
# Linear: what they repeat holds no "<", so an attempt ends before the next one begins.
_PLAIN_TIME = re.compile(r"<t>([\d.]++)</t>s")
_SPAN = re.compile(r"<t>(\d++(?:\.\d*+)?)</t>s to <t>(\d++(?:\.\d*+)?)</t>s")
# A span, else a time, else boxes, with a name before them or not.
_BARE_MENTION = re.compile(
    rf"(?P<span>{_SPAN.pattern})|(?P<time>{_PLAIN_TIME.pattern})"
    r"|(?:<obj>(?P<name>[^<]*+)</obj>)?+(?P<boxes>(?:<box>[^<]*+</box>)++)"
)
_CLAIM_TO_BOX = "</obj><box>["
_BOX_TO_TIME = "]</box>at<t>"


class Claim(NamedTuple):
    """One `<obj>name</obj><box>[..]</box>at<t>12.3</t>s` of a text, well formed or not.

    `boxes`: None where one of them is not JSON; an entry is None where the JSON is not four numbers.
    `time_s`: None where `time_text` is not a number; `nan` and `inf` are. `start`, `end`: its place in the text.
    """

    name: str
    boxes: tuple[Box | None, ...] | None
    time_text: str
    time_s: float | None
    start: int
    end: int

    @property
    def parsed(self) -> bool:
        """The time is a number and every box is JSON."""
        return self.boxes is not None and self.time_s is not None


class Mention(NamedTuple):
    """A place of a text that points into the clip: a claim, or boxes, a time or a span outside of any claim.

    `start`, `end`: its place in the text. `claim`: its place in `parse_claims` of the text, None if it is none.
    `boxes`: as in a `Claim`, () where it has none. `times_s`: none, one, or start and end; None where it is no number.
    """

    start: int
    end: int
    claim: int | None
    name: str
    boxes: tuple[Box | None, ...] | None
    times_s: tuple[float | None, ...]


class Part(NamedTuple):
    """`text[start:end]` of an assistant's turn; outside are the tags themselves and what stands beside them."""

    kind: Literal["think", "answer", "outside"]
    start: int
    end: int


class Span(NamedTuple):
    """`[start, end]` in seconds from the start of the clip."""

    start_s: float
    end_s: float


# ---- values -> text ----


def render_think_answer(reasoning: str, answer: str) -> str:
    """The assistant's turn: `<think>reasoning</think>`, newline, `<answer>answer</answer>`.

    Source: src/r1-v/src/open_r1/sft_multi_task.py:56-204.
    """
    return f"<think>{reasoning}</think>\n<answer>{answer}</answer>"


def render_time(time_s: Number) -> str:
    """`<t>12.3</t>s`, one decimal, as the frames of a prompt are labelled."""
    return f"<t>{time_s:.1f}</t>s"


def render_box(box: Sequence[Number]) -> str:
    """`<box>[x1,y1,x2,y2]</box>`: whole numbers without a point, others to three decimals, no spaces."""
    return f"<box>[{','.join(_render_number(value) for value in box)}]</box>"


def render_claim(name: str, box: Sequence[Number], time_s: Number) -> str:
    """`<obj>name</obj><box>[x1,y1,x2,y2]</box>at<t>12.3</t>s`: what, where and when."""
    return f"<obj>{name}</obj>{render_box(box)}at{render_time(time_s)}"


def render_span(start_s: Number, end_s: Number) -> str:
    """`From <t>1.0</t>s to <t>2.5</t>s`."""
    return f"From {render_time(start_s)} to {render_time(end_s)}"


def rewrite_boxes(text: str, transform: Callable[[Sequence[float]], Sequence[Number]]) -> str:
    """Replace every `<box>[x1,y1,x2,y2]</box>` of `text` by its transform, as integers without spaces.

    Nested lists (`[[..]]`) and boxes without brackets stay as they are. Numbers round half to even.

    Example: `rewrite_boxes("<box>[.5, 0, 1, 1]</box>", lambda box: [28 * v for v in box])` is
    `"<box>[14,0,28,28]</box>"`.
    Raises: InputError where a box does not hold exactly four numbers.
    Source: src/r1-v/src/open_r1/sft_multi_task.py:267-279.
    """
    pieces, done, here = [], 0, text.find("<box>[")
    while here >= 0:
        close = text.find("]", here + 6)
        if close < 0:
            break
        if close > here + 6 and text.startswith("]</box>", close):
            box = _read_four(text[here + 6 : close])
            pieces += [text[done:here], render_box([round(float(value)) for value in transform(box)])]
            done = close + len("]</box>")
        # A box that opened between `here` and `close` would end at the same bracket, so it fails alike.
        here = text.find("<box>[", close)
    return "".join([*pieces, text[done:]])


def _read_four(content: str) -> Box:
    numbers = content.split(",")
    try:
        box = [float(number) for number in numbers]
    except ValueError:
        box = []
    if len(box) != 4 or not all(map(math.isfinite, box)):
        raise InputError(f"<box>[{content[:80]}]</box> does not hold four numbers; expected [x1,y1,x2,y2]")
    return (box[0], box[1], box[2], box[3])


def _render_number(value: Number) -> str:
    value = float(value)
    return str(int(value)) if value.is_integer() else repr(round(value, 3))


# ---- text -> values ----


def think_text(text: str) -> str | None:
    """What stands in the first `<think>..</think>`, stripped; None without one."""
    return _first_between(text, THINK)


def answer_text(text: str) -> str | None:
    """What stands in the first `<answer>..</answer>`, stripped; None without one."""
    return _first_between(text, ANSWER)


def _first_between(text: str, tag: str) -> str | None:
    start = text.find(f"<{tag}>")
    if start < 0:
        return None
    start += len(tag) + 2
    end = text.find(f"</{tag}>", start)
    return None if end < 0 else text[start:end].strip()


def parse_times(text: str) -> list[float | None]:
    """The seconds of every `<t>12.3</t>s`; only digits and points count; None if they are no number.

    Example: `parse_times("<t>3</t>s <t>-1</t>s <t>1.2.3</t>s")` is `[3.0, None]`.
    Source: src/r1-v/src/open_r1/reward_func.py:388-426.
    """
    return [_to_float(content) for content in _PLAIN_TIME.findall(text)]


def is_plain_number(text: str) -> bool:
    """Only digits and points, as `parse_times` wants them."""
    digits = text.replace(".", "")
    return not digits or digits.isdecimal()


def parse_span(text: str) -> Span | None:
    """The first `<t>start</t>s to <t>end</t>s` of unsigned decimals (`5`, `5.`, `5.25`), in seconds.

    Source: src/r1-v/src/open_r1/reward_func.py:86-182.
    """
    found = _SPAN.search(text)
    return None if found is None else Span(float(found[1]), float(found[2]))


def parse_boxes(text: str) -> list[Box | None]:
    """The box of every `<box>[..]</box>` that stands on one line and is JSON; None if it is not four numbers.

    Source: src/r1-v/src/open_r1/reward_func.py:489-525.
    """
    values = (_from_json(content) for content in _bracketed(text, "<box>[", "]</box>"))
    return [box_from_json(value) for value in values if value is not None]


def parse_first_box(text: str) -> Box | None:
    """The first `<box>[..]</box>` on one line; None if there is none or it is not four numbers.

    Source: src/r1-v/src/open_r1/reward_func.py:184-237.
    """
    content = first_box_content(text)
    return None if content is None else box_from_json(_from_json(content))


def first_box_content(text: str) -> str | None:
    """`[..]` of the first `<box>[..]</box>` on one line, brackets included; None without one."""
    return next(_bracketed(text, "<box>[", "]</box>"), None)


def has_adjacent_box(text: str) -> bool:
    """An `<obj>..</obj><box>[..]</box>` occurs."""
    start = text.find("<obj>")
    box = text.find(_CLAIM_TO_BOX, start + 5) if start >= 0 else -1
    return box >= 0 and text.find("]</box>", box + len(_CLAIM_TO_BOX)) >= 0


def has_one_word_box(text: str) -> bool:
    """An `<obj>word</obj><box>[..]</box>` occurs on one line; its name is letters, digits and underscores.

    Source: src/r1-v/src/open_r1/reward_func.py:239-306.
    """
    for line in text.split("\n"):
        last_close = line.rfind("]</box>")
        start = line.find("<obj>")
        while start >= 0:
            end = start + 5
            while end < len(line) and (line[end] == "_" or line[end].isalnum()):
                end += 1
            box_start = end + len(_CLAIM_TO_BOX)
            if end > start + 5 and line.startswith(_CLAIM_TO_BOX, end) and last_close >= box_start:
                return True
            start = line.find("<obj>", end)
    return False


def counts_match(text: str, *names: str) -> bool:
    """Each of these tags is closed as often as it is opened, in whatever order."""
    return all(text.count(f"<{name}>") == text.count(f"</{name}>") for name in names)


def parse_claims(text: str) -> list[Claim]:
    """Every object, box run and time in a row, left to right; tags touch each other, contents are free.

    An `<obj>` opens a claim whose name runs to the next `</obj><box>[`, whatever stands between; the boxes run
    to the next `]</box>at<t>`, the time to the next `</t>s`.

    Example: `parse_claims("<obj>cat</obj><box>[1,2,3,4]</box>at<t>5</t>s")` is
    `[Claim("cat", ((1.0, 2.0, 3.0, 4.0),), "5", 5.0, 0, 45)]`.
    Source: src/r1-v/src/open_r1/reward_func.py:527-605.
    """
    claims = []
    start = text.find("<obj>")
    while start >= 0:
        name_end = text.find(_CLAIM_TO_BOX, start + 5)
        box_end = text.find(_BOX_TO_TIME, name_end + len(_CLAIM_TO_BOX)) if name_end >= 0 else -1
        time_start = box_end + len(_BOX_TO_TIME)
        time_end = text.find("</t>s", time_start) if box_end >= 0 else -1
        if time_end < 0:
            break  # what the next `<obj>` would need is missing as well
        run = text[name_end + len("</obj><box>") : box_end + 1]
        values = [_from_json(content) for content in _bracketed(run, "[", "]")]
        boxes = None if any(value is None for value in values) else tuple(map(box_from_json, values))
        end = time_end + len("</t>s")
        time_text = text[time_start:time_end]
        claims.append(Claim(text[start + 5 : name_end], boxes, time_text, _to_float(time_text), start, end))
        start = text.find("<obj>", end)
    return claims


def parse_mentions(text: str) -> list[Mention]:
    """Everything in `text` that points into the clip, left to right, without overlap.

    Example: `parse_mentions("at <t>5</t>s")` is `[Mention(3, 12, None, "", (), (5.0,))]`.
    """
    mentions, done = [], 0
    for number, claim in enumerate(parse_claims(text)):
        mentions += _bare_mentions(text, done, claim.start)
        mentions.append(Mention(claim.start, claim.end, number, claim.name, claim.boxes, (claim.time_s,)))
        done = claim.end
    return [*mentions, *_bare_mentions(text, done, len(text))]


def _bare_mentions(text: str, start: int, end: int) -> Iterator[Mention]:
    for found in _BARE_MENTION.finditer(text, start, end):
        boxes: tuple[Box | None, ...] | None = ()
        times_s: tuple[float | None, ...] = ()
        if found["span"] is not None:
            times_s = tuple(parse_span(found["span"]) or ())
        elif found["time"] is not None:
            times_s = tuple(parse_times(found["time"]))
        else:
            boxes = tuple(parse_boxes(found["boxes"])) or None
        yield Mention(found.start(), found.end(), None, found["name"] or "", boxes, times_s)


def parts(text: str) -> list[Part]:
    """The turn cut into its first think, its first answer and what is outside of them, in order, nothing left out."""
    inner = []
    for kind in (THINK, ANSWER):
        start = text.find(f"<{kind}>") + len(kind) + 2
        end = text.find(f"</{kind}>", start)
        if start >= len(kind) + 2 and end >= 0:
            inner.append(Part(kind, start, end))
    found, done = [], 0
    for part in sorted(inner, key=lambda part: part.start):
        if part.start < done:  # an answer within think: shown there
            continue
        found += [Part("outside", done, part.start), part]
        done = part.end
    return [part for part in [*found, Part("outside", done, len(text))] if part.start < part.end]


def box_from_json(value: object) -> Box | None:
    """Four numbers, numeric strings, booleans or nulls (as `nan`) -> a box; anything else -> None.

    Source: src/r1-v/src/open_r1/reward_func.py:356-386.
    """
    if not isinstance(value, list) or len(value) != 4:
        return None
    try:
        x1, y1, x2, y2 = map(float, value)
    except (TypeError, ValueError, OverflowError):  # a null, a word, a list, an integer beyond 1e308
        numbers = [math.nan if item is None else _to_float(item) for item in value]
        if any(number is None for number in numbers):
            return None
        x1, y1, x2, y2 = numbers
    return (x1, y1, x2, y2)


def _bracketed(text: str, opening: str, closing: str) -> Iterator[str]:
    """`[..]` of every `opening..closing` on one line, brackets included, shortest first, without overlap."""
    inner = len(opening) - 1
    for line in text.split("\n"):
        start = line.find(opening)
        while start >= 0:
            end = line.find(closing, start + len(opening))
            if end < 0:
                break
            yield line[start + inner : end + 1]
            start = line.find(opening, end + len(closing))


def _from_json(text: str) -> list | None:
    """The list that `text`, which begins and ends with a bracket, holds; None if it is not JSON."""
    try:
        value, end = _JSON.raw_decode(text)
    except (ValueError, RecursionError):  # RecursionError: thousands of opening brackets
        return None
    return value if end == len(text) else None


def _to_float(value: object) -> float | None:
    if not isinstance(value, str | int | float):
        return None
    try:
        return float(value)
    except ValueError:
        return None
    except OverflowError:  # an integer beyond 1e308
        return math.inf if value > 0 else -math.inf

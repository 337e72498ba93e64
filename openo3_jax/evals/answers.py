"""What a model wrote -> the option, the span or the text it answered. Linear in the text; never raises, never guesses.

An answer that cannot be read is None: there is no default letter and no default span.
"""

import math
import re
from collections.abc import Mapping

from openo3_jax import tags

_OPEN, _CLOSE = "([{<*\"'` \n\t", ")]}>*\"'`.:,; \n\t"
# A letter at the head of the answer, set off as options are: "B.", "(B)", "B) cat", "**B**: cat".
_LEADING = re.compile(r"[\s(\[*\"'`]{0,8}([A-Za-z])(?:[)\]:*]|\.(?!\w)|\s{0,3}$)")
_LETTER = r"([B-HJ-Z]\b|[AI]\b(?!\s{1,3}(?!(?:or|and)\b)[a-z]))"  # "A" and "I" before a small letter are words
# The letter that is called the answer, and one that is named in the same breath: "B or C", "(A), (B)".
_STATED = re.compile(
    r"\b(?i:answer|option|choice)\b(?:\s{1,3}is|\s{0,3}:|\s{0,3}=)?[\s(\[{*\"'`]{0,8}" + _LETTER,
)
_JOINED = re.compile(
    r"[)\]}*\"'`]{0,4}\s{0,3}(?:[,/&]|\b(?i:or|and)\b)\s{0,3}(?:\b(?i:option)\s{1,3})?[(\[{*\"'`]{0,4}" + _LETTER
)
_BOXED = re.compile(r"\\boxed\{\s{0,3}(?:\\text\{)?([A-Za-z])\}")
_NUMBER = re.compile(r"(?<![\w.:])\d++(?::\d++){0,2}+(?:\.\d++)?+(?=s\b|sec|\b)")
_WORD = re.compile(r"[^\W_]+(?:\.\d++)?")
_ARTICLES = frozenset(("a", "an", "the"))


def final_text(text: str) -> str:
    """What stands in the answer tag (to the end where it was cut off), else what follows the reasoning, else all.

    Empty where the text ends within its reasoning.
    """
    answer = tags.answer_text(text)
    if answer is not None:
        return answer
    if "<answer>" in text:
        return text.partition("<answer>")[2].strip()
    if "<think>" in text and "</think>" not in text:
        return ""
    return text.rpartition("</think>")[2].strip()


def parse_letter(text: str, options: Mapping[str, str]) -> str | None:
    """The letter among `options` (letter -> text of the option) that the answer states; None where it states none.

    Read are a letter alone, one set off at the head ("B.", "(B) cat"), one that is called the answer, and the
    option's own words; two different letters state nothing.

    Example: `parse_letter("<answer>(B) a cat</answer>", {"A": "a dog", "B": "a cat"})` is `"B"`.
    Source: Open-o3-Video eval/test/ takes exactly one letter, and "A" where there is none.
    """
    answer = final_text(text)
    bare = answer.strip(_OPEN + _CLOSE)
    if len(bare) == 1 and bare.upper() in options:
        return bare.upper()
    for letter, words in options.items():
        if words and bare.casefold() == words.strip(_OPEN + _CLOSE).casefold():
            return letter
    leading = _LEADING.match(answer)
    if leading is not None:
        stated = {leading[1].upper(), *_joined(answer, leading), *_listed(answer, options)}
    else:
        stated = {letter.upper() for letter in _BOXED.findall(answer)}
        stated = stated or {x for found in _STATED.finditer(answer) for x in (found[1], *_joined(answer, found))}
    stated &= options.keys()
    return stated.pop() if len(stated) == 1 else None


def _joined(answer: str, found: re.Match) -> list[str]:
    """The letter that is named together with one that was found."""
    other = _JOINED.match(answer, found.end())
    return [] if other is None else [other[1]]


def _listed(answer: str, options: Mapping[str, str]) -> list[str]:
    """Letters that stand before their option's words, as in a list of all options."""
    heads = ((letter, rf"\b{letter}[).:]\s{{0,3}}{re.escape(words)}") for letter, words in options.items() if words)
    return [letter for letter, head in heads if re.search(head, answer, re.IGNORECASE)]


def parse_span(text: str) -> tags.Span | None:
    """The span in seconds that the answer states: `<t>1.0</t>s to <t>2.5</t>s`, or the only two numbers in it.

    Numbers may be written `m:ss` or `h:mm:ss`. A span that ends before it starts stays so.

    Example: `parse_span("<answer>from 0:05 to 12.5 s</answer>")` is `Span(5.0, 12.5)`.
    Source: Open-o3-Video eval/test/test_vstar_multi_images.py:132-145.
    """
    answer = final_text(text)
    tagged = tags.parse_span(answer)
    numbers = [tagged.start_s, tagged.end_s] if tagged is not None else [to_seconds(n) for n in _NUMBER.findall(answer)]
    if len(numbers) != 2 or not all(map(math.isfinite, numbers)):
        return None
    return tags.Span(*numbers)


def to_seconds(text: str) -> float:
    """`12.5`, `1:05` or `1:02:03` in seconds. `text` holds digits, colons and a point only."""
    seconds = 0.0
    for part in text.split(":"):
        seconds = 60 * seconds + float(part)
    return seconds


def matches_open(text: str, gold: str) -> bool:
    """The final answer is the true one: equal to two decimals for numbers, else its words in a row within it.

    Only the answer is read, never the reasoning. Articles, case and punctuation do not count.
    Source: the rule of MMMU's open questions, as Open-o3-Video's eval for VideoMMMU applies it to the whole output.
    """
    said, wanted = words(final_text(text)), words(gold)
    number = _as_number(gold)
    if number is not None:
        numbers = [value for value in map(_as_number, _NUMERAL.findall(final_text(text))) if value is not None]
        return bool(numbers) and round(numbers[-1], 2) == round(number, 2)
    return bool(wanted) and f" {' '.join(wanted)} " in f" {' '.join(said)} "


_NUMERAL = re.compile(r"-?(?<![\w.])\d[\d,]*+(?:\.\d++)?+")


def _as_number(text: str) -> float | None:
    text = text.strip().strip("$").removesuffix("%").replace(",", "")
    if not re.fullmatch(r"-?\d++(?:\.\d++)?+", text):
        return None
    value = float(text)
    return value if math.isfinite(value) else None


def words(text: str) -> list[str]:
    """Words and numbers in small letters, without articles."""
    return [word for word in _WORD.findall(text.casefold()) if word not in _ARTICLES]

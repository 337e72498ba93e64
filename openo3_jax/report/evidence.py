"""Answers with their evidence -> one HTML page: the clip plays, a click on a claim seeks and draws its boxes.

Text of a model is escaped by the template, in data for the script by its JSON filter; the page may load nothing, its
content security policy says, and run no script but its own.
"""

import base64
import dataclasses
import functools
import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from openo3_jax import tags
from openo3_jax.report.embed import Embedded
from openo3_jax.report.verdicts import Scored, Verdict

NUM_COLORS = 5
_MOST_ROWS, _ROOM = 4, 9.0  # of buttons above the time line; percent of its width that one takes
_MOST_NAME = 60  # characters of a name on a button
_MOST_MENTIONS = 400  # of one answer that become buttons; the rest stays text


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """One completion to show. `shown_hw`: px of the frames the model was shown, its boxes' unit; None if not known.

    `media` None: `gap` says why. `scored` None: there is no truth to hold it against. `facts`: short lines below
    the title, name and value.
    """

    title: str
    question: str
    completion: str
    shown_hw: tuple[tags.Number, tags.Number] | None
    media: Embedded | None = None
    gap: str = ""
    scored: Scored | None = None
    facts: Sequence[tuple[str, str]] = ()


def render_page(title: str, answers: Sequence[Answer], notes: Sequence[str] = ()) -> str:
    """The page, with everything in it: no file beside it, nothing from the network."""
    samples = [view(answer, place) for place, answer in enumerate(answers)]
    return environment().get_template("evidence_page.jinja").render(title=title, samples=samples, notes=notes)


@functools.cache
def environment() -> jinja2.Environment:
    """Templates of this package; `policy` is the pages' content security policy."""
    loader = jinja2.PackageLoader("openo3_jax.report", ".")
    made = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    script = loader.get_source(made, "evidence_script.jinja")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    made.globals["script"] = script
    made.globals["policy"] = (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; img-src data:; "
        "media-src data: blob:; base-uri 'none'; form-action 'none'"
    )
    return made


def moments_s(completion: str) -> list[float]:
    """Every finite time that the completion cites, ends of spans included."""
    found = [mention.times_s for mention in tags.parse_mentions(completion)]
    return [time_s for times_s in found for time_s in times_s if time_s is not None and math.isfinite(time_s)]


def view(answer: Answer, place: int) -> dict[str, Any]:
    """What the template needs of one answer; `place` tells samples of a page apart."""
    scored, text = answer.scored, answer.completion
    clip_s = answer.media.duration_s if answer.media is not None else 0.0
    parts, marks = [], []
    for number, part in enumerate(tags.parts(text)):
        inner = text[part.start : part.end]
        mentions = tags.parse_mentions(inner)
        verdicts = scored.verdicts[number] if scored is not None else (Verdict(),) * len(mentions)
        pieces, done = [], 0
        for mention, verdict in zip(mentions, verdicts, strict=True):
            if len(marks) == _MOST_MENTIONS:
                break
            pieces += [{"text": inner[done : mention.start]}, {"mark": len(marks)}]
            marks.append(_mark(mention, verdict, answer, clip_s, len(marks)))
            done = mention.end
        if part.kind != "outside" or mentions or not _is_only_tags(inner):
            parts.append({"kind": part.kind, "pieces": [*pieces, {"text": inner[done:]}]})
    known_s = [t for mark in marks for t in mark["times_s"]]
    if scored is not None:
        known_s += [*scored.key_times_s, *(t for span in scored.spans_s for t in span)]
    axis_s = clip_s or max(known_s, default=0.0)
    return {
        "id": f"sample-{place}",
        "answer": answer,
        "parts": parts,
        "marks": marks,
        "axis_s": axis_s,
        "timeline": _timeline(marks, scored, axis_s) if axis_s > 0 and known_s else None,
        "num_claims": sum(mark["is_claim"] for mark in marks),
        "script": [{key: mark[key] for key in ("time_s", "boxes", "truth", "lines", "number")} for mark in marks],
    }


def _is_only_tags(text: str) -> bool:
    """Nothing but the tags of think and answer, which the page shows as headings."""
    for name in (tags.THINK, tags.ANSWER):
        text = text.replace(f"<{name}>", "").replace(f"</{name}>", "")
    return not text.strip()


def _mark(mention: tags.Mention, verdict: Verdict, answer: Answer, clip_s: float, place: int) -> dict[str, Any]:
    """One button: what it says, where it seeks, what it draws."""
    times_s = [t for t in mention.times_s if t is not None and math.isfinite(t)]
    number = place + 1
    name = " ".join(mention.name.split())
    name = name if len(name) <= _MOST_NAME else name[:_MOST_NAME] + "…"
    boxes, faults = _drawn(mention, answer)
    if mention.claim is not None and not times_s:
        faults.append("its time is no number: nowhere to seek to")
    if clip_s:
        faults += [f"{t:g} s is beyond the clip, which ends at {clip_s:.1f} s" for t in times_s if t > clip_s]
        faults += [f"{t:g} s is before the clip begins" for t in times_s if t < 0]
    lines = [*verdict.lines, *faults] or ["nothing to hold it against"]
    return {
        "number": number,
        "color": place % NUM_COLORS,
        "name": name,
        "is_claim": mention.claim is not None,
        "times_s": times_s,
        "time_s": times_s[0] if times_s else None,
        "where": ", ".join(_numbers(box) for box in mention.boxes or () if box is not None),
        "when": " to ".join(f"{t:g} s" for t in times_s),
        "is_faulty": bool(faults),
        "boxes": [{"name": f"{number} {name}".strip(), "box": box} for box in boxes],
        "truth": [{"name": _true_name(one), "box": [_unit(v) for v in one.box_frac]} for one in verdict.true_boxes],
        "lines": lines,
    }


def _true_name(one: Any) -> str:
    return one.name if one.time_s is None else f"true: {one.name}, {one.time_s:g} s"


def _drawn(mention: tags.Mention, answer: Answer) -> tuple[list[list[float]], list[str]]:
    """Boxes as fractions of the picture, and what keeps others from being drawn."""
    if mention.boxes is None:
        return [], ["a box is no JSON list of four numbers: not drawn"]
    boxes, faults = [], []
    for box in mention.boxes:
        if box is None or not all(map(math.isfinite, box)):
            faults.append("a box is not four finite numbers: not drawn")
        elif answer.shown_hw is None:
            faults.append("the size of the frames shown is not known: boxes are not drawn")
        elif box[2] <= box[0] or box[3] <= box[1]:
            faults.append(f"box {_numbers(box)} is empty or reversed: not drawn")
        else:
            height, width = answer.shown_hw
            x1, y1, x2, y2 = box[0] / width, box[1] / height, box[2] / width, box[3] / height
            if min(x1, y1) < 0 or max(x2, y2) > 1:
                faults.append(f"box {_numbers(box)} leaves the frame of {width:g}x{height:g} px: cut off")
            if x1 < 1 and y1 < 1 and x2 > 0 and y2 > 0:
                boxes.append([_unit(value) for value in (x1, y1, x2, y2)])
    return boxes, list(dict.fromkeys(faults))


def _unit(value: tags.Number) -> float:
    return round(min(max(float(value), 0.0), 1.0), 5)


def _numbers(box: Sequence[float]) -> str:
    return "[" + ", ".join(f"{value:g}" for value in box) + "]"


def _timeline(marks: Sequence[Mapping[str, Any]], scored: Scored | None, axis_s: tags.Number) -> dict[str, Any]:
    """Positions in percent of the axis."""

    def at(time_s: tags.Number) -> float:
        return round(100 * min(max(time_s / axis_s, 0.0), 1.0), 3)

    moments = sorted(({"mark": mark, "at": at(t)} for mark in marks for t in mark["times_s"]), key=lambda m: m["at"])
    last_at = [-math.inf] * _MOST_ROWS
    for moment in moments:  # the first row with room, else the one whose last button is farthest
        free = next((row for row, last in enumerate(last_at) if moment["at"] - last >= _ROOM), None)
        moment["row"] = last_at.index(min(last_at)) if free is None else free
        last_at[moment["row"]] = moment["at"]
    return {
        "moments": moments,
        "rows": max((moment["row"] + 1 for moment in moments), default=1),
        "spans": [
            {"from": at(start), "width": round(at(end) - at(start), 3), "what": f"true span {start:g} to {end:g} s"}
            for start, end in (scored.spans_s if scored is not None else ())
        ],
        "keys": [{"at": at(t), "what": f"true key frame {t:g} s"} for t in (scored.key_times_s if scored else ())],
        "ticks": [{"at": at(t), "what": f"{t:g} s"} for t in _ticks(axis_s)],
    }


def _ticks(axis_s: tags.Number) -> list[float]:
    """Round times, at most seven of them."""
    least = max(axis_s / 6, 0.01)
    power = 10.0 ** math.floor(math.log10(least))
    step = next(s * power for s in (1, 2, 5, 10) if s * power >= least)
    return [round(float(i * step), 2) for i in range(int(axis_s / step) + 1)]

"""What `ask --html` and `score --html` write: answers with the media they speak of, on one page."""

import contextlib
import itertools
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from openo3_jax import tasks
from openo3_jax.config import VideoConfig
from openo3_jax.data import media
from openo3_jax.data.video import Decoder
from openo3_jax.errors import InputError
from openo3_jax.report import embed, evidence, verdicts
from openo3_jax.rewards import commands
from openo3_jax.rewards.truth import SizeFinder

MOST_ANSWERS = 24  # of a file that go on a page
_BYTES_OF_ALL = 48 * 2**20  # of the media of a page, shared by its answers


def shown_hw(path: str | os.PathLike, config: VideoConfig) -> tuple[int, int]:
    """Height and width in px of the frames that a model is shown of the clip. Raises: InputError as `probe` does."""
    with Decoder() as decoder:
        width, height = decoder.probe(path, config).size_wh
    return height, width


def check_name(file: str | os.PathLike) -> None:
    """Raises InputError where no file can have this name."""
    if os.path.isdir(file):
        raise InputError(f"{file}: is a directory; expected the name of an HTML file")


def write(file: str | os.PathLike, page: str) -> None:
    """Write a page whole or not at all, and the directories above it. Raises: InputError where that is not possible."""
    check_name(file)
    file = Path(file)
    staging = file.with_name(f".{file.name}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        staging.write_text(page, encoding="utf-8", errors="backslashreplace")  # half an emoji is no character
        staging.replace(file)
    except OSError as error:  # a full disk names no file
        raise InputError(f"{file}: cannot be written ({error.strerror}); choose another place") from None
    finally:
        with contextlib.suppress(OSError):
            staging.unlink()


def answer_page(
    path: str | os.PathLike, question: str, completion: str, config: VideoConfig, facts: Sequence[tuple[str, str]] = ()
) -> str:
    """The page of one answer about the clip at `path`, which was shown to the model as `config` says.

    Raises: InputError for a clip that cannot be decoded.
    """
    with Decoder() as decoder:
        width, height = decoder.probe(path, config).size_wh
        clip = embed.embed_clip(path, decoder, evidence.moments_s(completion))
    answer = evidence.Answer(
        title=os.path.basename(path),
        question=question,
        completion=completion,
        shown_hw=(height, width),
        media=clip,
        facts=[*facts, ("boxes in px of frames of", f"{width}x{height}")],
    )
    return evidence.render_page(f"Answer: {question}", [answer])


def score_page(
    file: str, *, rules: str = "paper", root: str | os.PathLike | None = None, sizes: SizeFinder | None = None
) -> str:
    """The page of the first answers of a JSONL file as `openo3 score` reads it, scored, with media under `root`.

    Raises: InputError as `score_file` does; missing media are said on the page.
    """
    lines = commands.read_lines(file)
    rows = range(min(len(lines.records), MOST_ANSWERS))
    notes = [f"{len(lines.records)} answers in {os.path.basename(file)}, scored under the rules {rules!r}."]
    if len(lines.records) > MOST_ANSWERS:
        notes.append(f"The first {MOST_ANSWERS} are shown.")
    answers = record_answers(
        [lines.records[i] for i in rows],
        [f"Line {lines.numbers[i]}" for i in rows],
        rules=rules,
        root=root,
        sizes=sizes,
    )
    return evidence.render_page(f"Evidence: {os.path.basename(file)}", answers, notes)


def record_answers(
    records: Sequence[Mapping[str, Any]],
    titles: Sequence[str],
    *,
    rules: str,
    root: str | os.PathLike | None,
    sizes: SizeFinder | None = None,
    facts: Sequence[Sequence[tuple[str, str]]] | None = None,
    limits: embed.Limits | None = None,
) -> list[evidence.Answer]:
    """Records with `completion` and perhaps `step_percent` -> scored answers with media, or why there are none.

    Raises: InputError for a record that cannot be scored.
    """
    texts = [record["completion"] for record in records]
    progress = [float(record.get("step_percent", 1.0)) for record in records]
    scored = verdicts.score_rows(records, texts, progress, rules=rules, sizes=sizes)
    limits = limits or embed.Limits(max_bytes=max(_BYTES_OF_ALL // max(len(records), 1), 2**20))
    found = []
    with Decoder() as decoder:
        for record, text, title, one, more in zip(
            records, texts, titles, scored, facts or itertools.repeat((), len(records)), strict=True
        ):
            clip, gap = _embed(record, [*evidence.moments_s(text), *one.key_times_s], root, decoder, limits)
            found.append(
                evidence.Answer(
                    title=f"{title}: {record['task']}",
                    question=str(record.get("question", "")),
                    completion=text,
                    shown_hw=one.shown_hw or _size_of(record),
                    media=clip,
                    gap=gap,
                    scored=one,
                    facts=[("true answer", record["answer"]), *more],
                )
            )
    return found


def _size_of(record: Mapping[str, Any]) -> tuple[float, float] | None:
    """Height and width in px of the frames, as the record states them."""
    size = record.get("image_size")
    if not isinstance(size, list) or len(size) != 2 or not all(type(v) in (int, float) and v > 0 for v in size):
        return None
    return float(size[1]), float(size[0])


def _embed(
    record: Mapping[str, Any],
    moments_s: Sequence[float],
    root: str | os.PathLike | None,
    decoder: Decoder,
    limits: embed.Limits,
) -> tuple[embed.Embedded | None, str]:
    """The record's clip or picture, else why it is not there."""
    is_picture = record["task"] == tasks.VISUAL
    if root is None:
        return None, "no data root was given; --root ROOT shows the clip"
    for field in ("source", "image_path" if is_picture else "video_path"):
        if not isinstance(record.get(field), str):
            return None, f"the record has no {field}"
    try:
        path = media.find_media(root, record, "rl")
        if is_picture:
            return embed.embed_picture(path, decoder, limits), ""
        return embed.embed_clip(path, decoder, [t for t in moments_s if math.isfinite(t)], limits), ""
    except InputError as error:
        return None, str(error)

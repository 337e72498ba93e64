"""A data root in the released layout -> every flaw of its records and media files, and a mended copy."""

import collections
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from openo3_jax import model_files, tasks
from openo3_jax.config import VideoConfig
from openo3_jax.data import annotations, media, record_checks, store, workers
from openo3_jax.data import files as files_lib
from openo3_jax.data.record_checks import Facts, Flaw
from openo3_jax.data.video import Decoder, Inspection
from openo3_jax.errors import InputError

Advance = Callable[[int, int], None]  # files looked at, of how many
WholeFile = Inspection | tuple[int, int] | InputError  # a clip, the width and height of a picture, or what is wrong


class Finding(NamedTuple):
    """One flaw of one record."""

    level: str  # "problem" or "note"
    stage: tasks.Stage
    index: int  # of the record in its file
    id: str | int | None
    task: str | None
    source: str | None
    field: str
    what: str


class _Entry(NamedTuple):
    """A record that has the right form, where its media are, and what that search found wrong."""

    index: int
    raw: dict[str, Any]
    record: annotations.Record
    path: str | None
    key_paths: list[str | None]
    flaws: list[Flaw]


class Report(NamedTuple):
    """`totals`: number of records by stage, source and task. `num_files`: distinct media files looked at."""

    totals: dict[tuple[str, str, str], int]
    findings: list[Finding]
    num_files: int

    @property
    def problems(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.level == "problem"]


def check_root(
    root: str | os.PathLike,
    *,
    jobs: int,
    advance: Advance = lambda done, total: None,
    fix: str | os.PathLike | None = None,
) -> Report:
    """Check both files of `root` and all their media, `jobs` files at a time, each in a process that can be killed.

    `fix`: a new directory for a mended copy, see `_write_fixed`.

    Raises: InputError if neither file is there, one is not a JSON list, or `fix` is not empty.
    """
    if fix is not None:
        model_files.check_new(pathlib.Path(fix))
    stages = [s for s, name in annotations.STAGE_FILES.items() if os.path.exists(os.path.join(root, "json_data", name))]
    if not stages:
        raise InputError(f"{root}: no json_data/STGR-SFT.json or STGR-RL.json; expected a data root as released")
    raws = {stage: annotations.load_list(annotations.stage_file(root, stage)) for stage in stages}
    findings: list[Finding] = []
    refused: dict[tuple[tasks.Stage, int], str] = {}
    entries: dict[tasks.Stage, list[_Entry]] = {stage: [] for stage in stages}
    for stage in stages:
        for index, raw in enumerate(raws[stage]):
            try:
                record = annotations.check_record(raw, stage, where="record")
            except InputError as error:
                refused[stage, index] = str(error)
                findings.append(_finding(stage, index, raw, _schema_flaw(error)))
            else:
                entries[stage].append(_locate(root, stage, index, raw, record))
    files = _inspect_all([entry for stage in stages for entry in entries[stage]], jobs, advance)
    for stage in stages:
        for entry in entries[stage]:
            flaws = [*entry.flaws, *_media_flaws(entry, files)]
            flaws += record_checks.find_flaws(entry.raw, entry.record, stage, _facts(entry, files))
            findings += [_finding(stage, entry.index, entry.raw, flaw) for flaw in flaws]
    if fix is not None:
        with model_files.new_directory(pathlib.Path(fix)) as staging:
            _write_fixed(staging, root, entries, refused, files)
    findings.sort(key=lambda finding: (stages.index(finding.stage), finding.index))
    return Report(_count(raws), findings, len(files))


def _count(raws: dict[tasks.Stage, list[Any]]) -> dict[tuple[str, str, str], int]:
    named = [(stage, raw if isinstance(raw, dict) else {}) for stage, values in raws.items() for raw in values]
    return dict(collections.Counter((stage, str(raw.get("source")), str(raw.get("task"))) for stage, raw in named))


def _schema_flaw(error: InputError) -> Flaw:
    """`record: field: what` as a flaw of the field."""
    field, colon, what = str(error).removeprefix("record: ").partition(": ")
    return Flaw(field, what) if colon else Flaw("record", field)


def _finding(stage: tasks.Stage, index: int, raw: Any, flaw: Flaw) -> Finding:
    named = raw if isinstance(raw, dict) else {}
    level = "note" if flaw.is_note else "problem"
    identity = [named.get("id"), named.get("task"), named.get("source")]
    identity = [value if isinstance(value, str | int) else None for value in identity]
    return Finding(level, stage, index, *identity, flaw.field, flaw.what)


# ---- media ----


def _locate(
    root: str | os.PathLike, stage: tasks.Stage, index: int, raw: dict[str, Any], record: annotations.Record
) -> _Entry:
    flaws: list[Flaw] = []

    def find(field: str, search: Callable[[], pathlib.Path]) -> str | None:
        try:
            return os.fspath(search())
        except InputError as error:
            flaws.append(Flaw(field, str(error)))
            return None

    path = find(media.media_field(record), lambda: media.find_media(root, record, stage))
    if path and not media.is_first_choice(root, record, stage, path):
        flaws.append(Flaw(media.media_field(record), "found in the second directory that its source has", is_note=True))
    frames = record.get("key_frames") or [] if record["task"] == tasks.TEMPORAL_SPATIAL else []
    keys = [find("key_frames", lambda f=f: media.find_key_frame(root, record, f, stage)) for f in frames]
    return _Entry(index, raw, record, path, keys, flaws)


def _inspect_all(entries: Sequence[_Entry], jobs: int, advance: Advance) -> dict[str, WholeFile]:
    """Every distinct file once."""
    pictures = {key for entry in entries for key in entry.key_paths if key}
    clips = {entry.path for entry in entries if entry.path and entry.record["task"] != tasks.VISUAL}
    pictures |= {entry.path for entry in entries if entry.path and entry.record["task"] == tasks.VISUAL}
    files = [*sorted(clips), *sorted(pictures - clips)]

    def inspect(decoder: Decoder, path: str) -> WholeFile:
        try:
            if path in clips:
                return decoder.inspect(path, VideoConfig())
            height, width = decoder.picture(path, (28, 28))[1]
            return width, height
        except InputError as error:
            return error

    found: dict[str, WholeFile] = {}
    with workers.Decoders(jobs) as decoders:
        for path, result in zip(files, decoders.map(inspect, files), strict=True):
            found[path] = result
            advance(len(found), len(files))
    return found


def _facts(entry: _Entry, files: dict[str, WholeFile]) -> Facts:
    found = files.get(entry.path)
    if isinstance(found, Inspection):
        return Facts(duration_s=found.duration_s)
    return Facts(size_wh=found) if isinstance(found, tuple) else Facts()


def _media_flaws(entry: _Entry, files: dict[str, WholeFile]) -> Iterable[Flaw]:
    found = files.get(entry.path)
    if isinstance(found, InputError):
        yield Flaw(media.media_field(entry.record), str(found))
    elif isinstance(found, Inspection) and not found.is_whole:
        what = f"{entry.path}: has no usable index or is damaged; what can be decoded lasts {found.duration_s:.2f} s"
        yield Flaw(media.media_field(entry.record), what, is_note=True)
    for key in entry.key_paths:
        if isinstance(files.get(key), InputError):
            yield Flaw("key_frames", str(files[key]))


# ---- the mended copy ----


def _write_fixed(
    out: pathlib.Path,
    root: str | os.PathLike,
    entries: dict[tasks.Stage, list[_Entry]],
    refused: dict[tuple[tasks.Stage, int], str],
    files: dict[str, WholeFile],
) -> None:
    """json_data/ with the records that are in order or could be mended, videos/ with their media (hard links where
    the disk allows, copies else), and changes.jsonl: a line for each record that was changed or left out."""
    changes = [_change(stage, index, "left out", [why]) for (stage, index), why in refused.items()]
    for stage, located in entries.items():
        records = []
        for entry in located:
            record, what = _mend(entry, stage, files)
            if record is None:
                changes.append(_change(stage, entry.index, "left out", what))
                continue
            records.append(record)
            if what:
                changes.append(_change(stage, entry.index, "changed", what))
            names = {frame["path"] for frame in record.get("key_frames") or []}
            frames = entry.record.get("key_frames") or []
            keys = [path for frame, path in zip(frames, entry.key_paths, strict=False) if frame["path"] in names]
            for path in [entry.path, *keys]:
                _place(path, out / os.path.relpath(path, root))
        _write_json(pathlib.Path(annotations.stage_file(out, stage)), records)
    lines = [json.dumps(change, ensure_ascii=False) + "\n" for change in changes]
    (out / "changes.jsonl").write_text("".join(lines), encoding="utf-8")


def _change(stage: tasks.Stage, index: int, done: str, what: list[str]) -> dict[str, Any]:
    return {"stage": stage, "index": index, "done": done, "what": what}


def _mend(
    entry: _Entry, stage: tasks.Stage, files: dict[str, WholeFile]
) -> tuple[annotations.Record | None, list[str]]:
    """The record as it can be used, None if it cannot; and what was changed, or why it cannot be used."""
    facts = _facts(entry, files)
    frames = entry.record.get("key_frames") or []
    lost = [
        frame["path"]
        for frame, path in zip(frames, entry.key_paths, strict=False)
        if path is None or isinstance(files[path], InputError)
    ]
    mended, changes = record_checks.mend(entry.record, facts, lost)
    if mended.get("key_frames") and entry.raw["key_frames"] != entry.record["key_frames"]:
        changes.insert(0, "key_frames: sorted by time")
    if entry.path is None or isinstance(files[entry.path], InputError):
        return None, [f"{media.media_field(entry.record)}: cannot be read"]
    try:
        annotations.check_record(mended, stage, where="record")
    except InputError as error:
        return None, [str(error)]
    left = [flaw for flaw in record_checks.find_flaws(mended, mended, stage, facts) if not flaw.is_note]
    return (None, [f"{flaw.field}: {flaw.what}" for flaw in left]) if left else (mended, changes)


def _write_json(path: pathlib.Path, records: Sequence[annotations.Record]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(records, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def _place(source: str, target: pathlib.Path) -> None:
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        files_lib.link_or_copy(source, target)


# ---- in words ----


def write_jsonl(findings: Sequence[Finding | store.Damage], path: str | os.PathLike) -> None:
    """One finding per line, fields as in `Finding`, or in `store.Damage`."""
    lines = [json.dumps(finding._asdict(), ensure_ascii=False) + "\n" for finding in findings]
    pathlib.Path(path).write_text("".join(lines), encoding="utf-8")


def render(report: Report, *, most: int = 40) -> str:
    """A table of records by stage, source and task, then up to `most` problems, then the notes, counted."""
    bad = collections.Counter((f.stage, str(f.source), str(f.task), f.index) for f in report.problems)
    bad_records = collections.Counter(key[:3] for key in bad)
    rows = [("stage", "source", "task", "records", "with problems")]
    rows += [(*key, str(count), str(bad_records[key])) for key, count in sorted(report.totals.items())]
    lines = [*_table(rows), ""]
    for finding in report.problems[:most]:
        lines.append(f"{annotations.STAGE_FILES[finding.stage]}:{finding.index}: {finding.field}: {finding.what}")
    if len(report.problems) > most:
        lines.append(f".. and {len(report.problems) - most} more problems; --json FILE writes them all")
    notes = collections.Counter((f.stage, f.field, f.what) for f in report.findings if f.level == "note")
    lines += [f"note: {stage}: {field}: {what} ({count} records)" for (stage, field, what), count in notes.items()]
    total = sum(report.totals.values())
    lines.append(f"{total} records, {report.num_files} media files, {len(bad)} records with problems")
    return "\n".join(lines)


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]

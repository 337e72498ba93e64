"""Verbs about a data root: check, prepare, measure, make one of other annotations."""

from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from openo3_jax.config import VideoConfig
from openo3_jax.errors import InputError
from openo3_jax.verbs import shared


def check(
    root: Positional[Annotated[Path, arg(metavar="ROOT")]],
    *,
    fix: Path | None = None,
    json: Path | None = None,
    jobs: int = 0,
) -> int:
    """Check every record and every media file of a data root; exit code 2 if a problem was found.

    Args:
        root: the data root in the released layout; or a prepared set, whose files are compared with its manifest.
        fix: a new directory for a copy without the problems; its changes.jsonl says what was changed or left out.
        json: where to write all problems and notes, one JSON line each.
        jobs: files looked at side by side; 0 is one per core, at most 32.
    """
    from openo3_jax.data import check, store, workers

    shared.check_place("--json", json)
    if store.is_prepared(root):
        if fix is not None:
            raise InputError(f"--fix {fix}: {root} is a prepared set; fix the root that it was made of, then prepare")
        problems = findings = store.verify(root)
        lines = [f"{damage.path}: {damage.what}" for damage in problems]
        text = "\n".join([*lines, f"prepared set: {len(problems)} files differ from {store.MANIFEST}"])
    else:
        with shared.progress("check") as advance:
            report = check.check_root(root, jobs=workers.count(jobs), advance=advance, fix=fix)
        findings, problems, text = report.findings, report.problems, check.render(report)
    if json is not None:
        check.write_jsonl(findings, json)
    print(text)
    return 2 if problems else 0


def prepare(
    root: Positional[Annotated[Path, arg(metavar="ROOT")]],
    out: Positional[Annotated[Path, arg(metavar="OUT")]],
    *,
    frames: Literal["jpeg", "raw"] = "jpeg",
    jobs: int = 0,
    max_bad_fraction: float = 0.01,
    video: VideoConfig = VideoConfig(),  # noqa: B008 (frozen)
) -> None:
    """Store records with their frames, chosen and resized, as ArrayRecord: training then reads no video.

    Args:
        root: the data root in the released layout.
        out: a new directory, or one whose preparation was interrupted: it goes on.
        frames: as JPEG, or as they are, about eight times as large.
        jobs: clips decoded side by side; 0 is one per core, at most 32.
        max_bad_fraction: share of a stage's records that may be unusable; OUT/bad_samples.jsonl names them.
        video: how clips become frames; training must use the same.
    """
    from openo3_jax.data import prepare, workers

    with shared.progress("prepare") as advance:
        settings = {
            "frames": frames,
            "config": video,
            "jobs": workers.count(jobs),
            "max_bad_fraction": max_bad_fraction,
        }
        manifest = prepare.prepare_root(root, out, **settings, advance=advance)
    for stage, made in manifest["stages"].items():
        size_mib = sum(file["bytes"] for file in made["files"]) / 2**20
        print(f"{stage}: {made['records']} records, {made['left_out']} left out, {size_mib:.1f} MiB in {out}")


def stats(root: Positional[Annotated[Path, arg(metavar="ROOT")]], *, html: Path | None = None, jobs: int = 0) -> None:
    """How answers are distributed, and what guessing without looking scores.

    Args:
        root: a data root, or a prepared set.
        html: where to write tables and plots, one file.
        jobs: clips measured side by side; 0 is one per core, at most 32.
    """
    from openo3_jax.data import stats, workers

    if html is not None:
        from openo3_jax.report import data_page, pages

        pages.check_name(html)
    with shared.progress("stats") as advance:
        statistics = stats.compute_root(root, jobs=workers.count(jobs), advance=advance)
    if html is not None:
        pages.write(html, data_page.render(statistics, f"Statistics of {root}"))
    print(stats.render(statistics))


def convert(
    file: Positional[Annotated[Path, arg(metavar="FILE")]],
    out: Positional[Annotated[Path, arg(metavar="OUT")]],
    *,
    media: Path | None = None,
    name: str = "own",
) -> None:
    """Make STGR records of both stages from questions with spans and boxes; docs/data.md describes the lines.

    Args:
        file: JSONL, one question per line.
        out: a new data root.
        media: where videos and pictures lie; the directory of FILE without it.
        name: of the set, part of its sources.
    """
    from openo3_jax.data import convert

    print(convert.convert_file(file, out, media_root=media or file.parent, name=name))

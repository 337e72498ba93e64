"""Annotation files as benchmarks ship them (JSON, JSONL, TSV, parquet) -> rows; names -> clips under the data root."""

import ast
import csv
import io
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from openo3_jax.errors import InputError
from openo3_jax.evals import items, store

Row = Mapping[str, Any]
CLIP_SUFFIXES = (".mp4", ".MP4", ".mkv", ".webm", ".avi", ".mov")


class Loaded(NamedTuple):
    """The items of a benchmark, and a line for each row that could not be used: file, row, reason."""

    items: list[items.Item]
    rejected: list[str]


def load_items(rows: Sequence[tuple[str, Row]], make: Callable[[Row], items.Item]) -> Loaded:
    """`make` for every (place, row); a row it refuses is named and passed. Raises InputError where none is left."""
    made, rejected = [], []
    for place, row in rows:
        try:
            made.append(make(row))
        except InputError as error:
            rejected.append(f"{place}: {error}")
    if not made:
        raise InputError(f"no usable item; the first of {len(rejected)}: {rejected[0] if rejected else 'none there'}")
    return Loaded(made, rejected)


def read_rows(root: Path, *patterns: str) -> list[tuple[str, Row]]:
    """The rows of the files under `root` that match the first pattern with a match, each with its place.

    Raises: InputError where no pattern matches, or a file is no table of objects.
    """
    for pattern in patterns:
        files = sorted(root.glob(pattern))
        if files:
            return [row for file in files for row in read_file(file)]
    raise InputError(f"{root}: has no {' or '.join(patterns)}; expected the benchmark's own files")


def read_file(file: Path) -> list[tuple[str, Row]]:
    """The rows of one file, each with its place. Raises InputError where it is no table of objects."""
    readers = {".json": store.read_json, ".jsonl": _read_jsonl, ".tsv": _read_tsv, ".parquet": _read_parquet}
    if file.suffix not in readers:
        raise InputError(f"{file}: is no annotation file; expected one that ends in {', '.join(readers)}")
    rows = readers[file.suffix](file)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{file}: expected a list of objects")
    return [(f"{file}:{i}", row) for i, row in enumerate(rows, 1)]


def _read_jsonl(file: Path) -> list[Any]:
    lines = enumerate(file.read_bytes().splitlines(), 1)  # as bytes, which break at newlines only
    return [store.parse_line(line, f"{file}:{i}") for i, line in lines if line.strip()]


def _read_tsv(file: Path) -> list[Row]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            return list(csv.DictReader(stream, delimiter="\t"))
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{file}: cannot be read as tab-separated UTF-8 ({error}); download it again") from None


def _read_parquet(file: Path) -> list[Row]:
    import pyarrow  # comes with tensorflow-datasets; slow to import
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(file).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{file}: cannot be read as parquet ({str(error)[:100]}); download it again") from None


# ---- fields ----


def text_of(row: Row, field: str) -> str:
    """The field as text. Raises InputError where it is missing, empty or of another type."""
    value = row.get(field)
    if isinstance(value, bool) or not isinstance(value, str | int | float) or not str(value).strip():
        raise InputError(f"{field}={value!r}; expected a text")
    return str(value)


def number_of(row: Row, field: str) -> float:
    """The field as a finite number. Raises InputError for anything else."""
    value = row.get(field)
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = float("nan")
    if isinstance(value, bool) or not abs(number) < float("inf"):
        raise InputError(f"{field}={value!r}; expected a number")
    return number


def list_of(row: Row, field: str) -> list[Any]:
    """The field as a list: one itself, or one written as JSON or as a Python literal."""
    value = row.get(field)
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            try:
                value = ast.literal_eval(value)
            except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
                value = None
    if not isinstance(value, list | tuple):
        raise InputError(f"{field}={row.get(field)!r:.80}; expected a list")
    return list(value)


def groups_of(row: Row, *fields: str) -> dict[str, str]:
    """The fields that are there and not empty, as groups."""
    return {field: str(row[field]) for field in fields if row.get(field) not in (None, "", [])}


# ---- clips ----


def find_clip(root: Path, name: str, directories: Sequence[str] = ("", "videos", "video", "data")) -> Path:
    """The clip called `name` under `root`, in one of `directories`, with or without one of the usual suffixes.

    Of a path such as `./data/set/clip.mp4` leading parts may be missing under the root.

    Raises: InputError for a name that leaves the root and for a file that is not there.
    """
    parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".")]
    if not parts or ".." in parts or "\0" in name:
        raise InputError(f"video {name!r}: expected a path under the data root, without '..'")
    inside = os.path.realpath(root)
    for start in range(len(parts)):
        for directory in directories:
            base = root.joinpath(directory, *parts[start:])
            for path in (base, *(base.with_name(base.name + suffix) for suffix in CLIP_SUFFIXES)):
                if path.is_file():
                    if os.path.commonpath([inside, os.path.realpath(path)]) != inside:
                        raise InputError(f"{path}: is a link out of the data root {inside}; copy the file in")
                    return path
    tried = ", ".join(str(root / directory) for directory in directories)
    raise InputError(f"video {name!r}: no such file with any of {', '.join(CLIP_SUFFIXES)}; tried {tried}")


def picture_of(row: Row, field: str) -> Image.Image:
    """The picture in a field of a parquet file: {"bytes": .., "path": ..} or the bytes. Raises InputError otherwise."""
    value = row[field]
    raw = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(raw, bytes):
        raise InputError(f"{field}: got {type(raw).__name__}; expected the bytes of a picture")
    try:
        picture = Image.open(io.BytesIO(raw))
        picture.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{field}: is no readable picture ({error})") from None
    return picture

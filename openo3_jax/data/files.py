"""Files of data sets: JSON line by line, and links that may be copies."""

import json
import os
import pathlib
import shutil
from typing import Any

from openo3_jax.errors import InputError


def read_jsonl(path: str | os.PathLike) -> list[tuple[int, Any]]:
    """Number, from 1, and value of each line that is not blank; a line ends at a newline only, not at U+2028.

    Raises: InputError for a file that cannot be read or is not UTF-8, and with the number of a line that is not JSON.
    """
    try:
        text = pathlib.Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{path}: cannot be read ({reason}); expected JSON lines in UTF-8") from None
    values = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            values.append((number, json.loads(line)))
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}:{number}: is not JSON ({error}); expected one object per line") from None
    return values


def link_or_copy(source: str | os.PathLike, target: str | os.PathLike) -> None:
    """A hard link, or a copy where the disk has none or the two lie on different ones."""
    try:
        os.link(os.path.realpath(source), target)
    except OSError:
        shutil.copyfile(source, target)

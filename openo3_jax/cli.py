"""`openo3 VERB ...`: parse, call, print. Results go to stdout, everything else to stderr; heavy imports wait.

Exit codes: 0 done, 1 ours or a lost process, 2 the user's mistake, 3 a stated claim did not hold, 75 stopped by a
signal with the state saved, 130 interrupted.
"""

import contextlib
import errno
import functools
import io
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tyro
from tyro.conf import AvoidSubcommands

from openo3_jax.errors import InputError, Stopped
from openo3_jax.verbs import VERBS, Verbs, stages


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code. `--help` leaves through SystemExit(0)."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    _prepare_libraries()
    try:
        function, prog, rest = _find(words)
        return _parse(function, prog, rest)() or 0
    except InputError as error:
        return _fail(str(error))
    except Stopped as stopped:
        return _fail(str(stopped), code=75)
    except BrokenPipeError:  # the reader of stdout left; nothing is flushed into the void at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):  # names no file where it comes from a write
            return _fail(f"{error.filename or 'writing'}: {error.strerror}; make room and start again")
        if error.filename is None:
            raise
        return _fail(f"{error.filename}: {error.strerror}")
    except KeyboardInterrupt:
        return _fail("interrupted", code=130)
    return 1


def _find(words: list[str]) -> tuple[Callable[..., int | None], str, list[str]]:
    """The function that the first words name, the program's name with them, and the words that are left."""
    verbs: Any = VERBS
    prog = "openo3"
    while isinstance(verbs, Mapping):
        word = words[0] if words else "--help"
        if word in ("-h", "--help"):
            print(_help(prog, verbs))
            raise SystemExit(0)
        if word.endswith(".json") and verbs in (VERBS["sft"], VERBS["gspo"]):
            return _rerun(prog.split()[-1], word), f"{prog} {word}", words[1:]
        if word not in verbs:
            raise InputError(f"unknown verb {word!r}; expected {prog} with one of {', '.join(verbs)}")
        verbs, prog, words = verbs[word], f"{prog} {word}", words[1:]
    return verbs, prog, words


def _parse(function: Callable[..., int | None], prog: str, words: list[str]) -> Callable[[], int | None]:
    """The call that the words ask for. Raises: InputError with what the parser would print in a box."""

    @functools.wraps(function)
    def bind(*args: Any, **kwargs: Any) -> Callable[[], int | None]:
        return functools.partial(function, *args, **kwargs)

    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            return tyro.cli(bind, prog=prog, args=words, config=(AvoidSubcommands,))
    except SystemExit as stop:
        if stop.code == 0:
            raise
        rows = [row.strip(" │╰╯") for row in printed.getvalue().splitlines()[1:]]  # without the box and its title
        parts = re.split(r"(?:^| )[─-]{3,}", " ".join(rows))
        told = "; ".join(" ".join(part.split()) for part in parts if part.strip() and "full helptext" not in part)
        raise InputError(f"{told}; {prog} --help tells more") from None


def _rerun(stage: str, file: str) -> Callable[[], int | None]:
    """The verb of a stage with the settings that a run has saved."""
    from openo3_jax.train import run

    config = run.load_config(Path(file), stage)
    return stages.sft_of(config) if stage == "sft" else stages.gspo_of(config)


def _help(prog: str, verbs: Verbs) -> str:
    def summary(verb: Any) -> str:
        return " | ".join(verb) if isinstance(verb, Mapping) else verb.__doc__.partition("\n")[0]

    lines = [f"  {word:<11} {summary(verb)}" for word, verb in verbs.items()]
    return "\n".join([f"usage: {prog} {{{','.join(verbs)}}} ...", "", *lines, "", f"{prog} VERB --help tells more."])


def _fail(message: str, code: int = 2) -> int:
    print(f"openo3: {' '.join(message.split())}", file=sys.stderr)
    return code


def _prepare_libraries() -> None:
    """Set before they are imported: compiled programs are kept between runs, and warnings are not for the user."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "openo3_jax" / "compiled"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    warnings.filterwarnings("ignore")
    for name in ("jax", "orbax"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for name in ("absl", "asyncio"):  # a checkpoint that cannot be written is told by us, in one line
        logging.getLogger(name).setLevel(logging.CRITICAL)

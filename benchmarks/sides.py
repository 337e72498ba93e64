"""Two sides of a comparison, each in a process of its own, measured in turn.

A script runs itself once for each side (`--side NAME --work DIR`). That process makes what it needs, says so with a
line of JSON, then does a round for each line it is sent and answers with what it measured; all else goes to stderr.
Arrays that both sides must agree on are left in `DIR/NAME.npz`.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import numpy as np

Measured = Mapping[str, float]


class Side:
    """The process of one side, as its parent sees it: `with Side(...) as side: side.round()`."""

    def __init__(self, script: str, name: str, work: pathlib.Path, arguments: Sequence[str] = (), **environment: str):
        self.command = [sys.executable, script, "--side", name, "--work", str(work), *arguments]
        self.environment = os.environ | environment

    def __enter__(self) -> Self:
        self.process = subprocess.Popen(
            self.command, env=self.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.ready: dict[str, Any] = self._answer()
        return self

    def __exit__(self, *_: object) -> None:
        self.process.stdin.close()  # the end of its rounds
        self.process.wait()
        self.process.stdout.close()

    def round(self) -> dict[str, Any]:
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{' '.join(self.command)}: ended with {self.process.wait()}")
        return json.loads(line)


def add_arguments(parser: argparse.ArgumentParser, names: Sequence[str]) -> None:
    """What a script's child processes are told."""
    parser.add_argument("--side", choices=names, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=pathlib.Path, help=argparse.SUPPRESS)


def serve(prepare: Callable[[], tuple[Measured, Callable[[], Measured]]]) -> int:
    """The child's part: `prepare` returns what to say of the preparation, and the function that does a round."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    ready, do_round = prepare()
    print(json.dumps(ready), file=answers, flush=True)
    for _ in sys.stdin:
        print(json.dumps(do_round()), file=answers, flush=True)
    return 0


def in_turn(sides: Mapping[str, Side], rounds: int) -> dict[str, list[dict[str, Any]]]:
    """What each side measured in each round; a busy moment of the machine meets all of them."""
    measured: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            measured[name].append(side.round())
    return measured


def largest_gap(work: pathlib.Path, ours: str, theirs: str, starts: str = "") -> float:
    """Largest difference of the arrays that both sides left behind, each as a share of its largest value.

    `starts`: of those alone whose names start so.
    """
    with np.load(work / f"{ours}.npz") as mine, np.load(work / f"{theirs}.npz") as other:
        assert sorted(mine) == sorted(other), (sorted(mine), sorted(other))
        return max(
            float(np.abs(mine[name] - other[name]).max() / np.abs(other[name]).max())
            for name in mine
            if name.startswith(starts)
        )

"""What is said around the frames: a stage and task -> system and question wording; times -> lines of text."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from openo3_jax import tasks
from openo3_jax.errors import InputError

_DEFAULT = pathlib.Path(__file__).with_name("default_prompts.json")
_SLOT = "{question}"


@dataclasses.dataclass(frozen=True)
class Prompt:
    """The wording of one task: the system message ("" leaves it to the chat template) and the user's words.

    `question` holds `{question}` once, where the record's question goes; it follows the frames.
    """

    system: str
    question: str

    def ask(self, question: str) -> str:
        """The user's words for one question, which may itself hold braces."""
        before, after = self.question.split(_SLOT)
        return before + question + after


@dataclasses.dataclass(frozen=True)
class Prompts:
    """The wording of every task of both stages."""

    by_stage: Mapping[tasks.Stage, Mapping[tasks.Task, Prompt]]

    def of(self, stage: tasks.Stage, task: str) -> Prompt:
        return self.by_stage[stage][task]


def load_prompts(path: str | os.PathLike | None = None) -> Prompts:
    """The wording in the JSON file at `path`, this project's own (`default_prompts.json`) where it has none.

    The file maps a stage ("sft", "rl") to tasks, each to {"system": text, "question": text with {question}}.

    Example: `{"sft": {"temporal QA": {"system": "Find the moment.", "question": "Question: {question}"}}}`

    Raises: InputError naming stage, task and field for what is unknown, missing or of another type.
    """
    by_stage = _read(_DEFAULT)
    if path is not None:
        given = _read(pathlib.Path(path))
        by_stage = {stage: prompts | given.get(stage, {}) for stage, prompts in by_stage.items()}
    return Prompts(by_stage)


def _read(path: pathlib.Path) -> dict[tasks.Stage, dict[tasks.Task, Prompt]]:
    try:
        stages = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); expected a JSON file of prompts") from None
    except ValueError as error:
        raise InputError(f"{path}: is not JSON ({error}); expected prompts by stage and task") from None
    _check_keys(stages, tuple(tasks.STAGE_TASKS), f"{path}: stage")
    for stage in stages:
        _check_keys(stages[stage], tasks.STAGE_TASKS[stage], f"{path}: {stage}: task")
    return {
        stage: {task: _prompt(value, f"{path}: {stage}: {task}") for task, value in wordings.items()}
        for stage, wordings in stages.items()
    }


def _check_keys(value: Any, known: tuple[str, ...], where: str) -> None:
    unknown = [key for key in value if key not in known] if isinstance(value, dict) else [type(value).__name__]
    if unknown:
        raise InputError(f"{where}: got {unknown[0]!r}; expected one of {', '.join(known)}")


def _prompt(value: Any, where: str) -> Prompt:
    fields = [field.name for field in dataclasses.fields(Prompt)]
    is_texts = isinstance(value, dict) and all(isinstance(text, str) for text in value.values())
    if not is_texts or sorted(value) != sorted(fields):
        got = sorted(value) if isinstance(value, dict) else type(value).__name__
        raise InputError(f"{where}: got {got}; expected the texts {' and '.join(fields)}")
    if value["question"].count(_SLOT) != 1:
        raise InputError(
            f"{where}: question={value['question'][:80]!r} holds {_SLOT} {value['question'].count(_SLOT)} times; "
            "expected once, where the record's question goes"
        )
    return Prompt(**value)


def render_frame(number: int, time_s: float) -> str:
    """The words before frame `number` (from 1), shown at `time_s`: `Frame 1 at 0.0s: `."""
    return f"Frame {number} at {time_s:.1f}s: "


def render_total(duration_s: float) -> str:
    """The line after the last frame, whole seconds: `The video is in total 18 seconds.` and a newline."""
    return f"The video is in total {int(duration_s)} seconds.\n"

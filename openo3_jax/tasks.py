"""The six tasks of STGR and what each one has: names as they stand in the released JSON files."""

from typing import Literal, get_args

Task = Literal[
    "temporal-spatial free-form QA",
    "visual QA",
    "temporal QA",
    "temporal QA (MCQ)",
    "General video QA MCQ",
    "General video QA Free-form",
]
Stage = Literal["sft", "rl"]

TEMPORAL_SPATIAL: Task = "temporal-spatial free-form QA"
VISUAL: Task = "visual QA"
TEMPORAL: Task = "temporal QA"
TEMPORAL_MCQ: Task = "temporal QA (MCQ)"
GENERAL_MCQ: Task = "General video QA MCQ"
GENERAL_FREE_FORM: Task = "General video QA Free-form"

TASKS: tuple[Task, ...] = get_args(Task)
STAGE_TASKS: dict[Stage, tuple[Task, ...]] = {
    "sft": tuple(task for task in TASKS if task != TEMPORAL_MCQ),
    "rl": TASKS,
}

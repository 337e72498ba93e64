"""Records with round numbers, for values worked by hand: a frame of 100 x 100 px, key frames at 10 and 20 s."""

import json
import pathlib

from openo3_jax import tasks

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "reward_cases.jsonl"
CAT = "[0,0,20,20]"  # the cat of the frame at 10 s, px
DOG = "[50,50,100,100]"  # the dog of the frame at 20 s, px


def read_golden() -> list[dict]:
    return [json.loads(line) for line in GOLDEN.read_text(encoding="utf-8").splitlines()]


def spatial_record(**changes) -> dict:
    """A cat of 20 x 20 px at 10 s; at 20 s a dog of 50 x 50 px and a ball that is seen twice."""
    return {
        "task": tasks.TEMPORAL_SPATIAL,
        "answer": "A cat meets a dog.",
        "key_frames": [{"idx": 1, "time": 10.0, "path": "1.jpg"}, {"idx": 2, "time": 20.0, "path": "2.jpg"}],
        "key_items": {
            "1": {"cat": [[0, 0, 0.2, 0.2]]},
            "2": {"dog": [[0.5, 0.5, 1, 1]], "ball": [[0, 0, 0.1, 0.1], [0.2, 0, 0.3, 0.1]]},
        },
        "image_size": [100, 100],
    } | changes


def visual_record(**changes) -> dict:
    """The original is 200 x 100 px, the model saw 100 x 50: the box is [10, 10, 30, 30] there."""
    return {
        "task": tasks.VISUAL,
        "answer": "<obj>cup</obj><box>[20,20,60,60]</box>",
        "image_size": [200, 100],
        "image_size_refine": [100, 50],
    } | changes


def temporal_record(**changes) -> dict:
    return {"task": tasks.TEMPORAL, "answer": "[10, 20]"} | changes


def temporal_mcq_record(**changes) -> dict:
    return {"task": tasks.TEMPORAL_MCQ, "answer": "B\n[10, 20]"} | changes


def mcq_record(**changes) -> dict:
    return {"task": tasks.GENERAL_MCQ, "answer": "B"} | changes


def free_form_record(**changes) -> dict:
    return {"task": tasks.GENERAL_FREE_FORM, "answer": "a red car drives away"} | changes


def claim(name: str, box: str, time: object) -> str:
    return f"<obj>{name}</obj><box>{box}</box>at<t>{time}</t>s"


def completion(think: str, answer: str = "none") -> str:
    return f"<think>{think}</think><answer>{answer}</answer>"

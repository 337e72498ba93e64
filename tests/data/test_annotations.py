import copy
import json

import pytest

from openo3_jax import tasks
from openo3_jax.data import annotations
from openo3_jax.errors import InputError

STR = {
    "id": 7,
    "task": "temporal-spatial free-form QA",
    "source": "STR_coin",
    "video_path": "a.mp4",
    "question": "What?",
    "answer": "A cat",
    "reasoning_process": "I see it.",
    "key_frames": [{"idx": 1, "time": 9.2, "path": "b.jpg"}, {"idx": 0, "time": 3, "path": "a.jpg"}],
    "key_items": {"0": {"cat": [[0, 0.1, 0.5, 1]], "dog": None}, "1": {"cat": [[0, 0, 1, 1]]}, "2": None},
}
MCQ = {
    "task": "General video QA MCQ",
    "source": "videor1_mcq",
    "video_path": "a.mp4",
    "question": "Which?\nA. x\nB. y",
    "answer": "B",
    "reasoning_process": "So.",
    "key_frames": None,
    "key_items": None,
}
VISUAL = {
    "task": "visual QA",
    "source": "gqa",
    "image_path": "a.jpg",
    "image_size": [640, 360],
    "question": "Where?",
    "answer": "<obj>cat</obj><box>[1,2,3,4]</box>",
}


def write(path, records):
    path.write_text(json.dumps(records), encoding="utf-8")
    return path


def test_key_frames_are_sorted_and_nulls_dropped(tmp_path):
    path = write(tmp_path / "a.json", [STR, VISUAL, MCQ])
    first, second, third = annotations.load_records(path, "rl")
    assert [frame["time"] for frame in first["key_frames"]] == [3, 9.2]
    assert first["key_items"] == {"0": {"cat": [[0, 0.1, 0.5, 1]]}, "1": {"cat": [[0, 0, 1, 1]]}}
    assert (second, third) == (VISUAL, MCQ)


def test_load_stage_reads_the_released_layout(tmp_path):
    (tmp_path / "json_data").mkdir()
    write(tmp_path / "json_data" / "STGR-SFT.json", [MCQ])
    write(tmp_path / "json_data" / "STGR-RL.json", [VISUAL, VISUAL])
    assert annotations.load_stage(tmp_path, "sft") == [MCQ]
    assert len(annotations.load_stage(str(tmp_path), "rl")) == 2


def test_key_items_may_be_absent_in_sft_only():
    record = {key: value for key, value in STR.items() if key != "key_items"}
    assert "key_items" not in annotations.check_record(record, "sft", where="a")
    with pytest.raises(InputError, match="a: key_items: got nothing"):
        annotations.check_record(record, "rl", where="a")


def test_null_key_items_are_empty():
    assert annotations.check_record(STR | {"key_items": None}, "rl", where="a")["key_items"] == {}


@pytest.mark.parametrize("stage", ["sft", "rl"])
@pytest.mark.parametrize("record", [STR, STR | {"key_items": None}, MCQ], ids=["boxes", "null", "MCQ"])
def test_a_checked_record_passes_again_unchanged(record, stage):
    """As it must, where checked records are written to a file: `openo3 data prepare`, `check --fix`."""
    once = annotations.check_record(record, stage, where="a")
    assert annotations.check_record(once, stage, where="a") == once


BAD = {  # name: (stage, record, field, new value, what the error says); "absent" removes the field
    "unknown task": ("rl", MCQ, "task", "guess", "task='guess' is unknown; expected one of temporal-spatial"),
    "no task": ("rl", MCQ, "task", "absent", "task=None is unknown"),
    "task is a list": ("rl", MCQ, "task", ["visual QA"], "is unknown"),
    "task of the other stage": ("sft", MCQ, "task", "temporal QA (MCQ)", "does not occur in the sft stage"),
    "no question": ("rl", MCQ, "question", "absent", "question: got nothing; expected a text"),
    "blank answer": ("rl", MCQ, "answer", "  ", "answer: got"),
    "number as answer": ("rl", MCQ, "answer", 3, "answer: got 3; expected a text"),
    "no video": ("rl", MCQ, "video_path", "absent", "video_path: got nothing"),
    "no picture": ("rl", VISUAL, "image_path", None, "image_path: got null"),
    "no source": ("rl", MCQ, "source", "absent", "source: got nothing"),
    "no reasoning": ("sft", MCQ, "reasoning_process", "absent", "reasoning_process: got nothing"),
    "id": ("rl", MCQ, "id", [1], "id: got [1]"),
    "size of three": ("rl", VISUAL, "image_size", [1, 2, 3], "image_size: got [1, 2, 3]"),
    "size of zero": ("rl", VISUAL, "image_size", [0, 2], "image_size: got [0, 2]"),
    "key frames null": ("sft", STR, "key_frames", None, "key_frames: got null"),
    "no key frames": ("rl", STR, "key_frames", [], "key_frames: got []; expected at least one"),
    "key time text": ("rl", STR, "key_frames", [{"idx": 0, "time": "3", "path": "a"}], "key_frames: got"),
    "key time NaN": ("rl", STR, "key_frames", [{"idx": 0, "time": float("nan"), "path": "a"}], "key_frames"),
    "key time negative": ("rl", STR, "key_frames", [{"idx": 0, "time": -1, "path": "a"}], "key_frames"),
    "key idx true": ("rl", STR, "key_frames", [{"idx": True, "time": 1, "path": "a"}], "key_frames"),
    "key path empty": ("rl", STR, "key_frames", [{"idx": 0, "time": 1, "path": ""}], "key_frames"),
    "items of one frame": ("rl", STR, "key_items", {"0": {}}, "the key frames with idx [1]"),
    "items list": ("rl", STR, "key_items", [], "key_items: got []"),
    "box of three": ("rl", STR, "key_items", {"0": {"cat": [[0, 0, 1]]}, "1": {}}, "key_items: got"),
    "box not nested": ("rl", STR, "key_items", {"0": {"cat": [0, 0, 1, 1]}, "1": {}}, "key_items: got"),
    "box huge": ("rl", STR, "key_items", {"0": {"cat": [[0, 0, 1, 1e999]]}, "1": {}}, "key_items: got"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_records_name_file_index_field(name, tmp_path):
    stage, good, field, value, says = BAD[name]
    annotations.check_record(good | {"reasoning_process": "So."}, stage, where="good")
    bad = copy.deepcopy(good)
    bad[field] = value
    if value == "absent":
        del bad[field]
    path = write(tmp_path / "a.json", [good, bad, good])
    with pytest.raises(InputError) as caught:
        annotations.load_records(path, stage)
    assert str(caught.value).startswith(f"{path}:1: ") and says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_all_problems_can_be_listed(tmp_path):
    path = write(tmp_path / "a.json", [MCQ, 3, {"task": "x"}, VISUAL])
    records, problems = annotations.check_records(path, "rl")
    assert records == [MCQ, VISUAL]
    assert [str(problem).split(": ")[0] for problem in problems] == [f"{path}:1", f"{path}:2"]
    with pytest.raises(InputError, match=r"1 more bad record"):
        annotations.load_records(path, "rl")


BAD_FILES = {"[{]": "is not JSON", "{}": "holds a dict", "": "is not JSON", "[" * 100_000: "is not JSON"}


@pytest.mark.parametrize("content", BAD_FILES, ids=range(len(BAD_FILES)))
def test_bad_files(content, tmp_path):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(InputError, match=BAD_FILES[content]):
        annotations.load_records(tmp_path / "a.json", "rl")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"STGR-RL.json: cannot be read \(No such file"):
        annotations.load_stage(tmp_path, "rl")


def test_every_task_of_a_stage_is_accepted():
    for stage, names in tasks.STAGE_TASKS.items():
        for task in names:
            record = (STR if task == tasks.TEMPORAL_SPATIAL else MCQ) | {"task": task, "image_path": "a.jpg"}
            assert annotations.check_record(record, stage, where="a")["task"] == task

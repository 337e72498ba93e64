import json

import numpy as np
import pytest
from PIL import Image

from data import clips
from openo3_jax import cli
from openo3_jax.data import annotations, check, convert, images, media
from openo3_jax.errors import InputError

LINES = {  # task it becomes: the line
    "temporal-spatial free-form QA": {
        "video": "clips/a.mp4", "question": "Who?", "answer": "A cat", "id": "q7",
        "boxes": [
            {"name": "cat", "time": 3.0, "box": [0.5, 0, 1, 1]},
            {"name": "dog", "time": 1.2, "box": [0, 0, 0.25, 0.5]},
            {"name": "cat", "time": 3.0, "box": [0, 0, 0.5, 1]},
        ],
    },
    "temporal QA": {"video": "clips/a.mp4", "question": "When?", "answer": "later", "span": [1, 2.5]},
    "temporal QA (MCQ)": {
        "video": "clips/a.mp4", "question": "Which?", "answer": "red", "span": [1, 2.5], "options": ["blue", "red"],
    },
    "General video QA MCQ": {"video": "clips/a.mp4", "question": "Which?", "answer": "A", "options": ["blue", "red"]},
    "General video QA Free-form": {"video": "clips/a.mp4", "question": "Why?", "answer": "So", "reasoning": "Because."},
    "visual QA": {
        "image": "a.png", "question": "Where?", "answer": "left", "box_units": "px",
        "boxes": [{"name": "cat", "box": [10, 0, 20, 30]}],
    },
}  # fmt: skip


@pytest.fixture
def source(tmp_path):
    (tmp_path / "in" / "clips").mkdir(parents=True)
    clips.encode(tmp_path / "in" / "clips" / "a.mp4")
    Image.fromarray(np.zeros((60, 90, 3), np.uint8)).save(tmp_path / "in" / "a.png")
    write(tmp_path, LINES.values())
    return tmp_path


def write(tmp_path, lines):
    (tmp_path / "in" / "qa.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_each_task_comes_out_as_a_sound_record(source):
    out = source / "out"
    assert cli.main(["data", "convert", str(source / "in" / "qa.jsonl"), str(out), "--name", "zoo"]) == 0
    assert check.check_root(out, jobs=1).findings == []
    sft, rl = (annotations.load_stage(out, stage) for stage in ("sft", "rl"))
    assert [record["task"] for record in rl] == list(LINES)
    assert [record["task"] for record in sft] == [task for task in LINES if task != "temporal QA (MCQ)"]
    rl, sft = ({record["task"]: record for record in records} for records in (rl, sft))

    spatial = rl["temporal-spatial free-form QA"]
    assert spatial["id"] == "q7" and spatial["video_path"] == "zoo/clips/a.mp4"
    assert spatial["key_frames"] == [
        {"idx": 0, "time": 1.2, "path": "zoo/clips/a.mp4_1.2.jpg"},
        {"idx": 1, "time": 3.0, "path": "zoo/clips/a.mp4_3.0.jpg"},
    ]
    assert spatial["key_items"] == {"0": {"dog": [[0, 0, 0.25, 0.5]]}, "1": {"cat": [[0.5, 0, 1, 1], [0, 0, 0.5, 1]]}}
    assert sft["temporal-spatial free-form QA"]["reasoning_process"] == (
        "I see <obj>dog</obj><box>[0,0,0.25,0.5]</box>at<t>1.2</t>s, "
        "<obj>cat</obj><box>[0.5,0,1,1]</box>at<t>3.0</t>s, <obj>cat</obj><box>[0,0,0.5,1]</box>at<t>3.0</t>s."
    )
    # At 10 frames a second 1.2 s is frame 12 and 3 s frame 30.
    for frame, number in zip(spatial["key_frames"], (12, 30), strict=True):
        pixels = images.load_picture(media.find_key_frame(out, spatial, frame, "rl"))
        assert clips.read_number(pixels) == number

    assert rl["temporal QA"]["answer"] == "[1.0, 2.5]"
    assert sft["temporal QA"]["answer"] == "From <t>1.0</t>s to <t>2.5</t>s"
    assert rl["temporal QA (MCQ)"]["answer"] == "B\n[1.0, 2.5]"
    assert rl["temporal QA (MCQ)"]["question"] == "Which?\nA. blue\nB. red"
    assert rl["General video QA MCQ"]["answer"] == "A"
    assert sft["General video QA Free-form"]["reasoning_process"] == "Because."
    assert rl["visual QA"]["answer"] == "<obj>cat</obj><box>[10,0,20,30]</box>"
    assert rl["visual QA"]["image_size"] == [90, 60]


SPATIAL = "temporal-spatial free-form QA"
BAD = {  # what is changed in which line, and what is said
    "no answer": ("temporal QA", {"answer": ""}, "answer is missing"),
    "unknown field": ("temporal QA", {"when": 3}, "field 'when' is not known"),
    "late span": ("temporal QA", {"span": [1, 99]}, "inside the clip"),
    "late box": (SPATIAL, {"boxes": [{"name": "a", "time": 9.0, "box": [0, 0, 1, 1]}]}, "outside"),
    "px without saying so": ("visual QA", {"box_units": "frac"}, "leaves the frame of 1 x 1"),
    "box without a time": (SPATIAL, {"boxes": [{"name": "a", "box": [0, 0, 1, 1]}]}, "time: sec"),
    "neither option": ("General video QA MCQ", {"answer": "green"}, "no letter or text of the options"),
    "two media": ("visual QA", {"video": "clips/a.mp4"}, "either video or image"),
    "out of the media": ("temporal QA", {"video": "../secret.mp4"}, "without '..'"),
    "missing": ("temporal QA", {"video": "clips/b.mp4"}, "no such file"),
    "nothing asked": ("temporal QA", {"question": " "}, "question is missing"),
    "wrong type": ("temporal QA", {"question": 3}, "of the wrong type"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_mistakes_are_named_with_their_line(name, source):
    task, change, says = BAD[name]
    write(source, [LINES["General video QA Free-form"], LINES[task] | change])
    with pytest.raises(InputError, match=says) as caught:
        convert.convert_file(source / "in" / "qa.jsonl", source / "out", media_root=source / "in", name="zoo")
    assert str(caught.value).startswith(f"{source / 'in' / 'qa.jsonl'}:2: ")
    assert not (source / "out").exists()


def test_lines_are_as_their_editor_left_them(source):
    """A separator of Unicode within a text, lines of another system, an empty one at the end."""
    line = LINES["General video QA Free-form"] | {"question": "Why\u2028so?"}
    (source / "in" / "qa.jsonl").write_text(json.dumps(line, ensure_ascii=False) + "\r\n\r\n", encoding="utf-8")
    convert.convert_file(source / "in" / "qa.jsonl", source / "out", media_root=source / "in", name="zoo")
    assert [record["question"] for record in annotations.load_stage(source / "out", "rl")] == ["Why\u2028so?"]


@pytest.mark.parametrize("trouble", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["disk", "^C"])
def test_what_is_interrupted_leaves_nothing(trouble, source, monkeypatch):
    def fail(*_):
        raise trouble

    monkeypatch.setattr(convert.Decoder, "frames_at", fail)  # the clip has been copied then
    with pytest.raises(type(trouble)):
        convert.convert_file(source / "in" / "qa.jsonl", source / "out", media_root=source / "in", name="zoo")
    assert [path.name for path in source.iterdir()] == ["in"]


def test_a_name_stays_inside_the_data_root(source):
    with pytest.raises(InputError, match=r"name='\.\./zoo': expected letters"):
        convert.convert_file(source / "in" / "qa.jsonl", source / "out", media_root=source / "in", name="../zoo")
    assert not (source / "out").exists()


def test_a_picture_without_boxes_is_for_stage_one(source):
    write(source, [{"image": "a.png", "question": "What?", "answer": "A wall"}])
    convert.convert_file(source / "in" / "qa.jsonl", source / "out", media_root=source / "in", name="zoo")
    assert check.check_root(source / "out", jobs=1).findings == []
    assert annotations.load_stage(source / "out", "rl") == []
    (record,) = annotations.load_stage(source / "out", "sft")
    assert (record["answer"], record["reasoning_process"]) == ("A wall", "The picture shows it: A wall.")

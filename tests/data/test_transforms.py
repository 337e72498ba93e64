import numpy as np
import pytest
from PIL import Image

from data import clips
from openo3_jax.config import VideoConfig
from openo3_jax.data import images, prompts, transforms, video
from openo3_jax.errors import InputError

# Eight frames of 112 x 56 px over 8 s, frame i filled with i.
CLIP = video.Video(
    frames=np.repeat(np.arange(8, dtype=np.uint8), 56 * 112 * 3).reshape(8, 56, 112, 3),
    times_s=np.array([0.0, 1.1, 2.3, 3.4, 4.6, 5.7, 6.9, 8.0]),
    duration_s=8.2,
    source_hw=(100, 200),
)
STR = {
    "task": "temporal-spatial free-form QA",
    "source": "STR_coin",
    "video_path": "a.mp4",
    "question": "Is <box>[0,0,0.5,0.5]</box> a cat?",
    "answer": "Yes, <box>[0.25,0.5,1,1]</box>",
    "reasoning_process": "<obj>cat</obj><box>[0.1,0.2,0.3,0.4]</box>at<t>3.4</t>s, not <box>[[0,0,1,1]]</box>.",
    "key_frames": [
        {"idx": 0, "time": 3.4, "path": "k0.png"},
        {"idx": 1, "time": 6.5, "path": "k1.png"},
        {"idx": 2, "time": 9, "path": "k2.png"},
    ],
    "key_items": {"0": {}, "1": {}, "2": {}},
}
GENERAL = {
    "task": "General video QA MCQ",
    "source": "videor1",
    "video_path": "a.mp4",
    "question": "Which?",
    "answer": "B",
    "reasoning_process": "<box>[0.1,0.2,0.3,0.4]</box>",
}
VISUAL = {
    "task": "visual QA",
    "source": "gqa",
    "image_path": "a.png",
    "image_size": [600, 300],
    "question": "Where?",
    "answer": "<obj>cat</obj><box>[30,60,600,300]</box>",
    "reasoning_process": "Here.",
}


@pytest.fixture
def root(tmp_path):
    for folder in ("stgr/temporal_grounding/videos", "videor1", "gqa", "treevgr", "stgr/temporal_grounding/kfs"):
        (tmp_path / "videos" / folder).mkdir(parents=True)
    for folder in ("stgr/temporal_grounding/videos", "videor1"):
        (tmp_path / "videos" / folder / "a.mp4").touch()
    for i in range(3):
        path = tmp_path / "videos/stgr/temporal_grounding/kfs" / f"k{i}.png"
        Image.fromarray(key_pixels(i)).save(path)
    for folder in ("gqa", "treevgr"):
        Image.fromarray(np.zeros((150, 300, 3), np.uint8)).save(tmp_path / "videos" / folder / "a.png")
    return tmp_path


def key_pixels(i):
    return np.random.default_rng(i).integers(100, 256, (40, 80, 3), np.uint8)


def prepare(record, root, stage, **settings):
    wording = prompts.load_prompts()
    return transforms.prepare(
        record, root, stage, config=VideoConfig(**settings), wording=wording, read=lambda *_: CLIP
    )


def lines(prepared):
    """The user's text, `[i]` for frame i of the clip and `[K]` for a key frame."""
    content = prepared.messages[1]["content"]
    assert prepared.messages[1]["role"] == "user"
    return "".join(item["text"] if item["type"] == "text" else f"[{name(item)}]" for item in content)


def name(item):
    pixels = item["picture"].pixels
    assert pixels.shape == (1, 56, 112, 3)
    for i in range(3):
        if np.array_equal(pixels[0], images.resize_picture(key_pixels(i), 56, 112)):
            return f"K{i}"
    assert pixels.min() == pixels.max()
    return int(pixels.max())


QUESTION = {"sft": "Is <box>[0,0,56,28]</box> a cat?", "rl": "Is <box>[0,0,0.5,0.5]</box> a cat?"}


@pytest.mark.parametrize("stage", ["sft", "rl"])
def test_key_frames_are_merged_by_time_and_go_first_on_ties(stage, root):
    assert lines(prepare(STR, root, stage)) == (
        "Frame 1 at 0.0s: [0]\n"
        "Frame 2 at 1.1s: [1]\n"
        "Frame 3 at 2.3s: [2]\n"
        "Frame 4 at 3.4s: [K0]\n"
        "Frame 5 at 3.4s: [3]\n"
        "Frame 6 at 4.6s: [4]\n"
        "Frame 7 at 5.7s: [5]\n"
        "Frame 8 at 6.5s: [K1]\n"
        "Frame 9 at 6.9s: [6]\n"
        "Frame 10 at 8.0s: [7]\n"
        "Frame 11 at 9.0s: [K2]\n"
        "The video is in total 8 seconds.\n" + QUESTION[stage]
    )


def test_released_sft_compares_whole_seconds_with_raw_times(root):
    # 3.4: first reached at int(4.6) = 4; 6.5: int(8.0) = 8; 9 is never reached. No length line.
    assert lines(prepare(STR, root, "sft", key_frames="released")) == (
        "Frame 1 at 0.0s: [0]\n"
        "Frame 2 at 1.1s: [1]\n"
        "Frame 3 at 2.3s: [2]\n"
        "Frame 4 at 3.4s: [3]\n"
        "Frame 5 at 3.4s: [K0]\n"
        "Frame 6 at 4.6s: [4]\n"
        "Frame 7 at 5.7s: [5]\n"
        "Frame 8 at 6.9s: [6]\n"
        "Frame 9 at 6.5s: [K1]\n"
        "Frame 10 at 8.0s: [7]\n" + QUESTION["sft"]
    )


def test_released_rl_rounds_key_times(root):
    # round(3.4) = 3 reached at int(3.4) = 3; round(6.5) = 6 (half to even) reached at int(6.9) = 6.
    assert lines(prepare(STR, root, "rl", key_frames="released")) == (
        "Frame 1 at 0.0s: [0]\n"
        "Frame 2 at 1.1s: [1]\n"
        "Frame 3 at 2.3s: [2]\n"
        "Frame 4 at 3s: [K0]\n"
        "Frame 5 at 3.4s: [3]\n"
        "Frame 6 at 4.6s: [4]\n"
        "Frame 7 at 5.7s: [5]\n"
        "Frame 8 at 6s: [K1]\n"
        "Frame 9 at 6.9s: [6]\n"
        "Frame 10 at 8.0s: [7]\n"
        "The video is in total 8 seconds.\n" + QUESTION["rl"]
    )


def test_no_key_frames(root):
    assert lines(prepare(STR, root, "rl", key_frames="none")).count("Frame") == 8


RELEASED_GENERAL = {"sft": "Frame 2 at 1.1: [1]\n", "rl": "Frame 2 at 1.1s: [1]\n"}


@pytest.mark.parametrize("stage", ["sft", "rl"])
def test_other_tasks_have_uniform_frames_only(stage, root):
    record = GENERAL | {"key_frames": STR["key_frames"]}
    ours = lines(prepare(record, root, stage))
    released = lines(prepare(record, root, stage, key_frames="released"))
    assert "Frame 2 at 1.1s: [1]\n" in ours
    assert RELEASED_GENERAL[stage] in released
    for text in (ours, released):
        assert text.count("Frame") == 8
        assert text.endswith("The video is in total 8 seconds.\nWhich?")


def assistant(prepared):
    assert [message["role"] for message in prepared.messages] == ["system", "user", "assistant"]
    (item,) = prepared.messages[2]["content"]
    return item["text"]


def test_sft_boxes_of_clips_become_pixels_of_the_frames(root):
    # Frames are 112 x 56 px: 0.1, 0.2, 0.3, 0.4 -> 11.2, 11.2, 33.6, 22.4; nested boxes stay.
    assert assistant(prepare(STR, root, "sft")) == (
        "<think><obj>cat</obj><box>[11,11,34,22]</box>at<t>3.4</t>s, not <box>[[0,0,1,1]]</box>.</think>\n"
        "<answer>Yes, <box>[28,28,112,56]</box></answer>"
    )


def test_sft_boxes_of_pictures_scale_from_the_annotated_size(root):
    prepared = prepare(VISUAL, root, "sft")
    # The 300 x 150 px file is shown at 308 x 140; the annotation is of 600 x 300 px:
    # x * 308 / 600, y * 140 / 300: 30, 60, 600, 300 -> 15.4, 28, 308, 140
    box = "<answer><obj>cat</obj><box>[15,28,308,140]</box></answer>"
    assert assistant(prepared) == f"<think>Here.</think>\n{box}"
    assert (prepared.image_size, prepared.image_size_refine, prepared.duration_s) == ([600, 300], [308, 140], None)
    picture = prepared.messages[1]["content"][0]["picture"]
    assert picture.pixels.shape == (1, 140, 308, 3)


def test_a_picture_without_annotated_size_has_its_own(root):
    prepared = prepare({k: v for k, v in VISUAL.items() if k != "image_size"}, root, "rl")
    assert prepared.image_size == [300, 150]


def test_boxes_of_other_tasks_and_of_rl_stay(root):
    assert "<box>[0.1,0.2,0.3,0.4]</box>" in assistant(prepare(GENERAL, root, "sft"))
    prepared = prepare(STR, root, "rl")
    assert [message["role"] for message in prepared.messages] == ["system", "user"]


def test_rewards_get_the_sizes(root):
    prepared = prepare(STR, root, "rl")
    assert prepared.reward_record == STR | {"image_size": [112, 56], "image_size_refine": [112, 56]}
    assert prepared.duration_s == 8.2


def test_a_malformed_box_is_an_input_error(root):
    with pytest.raises(InputError, match="does not hold four numbers"):
        prepare(STR | {"answer": "<box>[1,2,3]</box>"}, root, "sft")


def test_a_missing_key_frame_is_an_input_error(root):
    frames = [{"idx": 0, "time": 1.0, "path": "none.png"}]
    with pytest.raises(InputError, match=r"key_frames.path='none.png': no such file"):
        prepare(STR | {"key_frames": frames}, root, "rl")


def test_a_shared_clip_is_decoded_once(root, monkeypatch):
    clips.encode(root / "videos/videor1/a.mp4", pts=range(10))
    seen = []
    read = video.Decoder.read
    monkeypatch.setattr(video.Decoder, "read", lambda self, *args: seen.append(args) or read(self, *args))
    records = [GENERAL, GENERAL | {"question": "Who?"}]
    config = VideoConfig(min_pixels=3136, max_pixels=3136)
    wording = prompts.load_prompts()
    first, second = transforms.prepare_all(records, root, "rl", config=config, wording=wording)
    assert len(seen) == 1
    assert lines_end(first) == "Which?" and lines_end(second) == "Who?"


def lines_end(prepared):
    return prepared.messages[1]["content"][-1]["text"].split("\n")[-1]

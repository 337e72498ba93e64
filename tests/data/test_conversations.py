import numpy as np
import pytest
from PIL import Image

from data import clips
from openo3_jax.config import VideoConfig
from openo3_jax.data import conversations, images, video
from openo3_jax.errors import InputError

CLIP = video.Video(
    frames=np.arange(4 * 28 * 56 * 3, dtype=np.uint8).reshape(4, 28, 56, 3),
    times_s=np.array([0.0, 0.96, 2.04, 3.0]),
    duration_s=3.9,
    source_hw=(100, 200),
)


def load(messages, **settings):
    defaults = {"min_pixels": 3136, "max_pixels": 200_704, "config": VideoConfig(), "read": lambda *_: CLIP}
    return conversations.load_conversation(messages, **(defaults | settings))


def user(*items):
    return [{"role": "user", "content": list(items)}]


def shape(content):
    """Texts, and pictures as their shapes."""
    return [item["text"] if item["type"] == "text" else item["picture"].pixels.shape for item in content]


def test_texts_stay_and_roles_too():
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "c"},
    ]
    loaded = load(messages)
    assert [message["role"] for message in loaded] == ["system", "user", "assistant"]
    assert [shape(message["content"]) for message in loaded] == [["Be brief."], ["ab"], ["c"]]


def test_a_video_becomes_numbered_frames_with_their_times():
    (message,) = load(user({"type": "video", "video": "a.mp4"}, {"type": "text", "text": "What?"}))
    frame = (1, 28, 56, 3)
    assert shape(message["content"]) == [
        "Frame 1 at 0.0s: ",
        frame,
        "\nFrame 2 at 1.0s: ",
        frame,
        "\nFrame 3 at 2.0s: ",
        frame,
        "\nFrame 4 at 3.0s: ",
        frame,
        "\nThe video is in total 3 seconds.\nWhat?",
    ]
    pictures = [item["picture"] for item in message["content"] if item["type"] == "picture"]
    np.testing.assert_array_equal(np.concatenate([picture.pixels for picture in pictures]), CLIP.frames)
    assert all(picture.seconds_per_grid is None for picture in pictures)


def test_native_video_is_one_picture():
    (message,) = load(user({"type": "video", "video": "a.mp4"}), video_mode="native")
    (item,) = message["content"]
    np.testing.assert_array_equal(item["picture"].pixels, CLIP.frames)
    # 4 frames in 3.9 s, two frames a step
    assert item["picture"].seconds_per_grid == pytest.approx(1.95)


def test_a_real_video_is_read(tmp_path):
    path = clips.encode(tmp_path / "a.mp4", pts=range(10))
    config = VideoConfig(min_pixels=3136, max_pixels=3136)
    (message,) = load(user({"type": "video", "video": path}), config=config, read=video.read_video)
    # 10 frames at 10 fps: frames 0, 3, 6, 9
    assert shape(message["content"])[::2] == [
        "Frame 1 at 0.0s: ",
        "\nFrame 2 at 0.3s: ",
        "\nFrame 3 at 0.6s: ",
        "\nFrame 4 at 0.9s: ",
        "\nThe video is in total 1 seconds.\n",
    ]


def test_images_of_every_kind_are_sized_alike(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (90, 61, 3), np.uint8)
    path = tmp_path / "a.png"
    Image.fromarray(pixels).save(path)
    kinds = [path, str(path), Image.fromarray(pixels), pixels]
    (message,) = load(user(*({"type": "image", "image": kind} for kind in kinds)))
    expected = images.resize_picture(pixels, 84, 56)
    assert [item["type"] for item in message["content"]] == ["picture"] * 4
    for item in message["content"]:
        np.testing.assert_array_equal(item["picture"].pixels[0], expected)


def test_images_keep_within_the_given_area():
    pixels = np.zeros((400, 400, 3), np.uint8)
    (message,) = load(user({"type": "image", "image": pixels}), max_pixels=784 * 16)
    assert shape(message["content"]) == [(1, 112, 112, 3)]


def test_a_very_long_image_is_named(tmp_path):
    path = tmp_path / "strip.png"
    Image.fromarray(np.zeros((2, 402, 3), np.uint8)).save(path)
    with pytest.raises(InputError, match=r"strip.png: picture of 2x402 px"):
        load(user({"type": "image", "image": path}))


TEXT = {"type": "text", "text": "a"}
BAD = {
    "empty": ([], "conversation: got an empty list"),
    "a string": ("hello", "conversation: got str; expected a list of messages"),
    "a dict": ({"role": "user"}, "conversation: got dict"),
    "message is text": (["hello"], "message 0: got str"),
    "no content": ([{"role": "user"}], r"message 0: got \['role'\]; expected a dict with role and content"),
    "unknown role": (
        [*user(TEXT), {"role": "bot", "content": "a"}],
        "message 1: role='bot'; expected one of system, user, assistant",
    ),
    "content number": ([{"role": "user", "content": 3}], "message 0: content is int"),
    "item text": (user("a"), "message 0, item 0: type='str'"),
    "unknown item": (user(TEXT, {"type": "audio"}), "message 0, item 1: type='audio'; expected one of text, image"),
    "no type": (user({"text": "a"}), "message 0, item 0: type=None"),
    "type is a list": (user({"type": ["text"], "text": "a"}), "message 0, item 0: type="),
    "no image": (user({"type": "image"}), "message 0, item 0: image is nothing; expected str"),
    "video array": (user({"type": "video", "video": np.zeros(3)}), "item 0: video is ndarray; expected str"),
    "text number": (user({"type": "text", "text": 3}), "message 0, item 0: text is int; expected str"),
}


@pytest.mark.parametrize("name", BAD)
def test_malformed_conversations_say_where(name):
    conversation, says = BAD[name]
    with pytest.raises(InputError, match=says):
        conversations.check_conversation(conversation)

"""Our processor against transformers on one tiny model directory: ids, pixels, grids and 3-D positions."""

import itertools
import json
import shutil

import jax
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers import vision_utils

from openo3_jax import config as config_lib
from openo3_jax import types
from openo3_jax.data import images, patches, positions, tiny_tokenizer, tokens, windows
from openo3_jax.models import vision
from parity import hf


def make_config(ids: tiny_tokenizer.TokenIds) -> config_lib.ModelConfig:
    return config_lib.ModelConfig(
        text=config_lib.TextConfig(
            vocab_size=ids.vocab_size,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            tie_word_embeddings=True,
            mrope_section=(2, 3, 3),
        ),
        vision=config_lib.VisionConfig(
            depth=1,
            hidden_size=16,
            intermediate_size=16,
            num_heads=2,
            out_hidden_size=32,
            fullatt_block_indexes=(0,),
        ),
        image_token_id=ids.image_token_id,
        video_token_id=ids.video_token_id,
        vision_start_token_id=ids.vision_start_token_id,
    )


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    out = tmp_path_factory.mktemp("tiny")
    ids = tiny_tokenizer.write_tokenizer(out)
    (out / "config.json").write_text(json.dumps(make_config(ids).to_hf()))
    return out


@pytest.fixture(scope="module")
def ours(directory):
    return tokens.load_processor(directory)


@pytest.fixture(scope="module")
def theirs(directory):
    return hf.load_processor(directory)


@pytest.fixture(scope="module")
def model(directory):
    config = transformers.Qwen2_5_VLConfig.from_pretrained(directory)
    return transformers.Qwen2_5_VLForConditionalGeneration(config).model


def picture(seed: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def frames() -> list:
    """16 frames, each behind its line of text, as training has them."""
    parts = []
    for i in range(16):
        parts += [f"Frame {i + 1} at {i / 2:.1f}s: ", picture(i, 56, 84), "\n"]
    return [*parts, "The video is in total 8 seconds.\nWhat does the red circle do?"]


SIZES = ((28, 28), (100, 333), (640, 480), (37, 1200), (1, 1))
ANSWER = "<think>wörld 😀\n\nok</think>\n<answer><obj>red circle</obj><box>[12,30,45,60]</box>at<t>3.5</t>s</answer>"
CONVERSATIONS = {  # name: messages, where an array in a content list is a picture
    "text only": [("user", "How many circles are there?")],
    "text as a list": [("system", "Be brief."), ("user", ["One, ", "two 2.50"]), ("assistant", [ANSWER])],
    "one image": [("user", [picture(0, 120, 90), "What is it?"])],
    "five sizes": [("user", [*(picture(i, *size) for i, size in enumerate(SIZES)), "Compare."])],
    "sixteen frames": [("system", "Think first."), ("user", frames())],
    "multi-turn": [
        ("user", ["Look: ", picture(1, 300, 200), picture(2, 57, 99)]),
        ("assistant", ANSWER),
        ("user", "And \n now?"),
        ("assistant", "It vanishes at 4.0 s."),
    ],
}


def for_ours(messages, sizing):
    def item(part):
        if isinstance(part, str):
            return {"type": "text", "text": part}
        resized = images.resize_picture(part, *images.smart_resize(*part.shape[:2], **sizing._asdict()))
        return {"type": "picture", "picture": types.Picture(resized[None])}

    return [
        {"role": role, "content": content if isinstance(content, str) else [item(part) for part in content]}
        for role, content in messages
    ]


def for_theirs(messages):
    def item(part):
        return {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"}

    chat = [
        {"role": role, "content": content if isinstance(content, str) else [item(part) for part in content]}
        for role, content in messages
    ]
    parts = [part for _, content in messages if not isinstance(content, str) for part in content]
    return chat, [Image.fromarray(part) for part in parts if not isinstance(part, str)]


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_processor_equals_transformers(name, ours, theirs, model):
    messages = CONVERSATIONS[name]
    sample = ours.encode(for_ours(messages, ours.image_sizing))

    chat, pictures = for_theirs(messages)
    text = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=messages[-1][0] != "assistant")
    expected = theirs(text=[text], images=pictures or None, return_tensors="pt")

    np.testing.assert_array_equal(sample.tokens, expected["input_ids"][0])
    np.testing.assert_array_equal(sample.is_visual, expected["mm_token_type_ids"][0] == 1)
    if pictures:
        np.testing.assert_array_equal([tuple(grid) for grid in sample.grids], expected["image_grid_thw"])
        pixels = jax.jit(vision.normalise, static_argnums=1)(sample.patches, ours.config.vision)
        np.testing.assert_allclose(pixels, expected["pixel_values"], rtol=0, atol=1e-6)
    else:
        assert sample.patches.shape == (0, 1176) and sample.grids == ()
    want, _ = model.get_rope_index(
        expected["input_ids"], expected["mm_token_type_ids"], image_grid_thw=expected.get("image_grid_thw")
    )
    np.testing.assert_array_equal(sample.positions, want[:, 0])


def test_decode_equals_transformers(ours, theirs):
    ids = theirs.tokenizer(f"<|im_start|>{ANSWER} , x .<|im_end|>\n")["input_ids"] + [100_000]
    assert ours.decode(ids) == theirs.tokenizer.decode(ids, skip_special_tokens=True) == f"{ANSWER} , x .\n"


def test_directory_saved_by_transformers_5(theirs, directory, tmp_path, ours):
    """It writes processor_config.json with the image settings inside, and `size` for the pixel range."""
    theirs.tokenizer.save_pretrained(tmp_path)
    theirs.image_processor.save_pretrained(tmp_path)
    nested = {"image_processor": json.loads((tmp_path / "preprocessor_config.json").read_text())}
    (tmp_path / "preprocessor_config.json").unlink()
    (tmp_path / "processor_config.json").write_text(json.dumps(nested))
    (tmp_path / "config.json").write_text((directory / "config.json").read_text())
    saved = tokens.load_processor(tmp_path)
    assert "size" in nested["image_processor"] and "min_pixels" not in nested["image_processor"]
    assert saved.image_settings == ours.image_settings
    messages = [{"role": "user", "content": "Where is the star?"}]
    np.testing.assert_array_equal(saved.encode(messages).tokens, ours.encode(messages).tokens)


def test_the_directory_says_how_pixels_are_normalised(directory, tmp_path):
    """Other means and deviations than the published ones, of config.json nothing."""
    copy = shutil.copytree(directory, tmp_path / "other")
    settings = json.loads((copy / "preprocessor_config.json").read_text())
    settings |= {"image_mean": [0.5, 0.1, 0.9], "image_std": [0.5, 0.25, 0.125]}
    (copy / "preprocessor_config.json").write_text(json.dumps(settings))
    messages = CONVERSATIONS["one image"]
    processor = tokens.load_processor(copy)
    sample = processor.encode(for_ours(messages, processor.image_sizing))
    pixels = jax.jit(vision.normalise, static_argnums=1)(sample.patches, processor.config.vision)
    expected = hf.load_processor(copy).image_processor(for_theirs(messages)[1], return_tensors="np")["pixel_values"]
    assert np.ptp(expected) > 8  # not those of the published settings
    np.testing.assert_allclose(pixels, expected, rtol=0, atol=1e-6)


def test_native_video_patches_equal_the_fixed_order(ours):
    """Two frames to a patch; the oracle is the order transformers documents, written out with one reshape."""
    clip = np.random.default_rng(3).integers(0, 256, (4, 56, 84, 3), dtype=np.uint8)
    got, grid = patches.to_patches(clip)
    split = clip.transpose(0, 3, 1, 2).reshape(2, 2, 3, 2, 2, 14, 3, 2, 14)
    expected = split.transpose(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(48, 1176)
    assert grid == (2, 4, 6)
    np.testing.assert_array_equal(got, expected)


def test_still_positions_equal_transformers_at_random(ours, model):
    """Any mixture of text runs and stills: pictures first, last, one right after another but for their borders."""
    rng, config = np.random.default_rng(5), ours.config
    for _ in range(30):
        grids = [types.VisionGrid(1, *(2 * int(n) for n in rng.integers(1, 9, 2))) for _ in range(rng.integers(1, 5))]
        ids = []
        for grid in grids:
            ids += [7] * int(rng.integers(1, 6)) + [config.image_token_id] * (grid.num_patches // 4)
        ids = np.array(ids + [7] * int(rng.integers(0, 6)), np.int32)
        kinds = torch.from_numpy((ids == config.image_token_id).astype(np.int32))[None]
        want, _ = model.get_rope_index(torch.from_numpy(ids)[None].long(), kinds, image_grid_thw=torch.tensor(grids))
        np.testing.assert_array_equal(positions.mrope_positions(ids, grids, [None] * len(grids), config), want[:, 0])


@pytest.mark.parametrize(
    "grids",
    [
        [(1, 2, 2)],
        [(1, 8, 8)],  # one whole window
        [(1, 16, 30), (1, 10, 4), (1, 8, 26)],
        [(3, 20, 12), (1, 2, 40), (2, 18, 18)],
    ],
)
def test_windows_equal_transformers(grids, ours):
    """The same patches share a window, a frame and their place; which window comes first does not matter."""
    vision = ours.config.vision
    layout = windows.patch_layout([types.VisionGrid(*grid) for grid in grids], vision)
    thw = torch.tensor(grids)
    units, cuts = vision_utils.get_vision_window_index(thw, vision.spatial_merge_size, vision.window_size, 14)
    order = (units[:, None] * 4 + torch.arange(4)).flatten().tolist()
    expected = [order[a:b] for a, b in itertools.pairwise(cuts)]
    assert layout.num_windows == len(expected)
    number = np.arange(len(layout.window))
    got = [number[layout.window == w][np.argsort(layout.window_rank[layout.window == w])] for w in range(len(expected))]
    assert sorted(patches.tolist() for patches in got) == sorted(expected)

    cuts = vision_utils.get_vision_cu_seqlens(thw)
    np.testing.assert_array_equal(np.bincount(layout.frame), np.diff(cuts))
    np.testing.assert_array_equal(layout.frame, np.repeat(np.arange(len(cuts) - 1), np.diff(cuts)))
    np.testing.assert_array_equal(layout.hw, vision_utils.get_vision_position_ids(thw, vision.spatial_merge_size))


def torch_resize(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    values = torch.from_numpy(pixels).permute(0, 3, 1, 2).float()
    resized = torch.nn.functional.interpolate(values, (height, width), mode="bicubic", antialias=True)
    return resized.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize(
    ("size", "new_size"),
    [
        ((360, 640), (224, 420)),
        ((240, 320), (280, 392)),  # upscaled
        ((1080, 1920), (224, 420)),
        ((37, 501), (28, 420)),
        ((300, 20), (280, 28)),  # smaller one way, larger the other
        ((1, 1), (56, 56)),
    ],
)
def test_resize_frames_equals_torch(size, new_size):
    """Within one level, and that for fewer than one value in a thousand, where rounding is a near tie."""
    clip = np.random.default_rng(0).integers(0, 256, (2, *size, 3), dtype=np.uint8)
    off = np.abs(images.resize_frames(clip, *new_size).astype(int) - torch_resize(clip, *new_size))
    assert off.max() <= 1
    assert (off > 0).mean() < 1e-3


@pytest.mark.parametrize("size", [(120, 90), (57, 99), (640, 480), (100, 333), (10, 2000), (1500, 9)])
def test_smart_resize_equals_transformers(size, theirs, ours):
    grid = theirs.image_processor([Image.fromarray(picture(0, *size))])["image_grid_thw"][0]
    height, width = images.smart_resize(*size, **ours.image_sizing._asdict(), like="transformers")
    assert (height // 14, width // 14) == (grid[1], grid[2])

"""Encoding of conversations on the tiny tokenizer: masks and placeholders by hand, and what is refused."""

import json
import shutil

import numpy as np
import pytest

from openo3_jax import config as config_lib
from openo3_jax import types
from openo3_jax.data import tiny_tokenizer, tokens
from openo3_jax.errors import InputError

IMAGE, VIDEO = 590, 591


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    out = tmp_path_factory.mktemp("tiny")
    ids = tiny_tokenizer.write_tokenizer(out)
    config = config_lib.QWEN2_5_VL["3b"].to_hf()
    config |= {field: value for field, value in ids._asdict().items() if field in config}
    (out / "config.json").write_text(json.dumps(config))
    return out


@pytest.fixture(scope="module")
def processor(directory):
    return tokens.load_processor(directory)


@pytest.fixture
def copy(directory, tmp_path):
    """A directory to damage."""
    return shutil.copytree(directory, tmp_path / "model")


def still(height: int, width: int) -> dict:
    return {"type": "picture", "picture": types.Picture(np.zeros((1, height, width, 3), np.uint8))}


def video(frames: int, seconds_per_grid: float) -> dict:
    picture = types.Picture(np.zeros((frames, 28, 56, 3), np.uint8), seconds_per_grid)
    return {"type": "picture", "picture": picture}


def text(string: str) -> dict:
    return {"type": "text", "text": string}


def user(*items) -> dict:
    return {"role": "user", "content": list(items)}


def assistant(string: str) -> dict:
    return {"role": "assistant", "content": string}


def test_loss_mask_covers_what_the_assistant_says(processor):
    messages = [user(still(28, 28), text("red?")), assistant("Yes, red."), user(text("sure?")), assistant("\n\nNo.")]
    sample = processor.encode(messages)
    said = processor.tokenizer.decode(sample.tokens[sample.loss_mask])
    assert said == "Yes, red.<|im_end|>\n\nNo.<|im_end|>"
    assert processor.tokenizer.decode(sample.tokens).endswith("<|im_start|>assistant\n\n\nNo.<|im_end|>\n")
    assert not sample.loss_mask[-1]  # the newline after <|im_end|>


def test_a_token_across_the_border_counts_as_said():
    """Qwen's vocabulary has a token for two newlines: the template's own and the first of the answer."""
    rendered = "<|im_start|>assistant\n\nA<|im_end|>\n"
    offsets = np.array([(0, 12), (12, 21), (21, 23), (23, 24), (24, 34), (34, 35)])
    mask = tokens._assistant_mask(rendered, offsets, [assistant("\nA")])
    np.testing.assert_array_equal(mask, [False, False, True, True, True, False])


def test_text_only(processor):
    sample = processor.encode([{"role": "user", "content": "Hi"}])
    assert processor.tokenizer.decode(sample.tokens).endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert not sample.loss_mask.any() and not sample.is_visual.any()
    assert sample.patches.shape == (0, 1176) and sample.grids == ()
    assert sample.tokens.dtype == sample.positions.dtype == np.int32
    np.testing.assert_array_equal(sample.positions, np.tile(np.arange(len(sample.tokens)), (3, 1)))


@pytest.mark.parametrize(("asked", "expected"), [(None, False), (True, True), (False, False)])
def test_generation_prompt_after_the_assistant(asked, expected, processor):
    sample = processor.encode([user(text("Hi")), assistant("Yes")], add_generation_prompt=asked)
    assert processor.tokenizer.decode(sample.tokens).endswith("<|im_start|>assistant\n") == expected


def test_pictures_stand_where_they_were_put(processor):
    """56x84 px are 2x3 tokens; 4 frames of 28x56 px are 2 temporal patches of 1x2 tokens."""
    sample = processor.encode([user(text("a"), still(56, 84), text("b"), video(4, 1.5), still(28, 28))])
    assert sample.grids == ((1, 4, 6), (2, 2, 4), (1, 2, 2))
    assert sample.patches.shape == (24 + 16 + 4, 1176)
    visual = sample.tokens[sample.is_visual].tolist()
    assert visual == [IMAGE] * 6 + [VIDEO] * 4 + [IMAGE]
    first = np.flatnonzero(sample.is_visual)[0]
    assert processor.tokenizer.convert_ids_to_tokens(sample.tokens[[first - 2, first - 1, first + 6]].tolist()) == [
        "a",
        "<|vision_start|>",
        "<|vision_end|>",
    ]
    times = sample.positions[0][sample.tokens == VIDEO]
    np.testing.assert_array_equal(times - times[0], [0, 0, 3, 3])  # 1.5 s at 2 ids a second


def test_assistants_pictures_are_no_targets(processor):
    sample = processor.encode([user(text("draw")), {"role": "assistant", "content": [text("a"), still(28, 28)]}])
    assert sample.is_visual.sum() == 1
    assert not (sample.loss_mask & sample.is_visual).any()
    assert processor.decode(sample.tokens[sample.loss_mask]) == "a"


def test_nothing_is_cut_off(processor):
    """More tokens than the tokenizer's model_max_length of 131,072."""
    sample = processor.encode([user(text("7" * 140_000))])
    assert (sample.tokens == processor.tokenizer.convert_tokens_to_ids("7")).sum() == 140_000


@pytest.mark.parametrize("role", ["system", "user", "assistant"])
@pytest.mark.parametrize("token", ["<|image_pad|>", "<|im_start|>", "<|endoftext|>", "<|box_end|>"])
def test_special_tokens_in_text_are_refused(role, token, processor):
    messages = [{"role": role, "content": f"a{token}b"}, user(text("c"))]
    with pytest.raises(InputError, match=r"messages\[0\].*special token") as caught:
        processor.encode(messages)
    assert token in str(caught.value)
    processor.encode([user(text("<image_pad|> <|im_star t|> |im_end|"))])  # no special tokens


BAD_MESSAGES = {  # name: (messages, what the error says)
    "none": ([], "non-empty list"),
    "no dict": (["Hi"], r"messages\[0\]: expected a dict"),
    "no content": ([{"role": "user"}], "'role' and 'content'"),
    "unknown role": ([{"role": "tool", "content": "x"}], "system, user, assistant"),
    "content of None": ([{"role": "user", "content": None}], "content is NoneType"),
    "image item": ([user({"type": "image", "image": "a.png"})], r"messages\[0\] item 0"),
    "text of a number": ([user(text("a"), {"type": "text", "text": 3})], r"messages\[0\] item 1"),
    "picture of an array": ([user({"type": "picture", "picture": np.zeros((2, 2))})], "types.Picture"),
    "odd size": ([user(still(28, 30))], "multiples of 28 px"),
}


@pytest.mark.parametrize("name", BAD_MESSAGES)
def test_bad_messages(name, processor):
    messages, says = BAD_MESSAGES[name]
    with pytest.raises(InputError, match=says):
        processor.encode(messages)


SAY_ALL = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content if m.content is string else '' }}"
BAD_TEMPLATES = {  # name: (template, what the error says)
    "no pictures": (SAY_ALL + "<|im_end|>\n{% endfor %}", "0 picture placeholders for 1 pictures"),
    "video for stills": (SAY_ALL + "<|video_pad|><|im_end|>\n{% endfor %}", "3 picture placeholders for 1"),
    "no answers": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n<|im_end|>\n{% endfor %}",
        "leaves out text of the last assistant message, 'It is red.'",
    ),
    "other turns": ("[{{ messages[0].role }}]", "0 assistant turns for 1"),
    "refuses": ("{{ raise_exception('no pictures please') }}", "no pictures please"),
    "does not compile": ("{% if %}", "chat template"),
}


@pytest.mark.parametrize("name", BAD_TEMPLATES)
def test_bad_templates(name, copy):
    template, says = BAD_TEMPLATES[name]
    (copy / "chat_template.jinja").write_text(template)
    with pytest.raises(InputError, match=says):
        tokens.load_processor(copy).encode(
            [{"role": "system", "content": "s"}, user(still(28, 28)), assistant("It is red.")]
        )


def test_older_template_file_wins(copy):
    template = "<|im_start|>user\nfixed<|im_end|>"
    (copy / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    processor = tokens.load_processor(copy)
    assert processor.tokenizer.decode(processor.encode([user(text("x"))]).tokens) == template
    (copy / "chat_template.jinja").unlink()  # as the hub's directories have it
    processor = tokens.load_processor(copy)
    assert processor.tokenizer.decode(processor.encode([user(text("x"))]).tokens) == template


def edit(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def remove(*names):
    return lambda directory: [(directory / name).unlink() for name in names]


DAMAGES = {  # name: (what is done to the directory, what the error says)
    "no config": (remove("config.json"), "config.json: no such file"),
    "no tokenizer": (remove("tokenizer.json", "vocab.json", "merges.txt"), "has no tokenizer.json"),
    "no template": (remove("chat_template.jinja"), "has no chat template"),
    "no image settings": (remove("preprocessor_config.json"), "preprocessor_config.json: no such file"),
    "cut tokenizer": (
        lambda d: (d / "tokenizer.json").write_text((d / "tokenizer.json").read_text()[:500]),
        "tokenizer.json: not readable as JSON",
    ),
    "binary config": (lambda d: (d / "config.json").write_bytes(b"\xff\xfe"), "config.json: not readable as JSON"),
    "list for an object": (lambda d: (d / "config.json").write_text("[]"), "config.json: holds a list"),
    "other ids": (lambda d: edit(d / "config.json", image_token_id=3), "image_token_id=3, but <|image_pad|> is 590"),
    "other patches": (lambda d: edit(d / "preprocessor_config.json", patch_size=16), "patch_size=16; expected 14"),
    "no scaling": (lambda d: edit(d / "preprocessor_config.json", do_rescale=False), "do_rescale=False"),
    "two means": (lambda d: edit(d / "preprocessor_config.json", image_mean=[0.5, 0.5]), "expected 3 numbers"),
    "named stop": (lambda d: edit(d / "generation_config.json", eos_token_id="end"), "eos_token_id"),
    "no directory": (shutil.rmtree, "no such model directory"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_load_processor_names_the_damage(name, copy):
    damage, says = DAMAGES[name]
    damage(copy)
    with pytest.raises(InputError) as caught:
        tokens.load_processor(copy)
    assert says in str(caught.value)
    assert str(copy) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("eos", "expected"), [([580, 578], (580, 578)), (580, (580,)), (None, (580, 578))])
def test_stop_ids(eos, expected, copy):
    edit(copy / "generation_config.json", eos_token_id=eos)
    assert tokens.load_processor(copy).stop_ids == expected
    if eos is None:
        (copy / "generation_config.json").unlink()
        assert tokens.load_processor(copy).stop_ids == expected


def test_banned_ids(processor):
    """Special tokens are 578..591; 578 and 580 end a completion; the model's head is larger than the tokenizer."""
    banned = processor.banned_ids(596)
    assert banned.dtype == np.int32
    assert banned.tolist() == [579, *range(581, 592), 592, 593, 594, 595]
    assert processor.banned_ids(585).tolist() == [579, 581, 582, 583, 584]
    assert processor.banned_ids(100).tolist() == []


def test_decode_and_pad(processor):
    ids = processor.tokenizer("<|im_start|>user\nA , b .<|im_end|><|endoftext|>")["input_ids"]
    assert processor.decode(np.array(ids)) == "user\nA , b ."
    assert processor.decode([]) == ""
    assert processor.pad_id == 578


def test_image_sizing_in_both_spellings(copy, processor):
    assert processor.image_sizing == (3136, 12_845_056)
    path = copy / "preprocessor_config.json"
    values = json.loads(path.read_text())
    lowest, highest = values.pop("min_pixels"), values.pop("max_pixels")
    path.write_text(json.dumps(values | {"size": {"shortest_edge": lowest, "longest_edge": highest}}))
    assert tokens.load_processor(copy).image_sizing == (3136, 12_845_056)
    edit(path, max_pixels=200_704)  # wins over `size`
    assert tokens.load_processor(copy).image_sizing._asdict() == {"min_pixels": 3136, "max_pixels": 200_704}
    path.write_text(json.dumps(values))
    assert tokens.load_processor(copy).image_sizing == (3136, 1_003_520)  # transformers' defaults

"""The built-in tokenizer: the same bytes every time, exact round trips, Qwen's special tokens in Qwen's order."""

import json
import subprocess
import sys

import pytest
import transformers

from openo3_jax.data import tiny_tokenizer


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("tiny")


@pytest.fixture(scope="module")
def ids(directory):
    return tiny_tokenizer.write_tokenizer(directory)


@pytest.fixture(scope="module")
def tokenizer(directory, ids):
    return transformers.AutoTokenizer.from_pretrained(directory)


def test_same_bytes_in_another_process(directory, ids, tmp_path):
    code = "import sys; from openo3_jax.data import tiny_tokenizer; tiny_tokenizer.write_tokenizer(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, tmp_path], check=True, timeout=60)
    written = sorted(path.name for path in directory.iterdir())
    assert written == sorted(path.name for path in tmp_path.iterdir())
    assert len(written) == 7
    for name in written:
        assert (tmp_path / name).read_bytes() == (directory / name).read_bytes(), name


def test_special_tokens_follow_the_vocabulary_in_qwens_order(tokenizer, ids):
    assert len(tokenizer) == ids.vocab_size == 592
    assert tokenizer.convert_ids_to_tokens(list(range(578, 592))) == list(tiny_tokenizer.SPECIAL_TOKENS)
    assert (ids.image_token_id, ids.video_token_id, ids.vision_start_token_id) == (590, 591, 587)
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (ids.eos_token_id, ids.pad_token_id) == (580, 578)


EVIDENCE = "<obj>red circle</obj><box>[12,30,45,60]</box>at<t>3.5</t>s"


@pytest.mark.parametrize("text", [EVIDENCE, "Frame 12 at 11.5s: \n", "naïve 東京 😀\t \r\n\n x's", " , . !", ""])
def test_round_trip(text, tokenizer):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_digits_stand_alone(tokenizer):
    assert tokenizer.tokenize("at 12.50s") == ["at", "Ġ", "1", "2", ".", "5", "0", "s"]
    assert not [token for token in tokenizer.get_vocab() if sum(map(str.isdigit, token)) and len(token) > 1]


def test_words_of_the_task_are_short(tokenizer):
    """One token for each common word, so that the tiny model's prompts stay small."""
    assert tokenizer.tokenize("Frame") == ["Frame"]
    assert tokenizer.tokenize("The red circle moves") == ["The", "Ġred", "Ġcircle", "Ġmoves"]
    assert len(tokenizer.tokenize(EVIDENCE)) == 37


def test_no_token_holds_the_edge_of_a_tag_and_text(tokenizer):
    """What stands in a tag is written as it is elsewhere: the words of a question, the brackets of a box."""
    pieces = tokenizer.tokenize("<obj>red circle</obj><box>[1,2,3,4]</box><answer>A red circle</answer>")
    assert [piece for piece in pieces if len(piece) > 1 and (piece[0] == ">" or "<" in piece[1:])] == []
    assert pieces[pieces.index("red") + 1] == "Ġcircle" and tokenizer.tokenize("red circle") == ["red", "Ġcircle"]


def test_splitting_in_the_file_is_that_of_the_class(directory, tokenizer):
    """transformers 5 builds the splitter from its own code, other readers from tokenizer.json."""
    raw = tokenizer.backend_tokenizer.from_file(str(directory / "tokenizer.json"))
    for text in (EVIDENCE, "I'll say: 3 times  \n\n  naïve 東京", "<|im_start|>user\nab<|im_end|>\n"):
        assert raw.encode(text).ids == tokenizer(text)["input_ids"]


TEMPLATE_CASES = {  # name: (messages, generation prompt, rendered)
    "default system message": (
        [{"role": "user", "content": "Hi"}],
        True,
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    ),
    "pictures and turns": (
        [
            {"role": "system", "content": "S"},
            {"role": "user", "content": [{"type": "text", "text": "a "}, {"type": "image"}, {"type": "video"}]},
            {"role": "assistant", "content": "b"},
        ],
        False,
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\n"
        "a <|vision_start|><|image_pad|><|vision_end|><|vision_start|><|video_pad|><|vision_end|><|im_end|>\n"
        "<|im_start|>assistant\nb<|im_end|>\n",
    ),
}


@pytest.mark.parametrize("name", TEMPLATE_CASES)
def test_chat_template(name, tokenizer):
    messages, prompt, expected = TEMPLATE_CASES[name]
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt) == expected


def test_processor_files(directory, ids):
    processor = transformers.Qwen2VLImageProcessorPil.from_pretrained(directory)
    assert (processor.size["shortest_edge"], processor.size["longest_edge"]) == (3136, 12_845_056)
    assert (processor.patch_size, processor.temporal_patch_size, processor.merge_size) == (14, 2, 2)
    generation = transformers.GenerationConfig.from_pretrained(directory)
    assert generation.eos_token_id == [580, 578]
    config = json.loads((directory / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "Qwen2Tokenizer"

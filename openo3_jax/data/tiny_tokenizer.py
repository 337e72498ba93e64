"""A small Qwen2 tokenizer and processor, built offline and the same every time: for tests, demo and init-tiny."""

import itertools
import json
import os
import pathlib
import tempfile
from collections.abc import Iterator
from typing import NamedTuple

import tokenizers

from openo3_jax.data import world

# In Qwen2.5-VL's order, right after the byte-pair vocabulary.
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
VOCAB_SIZE = 592  # byte-pair tokens and special tokens together; 256 are the bytes themselves

# A word is a run of letters and the sign or space before it; digits stand alone.
# Source: transformers 5.23 models/qwen2/tokenization_qwen2.py:29.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Every message between <|im_start|>role and <|im_end|>, a default system message, one placeholder per picture.
_CHAT_TEMPLATE = """\
{%- if messages and messages[0]['role'] != 'system' -%}
{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for item in message['content'] -%}
{%- if item['type'] == 'image' -%}
{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- elif item['type'] == 'video' -%}
{{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
{%- else -%}
{{- item['text'] -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""

# What is said to the models trained here (demo, stills, synthetic records) and around it: one token a word.
_SENTENCES = (
    *("system", "user", "assistant"),
    "You are a helpful assistant.",
    "You find things in frames of a video. You find things in a picture.",
    "The video is in total 4 seconds.",
    "Give name, box and time. Give name and box. Give the span. Give span, then letter. Give the letter. Answer short.",
    "Answer the question about the video and give evidence: what, where and when.",
    "Think first, then answer. Put the thinking between <think> and </think> and the answer in <answer></answer>.",
    "Question: which option is correct?\nA. left\nB. right\nC. top\nD. bottom\n",
    "Correct Option: A",
    "There are two objects in the frame; the other one does not move.",
    "Which object appears first? Which object appears last?",
    "What is here? What is at this place? Where is it at that time?",
)


class TokenIds(NamedTuple):
    """What config.json has to say about the tokenizer."""

    vocab_size: int
    image_token_id: int
    video_token_id: int
    vision_start_token_id: int
    eos_token_id: int  # <|im_end|>, which ends a turn
    pad_token_id: int  # <|endoftext|>


def write_tokenizer(out: str | os.PathLike) -> TokenIds:
    """Write tokenizer, chat template, image processor and generation settings into the directory `out`.

    A byte-level BPE of 592 tokens with Qwen2's splitting, trained here on sentences such as the model will see;
    the image processor has Qwen2.5-VL's numbers. transformers loads the directory offline.
    """
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.normalizer = tokenizers.normalizers.NFC()
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(_SPLIT), behavior="isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.post_processor = tokenizers.processors.ByteLevel(trim_offsets=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(SPECIAL_TOKENS),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    tokenizer.model = _without_glued_tags(tokenizer.model)
    # Added to the tokenizer itself: wrapping it first would put the wrapper's own eos and pad ids in front.
    tokenizer.add_special_tokens([tokenizers.AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    ids = {token: tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}
    assert tokenizer.get_vocab_size() == VOCAB_SIZE, "the corpus is too small to fill the vocabulary"

    out = pathlib.Path(out)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"))
    tokenizer.model.save(str(out))  # vocab.json and merges.txt, for readers that want those
    (out / "chat_template.jinja").write_text(_CHAT_TEMPLATE, encoding="utf-8")
    _write_json(out / "tokenizer_config.json", _tokenizer_config(ids))
    _write_json(out / "preprocessor_config.json", _preprocessor_config())
    _write_json(
        out / "generation_config.json",
        {
            "do_sample": True,
            "temperature": 1.0,
            "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]],
            "pad_token_id": ids["<|endoftext|>"],
        },
    )
    return TokenIds(
        vocab_size=VOCAB_SIZE,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        eos_token_id=ids["<|im_end|>"],
        pad_token_id=ids["<|endoftext|>"],
    )


def _corpus() -> Iterator[str]:
    """Lines as prompts and answers have them: frame labels, objects with boxes and times, plain sentences."""
    for index, (color, shape) in enumerate(itertools.product(world.COLORS, world.SHAPES)):
        name = f"{color} {shape}"
        yield f"Frame {index % 16 + 1} at {index / 2:.1f}s: \n"
        box = f"[{index},{index + 9},{index * 3},{index * 5}]"
        yield f"<think>I see <obj>{name}</obj><box>{box}</box>at<t>{index / 2}</t>s, later there.</think>"
        yield f"<think>It appears at <t>{index / 4}</t>s and is gone at <t>{index / 2}</t>s.</think>\n"
        yield f"<answer>From <t>{index / 4}</t>s to <t>{index / 2}</t>s</answer>"
        yield f"<answer>A {name}</answer><answer>To the left</answer><answer>To the right</answer>"
        yield f"<think>At <t>{index / 2}</t>s I see a {name}: A.</think>"
        yield f"From <t>{index / 4}</t>s to <t>{index / 2}</t>s it moves to the {'left' if index % 2 else 'right'}."
        yield f"Where is the {name}? When is the {name} visible? What color is the {shape}?\nA. {color}\nB. {color}"
        yield f"Which object is shown on the {color} background? Which way does the {shape} move? Nowhere nowhere"
        yield f"{name} {box}, {name} {box}"
        yield f"{color}"
    for sentence in _SENTENCES:
        yield from [sentence] * 8


def _without_glued_tags(model: tokenizers.models.BPE) -> tokenizers.models.BPE:
    """The model without merges over the edge of a tag, such as `>` + `red` or `]` + `</`.

    What stands inside a tag is then written with the tokens that it has elsewhere: else `<obj>red` would hold no word
    that a model knows, and `<box>[` no bracket. The merged tokens stay in the vocabulary, unused.
    """
    with tempfile.TemporaryDirectory() as folder:
        vocab, merges = tokenizers.models.BPE.read_file(*model.save(folder))
    return tokenizers.models.BPE(vocab, [(a, b) for a, b in merges if a[0] != ">" and not b.startswith("<")])


def _tokenizer_config(ids: dict[str, int]) -> dict:
    def added(token: str) -> dict:
        flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
        return {"content": token, **flags, "special": True}

    return {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {str(number): added(token) for token, number in ids.items()},
        "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 131072,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",  # a name that transformers 4 and 5 both have
        "unk_token": None,
    }


def _preprocessor_config() -> dict:
    return {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
        "min_pixels": 4 * 28 * 28,
        "max_pixels": 16384 * 28 * 28,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }


def _write_json(path: pathlib.Path, values: dict) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

"""Random Qwen2.5-VL directories of odd shapes and the `transformers` side of every comparison."""

import json
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from openo3_jax.data import tiny_tokenizer

# name -> (text overrides, vision overrides, tied head). The grids of CASES are never multiples of a window.
SHAPES = {
    "gqa 4:1, one full block": ({}, {}, False),
    "gqa 3:1, two full blocks, tied": (
        {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 2, "mrope_section": [2, 3, 3]},
        {"depth": 4, "fullatt_block_indexes": [1, 3], "hidden_size": 64, "num_heads": 4, "out_hidden_size": 96},
        True,
    ),
    "mha, all blocks full": (
        {"num_key_value_heads": 4, "intermediate_size": 52, "num_hidden_layers": 3},
        {"depth": 2, "fullatt_block_indexes": [0, 1], "intermediate_size": 36},
        False,
    ),
}
EXTRA_IDS = 40  # rows of the embedding that the tokenizer has no token for, as in the published models

# name -> height and width in px of each picture of the conversation
CASES = {
    "text only": [],
    "one image": [(84, 140)],
    "five images": [(56, 84), (56, 56), (140, 56), (112, 112), (84, 196)],
    "sixteen frames": [(56, 84)] * 16,
}


def make_config(shape: str, ids: tiny_tokenizer.TokenIds) -> Qwen2_5_VLConfig:
    text, vision, tied = SHAPES[shape]
    text = {
        "vocab_size": ids.vocab_size + EXTRA_IDS,
        "hidden_size": 64,
        "intermediate_size": 88,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "mrope_section": [4, 2, 2],
        "max_position_embeddings": 4096,
        "bos_token_id": None,
        "eos_token_id": ids.eos_token_id,
        "pad_token_id": ids.pad_token_id,
    } | text
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": text.pop("mrope_section")}
    vision = {
        "depth": 3,
        "hidden_size": 48,
        "intermediate_size": 60,
        "num_heads": 2,
        "out_hidden_size": text["hidden_size"],
        "fullatt_block_indexes": [1],
        "window_size": 112,
        "tokens_per_second": 2,
    } | vision
    return Qwen2_5_VLConfig(
        text_config={**text, "rope_parameters": rope},
        vision_config=vision,
        tie_word_embeddings=tied,
        image_token_id=ids.image_token_id,
        video_token_id=ids.video_token_id,
        vision_start_token_id=ids.vision_start_token_id,
    )


def make_model(config: Qwen2_5_VLConfig, *, seed: int = 0) -> Qwen2_5_VLForConditionalGeneration:
    """Float32, eager attention, weights large enough that an error shows, norms and biases away from 1 and 0."""
    model = Qwen2_5_VLForConditionalGeneration._from_config(config, attn_implementation="eager").float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            scale = 0.2 if weight.ndim == 1 else 1.5 / weight.flatten(1).shape[1] ** 0.5
            noise = torch.randn(weight.shape, generator=generator) * scale
            weight.copy_(noise + ("norm" in name or "ln_q" in name))
    return model


def write_directory(shape: str, out: Path, **save_kwargs) -> Qwen2_5_VLForConditionalGeneration:
    """Tokenizer files and a random model of this shape; returns the model."""
    ids = tiny_tokenizer.write_tokenizer(out)
    settings = (out / "generation_config.json").read_text()
    model = make_model(make_config(shape, ids))
    model.generation_config = transformers.GenerationConfig(**json.loads(settings))
    model.save_pretrained(out, **save_kwargs)
    return model


class TorchvisionFreeProcessor(transformers.Qwen2_5_VLProcessor):
    """transformers' own, without the video processor, which needs torchvision."""

    def check_argument_for_proper_class(self, *_args):
        return None


def load_processor(directory: Path) -> TorchvisionFreeProcessor:
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    return TorchvisionFreeProcessor(
        image_processor=transformers.Qwen2VLImageProcessorPil.from_pretrained(directory),
        tokenizer=tokenizer,
        video_processor=None,
        chat_template=tokenizer.chat_template,
    )


def make_conversation(case: str, *, seed: int = 0) -> list[dict]:
    """One user turn with the case's pictures (random uint8, sides multiples of 28), each with a line of text."""
    draw = np.random.default_rng([seed, len(CASES[case])])
    items = []
    for number, (height, width) in enumerate(CASES[case], start=1):
        pixels = draw.integers(0, 256, (height, width, 3), dtype=np.uint8)
        items += [
            {"type": "text", "text": f"Frame {number} at {number / 2:.1f}s: "},
            {"type": "image", "image": pixels},
            {"type": "text", "text": "\n"},
        ]
    items.append({"type": "text", "text": "Where does the red circle go, and when?"})
    return [{"role": "user", "content": items}]


def encode(processor, conversations: list[list[dict]], *, padding_side: str = "right") -> dict[str, torch.Tensor]:
    """transformers' inputs for a padded batch."""
    texts = [processor.apply_chat_template(c, tokenize=False, add_generation_prompt=True) for c in conversations]
    pictures = [
        Image.fromarray(item["image"])
        for conversation in conversations
        for message in conversation
        for item in message["content"]
        if item["type"] == "image"
    ]
    processor.tokenizer.padding_side = padding_side
    return dict(processor(text=texts, images=pictures or None, padding=True, return_tensors="pt"))


def answer(model, processor, messages: list[dict], *, max_new_tokens: int = 400) -> str:
    """transformers' greedy answer to our prepared messages; pictures go through its own image processor."""
    pictures, rendered = [], []
    for message in messages:
        items = []
        for item in message["content"]:
            if item["type"] == "picture":
                pictures.append(Image.fromarray(item["picture"].pixels[0]))
            items.append({"type": "image"} if item["type"] == "picture" else item)
        rendered.append({"role": message["role"], "content": items})
    text = processor.apply_chat_template(rendered, tokenize=False, add_generation_prompt=True)
    inputs = processor(text=[text], images=pictures, return_tensors="pt", do_resize=False)
    with torch.no_grad():
        tokens = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
    new = tokens[0, inputs["input_ids"].shape[1] :]
    return processor.tokenizer.decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=False)

"""The side of `transformers` and torch: the same weights, the same inputs, none of our code between them.

model = hf_model.load(directory); hf_model.inputs([sample], processor)
"""

import pathlib
from collections.abc import Sequence

import numpy as np
import torch
import transformers

from openo3_jax.data import tokens
from openo3_jax.types import Sample

GROWN = (("attention_mask", 1), ("mm_token_type_ids", 0))  # and what completion tokens have in them


def load(directory: pathlib.Path, *, dtype: str = "float32") -> transformers.PreTrainedModel:
    """Scaled-dot-product attention, evaluation mode; no token ends an answer."""
    transformers.logging.set_verbosity_error()
    model = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(
        directory, dtype=dtype, attn_implementation="sdpa"
    )
    model.generation_config = transformers.GenerationConfig(pad_token_id=0)
    return model.eval()


def inputs(samples: Sequence[Sample], processor: tokens.Processor) -> dict[str, torch.Tensor]:
    """What the model takes for prompts padded on the left; pixels normalised on the host, as its processor does."""
    longest = max(len(sample.tokens) for sample in samples)
    ids = np.full((len(samples), longest), processor.pad_id, np.int64)
    mask = np.zeros_like(ids)
    for row, sample in enumerate(samples):
        ids[row, longest - len(sample.tokens) :] = sample.tokens
        mask[row, longest - len(sample.tokens) :] = 1
    vision = processor.config.vision
    per_channel = vision.patch_dim // vision.in_channels
    mean, std = (np.repeat(np.float32(values), per_channel) for values in (vision.image_mean, vision.image_std))
    pixels = np.concatenate([sample.patches for sample in samples]).astype(np.float32)
    grids = [list(grid) for sample in samples for grid in sample.grids]
    return {
        "input_ids": torch.tensor(ids),
        "attention_mask": torch.tensor(mask),
        "mm_token_type_ids": torch.tensor((ids == processor.config.image_token_id).astype(np.int64)),
        "pixel_values": torch.tensor((pixels / 255 - mean) / std),
        "image_grid_thw": torch.tensor(grids),
    }


def repeated(prompt: dict[str, torch.Tensor], whole: torch.Tensor) -> dict[str, torch.Tensor]:
    """The inputs of one prompt for rows of it with a completion each `[group, tokens]`: its pictures once for each."""
    group, length = whole.shape
    new = length - prompt["input_ids"].shape[1]
    grown = {
        name: torch.nn.functional.pad(prompt[name], (0, new), value=value).expand(group, -1) for name, value in GROWN
    }
    pictures = {name: prompt[name].repeat(group, 1) for name in ("pixel_values", "image_grid_thw")}
    return {"input_ids": whole, **grown, **pictures}

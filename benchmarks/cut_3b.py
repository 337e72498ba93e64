"""Qwen2.5-VL-3B cut to a few layers, with random weights on disk, and samples of given frames and slots for it."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from openo3_jax import tiny
from openo3_jax.config import QWEN2_5_VL, ModelConfig
from openo3_jax.data import packing, tiny_tokenizer, tokens
from openo3_jax.policy import Policy
from openo3_jax.types import Batch, Picture, Sample


class Cut(NamedTuple):
    """How much of the model is left. `divide`: of the widths, for a model that is made in a second."""

    layers: int = 4  # of both towers; the vision tower's last one attends over whole frames
    vocab: int = 16384  # with the published 151,936 torch alone takes 20 GiB for a step of training
    divide: int = 1


QUICK = Cut(layers=2, vocab=1024, divide=16)


def write(directory: pathlib.Path, cut: Cut) -> None:
    """A Hugging Face directory; the same cut gives the same bytes."""
    tiny.write_random(directory, lambda ids: _config(cut, ids), seed=0)


def _config(cut: Cut, ids: tiny_tokenizer.TokenIds) -> ModelConfig:
    whole = QWEN2_5_VL["3b"]
    text, vision = whole.text, whole.vision
    section = (1, 1, 2) if cut.divide > 1 else text.mrope_section
    text = dataclasses.replace(
        text,
        vocab_size=cut.vocab,
        num_hidden_layers=cut.layers,
        hidden_size=text.hidden_size // cut.divide,
        intermediate_size=text.intermediate_size // cut.divide,
        mrope_section=section,
    )
    vision = dataclasses.replace(
        vision,
        depth=cut.layers,
        fullatt_block_indexes=(cut.layers - 1,),
        hidden_size=vision.hidden_size // 5 if cut.divide > 1 else vision.hidden_size,
        intermediate_size=vision.intermediate_size // cut.divide,
        out_hidden_size=text.hidden_size,
    )
    return ModelConfig(
        text=text,
        vision=vision,
        image_token_id=ids.image_token_id,
        video_token_id=ids.video_token_id,
        vision_start_token_id=ids.vision_start_token_id,
    )


def make_batch(policy: Policy, samples: Sequence[Sample]) -> Batch:
    """A row for each, in the shape that the pipeline of training would choose: to the next 128 slots and 64 patches."""
    bucket = packing.bucket_for([[sample] for sample in samples], policy.config.vision, fine=True)
    return policy.batch(samples, bucket)


def make_sample(
    processor: tokens.Processor,
    pictures: Sequence[tuple[int, int]],
    *,
    slots: int | None = None,
    targets: int = 0,
    seed: int = 0,
) -> Sample:
    """Pictures of these heights and widths in px, then text: up to so many slots, the last of them targets."""
    draw = np.random.default_rng(seed)
    drawn = [Picture(draw.integers(0, 256, (1, *size, 3), dtype=np.uint8)) for size in pictures]
    items = [{"type": "picture", "picture": picture} for picture in drawn]
    text = "What happens here?" + " why" * (0 if slots is None else 2 * slots)
    sample = processor.encode([{"role": "user", "content": [*items, {"type": "text", "text": text}]}])
    slots = len(sample.tokens) if slots is None else slots
    assert slots <= len(sample.tokens) and not sample.is_visual[slots:].any(), (slots, len(sample.tokens))
    return dataclasses.replace(
        sample,
        tokens=sample.tokens[:slots],
        positions=sample.positions[:, :slots],
        loss_mask=np.arange(slots) >= slots - targets,
        is_visual=sample.is_visual[:slots],
    )

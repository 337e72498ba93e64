"""What a step of a recipe is made of: rows, slots, pictures, targets; and how many operations of the model that is."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from openo3_jax.config import GSPOConfig, ModelConfig, SFTConfig
from openo3_jax.data import packing, sampling
from openo3_jax.models import flops
from openo3_jax.plan.config import Sizes
from openo3_jax.train import profiling
from openo3_jax.types import VisionGrid

LINE_TOKENS = 16  # of the text around a frame that tells its time
ASPECT = 16 / 9


class Load(NamedTuple):
    """A step: rows of every program, and the shape that each row has."""

    rows: int  # of an update
    row: packing.Bucket
    prompts: int  # rows of the sampler, 0 in stage one
    prompt: packing.Bucket | None
    grids: tuple[VisionGrid, ...]  # of a sample
    prompt_tokens: int
    padding: float  # rows for each row that is not padding


def grid_of(config: SFTConfig | GSPOConfig, model: ModelConfig, num_frames: int) -> VisionGrid:
    """One of `num_frames` frames of 16:9, as large as their cap allows.

    Example: 8 x 16 visual tokens by default, of at most 134. Frames of 480x640 px have 130; smaller ones, which are
    scaled up past the cap, may have more than are planned: 140 those of 240x320 px.
    """
    tokens = sampling.most_pixels(num_frames, config.video) // model.vision.merged_px**2
    height = max(1, math.isqrt(int(tokens / ASPECT)))
    merge = model.vision.spatial_merge_size
    return VisionGrid(1, merge * height, merge * (tokens // height))


def make_load(config: SFTConfig | GSPOConfig, model: ModelConfig, sizes: Sizes, ways: int) -> Load:
    """A step over `ways` devices that share the rows.

    Rows of stage one are as long as they may be, with as many samples as fit; of stage two a prompt and its group.
    """
    frames = sizes.num_frames(config.video)
    grids = (grid_of(config, model, frames),) * frames if frames else ()
    visual = sum(grid.num_patches for grid in grids) // model.vision.merge_unit
    prompt = visual + frames * LINE_TOKENS + sizes.text_tokens
    if isinstance(config, SFTConfig):
        sample = packing.Size(prompt + sizes.answer_tokens, sizes.answer_tokens, grids)
        in_row = max(1, config.max_row_tokens // sample.tokens)
        rest = max(0, config.max_row_tokens - in_row * sample.tokens)
        row = _bucket([*[sample] * in_row, packing.Size(rest, 0, ())], model)
        filled = -(-config.batch_size // in_row)
        rows = _round(filled, ways)
        return Load(rows, row, 0, None, grids, prompt, rows / filled)
    new = config.sampling.num_samples * config.sampling.max_new_tokens
    row = _bucket([packing.Size(prompt + new - config.sampling.num_samples, new, grids)], model)
    rows = _round(config.batch_size // config.minibatches, ways)
    asked = _bucket([packing.Size(prompt, 0, grids)], model)
    padding = rows * config.minibatches / config.batch_size
    return Load(rows, row, _round(config.batch_size, ways), asked, grids, prompt, padding)


def _bucket(row: Sequence[packing.Size], model: ModelConfig) -> packing.Bucket:
    return packing.bucket_for([row], model.vision, fine=True)


def _round(number: int, ways: int) -> int:
    return -(-number // ways) * ways


class Work(NamedTuple):
    """Operations of a step over all devices. `model`: of all of it, without what is computed twice."""

    prefill: int
    decode: int
    update: int  # with what is computed twice
    model: int


def work(config: SFTConfig | GSPOConfig, model: ModelConfig, sizes: Sizes, load: Load) -> Work:
    """Of the samples in a step; rows of padding are not counted. Exact but for norms and the like (models/flops.py)."""
    if isinstance(config, SFTConfig):
        tokens = load.prompt_tokens + sizes.answer_tokens
        total = profiling.sft_flops(
            model, [(tokens, sizes.answer_tokens, load.grids)] * config.batch_size, lora=config.lora
        )
        twice = flops.again_flops(model, load.grids, prompt=tokens, targets=sizes.answer_tokens, remat=config.remat)
        return Work(0, 0, total + config.batch_size * twice, total)
    new = [config.sampling.max_new_tokens] * config.sampling.num_samples
    scored = (config.kl_coef > 0) + (config.old_logp == "recompute")
    group = (load.prompt_tokens, new, load.grids)
    total = config.batch_size * profiling.gspo_flops(model, [group], scored=scored, lora=config.lora)
    of_group = {"prompt": load.prompt_tokens, "completions": new, "targets": sum(new)}
    forward = flops.forward_flops(model, load.grids, **of_group)
    twice = flops.again_flops(model, load.grids, **of_group, remat=config.remat)
    prefill = flops.forward_flops(model, load.grids, prompt=load.prompt_tokens, targets=1)
    pairs = flops.causal_pairs(load.prompt_tokens, new) - flops.causal_pairs(load.prompt_tokens)
    decode = flops.text_flops(model.text, tokens=sum(new), pairs=pairs, targets=sum(new))
    update = total + config.batch_size * (twice - forward)
    return Work(config.batch_size * prefill, config.batch_size * decode, update, total)

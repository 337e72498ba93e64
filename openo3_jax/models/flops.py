"""Floating-point operations of a forward pass, counted from sizes: a multiply-add is two.

Compilers do not serve here: they count the body of a loop once, or say nothing. Norms, rotations, softmax and
embedding look-ups are left out: they are below 1 % at every published size.
"""

import dataclasses
from collections.abc import Iterable

from openo3_jax.config import LoRAConfig, ModelConfig, Remat, TextConfig, VisionConfig
from openo3_jax.types import VisionGrid


def text_flops(config: TextConfig, *, tokens: int, pairs: int, targets: int) -> int:
    """The decoder over `tokens` of all rows; `pairs` of a query and a key it sees; logits at `targets`."""
    dim, head_dim = config.hidden_size, config.head_dim
    queries, keys = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    weights = 2 * dim * queries + 2 * dim * keys + 3 * dim * config.intermediate_size
    per_layer = 2 * tokens * weights + 4 * pairs * queries
    return config.num_hidden_layers * per_layer + 2 * targets * dim * config.vocab_size


def causal_pairs(prompt: int, completions: Iterable[int] = ()) -> int:
    """Pairs of a prompt with completions that see it and themselves; shared or not, their own part is the same."""
    own = sum(length * prompt + length * (length + 1) // 2 for length in completions)
    return prompt * (prompt + 1) // 2 + own


def vision_flops(config: VisionConfig, grids: Iterable[VisionGrid]) -> int:
    """The tower over pictures: windows in most layers, whole frames in the listed ones."""
    dim, side = config.hidden_size, config.window_size // config.patch_size
    num_full = len(config.fullatt_block_indexes)
    total = 0
    for grid in grids:
        patches, frame = grid.num_patches, grid.height * grid.width
        rows, columns = _cuts(grid.height, side), _cuts(grid.width, side)
        in_windows = grid.frames * sum((r * c) ** 2 for r in rows for c in columns)
        pairs = num_full * grid.frames * frame**2 + (config.depth - num_full) * in_windows
        weights = config.depth * (4 * dim * dim + 3 * dim * config.intermediate_size) + config.patch_dim * dim
        wide = dim * config.merge_unit
        merger = patches // config.merge_unit * (wide * wide + wide * config.out_hidden_size)
        total += 2 * patches * weights + 4 * pairs * dim + 2 * merger
    return total


def _cuts(size: int, side: int) -> list[int]:
    """Lengths of the windows along one side of a frame."""
    return [side] * (size // side) + [size % side] * (size % side > 0)


def forward_flops(
    config: ModelConfig, grids: Iterable[VisionGrid], *, prompt: int, completions: Iterable[int] = (), targets: int
) -> int:
    """One prompt with its pictures and the completions that share it, through both towers."""
    return sum(_towers(config, grids, prompt, completions, targets))


def backward_flops(
    config: ModelConfig,
    grids: Iterable[VisionGrid],
    *,
    prompt: int,
    completions: Iterable[int] = (),
    targets: int,
    lora: LoRAConfig | None = None,
) -> int:
    """Of the same, for the gradients of inputs and weights; nothing is computed twice.

    With adapters the frozen weights need none, and a tower without adapters none at all. The adapters' own are left
    out: below 2 % at rank 64.
    """
    text, vision = _towers(config, grids, prompt, completions, targets)
    if lora is None:
        return 2 * (text + vision)
    return text + (vision if lora.vision else 0)


def again_flops(
    config: ModelConfig,
    grids: Iterable[VisionGrid],
    *,
    prompt: int,
    completions: Iterable[int] = (),
    targets: int,
    remat: Remat,
) -> int:
    """Of the forward pass what the backward pass computes again, see `config.Remat`.

    The head's products always are (train/losses.py). "attention" saves that of the decoder; with "dots" what is left
    are the projections of the decoder's attention, and all but the MLP of the vision tower's blocks.
    """
    lengths = list(completions)
    if remat == "none":
        return text_flops(config.text, tokens=0, pairs=0, targets=targets)
    if remat == "dots":
        text = dataclasses.replace(config.text, intermediate_size=0)
        vision = dataclasses.replace(config.vision, intermediate_size=0)
        around = dataclasses.replace(config.vision, depth=0, fullatt_block_indexes=())  # patch embedding and merger
        grids = list(grids)
        decoder = text_flops(text, tokens=prompt + sum(lengths), pairs=0, targets=targets)
        return decoder + vision_flops(vision, grids) - vision_flops(around, grids)
    saved = causal_pairs(prompt, lengths) if remat == "attention" else 0
    return sum(_towers(config, grids, prompt, lengths, targets)) - text_flops(
        config.text, tokens=0, pairs=saved, targets=0
    )


def _towers(
    config: ModelConfig, grids: Iterable[VisionGrid], prompt: int, completions: Iterable[int], targets: int
) -> tuple[int, int]:
    """Forward, of the decoder and of the vision tower."""
    lengths = list(completions)
    pairs = causal_pairs(prompt, lengths)
    text = text_flops(config.text, tokens=prompt + sum(lengths), pairs=pairs, targets=targets)
    return text, vision_flops(config.vision, grids)

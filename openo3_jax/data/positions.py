"""Tokens and grids -> 3-D M-RoPE position ids (time, row, column)."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int, Int32

from openo3_jax import config as config_lib
from openo3_jax import types
from openo3_jax.errors import InputError


def mrope_positions(
    tokens: Int[np.ndarray, " seq"],
    grids: Sequence[types.VisionGrid],
    seconds_per_grid: Sequence[float | None],
    config: config_lib.ModelConfig,
) -> Int32[np.ndarray, "3 seq"]:
    """Position ids of one conversation. Text counts up by one on all three axes.

    Token (t, row, column) of a picture that starts at position p has ids p + time, p + row, p + column, with rows
    and columns in merged tokens and time = floor(t * seconds_per_grid * tokens_per_second); without seconds
    (stills) time = t. Text after it goes on at the largest id on any axis + 1.

    Example: text, text, a still of 4x6 patches (2x3 tokens), text: times 0 1 2 2 2 2 2 2 5, rows 0 1 2 2 2 3 3 3 5,
    columns 0 1 2 3 4 2 3 4 5.

    Raises: InputError when the placeholders in `tokens` do not match the grids.
    Source: arXiv 2502.13923 section 2.1.3; for stills equal to transformers `get_rope_index`. For video
    transformers 4.57 cuts the seconds to whole numbers and 5.23 restarts text below the video's last time id;
    this is the rule the model was trained with.
    """
    merge = config.vision.spatial_merge_size
    is_visual = (tokens == config.image_token_id) | (tokens == config.video_token_id)
    spans, text_start, position = [], 0, 0
    for index, (grid, seconds) in enumerate(zip(grids, seconds_per_grid, strict=True)):
        times, rows, columns = np.indices((grid.frames, grid.height // merge, grid.width // merge))
        if seconds is not None:
            times = np.floor(times * seconds * config.vision.tokens_per_second).astype(np.int64)
        start = text_start + int(np.argmax(is_visual[text_start:])) if text_start < len(tokens) else text_start
        stop = start + times.size
        if stop > len(tokens) or not is_visual[start:stop].all():
            raise InputError(
                f"picture {index}: its grid {tuple(grid)} needs {times.size} visual tokens in a row from token "
                f"{start}; the conversation has fewer there"
            )
        spans.append(position + np.tile(np.arange(start - text_start), (3, 1)))
        position += start - text_start
        spans.append(position + np.stack([times, rows, columns]).reshape(3, -1))
        position = int(spans[-1].max()) + 1
        text_start = stop
    if is_visual[text_start:].any():
        raise InputError(
            f"{int(is_visual[text_start:].sum())} visual tokens are left after {len(grids)} pictures; "
            "tokens and grids must come from the same conversation"
        )
    spans.append(position + np.tile(np.arange(len(tokens) - text_start), (3, 1)))
    return np.concatenate(spans, axis=1).astype(np.int32)

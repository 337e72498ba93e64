"""uint8 pixels -> normalised patches in the order of transformers' `Qwen2VLImageProcessor`."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, UInt8

from openo3_jax import types
from openo3_jax.errors import InputError


def grid_of(
    pixels: UInt8[np.ndarray, "frames height width 3"],
    *,
    patch_size: int = 14,
    temporal_patch_size: int = 2,
    merge_size: int = 2,
) -> types.VisionGrid:
    """The grid of patches that `to_patches` cuts.

    Raises: InputError when a side is not a multiple of patch_size * merge_size px.
    """
    frames, height, width, _ = pixels.shape
    unit_px = patch_size * merge_size
    if 0 in pixels.shape or height % unit_px or width % unit_px:
        raise InputError(
            f"picture of {frames} x {height}x{width} px (frames x height x width): sides must be multiples of "
            f"{unit_px} px; resize it with smart_resize"
        )
    return types.VisionGrid(-(-frames // temporal_patch_size), height // patch_size, width // patch_size)


def to_patches(
    pixels: UInt8[np.ndarray, "frames height width 3"],
    *,
    mean: Sequence[float],
    std: Sequence[float],
    patch_size: int = 14,
    temporal_patch_size: int = 2,
    merge_size: int = 2,
    out: Float[np.ndarray, "patches patch_dim"] | None = None,
) -> tuple[Float[np.ndarray, "patches patch_dim"], types.VisionGrid]:
    """(pixels / 255 - mean) / std per channel, in float32, cut into patches; and their grid.

    The last frame is repeated until the frames fill whole temporal patches. Patches run over time, then over
    units of merge_size x merge_size patches row by row, then over the patches of a unit; the values of a patch
    run over channel, frame, row, column. They are written into `out`, if given.

    Raises: InputError when a side is not a multiple of patch_size * merge_size px.
    Source: transformers 5.23 models/qwen2_vl/image_processing_pil_qwen2_vl.py (`patchify`).
    """
    frames, height, width, _ = pixels.shape
    unit_px = patch_size * merge_size
    grid = grid_of(pixels, patch_size=patch_size, temporal_patch_size=temporal_patch_size, merge_size=merge_size)
    # Cut as bytes, a quarter of the memory; then one float per value a byte can have: bit-equal to the arithmetic.
    split = pixels.reshape(
        frames, height // unit_px, merge_size, patch_size, width // unit_px, merge_size, patch_size, 3
    ).transpose(0, 1, 4, 2, 5, 7, 3, 6)
    cut = np.ascontiguousarray(split).reshape(frames, -1, 3, patch_size**2)
    values = (np.arange(256) * (1 / 255)).astype(np.float32)
    table = (values - np.float32(mean)[:, None]) / np.float32(std)[:, None]
    if out is None:
        out = np.empty((grid.num_patches, 3 * temporal_patch_size * patch_size**2), np.float32)
    patches = out.reshape(grid.frames, cut.shape[1], 3, temporal_patch_size, patch_size**2)
    for channel in range(3):
        floats = np.take(table[channel], cut[:, :, channel], mode="clip")
        for place in range(temporal_patch_size):
            shown = floats[place::temporal_patch_size]
            patches[: len(shown), :, channel, place] = shown
            patches[len(shown) :, :, channel, place] = floats[-1]
    return out, grid

"""Arrays that cross a package border. `data` makes them on the host, `models` and `train` read them under `jit`.

Every array of a `Batch` has a static shape: what varies between samples (grids, lengths, windows) arrives as index
arrays, with -1 where there is nothing, so that one compiled program serves all batches of a bucket.
"""

import dataclasses
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

# Arrays, and what jax puts in their place while it traces or lowers a program.
Array = jax.Array | np.ndarray | jax.ShapeDtypeStruct | jax.stages.ArgInfo


class VisionGrid(NamedTuple):
    """Size of one picture or native video in patches of 14 px: `frames` counts temporal patches (1 for a picture)."""

    frames: int
    height: int
    width: int

    @property
    def num_patches(self) -> int:
        return self.frames * self.height * self.width


class RowShare(NamedTuple):
    """Which of `parts` equal parts of a batch's rows lie on this process's devices.

    `owned`: those of them that it answers for; where devices of several processes hold the same rows, one does.
    """

    parts: int = 1
    held: tuple[int, ...] = (0,)
    owned: tuple[int, ...] = (0,)

    def part(self, row: int, num_rows: int) -> int:
        """The part that a row is in, of `num_rows` and so many more that the parts are equal."""
        return row // -(-num_rows // self.parts)

    def rows(self, num_rows: int) -> list[int]:
        """The rows that this process holds, in the order of its parts.

        Example: `RowShare(4, (0, 2), (0, 2)).rows(8) == [0, 1, 4, 5]`
        """
        assert num_rows % self.parts == 0, (num_rows, self.parts)
        size = num_rows // self.parts
        return [part * size + row for part in self.held for row in range(size)]


@dataclasses.dataclass(frozen=True)
class Picture:
    """Pixels ready to be cut into patches: sides are multiples of 28 px, values 0..255.

    A picture (or one frame of a clip) has one frame; native video has an even number of them and carries the
    seconds between its temporal patches (two frames each).
    """

    pixels: UInt8[np.ndarray, "frames height width 3"]
    seconds_per_grid: float | None = None  # None: a still picture


@dataclasses.dataclass(frozen=True)
class Sample:
    """One conversation, tokenised, on the host. Visual tokens stand in `tokens` as runs of the placeholder id.

    `positions`: 3-D M-RoPE ids (time, row, column). `loss_mask`: True where the assistant wrote the token.
    `patches`: pixels as bytes in the order of `transformers` (merge units of 2x2 patches are contiguous); the model
    normalises them.
    """

    tokens: Int[np.ndarray, " seq"]
    positions: Int[np.ndarray, "3 seq"]
    loss_mask: Bool[np.ndarray, " seq"]
    is_visual: Bool[np.ndarray, " seq"]
    patches: UInt8[np.ndarray, "patches patch_dim"]
    grids: tuple[VisionGrid, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class VisionBatch:
    """The pictures of each row, one after the other in `patches`, and where attention finds them.

    `window_patches[r, w]` lists the patches of window w, `window_slots[r, p]` says where patch p sits in the
    flattened `[windows * window_size]`; likewise for frames, whose arrays are flattened one after the other. Both
    directions are given so that forward and backward are gathers. -1 is padding everywhere.
    """

    patches: UInt8[Array, "rows patches patch_dim"]
    patch_hw: Int[Array, "rows patches 2"]  # row and column of the patch within its frame, for 2-D RoPE
    window_patches: Int[Array, "rows windows window_size"]
    window_slots: Int[Array, "rows patches"]
    frame_patches: tuple[Int[Array, "rows _frames _frame_size"], ...]  # one array per size of frame
    frame_slots: Int[Array, "rows patches"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows of tokens ready for a jitted step.

    `segments`: 0 is padding, samples packed into a row count from 1; attention never crosses them.
    `branches`: 0 is seen by its whole segment, k > 0 only by branch k (completions that share a prompt).
    `visual_tokens`: which merged visual token of the row fills this slot, -1 for text; `visual_slots` its inverse.
    `target_slots`, `targets`: the loss predicts token `targets[r, j]` from the hidden state at slot
    `target_slots[r, j]`; -1 is padding. Nothing else ever meets the vocabulary.
    """

    tokens: Int[Array, "rows seq"]
    positions: Int[Array, "rows 3 seq"]
    segments: Int[Array, "rows seq"]
    branches: Int[Array, "rows seq"]
    visual_tokens: Int[Array, "rows seq"]
    visual_slots: Int[Array, "rows visual"]
    target_slots: Int[Array, "rows num_targets"]
    targets: Int[Array, "rows num_targets"]
    vision: VisionBatch


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rollouts:
    """Prompts with their groups of completions, scored, ready for an update of stage two.

    Row r of `batch` holds prompt r and all of its completions, each on its own branch; its targets are their tokens.
    `completion[r, j]`: to which completion target j belongs, -1 is padding. `sampled_logp`, `old_logp`: nats, by the
    sampler, and by the policy that the ratio is taken against. `keep`: False for what the loss leaves out.
    """

    batch: Batch
    completion: Int[Array, "rows num_targets"]
    sampled_logp: Float[Array, "rows num_targets"]
    old_logp: Float[Array, "rows num_targets"]
    advantage: Float[Array, "rows group"]
    keep: Bool[Array, "rows group"]

"""What a plan is told besides the recipe: how long samples are, what shares of the peaks are reached, what it costs."""

import dataclasses

from openo3_jax.config import VideoConfig
from openo3_jax.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """A sample of the data: every one of a step is taken to be this long."""

    frames: int | None = None  # None: the most that the recipe shows, video.max_frames
    text_tokens: int = 256  # the question, with everything but the frames
    answer_tokens: int = 512  # of stage one; stage two has the limit of its sampling

    def __post_init__(self):
        if (self.frames or 0) < 0 or self.text_tokens < 1 or self.answer_tokens < 1:
            raise InputError(
                f"plan: frames={self.frames}, text_tokens={self.text_tokens}, answer_tokens={self.answer_tokens}; "
                "expected frames >= 0 and the others >= 1"
            )

    def num_frames(self, video: VideoConfig) -> int:
        """Of a sample, in a recipe with these settings."""
        return video.max_frames if self.frames is None else self.frames


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rates:
    """What makes a time of operations and bytes."""

    compute_efficiency: float = 0.4  # share of the peak that arithmetic is expected to reach
    bandwidth_efficiency: float = 0.6  # the same of memory and links
    price: float | None = None  # of a device for an hour

    def __post_init__(self):
        shares = (self.compute_efficiency, self.bandwidth_efficiency)
        if any(not 0 < share <= 1 for share in shares) or (self.price is not None and self.price < 0):
            raise InputError(f"plan: efficiencies {shares}, price {self.price}; expected shares in (0, 1], price >= 0")

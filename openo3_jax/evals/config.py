"""How an evaluation is run: the flags of `openo3 eval`. Imports nothing heavy."""

import dataclasses
from typing import Literal

from openo3_jax.errors import InputError

BoxesIn = Literal["source", "released"]
Vote = Literal["majority", "confidence", "released"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """What is None is the benchmark's own."""

    batch_size: int = 8  # calls answered together, over all devices
    seed: int = 0
    temperature: float = 0.0  # 0 is greedy; voting over several samples wants 1.0
    max_new_tokens: int | None = None
    repetition_penalty: float | None = None  # 1 is none
    num_samples: int = 1  # per question; they share its prefix and vote
    # votes weigh alike, or by how far the evidence cited helps: mean over its objects (paper), one look (released)
    vote: Vote = "majority"
    boxes: BoxesIn = "source"  # boxes said are taken to px of the clip itself, or left in px of the frames shown
    limit: int | None = None  # the first so many items only
    max_frames: int | None = None
    min_pixels: int | None = None  # of a frame
    max_pixels: int | None = None  # of a frame
    video_mode: Literal["frames", "native"] | None = None  # frames with their times in text, or native video
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the weights; the reference's is bfloat16
    evidence: bool = False  # ask again with the cited evidence hidden, and with as large a region elsewhere

    def __post_init__(self):
        if self.batch_size < 1 or self.num_samples < 1 or (self.limit is not None and self.limit < 1):
            raise InputError(
                f"eval: batch_size={self.batch_size}, num_samples={self.num_samples} and limit={self.limit} must be at "
                "least 1"
            )
        if self.num_samples > 1 and self.temperature == 0:
            raise InputError(
                f"eval: num_samples={self.num_samples} at temperature 0 are all the same; give --temperature 1.0"
            )
        if self.vote != "majority" and self.num_samples == 1:
            raise InputError(
                f"eval: --vote {self.vote} weighs several samples; got num_samples=1; give --num-samples 8 "
                "--temperature 1.0"
            )
        if self.evidence and (self.num_samples > 1 or self.temperature > 0):
            raise InputError(
                f"eval: --evidence compares greedy answers; got num_samples={self.num_samples}, temperature="
                f"{self.temperature:g}"
            )

"""Frozen settings with units and validation: what the model is (`model.py`) and what a run does (`settings.py`)."""

from openo3_jax.config.model import QWEN2_5_VL, ModelConfig, TextConfig, VisionConfig
from openo3_jax.config.settings import (
    TEXT_TARGETS,
    VISION_TARGETS,
    AdvantageConfig,
    GSPOConfig,
    HostsConfig,
    LoRAConfig,
    OptimizerConfig,
    Remat,
    RunConfig,
    SamplingConfig,
    SFTConfig,
    VideoConfig,
)

__all__ = [
    "QWEN2_5_VL",
    "TEXT_TARGETS",
    "VISION_TARGETS",
    "AdvantageConfig",
    "GSPOConfig",
    "HostsConfig",
    "LoRAConfig",
    "ModelConfig",
    "OptimizerConfig",
    "Remat",
    "RunConfig",
    "SFTConfig",
    "SamplingConfig",
    "TextConfig",
    "VideoConfig",
    "VisionConfig",
]

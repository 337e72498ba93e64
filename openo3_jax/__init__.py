"""Open-o3 Video in JAX: train a vision-language model to answer questions about a video with evidence.

The names below are those of `openo3_jax.api`, imported on first use: `import openo3_jax` loads neither jax nor
transformers.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from openo3_jax.api import (
        Generations,
        Policy,
        Rewards,
        Rollouts,
        TrainState,
        init_tiny,
        load_pretrained,
        make_gspo_step,
        make_sft_step,
        make_state,
        score,
    )

__all__ = [
    "Generations",
    "Policy",
    "Rewards",
    "Rollouts",
    "TrainState",
    "init_tiny",
    "load_pretrained",
    "make_gspo_step",
    "make_sft_step",
    "make_state",
    "score",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module("openo3_jax.api"), name)
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("openo3-jax")
    raise AttributeError(f"module 'openo3_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

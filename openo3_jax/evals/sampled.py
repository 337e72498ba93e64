"""The quantity that stage two raises: the reward of sampled answers, on fixed prompts with fixed seeds."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from openo3_jax.config import SamplingConfig
from openo3_jax.data import annotations
from openo3_jax.policy import Policy
from openo3_jax.rewards import score
from openo3_jax.rewards.score import Rewards
from openo3_jax.types import Sample

PROMPTS_AT_ONCE = 16


class SampledRewards(NamedTuple):
    """Completion g of prompt i at `[i, g]`; `highest[i]` is what a perfect answer to prompt i gets."""

    total: Float[np.ndarray, "prompts group"]
    highest: Float[np.ndarray, " prompts"]
    texts: list[list[str]]
    rewards: Rewards  # flat, prompt by prompt

    @property
    def share(self) -> float:
        """Mean reward as a share of the highest, in [0, 1]."""
        return float(self.total.mean() / self.highest.mean())


def sample_rewards(
    policy: Policy,
    samples: Sequence[Sample],
    records: Sequence[annotations.Record],
    sampling: SamplingConfig,
    *,
    rules: str = "paper",
    seed: int = 0,
    advance: Callable[[int], None] = lambda done: None,
) -> SampledRewards:
    """Sample a group for each prompt and score it as at the end of training; prompt i draws from seed + i.

    `records` carry the sizes that rewards need (`Prepared.reward_record`). A term's maximum is 1 where it applies.
    `advance` is told now and then how many prompts are done.
    """
    group = sampling.num_samples
    texts: list[list[str]] = []
    for start in range(0, len(samples), PROMPTS_AT_ONCE):
        few = samples[start : start + PROMPTS_AT_ONCE]
        texts += policy.continue_samples(few, sampling, [seed + start + i for i in range(len(few))]).texts
        advance(start + len(few))
    repeated = [record for record in records for _ in range(group)]
    rewards = score.score(repeated, [text for row in texts for text in row], rules=rules)
    applies = np.sum(list(rewards.applies.values()), axis=0).reshape(-1, group)
    return SampledRewards(rewards.total.reshape(-1, group), applies.max(axis=1).astype(np.float32), texts, rewards)

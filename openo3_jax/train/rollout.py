"""Prompts -> groups of completions, judged -> arrays for the update: host code around jitted parts."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Shaped

from openo3_jax import mesh as mesh_lib
from openo3_jax.config import GSPOConfig
from openo3_jax.data import groups, packing
from openo3_jax.data.rl_prompts import Prompt
from openo3_jax.errors import InputError
from openo3_jax.policy import Generations, Policy
from openo3_jax.rewards import rubric, score
from openo3_jax.rewards.rubric import Advantages
from openo3_jax.rewards.score import Rewards
from openo3_jax.types import Rollouts

# (records, completions, share of training done) -> one value per completion
Reward = Callable[[Sequence, Sequence[str], float], Rewards]


class Groups(NamedTuple):
    """What a step sampled: completion g of prompt i at `[i][g]`, rewards flat in that order."""

    prompts: list[Prompt]
    generations: Generations
    rewards: Rewards
    advantages: Advantages


class GrowingBucket:
    """The union of all buckets asked for: shapes only grow, so that few programs are compiled."""

    def __init__(self):
        self._bucket: packing.Bucket | None = None

    def __call__(self, need: packing.Bucket) -> packing.Bucket:
        self._bucket = need if self._bucket is None else packing.union(self._bucket, need)
        return self._bucket

    def to_json(self) -> dict[str, Any] | None:
        """What a checkpoint keeps: None before the first bucket."""
        return None if self._bucket is None else dataclasses.asdict(self._bucket)

    @classmethod
    def from_json(cls, values: Mapping[str, Any] | None) -> "GrowingBucket":
        growing = cls()
        if values is not None:
            frames = {int(size): count for size, count in values["frames"].items()}
            growing._bucket = packing.Bucket(**{**values, "frames": frames})
        return growing


def prompt_seeds(seed: int, step: int, number: int) -> list[int]:
    """A sampling seed for each prompt of a step, the same whatever was sampled before."""
    return [int(np.random.default_rng([seed, step, place]).integers(2**31)) for place in range(number)]


def rubric_reward(rules: str) -> Reward:
    """The rewards of this package under a rule set."""
    return lambda records, completions, progress: score.score(records, completions, progress=progress, rules=rules)


def own_reward(function: Callable[[Sequence, Sequence[str]], Sequence[float]]) -> Reward:
    """A function of records and completions that gives one number each, as a reward without terms.

    Raises (when called): InputError for another number of values.
    """

    def reward(records: Sequence, completions: Sequence[str], progress: float) -> Rewards:
        del progress
        total = np.asarray(function(records, completions), np.float32)
        if total.shape != (len(records),):
            raise InputError(
                f"reward: gave shape {total.shape} for {len(records)} completions; expected one number each"
            )
        return Rewards(terms={}, applies={}, total=total)

    return reward


def judge(
    prompts: Sequence[Prompt], out: Generations, config: GSPOConfig, reward: Reward, progress: float
) -> tuple[Rewards, Advantages]:
    """Score every completion and compare it with its group, as `config.cut` says of those that the limit cut.

    Raises: InputError for a reward that is not finite, naming the record and the completion.
    """
    group = config.sampling.num_samples
    records = [prompt.record for prompt in prompts for _ in range(group)]
    texts = [text for row in out.texts for text in row]
    rewards = reward(records, texts, progress)
    for place in np.flatnonzero(~np.isfinite(rewards.total))[:1]:
        index = prompts[place // group].index
        raise InputError(
            f"reward: {rewards.total[place]} for record {index}, completion {texts[place]!r:.80}; expected a finite "
            "number; give 0 where nothing can be said"
        )
    total = np.asarray(rewards.total, np.float32).reshape(len(prompts), group)
    finished = np.array(out.finished)
    if config.cut == "zero":
        total = np.where(finished, total, np.float32(0))
    valid = finished if config.cut == "drop" else np.ones_like(finished)
    advantages = rubric.advantages(total, config.advantages, valid)
    return rewards, Advantages(*map(np.asarray, advantages))


def make_rollouts(policy: Policy, sampled: Groups, rows: slice, config: GSPOConfig, bucket: GrowingBucket) -> Rollouts:
    """The groups of some prompts as arrays on the devices, one row for each; `old_logp` is the sampler's.

    Rows are those of a full minibatch: what is missing is padding.
    """
    samples = [prompt.sample for prompt in sampled.prompts[rows]]
    tokens = sampled.generations.tokens[rows]
    num_rows = policy.round_rows(config.batch_size // config.minibatches)
    shape = bucket(groups.group_bucket(samples, tokens, policy.config.vision, num_rows=num_rows))
    batch, completion = groups.make_group_batch(samples, tokens, shape, policy.config, pad_id=policy.processor.pad_id)
    logp = groups.spread(sampled.generations.logp[rows], completion.shape)

    def pad(values: Shaped[np.ndarray, "prompts group"]) -> Shaped[np.ndarray, "rows group"]:
        return np.pad(values, ((0, num_rows - len(values)), (0, 0)))

    rollouts = Rollouts(
        batch=batch,
        completion=completion,
        sampled_logp=logp,
        old_logp=logp,
        advantage=pad(sampled.advantages.advantage[rows]),
        keep=pad(sampled.advantages.keep[rows]),
    )
    return mesh_lib.shard_rows(rollouts, policy.mesh)


def summarize(sampled: Groups) -> dict[str, float]:
    """Means for the log: reward by term and task, length, cuts, and groups in which there is nothing to compare.

    `all_wrong`: share of groups without a reward above 1, `all_right`: of those without one below 2.
    Source: src/r1-v/src/open_r1/trainer/grpo_trainer.py:710-738.
    """
    rewards, finished = sampled.rewards, np.array(sampled.generations.finished)
    total = np.asarray(rewards.total).reshape(finished.shape)
    lengths = [len(tokens) for group in sampled.generations.tokens for tokens in group]
    task = np.array([prompt.record["task"] for prompt in sampled.prompts for _ in range(finished.shape[1])])
    values = {
        "reward/total": float(total.mean()),
        "reward/group_std": float(sampled.advantages.std.mean()),
        "gspo/length": float(np.mean(lengths)),
        "gspo/cut": float(1 - finished.mean()),
        "gspo/kept": float(sampled.advantages.keep.mean()),
        "gspo/all_wrong": float((total.max(1) <= 1).mean()),
        "gspo/all_right": float((total.min(1) >= 2).mean()),
        "gspo/all_equal": float((total.max(1) == total.min(1)).mean()),
    }
    for name in np.unique(task):
        of_task = task == name
        slug = str(name).replace(" ", "_")
        values[f"reward/total/{slug}"] = float(rewards.total[of_task].mean())
        for term, scores in rewards.terms.items():
            counted = of_task & rewards.applies[term]
            if counted.any():
                values[f"reward/{term}/{slug}"] = float(scores[counted].mean())
    return values

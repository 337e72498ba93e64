"""Prompts -> groups of completions, judged -> arrays for the update: host code around jitted parts."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Shaped

from openo3_jax import hosts
from openo3_jax import mesh as mesh_lib
from openo3_jax.config import GSPOConfig
from openo3_jax.data import groups, packing
from openo3_jax.data.rl_prompts import Prompt
from openo3_jax.errors import InputError
from openo3_jax.policy import Generations, Policy
from openo3_jax.rewards import rubric, score
from openo3_jax.rewards.own import Reward
from openo3_jax.rewards.rubric import Advantages
from openo3_jax.rewards.rules import get_rules
from openo3_jax.rewards.score import Rewards
from openo3_jax.types import Rollouts


class Groups(NamedTuple):
    """What a step sampled: completion g of prompt i at `[i][g]`, rewards flat in that order.

    A prompt that could not be used is None; its completions are empty, its rewards 0, and nothing of it is kept.
    """

    prompts: list[Prompt | None]
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
    """A sampling seed for each place of a step, the same whatever was sampled before."""
    return [int(np.random.default_rng([seed, step, place]).integers(2**31)) for place in range(number)]


def rubric_reward(rules: str) -> Reward:
    """The rewards of this package under a rule set. Raises: InputError for rules that there are not."""
    found = get_rules(rules)
    return lambda records, completions, progress: score.score(records, completions, progress=progress, rules=found)


def judge(
    prompts: Sequence[Prompt | None], out: Generations, config: GSPOConfig, reward: Reward, progress: float
) -> tuple[Rewards, Advantages]:
    """Score every completion and compare it with its group, as `config.cut` says of those that the limit cut.

    Each process scores the completions of its own prompts; all of them get all rewards.
    Raises: InputError for a reward that is not finite, naming the record and the completion.
    """
    group = config.sampling.num_samples
    own = [place for place, prompt in enumerate(prompts) if prompt is not None and prompt.is_own]
    _, parts = hosts.together(lambda: _score(prompts, own, out, reward, progress), lambda scored: scored)
    rewards = _join(parts, len(prompts), group)
    total = rewards.total.reshape(len(prompts), group)
    finished = np.array(out.finished)
    if config.cut == "zero":
        total = np.where(finished, total, np.float32(0))
    is_there = np.array([prompt is not None for prompt in prompts])
    valid = finished & is_there[:, None] if config.cut == "drop" else np.broadcast_to(is_there[:, None], finished.shape)
    advantages = rubric.advantages(total, config.advantages, valid)
    return rewards, Advantages(*map(np.asarray, advantages))


def _score(
    prompts: Sequence[Prompt | None], own: list[int], out: Generations, reward: Reward, progress: float
) -> dict[str, Any]:
    """The rewards of the prompts in the places `own`, as JSON has them."""
    records = [prompts[place].record for place in own for _ in out.texts[place]]
    texts = [text for place in own for text in out.texts[place]]
    if not own:
        return {"places": [], "total": [], "terms": {}, "applies": {}}
    rewards = reward(records, texts, progress)
    for number in np.flatnonzero(~np.isfinite(rewards.total))[:1]:
        index = prompts[own[number // len(out.texts[0])]].index
        raise InputError(
            f"reward: {rewards.total[number]} for record {index}, completion {texts[number]!r:.80}; expected a finite "
            "number; give 0 where nothing can be said"
        )
    terms = {name: np.asarray(values, np.float32).tolist() for name, values in rewards.terms.items()}
    applies = {name: np.asarray(values).tolist() for name, values in rewards.applies.items()}
    return {
        "places": own,
        "total": np.asarray(rewards.total, np.float32).tolist(),
        "terms": terms,
        "applies": applies,
    }


def _join(parts: Sequence[Mapping[str, Any]], num_prompts: int, group: int) -> Rewards:
    """What the processes have scored, each its own prompts; 0 for a prompt that no one has."""
    names = dict.fromkeys(name for part in parts for name in part["terms"])

    def fill(read: Callable[[Mapping[str, Any]], Sequence], dtype: type) -> np.ndarray:
        values = np.zeros((num_prompts, group), dtype)
        for part in parts:
            if part["places"]:
                values[part["places"]] = np.asarray(read(part), dtype).reshape(-1, group)
        return values.reshape(-1)

    return Rewards(
        terms={name: fill(lambda part, name=name: part["terms"][name], np.float32) for name in names},
        applies={name: fill(lambda part, name=name: part["applies"][name], bool) for name in names},
        total=fill(lambda part: part["total"], np.float32),
    )


def make_rollouts(policy: Policy, sampled: Groups, rows: slice, config: GSPOConfig, bucket: GrowingBucket) -> Rollouts:
    """The groups of some prompts as arrays on the devices, one row for each; `old_logp` is the sampler's.

    Rows are those of a full minibatch: what is missing is padding. Of several processes each makes those it holds.
    """
    prompts, tokens, logps = sampled.prompts[rows], sampled.generations.tokens[rows], sampled.generations.logp[rows]
    num_rows = policy.round_rows(config.batch_size // config.minibatches)
    there = [(prompt.room, group) for prompt, group in zip(prompts, tokens, strict=True) if prompt is not None]
    shape = bucket(groups.group_bucket(*zip(*there, strict=True), policy.config.vision, num_rows=num_rows))
    own = mesh_lib.row_share(policy.mesh).rows(num_rows)

    def mine(values: Sequence[Any], missing: Any) -> list[Any]:
        """The values of the rows that this process holds."""
        return [values[row] if row < len(values) else missing for row in own]

    samples = mine([None if prompt is None else prompt.sample for prompt in prompts], None)
    batch, completion = groups.make_group_batch(
        samples,
        mine(tokens, []),
        dataclasses.replace(shape, rows=len(own)),
        policy.config,
        pad_id=policy.processor.pad_id,
    )
    logp = groups.spread(mine(logps, []), completion.shape)

    def pad(values: Shaped[np.ndarray, "prompts group"]) -> Shaped[np.ndarray, "rows group"]:
        return np.pad(values, ((0, num_rows - len(values)), (0, 0)))[own]

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
    rewards, there = sampled.rewards, [place for place, prompt in enumerate(sampled.prompts) if prompt is not None]
    finished = np.array(sampled.generations.finished)
    group = finished.shape[1]
    total = np.asarray(rewards.total).reshape(finished.shape)[there]
    lengths = [len(tokens) for place in there for tokens in sampled.generations.tokens[place]]
    tasks = [None if prompt is None else prompt.record["task"] for prompt in sampled.prompts for _ in range(group)]
    task = np.array(tasks, object)
    values = {
        "reward/total": float(total.mean()),
        "reward/group_std": float(sampled.advantages.std[there].mean()),
        "gspo/length": float(np.mean(lengths)),
        "gspo/cut": float(1 - finished[there].mean()),
        "gspo/kept": float(sampled.advantages.keep[there].mean()),
        "gspo/all_wrong": float((total.max(1) <= 1).mean()),
        "gspo/all_right": float((total.min(1) >= 2).mean()),
        "gspo/all_equal": float((total.max(1) == total.min(1)).mean()),
    }
    for name in sorted({name for name in tasks if name is not None}):
        of_task = task == name
        slug = str(name).replace(" ", "_")
        values[f"reward/total/{slug}"] = float(rewards.total[of_task].mean())
        for term, scores in rewards.terms.items():
            counted = of_task & rewards.applies[term]
            if counted.any():
                values[f"reward/{term}/{slug}"] = float(scores[counted].mean())
    return values

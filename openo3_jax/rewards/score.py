"""Records and completions in, rewards out: parse once, score each bucket under `jit`."""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float

from openo3_jax.rewards import parse, rubric
from openo3_jax.rewards.arrays import Bucket
from openo3_jax.rewards.rules import TERMS, RewardRules, get_rules
from openo3_jax.rewards.truth import SizeFinder


@dataclasses.dataclass(frozen=True)
class Rewards:
    """One value per completion and term, by term name; 0 where a term does not apply, never nan."""

    terms: dict[str, Float[np.ndarray, " rollouts"]]
    applies: dict[str, Bool[np.ndarray, " rollouts"]]
    total: Float[np.ndarray, " rollouts"]


def score(
    records: Sequence[Any],
    completions: Sequence[Any],
    *,
    progress: parse.Progress = 1.0,
    rules: str | RewardRules = "paper",
    sizes: SizeFinder | None = None,
) -> Rewards:
    """Score every completion against its STGR-RL record; tasks may be mixed, order does not matter.

    `progress` in [0, 1] is the share of training done, one number or one per completion. `rules` is "paper",
    "released", "hardened" or a `RewardRules`. `sizes(record)` gives the picture sizes a record lacks.
    A malformed completion scores 0 where it is malformed; a term whose ground truth is malformed does not apply.

    Raises: InputError for a record with a missing field or a wrong type, with its index and the field.
    """
    with parse.no_collection():
        return score_parsed(parse.parse(records, completions, progress, sizes), get_rules(rules))


def score_parsed(parsed: parse.Parsed, rules: RewardRules) -> Rewards:
    """Score what is parsed already, for instance under several rules."""
    return score_buckets(parsed.buckets(), len(parsed.golds), rules)


def score_buckets(buckets: Sequence[Bucket], num_rows: int, rules: RewardRules) -> Rewards:
    """The numeric part: one jitted call per bucket, in float64, out as float32."""
    terms = np.zeros((num_rows, len(TERMS)), np.float32)
    applies = np.zeros((num_rows, len(TERMS)), bool)
    total = np.zeros(num_rows, np.float32)
    with double_precision():
        scored = [rubric.score_rows(bucket.rows, rules.numbers()) for bucket in buckets]
    for bucket, scores in zip(buckets, scored, strict=True):
        real = len(bucket.places)
        terms[bucket.places] = np.asarray(scores.terms)[:real]
        applies[bucket.places] = np.asarray(scores.applies)[:real]
        total[bucket.places] = np.asarray(scores.total)[:real]
    return Rewards(
        {term: terms[:, column].copy() for column, term in enumerate(TERMS)},
        {term: applies[:, column].copy() for column, term in enumerate(TERMS)},
        total,
    )


@contextlib.contextmanager
def double_precision() -> Iterator[None]:
    """Compute in float64 and on the host's own backend: a gate at 1.0 s needs it, and TPUs have no fast float64.

    Where jax was started without its CPU backend (`JAX_PLATFORMS=cuda`), the default device does it.
    """
    try:
        host = jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        host = None
    with jax.enable_x64(True), jax.default_device(host):
        yield

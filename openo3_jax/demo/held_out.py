"""Held-out clips: what a policy says about them, sampled and greedily, scored and kept in a file."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from openo3_jax.config import SamplingConfig, VideoConfig
from openo3_jax.data import annotations, prompts, transforms
from openo3_jax.evals import metrics, records, sampled, store
from openo3_jax.policy import Policy
from openo3_jax.train import metrics as progress
from openo3_jax.types import Sample

SEED = 7  # of the sampled answers


class Questions(NamedTuple):
    """The stage-two questions of a data root, as rewards take them, and their tokens."""

    records: list[annotations.Record]
    samples: list[Sample]


class Held(NamedTuple):
    """What a policy earned on each question: mean reward and `records.COLUMNS` of its samples, and both greedily."""

    reward: Float[np.ndarray, "questions 1"]
    drawn: Float[np.ndarray, "questions 4"]
    greedy: Float[np.ndarray, " questions"]
    columns: Float[np.ndarray, "questions 4"]
    texts: list[str]  # the greedy answers

    def values(self, chosen: np.ndarray | slice = slice(None)) -> dict[str, float]:
        """The table's row, over all questions or those chosen; `nan` where nothing of the kind is asked."""
        named = dict(zip(records.COLUMNS, metrics.column_means(self.columns[chosen]).tolist(), strict=True))
        means = metrics.column_means(records.means(self.columns[chosen]))
        own = {"mam": float(metrics.mam(means)), "mlgm": float(metrics.mlgm(means))}
        return named | own | {"reward": float(self.reward[chosen].mean()), "greedy": float(self.greedy[chosen].mean())}

    @property
    def drawn_mlgm(self) -> float:
        """mLGM of the samples, over all questions."""
        return float(metrics.mlgm(metrics.column_means(records.means(self.drawn))))


def load(root: Path, policy: Policy, video: VideoConfig, prompts_file: Path) -> Questions:
    """All stage-two questions of `root`, tokenised as in training."""
    found = annotations.load_stage(root, "rl")
    wording = prompts.load_prompts(prompts_file)
    prepared = transforms.prepare_all(found, root, "rl", config=video, wording=wording)
    return Questions(
        [one.reward_record for one in prepared], [policy.processor.encode(one.messages) for one in prepared]
    )


def measure(policy: Policy, asked: Questions, sampling: SamplingConfig, rules: str, file: Path) -> Held:
    """Answer everything twice: by `sampling` with fixed seeds, and greedily. `file` keeps it; if it is there, read."""
    if file.exists():
        kept = store.read_json(file)
        drawn, columns = (np.array(kept[name], np.float64) for name in ("drawn", "columns"))
        return Held(np.array(kept["reward"]), drawn, np.array(kept["greedy"]), columns, kept["texts"])
    number = len(asked.samples)
    draw = functools.partial(sampled.sample_rewards, policy, asked.samples, asked.records, rules=rules, seed=SEED)
    with progress.Progress(f"questions to {file.stem}, sampled and greedily", 2 * number) as bar:
        rewards = draw(sampling, advance=lambda done: bar.update(done, ""))
        once = dataclasses.replace(sampling, num_samples=1, temperature=0.0)
        greedy = draw(once, advance=lambda done: bar.update(number + done, ""))
    nth_samples = zip(*rewards.texts, strict=True)
    every = [records.judge(asked.records, texts) for texts in nth_samples]
    texts = [row[0] for row in greedy.texts]
    held = Held(
        reward=rewards.total.mean(1, keepdims=True),
        drawn=np.mean(every, axis=0),
        greedy=greedy.total[:, 0],
        columns=records.judge(asked.records, texts),
        texts=texts,
    )
    kept = {"reward": held.reward.tolist(), "drawn": _with_null(held.drawn)}
    kept |= {"greedy": held.greedy.tolist(), "columns": _with_null(held.columns), "texts": texts}
    file.parent.mkdir(exist_ok=True)
    store.replace_text(file, json.dumps(kept) + "\n")
    return held


def _with_null(columns: Float[np.ndarray, "rows columns"]) -> list[list[float | None]]:
    return [[None if np.isnan(value) else float(value) for value in row] for row in columns]


def gain(before: Held, after: Held) -> metrics.Interval:
    """Of the sampled reward, question by question."""
    return metrics.paired_bootstrap(before.reward, after.reward, lambda means: means[..., 0])


def by_objects(asked: Questions) -> dict[int, np.ndarray]:
    """Number of objects in the clip -> which questions are about such clips."""
    numbers = np.array([record["num_objects"] for record in asked.records])
    return {int(number): numbers == number for number in sorted(set(numbers.tolist()))}


def constants(asked: Questions, chosen: np.ndarray | slice) -> dict[str, float]:
    """tIoU and vIoU of the span and the box that suit the chosen questions best: what could be had without looking."""
    records_of = np.array(asked.records, dtype=object)[chosen].tolist()
    return {"tiou": records.constant_span(records_of), "viou": records.constant_box(records_of)}

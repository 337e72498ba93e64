"""The benchmarks by name: where their items come from, what the model is shown, what is measured."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from openo3_jax.config import VideoConfig
from openo3_jax.errors import InputError
from openo3_jax.evals import choice, files, grounding, items, judge, own, published, scores, vstar, wording
from openo3_jax.evals.config import BoxesIn

Said = Mapping[items.Key, items.Prediction]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Context:
    """What scoring needs beside the predictions: verdicts and weights of samples by item, and what boxes are in."""

    verdicts: Mapping[str, judge.Verdict] = dataclasses.field(default_factory=dict)
    weights: Mapping[str, Sequence[float]] | None = None
    boxes_in: BoxesIn = "source"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Benchmark:
    """`load` reads the data root. `video` and `video_mode`: what a clip becomes. `votes`: several samples may vote."""

    name: str
    load: Callable[[Path, wording.Wording], files.Loaded]
    score: Callable[[Sequence[items.Item], Said, Context], scores.Scores]
    measures: tuple[scores.Measure, ...]
    group_measures: tuple[scores.Measure, ...]
    video: VideoConfig
    video_mode: Literal["frames", "native"]
    max_new_tokens: int
    repetition_penalty: float = 1.05  # the reference's (eval/models/model_vllm.py)
    questions: Callable[[items.Item, Said], judge.Question | None] = lambda item, said: None
    votes: bool = False

    def published(self, measure: str) -> dict[str, float]:
        """Model -> the paper's number for a measure ("accuracy") or a row of a table by group ("duration: long")."""
        if self.name == "vstar":
            rows = {name: row._asdict() for name, row in published.VSTAR.items()}
            return {name: row[measure] for name, row in rows.items() if measure in row}
        return dict(published.GENERAL.get(self.name, {}).get(measure, {}))


# Frames of V-STaR: 1 a second up to 16, evenly spread where the clip is longer, at the pixels of training. The
# reference shows them at up to 12.8 million px each (test_vstar_multi_images.py:90-130): --max-pixels.
_VSTAR_VIDEO = VideoConfig(fps=1.0)
# The three sets of options: 64 frames of at most 262,144 px as native video (eval/config, model_vllm.py:39-90).
_GENERAL_VIDEO = VideoConfig(max_frames=64, max_pixels=262_144)


def _vstar_question(item: items.Item, said: Said) -> judge.Question | None:
    prediction = said.get((item.id, vstar.WHAT))
    return None if prediction is None or prediction.error is not None else vstar.question_of(item.truth, prediction)


def _choice(name: str, load: Callable[[Path, wording.Wording], files.Loaded]) -> Benchmark:
    return Benchmark(
        name=name,
        load=load,
        score=lambda asked, said, context: choice.score(asked, said, context.weights),
        measures=choice.MEASURES,
        group_measures=choice.MEASURES[:1],
        video=_GENERAL_VIDEO,
        video_mode="native",
        max_new_tokens=8192,
        votes=True,
    )


_ALL = (
    Benchmark(
        name="vstar",
        load=vstar.load,
        score=lambda asked, said, context: vstar.score(asked, said, context.verdicts, boxes_in=context.boxes_in),
        measures=vstar.MEASURES,
        group_measures=vstar.GROUP_MEASURES,
        video=_VSTAR_VIDEO,
        video_mode="frames",
        max_new_tokens=2048,
        questions=_vstar_question,
    ),
    _choice("videomme", choice.load_videomme),
    _choice("worldsense", choice.load_worldsense),
    _choice("videommmu", choice.load_videommmu),
    Benchmark(
        name="tvgbench",
        load=grounding.load_tvgbench,
        score=lambda asked, said, context: grounding.score(asked, said),
        measures=grounding.MEASURES,
        group_measures=grounding.MEASURES,
        video=_GENERAL_VIDEO,
        video_mode="frames",
        max_new_tokens=2048,
    ),
    _choice("longvideo_reason", choice.load_longvideo_reason),
    Benchmark(
        name="jsonl",
        load=own.load,
        score=lambda asked, said, context: own.score(asked, said, context.verdicts, boxes_in=context.boxes_in),
        measures=own.MEASURES,
        group_measures=own.MEASURES,
        video=VideoConfig(),
        video_mode="frames",
        max_new_tokens=2048,
        questions=own.question_of,
    ),
)
BENCHMARKS: Mapping[str, Benchmark] = {benchmark.name: benchmark for benchmark in _ALL}


def of(name: str) -> Benchmark:
    """The benchmark of that name. Raises InputError with the known names."""
    if name not in BENCHMARKS:
        raise InputError(f"unknown benchmark {name!r}; expected one of {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name]

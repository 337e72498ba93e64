"""How cost grows: a step's time and memory, decoding, rewards, reading, each against one size; a table and a picture.

    python benchmarks/growth.py [--quick] [--json FILE] [--out docs/figures/growth.png]

A decoder of 256 x 4 layers and a tower of 128 x 2 layers, float32; memory is what the compiled step holds beyond its
arguments. The last column is the exponent between the two largest sizes: 1 is linear.
"""

import dataclasses
import functools
import math
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import gspo
import jax
import numpy as np
import random_model
import results

import rewards
from openo3_jax.config import SamplingConfig, SFTConfig, VideoConfig
from openo3_jax.data import annotations, pipeline, prompts, synthetic
from openo3_jax.models import generate
from openo3_jax.policy import Policy
from openo3_jax.rewards import score
from openo3_jax.train import state as state_lib
from openo3_jax.train import steps

MODEL = random_model.Size(256, 4, 128, 2, 4, (112, 112), 512, 4, 32)
FRAME_TOKENS = 24  # of a picture of 112 x 112 px with what stands around it, about
GIB = 2**30
ROUNDS = 3


class Point(NamedTuple):
    size: int
    seconds: float
    temporary_bytes: int | None = None


class Sweep(NamedTuple):
    """One size, and what is measured at each of its values."""

    title: str
    axis: str
    sizes: Sequence[int]
    measure: Callable[[int], Point]
    power: int = 1  # of the size, that the time would go with if it were linear; -1 for what works beside each other


def main() -> int:
    parser = results.make_parser(__doc__)
    parser.add_argument("--out", type=pathlib.Path, help="where the picture goes; none without it")
    args = parser.parse_args()
    rows, drawn = [], []
    with tempfile.TemporaryDirectory() as directory:
        place = pathlib.Path(directory)
        policy = random_model.make_policy(place, MODEL)
        for sweep in make_sweeps(policy, place):
            points = [sweep.measure(size) for size in (sweep.sizes[:2] if args.quick else sweep.sizes)]
            drawn.append((sweep, points))
            rows += [row_of(sweep, point, points[i - 1] if i else None) for i, point in enumerate(points)]
            print(f"{sweep.title}: " + ", ".join(f"{p.size}: {p.seconds:.3g} s" for p in points), flush=True)
    if args.out is not None:
        draw(drawn, args.out)
    return results.finish(rows, args)


def row_of(sweep: Sweep, point: Point, before: Point | None) -> results.Row:
    row = results.compare(sweep.title, f"{point.size} {sweep.axis}", ours=point.seconds, theirs=None, unit="s")
    notes = [] if point.temporary_bytes is None else [f"{point.temporary_bytes / GIB:.3f} GiB"]
    if before is not None:
        notes.append(f"time grows as n^{exponent(before, point):.2f}")
    return dataclasses.replace(row, note=", ".join(notes))


def exponent(before: Point, point: Point) -> float:
    return math.log(point.seconds / before.seconds) / math.log(point.size / before.size)


def make_sweeps(policy: Policy, place: pathlib.Path) -> list[Sweep]:
    of_step, decoding = functools.partial(sft_step, policy), Decoding(policy)
    return [
        Sweep("SFT step, sequence", "tokens", (512, 1024, 2048, 4096), lambda n: of_step(n, tokens=n)),
        Sweep("SFT step, frames", "frames", (4, 8, 16, 32), lambda n: of_step(n, frames=n, tokens=FRAME_TOKENS * n)),
        Sweep("SFT step, batch", "rows", (1, 2, 4, 8), lambda n: of_step(n, rows=n)),
        Sweep("GSPO update, group", "completions", (2, 4, 8, 16), functools.partial(gspo_update, policy)),
        Sweep("decoding a token, context", "tokens", (512, 1024, 2048, 4096), decoding),
        Sweep("rewards, batch", "completions", (256, 512, 1024, 2048), score_rewards),
        Sweep("reading a batch, workers", "workers", (1, 2, 4), Reading(policy, place / "data"), power=-1),
    ]


def fastest(call: Callable[[], Any], rounds: int = ROUNDS) -> float:
    """Seconds of the fastest of several calls, after one that is not counted."""
    found = []
    for _ in range(1 + rounds):
        started_s = time.perf_counter()
        jax.block_until_ready(call())
        found.append(time.perf_counter() - started_s)
    return min(found[1:])


def step_point(size: int, step: Any, state: Any, batch: Any) -> Point:
    """A train step compiled once, run several times."""
    compiled, kept = step.lower(state, batch).compile(), [state]

    def call() -> Any:
        kept[0], measured = compiled(kept[0], batch)
        return measured

    return Point(size, fastest(call), compiled.memory_analysis().temp_size_in_bytes)


def sft_step(policy: Policy, n: int, *, rows: int = 1, frames: int = 4, tokens: int = 512) -> Point:
    """`n`: what of these is changed."""
    size = MODEL._replace(frames=frames, prompt=tokens)
    samples = [random_model.make_prompt(policy.processor, size, row, "because " * 16) for row in range(rows)]
    config = SFTConfig(steps=8, batch_size=rows, compute_dtype="float32")
    return step_point(n, steps.make_sft_step(config), state_lib.make_state(policy, config), policy.batch(samples))


def gspo_update(policy: Policy, group: int) -> Point:
    size = MODEL._replace(group=group)
    config = gspo.make_config(size)
    prompt = random_model.make_prompt(policy.processor, size)
    new = np.random.default_rng(0).integers(0, 256, (1, group, size.new_tokens))
    side = gspo.Side([prompt], group)
    rollouts = gspo.make_rollouts(policy, side, new, np.full(new.shape, -6.0), group)
    return step_point(group, steps.make_gspo_step(config), state_lib.make_state(policy, config), rollouts)


class Decoding:
    """A step of decoding 4 samples behind a prompt of some length."""

    def __init__(self, policy: Policy, new_tokens: int = 64):
        self.policy, self.asked = policy, SamplingConfig(num_samples=4, max_new_tokens=new_tokens)
        self.prefill = jax.jit(generate.prefill, static_argnums=0)
        self.decode = jax.jit(generate.decode, static_argnames="config")

    def __call__(self, tokens: int) -> Point:
        policy = self.policy
        prompt = random_model.make_prompt(policy.processor, MODEL._replace(prompt=tokens))
        prompts = self.prefill(policy.graphdef, policy.params, *policy.prompt_batch([prompt]))
        keys = jax.random.split(jax.random.key(0), (1, self.asked.num_samples))
        none = np.zeros(policy.config.text.vocab_size, bool)

        def call(limit: int) -> Any:
            layout = policy.sampling_layout
            return self.decode(layout, prompts, keys, none, none, np.int32(limit), config=self.asked)

        limit = self.asked.max_new_tokens
        return Point(tokens, (fastest(lambda: call(limit)) - fastest(lambda: call(1))) / (limit - 1))


def score_rewards(count: int) -> Point:
    made = rewards.make_rollouts(count, group=4)
    return Point(count, fastest(lambda: score.score(made.records, made.texts, progress=made.progress).total))


class Reading:
    """A batch of 8 clips from mp4 to packed rows, read ahead by some processes."""

    def __init__(self, policy: Policy, root: pathlib.Path, clips: int = 48):
        self.policy, self.root = policy, root
        synthetic.write_dataset(root, num_train=clips, seed=0)
        self.records = annotations.load_stage(root, "sft")

    def __call__(self, workers: int) -> Point:
        processor = self.policy.processor
        config = SFTConfig(steps=6, batch_size=8, workers=workers, video=VideoConfig(min_frames=8, max_frames=8))
        with pipeline.Samples(self.records, self.root, "sft", processor, config, prompts.load_prompts()) as samples:
            batches = pipeline.SFTBatches(samples, processor, config, rows_multiple=1)
            batches(0)
            started_s = time.perf_counter()
            for step in range(1, config.steps):
                batches(step)
            return Point(workers, (time.perf_counter() - started_s) / (config.steps - 1))


def draw(drawn: Sequence[tuple[Sweep, list[Point]]], out: pathlib.Path) -> None:
    """A panel for each sweep, both axes logarithmic, with the line that linear growth from the first point would be."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 6.5), layout="constrained")
    panels = figure.subplots(2, 4).flat
    for (sweep, points), panel in zip(drawn, panels, strict=False):
        sizes, seconds = [p.size for p in points], [p.seconds for p in points]
        panel.loglog(sizes, seconds, "o-", color="#1f5fa8", label="seconds")
        linear = [seconds[0] * (size / sizes[0]) ** sweep.power for size in sizes]
        panel.loglog(sizes, linear, ":", color="#888888", label="linear")
        if points[0].temporary_bytes is not None:
            held = [p.temporary_bytes / GIB for p in points]
            panel.loglog(sizes, held, "s--", color="#c0562f", label="temporaries, GiB")
        panel.set_title(sweep.title, fontsize=10)
        panel.set_xlabel(sweep.axis, fontsize=9)
        panel.set_xticks(sizes, [str(size) for size in sizes])
        panel.minorticks_off()
        panel.legend(fontsize=8)
    for panel in list(panels):
        panel.axis("off")
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    sys.exit(main())

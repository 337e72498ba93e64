"""Make the demo's tiny base again: a model from random weights, taught on rendered stills to name and to box shapes.

    python scripts/train_tiny_base.py OUT [--seed 0]

Two lessons: first to see; then to see whatever is said around the pictures, on which of several, and to repeat words.
Each writes OUT/NAME, a Hugging Face directory with bfloat16 weights, and in it log.jsonl: a line for every 400 steps
with the loss and what the model sees, then one with the seed, the settings and the hash of the weights. A lesson that
is there is not taught again. Then tokens that were never shown get rows like the others, in OUT/base: what the package
carries in openo3_jax/demo/tiny_base, with the logs of both lessons. An hour and a half on two cores.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=2")  # faster than one device of two threads

import jax

from openo3_jax import mesh as mesh_lib
from openo3_jax import policy as policy_lib
from openo3_jax import tiny, types
from openo3_jax.data import tokens
from openo3_jax.demo import base, stills
from openo3_jax.train import ahead, steps
from openo3_jax.train import state as state_lib

MEASURE_EVERY = 400
EASY_SHARE = 0.25  # of the first lesson, with one object only
MEASURED = {"": {}, "_with_words": {"words": 8}, "_of_several": {"pictures": 6}}
SHOWN_STEPS = 100  # of the second lesson; a token that none of these shows is a stranger


class Part(NamedTuple):
    name: str
    steps: int
    rows: int  # of 256 tokens, in an update
    learning_rate: float


PARTS = (Part("see", 1800, 32, 6e-3), Part("read", 4000, 16, 5e-3))
PICTURES = (2, 4, 7)  # of a row of the second lesson with labels, in its three thirds
SETTINGS = {"lessons": [part._asdict() for part in PARTS], "pictures": PICTURES, "shown_steps": SHOWN_STEPS}


def lesson(part: Part, step: int) -> stills.Lesson:
    if part.name == "see":
        return stills.Lesson((1, 1 if step < EASY_SHARE * part.steps else 3))
    if step % 4 == 0:
        return stills.Lesson((1, 3), words=8)
    return stills.Lesson((1, 3), pictures=PICTURES[3 * step // part.steps], words=3)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    start = args.out / "random"
    if not start.exists():
        tiny.write_random(start, base.make_config, seed=args.seed)
    for part in PARTS:
        if not (args.out / part.name).exists():
            teach(part, start, args.out / part.name, args.seed)
        start = args.out / part.name
    policy = policy_lib.load_pretrained(start)
    shown = (make_batch(policy.processor, PARTS[-1], step, args.seed) for step in range(SHOWN_STEPS))
    logs = {part.name: (args.out / part.name / "log.jsonl").read_text() for part in PARTS}
    log = [{"lesson": name, **json.loads(line)} for name, text in logs.items() for line in text.splitlines()]
    _write(args.out / "base", base.renew_strangers(policy, shown, args.seed), log, {"seed": args.seed} | SETTINGS)
    return 0


def make_batch(processor: tokens.Processor, part: Part, step: int, seed: int) -> types.Batch:
    now = lesson(part, step)
    rows = part.rows * 256 // max(256, now.row_tokens)
    return stills.make_batch(processor, [seed, step], rows - rows % 2, now)


def teach(part: Part, start: Path, out: Path, seed: int) -> None:
    recipe = base.recipe(part.steps, part.rows, part.learning_rate)
    mesh = mesh_lib.make_mesh({"data": jax.device_count()})
    policy = policy_lib.load_pretrained(start, mesh=mesh)
    state = state_lib.make_state(policy, recipe)
    update = steps.make_sft_step(recipe)

    def make(step: int):
        return mesh_lib.shard_rows(make_batch(policy.processor, part, step, seed), mesh)

    log, started_s, losses = [], time.monotonic(), []
    with ahead.Ahead(make, part.steps) as batches:
        for step in range(part.steps):
            state, metrics = update(state, batches(step))
            losses.append(float(metrics["loss"]))  # waits: steps that queue up can starve each other on the CPU
            done = step + 1
            if done % MEASURE_EVERY == 0 or done == part.steps:
                policy = dataclasses.replace(policy, params=state.params)
                log.append({"step": done, "loss": statistics.mean(losses), **_seen(policy)})
                losses = []
                print(json.dumps(log[-1]), f"{time.monotonic() - started_s:.0f} s", file=sys.stderr, flush=True)
    _write(out, policy, log, {"seed": seed, "recipe": dataclasses.asdict(recipe), "jax": jax.__version__})


def _seen(policy: policy_lib.Policy) -> dict[str, float]:
    found = {}
    for number in (1, 2, 3):
        for kind, how in MEASURED.items():
            sight = base.measure(policy, number, **how)
            found |= {f"box_iou_{number}{kind}": sight.box_iou, f"names_{number}{kind}": sight.names}
    return {name: round(value, 3) for name, value in found.items()}


def _write(out: Path, policy: policy_lib.Policy, log: list[dict], settings: dict) -> None:
    staged = out.with_name(f".{out.name}")
    shutil.rmtree(staged, ignore_errors=True)
    policy.save_pretrained(staged, dtype="bfloat16")
    digest = hashlib.sha256((staged / "model.safetensors").read_bytes()).hexdigest()
    lines = [*log, settings | {"sha256": digest}]
    (staged / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    shutil.rmtree(out, ignore_errors=True)
    staged.rename(out)


if __name__ == "__main__":
    sys.exit(main())

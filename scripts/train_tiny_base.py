"""Make the demo's tiny base again: a model from random weights, taught on rendered stills to name and to box shapes.

    python scripts/train_tiny_base.py OUT [--steps 1800] [--seed 0]

Writes OUT, a Hugging Face directory with bfloat16 weights, and in it log.jsonl: a line for every 100 steps with the
loss and what the model sees, then one with the seed, the settings and the hash of the weights. Half an hour on two
cores. The package carries the result in openo3_jax/demo/tiny_base.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=2")  # faster than one device of two threads

import jax
import jax.numpy as jnp

from openo3_jax import mesh as mesh_lib
from openo3_jax import policy as policy_lib
from openo3_jax import tiny
from openo3_jax.config import SFTConfig
from openo3_jax.demo import base, stills
from openo3_jax.train import ahead, steps
from openo3_jax.train import state as state_lib

MEASURE_EVERY = 100
EASY_SHARE = 0.25  # of the training, with one object only


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=1800)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    recipe = base.recipe(args.steps)
    with tempfile.TemporaryDirectory() as work:
        start = Path(work) / "start"
        tiny.write_random(start, base.make_config, seed=args.seed)
        mesh = mesh_lib.make_mesh({"data": jax.device_count()})
        policy = policy_lib.load_pretrained(start, mesh=mesh)
        state = state_lib.make_state(policy, recipe)
        update = steps.make_sft_step(recipe)

        def make(step: int):
            most = 1 if step < EASY_SHARE * args.steps else 3
            batch = stills.make_batch(policy.processor, [args.seed, step], recipe.batch_size, (1, most))
            return mesh_lib.shard_rows(batch, mesh)

        log, started_s, losses = [], time.monotonic(), []
        with ahead.Ahead(make, args.steps) as batches:
            for step in range(args.steps):
                state, metrics = update(state, batches(step))
                losses.append(metrics["loss"])
                done = step + 1
                if done % MEASURE_EVERY == 0 or done == args.steps:
                    policy = dataclasses.replace(policy, params=state.params)
                    log.append({"step": done, "loss": float(jnp.stack(losses).mean()), **_seen(policy)})
                    losses = []
                    print(json.dumps(log[-1]), f"{time.monotonic() - started_s:.0f} s", file=sys.stderr, flush=True)
                    _write(args.out, policy, log, args.seed, recipe)
    return 0


def _seen(policy: policy_lib.Policy) -> dict[str, float]:
    found = {}
    for number in (1, 2, 3):
        sight = base.measure(policy, number)
        found |= {f"box_iou_{number}": round(sight.box_iou, 3), f"names_{number}": round(sight.names, 3)}
    return found


def _write(out: Path, policy: policy_lib.Policy, log: list[dict], seed: int, recipe: SFTConfig) -> None:
    """The directory as it is now, in the place of that of the last time."""
    shutil.rmtree(out, ignore_errors=True)
    policy.save_pretrained(out, dtype="bfloat16")
    digest = hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()
    last = {"seed": seed, "recipe": dataclasses.asdict(recipe), "jax": jax.__version__, "sha256": digest}
    (out / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*log, last]))


if __name__ == "__main__":
    sys.exit(main())

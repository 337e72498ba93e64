"""One iteration of GSPO, the prompt shared by its group, against the prompt repeated for every sample.

    python benchmarks/gspo.py [--quick] [--json FILE]

Both sides are this package: the same functions, given one row for a group or a row for each sample. A prompt of 2,048
visual and text tokens (16 frames), groups of 8, 256 new tokens; a decoder of 1,024 x 4 layers, a tower of 512 x 4
layers. Exits with 3 where the shared form needs more than 0.35 of the operations or of the time, or where the two
disagree.
"""

import dataclasses
import pathlib
import resource
import sys
import tempfile
from typing import Any, NamedTuple

import compiling
import numpy as np
import random_model
import results

from openo3_jax.config import GSPOConfig, ModelConfig, SamplingConfig
from openo3_jax.data import groups
from openo3_jax.models import flops
from openo3_jax.policy import Policy
from openo3_jax.train import state as state_lib
from openo3_jax.train import steps
from openo3_jax.types import Rollouts, Sample

ROUNDS = 2
MOST = 0.35  # of the repeated form's operations and time


FULL = random_model.FULL._replace(layers=4)
QUICK = random_model.QUICK


class Side(NamedTuple):
    """Rows of prompts, and how many samples each of them has."""

    prompts: list[Sample]
    group: int


def iteration(policy: Policy, state: Any, step: Any, side: Side, config: GSPOConfig) -> tuple[Any, dict[str, float]]:
    """Rollout, then one update with a reference; seconds of each without compilation, and the loss."""
    started = compiling.clock_s()
    sampling = dataclasses.replace(config.sampling, num_samples=side.group)
    now = dataclasses.replace(policy, params=state.params)
    out = now.continue_samples(side.prompts, sampling, list(range(len(side.prompts))))
    sampled = compiling.clock_s()
    rollouts = make_rollouts(policy, side, out.tokens, out.logp, config.sampling.num_samples)
    state, measured = step(state, rollouts)
    loss = float(measured["loss"])
    done = compiling.clock_s()
    return state, {"rollout": sampled - started, "update": done - sampled, "all": done - started, "loss": loss}


def make_rollouts(policy: Policy, side: Side, new: Any, logp: Any, total: int) -> Rollouts:
    """Advantages from -1 to 1 over the whole group, whichever rows it stands in."""
    rows = len(side.prompts)
    bucket = groups.group_bucket(side.prompts, new, policy.config.vision, num_rows=rows)
    batch, completion = groups.make_group_batch(side.prompts, new, bucket, policy.config, pad_id=0)
    values = groups.spread(logp, completion.shape)
    advantage = np.linspace(-1, 1, total, dtype=np.float32).reshape(rows, side.group)
    return Rollouts(batch, completion, values, values, advantage, np.ones_like(advantage, bool))


def operations(config: ModelConfig, prompt: Sample, side: Side, new_tokens: int) -> float:
    """Prefill, decoding, and in the update the policy's forward and backward and the reference's forward."""
    rows, group = len(side.prompts), side.group
    length, targets = len(prompt.tokens), group * new_tokens
    prefill = flops.forward_flops(config, prompt.grids, prompt=length, targets=1)
    pairs = flops.causal_pairs(length, [new_tokens] * group) - flops.causal_pairs(length)
    decode = flops.text_flops(config.text, tokens=targets, pairs=pairs, targets=targets)
    update = flops.forward_flops(config, prompt.grids, prompt=length, completions=[new_tokens] * group, targets=targets)
    return float(rows * (prefill + decode + 4 * update))  # forward, twice that backward, and the reference's forward


def temporary_bytes(step: Any, state: Any, rollouts: Rollouts) -> int:
    """What the compiled update holds beyond its arguments."""
    return step.lower(state, rollouts).compile().memory_analysis().temp_size_in_bytes


def make_config(size: random_model.Size) -> GSPOConfig:
    """One prompt a step, all else as the reference has it, in float32."""
    sampling = SamplingConfig(num_samples=size.group, max_new_tokens=size.new_tokens)
    return GSPOConfig(steps=4, batch_size=1, sampling=sampling, compute_dtype="float32")


def main() -> int:
    args = results.make_parser(__doc__).parse_args()
    compiling.watch()
    size = QUICK if args.quick else FULL
    config = make_config(size)
    step = steps.make_gspo_step(config)
    with tempfile.TemporaryDirectory() as directory:
        policy = random_model.make_policy(pathlib.Path(directory), size)
        prompt = random_model.make_prompt(policy.processor, size)
        sides = {"shared": Side([prompt], size.group), "repeated": Side([prompt] * size.group, 1)}
        print(f"prompt {len(prompt.tokens)} tokens, group {size.group}, {size.new_tokens} new")

        # The same completions through both forms first: the same gradient.
        out = policy.continue_samples([prompt], config.sampling, [0])
        repeated = [[tokens] for tokens in out.tokens[0]], [[logp] for logp in out.logp[0]]
        same = {
            "shared": make_rollouts(policy, sides["shared"], out.tokens, out.logp, size.group),
            "repeated": make_rollouts(policy, sides["repeated"], *repeated, size.group),
        }
        norm, memory, states = {}, {}, {}
        for name in sides:
            state = state_lib.make_state(policy, config)
            memory[name] = temporary_bytes(step, state, same[name])
            states[name], measured = step(state, same[name])
            norm[name] = float(measured["grad_norm"])
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
        for _ in range(1 + ROUNDS):  # in turn, so that a busy moment of the machine meets both
            for name, side in sides.items():
                states[name], seconds = iteration(policy, states[name], step, side, config)
                runs[name].append(seconds)
        # the first round compiles
        fastest = {name: min(found[1:], key=lambda run: run["all"]) for name, found in runs.items()}
        gap = abs(norm["shared"] - norm["repeated"]) / norm["repeated"]
        count = {name: operations(policy.config, prompt, side, size.new_tokens) for name, side in sides.items()}
    print(f"{'':10s} {'TFLOP':>8s} {'rollout s':>10s} {'update s':>10s} {'all s':>8s} {'temporaries GiB':>16s}")
    for name, run in fastest.items():
        print(
            f"{name:10s} {count[name] / 1e12:8.2f} {run['rollout']:10.2f} {run['update']:10.2f} {run['all']:8.2f} "
            f"{memory[name] / 2**30:16.2f}"
        )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"gradient norm {norm['shared']:.6f}, repeated {norm['repeated']:.6f}; peak of the process {peak:.1f} GiB")
    judged = {"most": MOST, "judged": not args.quick}
    work = f"GSPO, {size.group} completions of {size.new_tokens} share {len(prompt.tokens)} tokens"
    teraflop = {name: number / 1e12 for name, number in count.items()}
    seconds = {name: run["all"] for name, run in fastest.items()}
    code = results.finish(
        [
            results.compare(work, "repeated", ours=both["shared"], theirs=both["repeated"], unit=unit, **judged)
            for unit, both in (("TFLOP", teraflop), ("s", seconds))
        ],
        args,
    )
    return code if gap < 1e-3 else 3


if __name__ == "__main__":
    sys.exit(main())

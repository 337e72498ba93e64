"""One iteration of GSPO against the released formulation on torch and transformers, each side in its own process.

    python benchmarks/gspo_released.py [--quick] [--json FILE] [--rounds 1]

A prompt of 2,048 tokens (16 frames), 8 completions of 256, a decoder of 1,024 x 8 layers and a tower of 512 x 4 layers,
float32: sampling, then one update with a reference and AdamW. The released form repeats the prompt with its pictures
for every completion: `generate` (sdpa, a cache, `num_return_sequences=8`), then the policy forward and backward with
gradient checkpointing, and the reference forward, over prompt + completion (grpo_trainer.py:371-706). First the same
short completions through both: log-probabilities within 1e-3 nats, loss and gradient norm within 1e-3 of their size.
"""

import dataclasses
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable

import gspo
import numpy as np
import random_model
import results
import sides

MOST = 0.3  # of their time
CHECKED = 2  # completions that both sides are compared on
CHECKED_TOKENS = 16  # of each
LOGP_GAP = 1e-3  # nats
RELATIVE_GAP = 1e-3


def main() -> int:
    parser = results.make_parser(__doc__)
    sides.add_arguments(parser, ["ours", "theirs"])
    parser.add_argument("--rounds", type=int, default=1)
    args = parser.parse_args()
    size = random_model.QUICK if args.quick else random_model.FULL
    if args.side:
        prepare = {"ours": prepare_ours, "theirs": prepare_theirs}[args.side]
        return sides.serve(lambda: prepare(args.work, size))
    flags = ["--quick"] if args.quick else []
    with tempfile.TemporaryDirectory() as directory:
        work = pathlib.Path(directory)
        with sides.Side(__file__, "ours", work, flags) as ours, sides.Side(__file__, "theirs", work, flags) as theirs:
            found = sides.in_turn({"ours": ours, "theirs": theirs}, args.rounds)
        gaps = differences(work)
    best = {name: min(measured, key=lambda one: one["all_s"]) for name, measured in found.items()}
    row = results.compare(
        f"GSPO iteration, {size.prompt} tokens, {size.group} x {size.new_tokens} new",
        "released form on torch",
        ours=best["ours"]["all_s"],
        theirs=best["theirs"]["all_s"],
        unit="s",
        most=MOST,
        judged=not args.quick,
        compile_s=found["ours"][-1]["compile_s"],
        note=", ".join(f"{name} differs by {gap:.1e}" for name, gap in gaps.items()),
    )
    code = results.finish([row], args)
    for name, measured in found.items():
        phases = (f"{one['rollout_s']:.1f} s sampling, {one['update_s']:.1f} s update" for one in measured)
        print(f"{name}: {'; '.join(phases)}")
    bounds = {"log-probability": LOGP_GAP, "loss": RELATIVE_GAP, "gradient norm": RELATIVE_GAP}
    return code if all(gaps[name] <= bound for name, bound in bounds.items()) else 3


def differences(work: pathlib.Path) -> dict[str, float]:
    """Of what both sides found for the same completions: nats, else shares of theirs."""
    with np.load(work / "ours.npz") as ours, np.load(work / "theirs.npz") as theirs:
        logp = float(np.abs(ours["logp"] - theirs["logp"]).max())
        loss, norm = (float(abs(ours[name] / theirs[name] - 1)) for name in ("loss", "norm"))
        return {"log-probability": logp, "loss": loss, "gradient norm": norm}


def prepare_ours(work: pathlib.Path, size: random_model.Size) -> tuple[dict, Callable]:
    import compiling

    from openo3_jax.train import state as state_lib
    from openo3_jax.train import steps

    compiling.watch()
    policy = random_model.make_policy(work, size)
    policy.save_pretrained(work / "model")
    prompt, config = random_model.make_prompt(policy.processor, size), gspo.make_config(size)
    step = steps.make_gspo_step(config)
    kept = {"state": state_lib.make_state(policy, config)}

    short = dataclasses.replace(config.sampling, num_samples=CHECKED, max_new_tokens=CHECKED_TOKENS)
    out = policy.continue_samples([prompt], short, [0])
    checked = gspo.Side([prompt], CHECKED)
    rollouts = gspo.make_rollouts(policy, checked, out.tokens, out.logp, CHECKED)
    kept["state"], measured = step(kept["state"], rollouts)
    np.savez(
        work / "ours.npz",
        tokens=np.array(out.tokens[0]),
        logp=np.array(out.logp[0]),
        loss=float(measured["loss"]),
        norm=float(measured["grad_norm"]),
    )

    def do_round() -> dict[str, float]:
        kept["state"], seconds = gspo.iteration(policy, kept["state"], step, gspo.Side([prompt], size.group), config)
        times = {f"{phase}_s": took_s for phase, took_s in seconds.items() if phase != "loss"}
        return times | {"compile_s": compiling.seconds()}

    return {}, do_round


def prepare_theirs(work: pathlib.Path, size: random_model.Size) -> tuple[dict, Callable]:
    import hf_gspo
    import hf_model
    import torch

    from openo3_jax.data import tokens

    torch.manual_seed(0)
    processor, model = tokens.load_processor(work / "model"), hf_model.load(work / "model")
    prompt = hf_model.inputs([random_model.make_prompt(processor, size)], processor)
    released = hf_gspo.Iteration(model, prompt, gspo.make_config(size))
    with np.load(work / "ours.npz") as ours:
        completions = torch.tensor(ours["tokens"]).long()
    whole = torch.cat([prompt["input_ids"].expand(len(completions), -1), completions], 1)
    logp, loss, norm = released.update(whole)
    np.savez(work / "theirs.npz", logp=logp.numpy(), loss=loss, norm=norm)

    def do_round() -> dict[str, float]:
        started_s = time.perf_counter()
        whole = released.sample()
        sampled_s = time.perf_counter()
        released.update(whole)
        done_s = time.perf_counter()
        return {"all_s": done_s - started_s, "rollout_s": sampled_s - started_s, "update_s": done_s - sampled_s}

    return {}, do_round


if __name__ == "__main__":
    sys.exit(main())

"""A step of stage one (forward, backward, AdamW) against transformers and torch: time, and memory above the state.

    python benchmarks/training.py [--quick] [--json FILE] [--rounds 2] [--steps 2] [--vocab 16384] [--remat dots]
                                  [--head all]

The widths of Qwen2.5-VL-3B, four layers of each tower (one over whole frames), a vocabulary of 16,384; 16 frames of
224 x 420 px in a row of 2,560 slots of which the last 256 are targets; float32 on the CPU. torch: sdpa, no dropout,
fused AdamW, logits of all slots, as its Trainer has them; `--head targets` gives it those of the targets alone.
Each side is a process of its own, one after the other (both do not fit 24 GiB), `--rounds` times; a process does a step
that is not counted (ours compiles in it), then `--steps` that are. Loss and gradient norm of the first step must agree,
torch's norm of its gradients in float64: its own, which clips, sums millions of float32 with an error of 1e-3. Those of
later steps are told: AdamW's first update is as large where a gradient is rounding as where it is not.

Memory: the highest resident set of the process during the counted steps, less that before the model was read (the
interpreter with its libraries, the sample), less weights and both moments of AdamW. So gradients and activations count.
"""

import argparse
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Mapping

import cut_3b
import numpy as np
import results
import sides

FRAMES, FRAME_HW = 16, (224, 420)
SLOTS, TARGETS = 2560, 256
LEARNING_RATE = 1e-5
# The compiler's default order of operations is for concurrency: it makes room for all gradients before the first layer.
XLA_FLAGS = f"{cut_3b.XLA_FLAGS} --xla_cpu_scheduler_type=CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"
MOST_TIME, MOST_MEMORY = 0.8, 0.7
TOLERANCE = 1e-4  # of losses and gradient norms
GIB = 2**30


def main() -> int:
    parser = results.make_parser(__doc__)
    sides.add_arguments(parser, ["ours", "theirs"])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--vocab", type=int, default=cut_3b.Cut().vocab)
    parser.add_argument("--remat", choices=["none", "layers", "attention", "dots"], default="dots")
    parser.add_argument("--head", choices=["all", "targets"], default="all", help="slots that torch makes logits of")
    args = parser.parse_args()
    if args.side:
        prepare = {"ours": prepare_ours, "theirs": prepare_theirs}[args.side]
        return sides.serve(lambda: prepare(args))
    with tempfile.TemporaryDirectory() as directory:
        work = pathlib.Path(directory)
        cut_3b.write(work / "model", cut_3b.QUICK if args.quick else cut_3b.Cut(vocab=args.vocab))
        found: dict[str, list[dict[str, float]]] = {"ours": [], "theirs": []}
        for _ in range(1 if args.quick else args.rounds):
            for name, runs in found.items():
                runs.append(run(work, name, args))
        gap, in_all = (sides.largest_gap(work, "ours", "theirs", name) for name in ("step 0", ""))
    rows = compare(found, gap, in_all, args)
    return results.finish(rows, args) or (0 if gap < TOLERANCE else 3)


def run(work: pathlib.Path, name: str, args: argparse.Namespace) -> dict[str, float]:
    """The fastest of the counted steps of one process, and its memory."""
    flags = ["--vocab", str(args.vocab), "--remat", args.remat, "--head", args.head]
    flags += ["--quick"] if args.quick else []
    with sides.Side(__file__, name, work, flags, XLA_FLAGS=XLA_FLAGS) as side:
        steps = [side.round() for _ in range(args.steps)]
        return {
            "wall_s": min(step["wall_s"] for step in steps),
            "core_s": min(step["core_s"] for step in steps),
            "memory_gib": max(step["memory_gib"] for step in steps),
            "compile_s": side.ready["compile_s"],
        }


def compare(
    found: Mapping[str, list[dict[str, float]]], gap: float, in_all: float, args: argparse.Namespace
) -> list[results.Row]:
    ours, theirs = ({key: min(one[key] for one in runs) for key in runs[0]} for runs in found.values())
    vocab = "" if args.quick else f", vocabulary {args.vocab:,}"
    head = "logits of all slots" if args.head == "all" else "logits of the targets alone"
    against, judged = f"transformers + torch, {head}", not args.quick
    work = "SFT step, 3B widths, 4 + 4 layers" + vocab
    same = f"loss and gradient norm differ by {gap:.0e}, over all steps by {in_all:.0e}; remat={args.remat}, "
    same += f"XLA_FLAGS={XLA_FLAGS}"
    times = {"ours": ours["wall_s"], "theirs": theirs["wall_s"]}
    cores = {"ours": ours["core_s"], "theirs": theirs["core_s"]}
    memory = {"ours": ours["memory_gib"], "theirs": theirs["memory_gib"]}
    compiled = {"compile_s": ours["compile_s"], "note": same}
    return [
        results.compare(work, against, **times, unit="s", most=MOST_TIME, judged=judged, **compiled),
        results.compare(f"{work}, all cores", against, **cores, unit="s of a core"),
        results.compare(f"{work}, memory", against, **memory, unit="GiB", most=MOST_MEMORY, judged=judged),
    ]


class Memory:
    """GiB of the process above what it held at the start and a model's state."""

    def __init__(self):
        self._base = _status("VmRSS")

    def forget(self) -> None:
        """The highest value begins anew."""
        pathlib.Path("/proc/self/clear_refs").write_text("5")

    def above(self, weight_bytes: int) -> float:
        return (_status("VmHWM") - self._base - 3 * weight_bytes) / GIB


def _status(field: str) -> int:
    """Bytes, of /proc/self/status."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def make_rounds(work: pathlib.Path, name: str, memory: Memory, weight_bytes: int, step: Callable) -> Callable:
    """Rounds of a side: `step` gives loss and gradient norm, which are kept for the comparison."""
    said: list[tuple[float, float]] = []

    def do_round() -> dict[str, float]:
        started, started_core = time.perf_counter(), time.process_time()
        said.append(step())
        seconds = {"wall_s": time.perf_counter() - started, "core_s": time.process_time() - started_core}
        np.savez(work / f"{name}.npz", **{f"step {i}": np.array(pair) for i, pair in enumerate(said)})
        return seconds | {"memory_gib": memory.above(weight_bytes)}

    return do_round


def make_sample(directory: pathlib.Path, *, quick: bool):
    from openo3_jax.data import tokens

    processor = tokens.load_processor(directory)
    pictures = [(56, 84)] * 3 if quick else [FRAME_HW] * FRAMES
    slots, targets = (128, 32) if quick else (SLOTS, TARGETS)
    return processor, cut_3b.make_sample(processor, pictures, slots=slots, targets=targets)


def prepare_ours(args: argparse.Namespace) -> tuple[dict, Callable]:
    import compiling
    import jax
    import jax.numpy as jnp

    from openo3_jax import policy as policy_lib
    from openo3_jax.config import OptimizerConfig, SFTConfig
    from openo3_jax.train import state as state_lib
    from openo3_jax.train import steps

    compiling.watch()
    jax.block_until_ready(jax.jit(jnp.sin)(jnp.ones(8)))
    _, sample = make_sample(args.work / "model", quick=args.quick)
    memory = Memory()
    policy = policy_lib.load_pretrained(args.work / "model", mesh={"fsdp": 1})
    optimizer = OptimizerConfig(learning_rate=LEARNING_RATE, schedule="constant")
    config = SFTConfig(steps=100, compute_dtype="float32", remat=args.remat, optimizer=optimizer)
    batch, state = cut_3b.make_batch(policy, [sample]), state_lib.make_state(policy, config)
    weight_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state.params))
    policy = policy.without_weights()
    update = steps.make_sft_step(config)

    def step() -> tuple[float, float]:
        nonlocal state
        state, measured = update(state, batch)
        jax.block_until_ready(state.params)
        return float(measured["loss"]), float(measured["grad_norm"])

    do_round = make_rounds(args.work, "ours", memory, weight_bytes, step)
    do_round()
    memory.forget()
    return {"compile_s": compiling.seconds()}, do_round


def prepare_theirs(args: argparse.Namespace) -> tuple[dict, Callable]:
    import hf_model
    import torch

    processor, sample = make_sample(args.work / "model", quick=args.quick)
    memory = Memory()
    model = hf_model.load(args.work / "model").train()
    inputs = hf_model.inputs([sample], processor)
    is_target = torch.tensor(sample.loss_mask)[None]
    labels = torch.where(is_target, inputs["input_ids"], -100)
    weights = list(model.parameters())
    optimizer = torch.optim.AdamW(weights, lr=LEARNING_RATE, weight_decay=0.0, fused=True)

    def loss_of() -> torch.Tensor:
        if args.head == "all":
            return model(**inputs, labels=labels, use_cache=False).loss
        hidden = model.model(**inputs, use_cache=False).last_hidden_state[:, :-1][is_target[:, 1:]]
        return torch.nn.functional.cross_entropy(model.lm_head(hidden), labels[is_target])

    def exact_norm() -> float:
        return sum(float(torch.linalg.vector_norm(weight.grad, dtype=torch.float64)) ** 2 for weight in weights) ** 0.5

    def step() -> tuple[float, float]:
        loss = loss_of()
        loss.backward()
        first_norm = None if optimizer.state else exact_norm()
        norm = torch.nn.utils.clip_grad_norm_(weights, 5.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach()), first_norm or float(norm)

    do_round = make_rounds(args.work, "theirs", memory, sum(weight.nbytes for weight in weights), step)
    do_round()
    memory.forget()
    return {"compile_s": 0.0}, do_round


if __name__ == "__main__":
    sys.exit(main())

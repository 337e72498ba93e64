"""Attention on this CPU, forward and backward, in blocks, with all scores and by torch; and compiled for H100 and TPU.

    python benchmarks/attention.py [--quick] [--json FILE] [--aot]

`--aot` compiles the kernels for chips that need not be here and prints their memory; each compiler that is installed
is used (pip install "openo3-jax[plan-tpu]", "[plan-gpu]"), in a process of its own. Nothing runs on those chips.

Exits with 3 where values or gradients differ by more than float32 explains, or a compilation that was asked for fails.
"""

import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import results
import torch

from openo3_jax import mesh as mesh_lib
from openo3_jax.errors import InputError
from openo3_jax.models import attention
from openo3_jax.plan import devices as devices_lib

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 32  # of the model that runs here
HEADS_7B, KV_HEADS_7B, HEAD_DIM_7B = 28, 4, 128
TORCH = "torch's fused kernel"
TOLERANCE = 1e-5  # of the largest value
GIB = 2**30


class Case(NamedTuple):
    """What is compiled ahead of time: sizes of a 7B model's rows, bfloat16."""

    axes: Mapping[str, int]
    rows: int
    seq: int
    backend: attention.Backend
    group: attention.Group | None = None


EIGHT = {"fsdp": 8}
CASES = {
    "rows of 16,384": Case(EIGHT, 8, 16384, "auto"),
    "the same in blocks": Case(EIGHT, 8, 16384, "blockwise"),
    "4 rows of 4,096 each": Case(EIGHT, 32, 4096, "auto"),
    "a prompt with 8 completions, 22,528": Case(EIGHT, 8, 22528, "auto", attention.Group(8, 768)),
    "the same in blocks, 22,528": Case(EIGHT, 8, 22528, "blockwise"),
    "131,072 over 4, slots for heads": Case({"fsdp": 2, "context": 4}, 2, 131072, "auto"),
    "131,072 over 8, keys gathered": Case({"context": 8}, 1, 131072, "auto"),
}
TARGETS = ("h100:8", "v5p:2x2x2")


def main() -> int:
    parser = results.make_parser(__doc__)
    parser.add_argument("--aot", action="store_true", help="compile for accelerators too")
    parser.add_argument("--compile", choices=TARGETS, help="for these chips alone")  # what a child process is told
    args = parser.parse_args()
    if args.compile:
        return compile_cases(args.compile, quick=args.quick)
    rows, ok = run_here(*((2, 512, 2) if args.quick else (6, 2048, 5)))
    results.finish(rows, args)
    if args.aot:
        ok &= all([compile_in_child(target, quick=args.quick) for target in TARGETS])
    return 0 if ok else 3


# ---- on this CPU ----


def make_slots(rows: int, seq: int) -> dict[str, attention.Slots]:
    """One sample to a row; four packed into it; a prompt of half the row with four completions."""
    at = np.arange(seq)
    quarter, eighth = 1 + at * 4 // seq, np.maximum(0, at * 8 // seq - 3)
    one, none = np.ones(seq), np.zeros(seq)
    rows_of = {"one sample": (one, none), "four packed": (quarter, none), "prompt + 4 completions": (one, eighth)}
    return {
        name: attention.Slots(*(np.broadcast_to(x.astype(np.int32), (rows, seq)) for x in pair))
        for name, pair in rows_of.items()
    }


def run_here(rows: int, seq: int, rounds: int) -> tuple[list[results.Row], bool]:
    """Blocks beside torch's kernel, which knows one sample to a row, and whether all values agree."""
    draw = np.random.default_rng(0)
    sizes = [(rows, seq, heads, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)]
    q, k, v, pull = (draw.normal(size=size).astype(np.float32) for size in sizes)
    print(f"{rows} rows of {seq} slots, {HEADS} heads of {HEAD_DIM}, {KV_HEADS} for keys, float32, ms")
    print(f"{'':48}{'forward':>8}{'with backward':>16}{'difference':>12}")
    ok, found = True, []
    for name, slots in make_slots(rows, seq).items():
        contenders = {"scores in full": "xla", "blocks": "blockwise"}
        runs = {label: jax_runs(backend, slots, (q, k, v), pull) for label, backend in contenders.items()}
        if name == "one sample":
            runs[TORCH] = torch_runs(q, k, v, pull)
        expected = runs["scores in full"][1]()
        times = fastest(runs, rounds)
        for label, run in runs.items():
            difference = max(
                float(np.abs(mine - reference).max() / np.abs(reference).max())
                for mine, reference in zip(run[1](), expected, strict=True)
            )
            ok &= difference < TOLERANCE
            forward, both = times[label]
            print(
                f"{name if label == 'scores in full' else '':24}{label:24}{forward:8.0f}{both:16.0f}{difference:12.1e}"
            )
        if name == "one sample":
            for part, ours, theirs in zip(("forward", "with backward"), times["blocks"], times[TORCH], strict=True):
                work = f"attention in blocks, {rows} rows of {seq:,}, {part}"
                found.append(results.compare(work, TORCH, ours=ours, theirs=theirs, unit="ms"))
    return found, ok


def jax_runs(backend: attention.Backend, slots: attention.Slots, qkv: Any, pull: Any) -> tuple[Callable, Callable]:
    attend = partial(attention.attention, slots=slots, causal=True, backend=backend)

    @jax.jit
    def both(qkv, pull):
        out, back = jax.vjp(attend, *qkv)
        return out, *back(pull)

    forward = jax.jit(lambda qkv: attend(*qkv))
    return lambda: [np.asarray(forward(qkv))], lambda: [np.asarray(x) for x in both(qkv, pull)]


def torch_runs(*arrays: np.ndarray) -> tuple[Callable, Callable]:
    q, k, v, pull = (torch.tensor(x).transpose(1, 2) for x in arrays)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]

    def attend(q, k, v):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    def forward():
        with torch.no_grad():
            return [attend(q, k, v)]

    def both():
        out = attend(*leaves)
        grads = torch.autograd.grad(out, leaves, pull)
        return [x.detach().transpose(1, 2).numpy() for x in (out, *grads)]

    return forward, both


def fastest(runs: Mapping[str, tuple[Callable, Callable]], rounds: int) -> dict[str, tuple[float, float]]:
    """Milliseconds of each, all contenders in turn, the fastest of the rounds; the first call compiles."""
    best = {label: [float("inf")] * 2 for label in runs}
    for _ in range(rounds + 1):
        for label, pair in runs.items():
            for i, run in enumerate(pair):
                started_s = time.perf_counter()
                run()
                best[label][i] = min(best[label][i], 1e3 * (time.perf_counter() - started_s))
    return {label: tuple(values) for label, values in best.items()}


# ---- for chips that are not here ----


def compile_in_child(target: str, *, quick: bool) -> bool:
    """Compile in a process of its own: a compiler's plugin stays in the process that loads it."""
    devices = devices_lib.parse(target)
    try:
        devices_lib.check_extra(devices)
    except InputError as missing:
        print(f"\n{target}: {missing}; nothing is compiled")
        return True
    command = [sys.executable, __file__, "--compile", target, *(["--quick"] if quick else [])]
    return subprocess.run(command, env=devices_lib.environment(devices), check=False).returncode == 0


def compile_cases(target: str, *, quick: bool) -> int:
    devices = devices_lib.topology(devices_lib.parse(target))
    print(f"\n{target}, {HEADS_7B} heads of {HEAD_DIM_7B}, {KV_HEADS_7B} for keys, bfloat16, per device")
    print(f"{'':40}{'forward':>9}{'with backward':>15}{'compiled in':>13}", flush=True)
    for name, case in list(CASES.items())[: 2 if quick else None]:
        started_s = time.perf_counter()
        forward, both = (temporary_bytes(case, devices, backward) for backward in (False, True))
        took_s = time.perf_counter() - started_s
        print(f"{name:40}{forward / GIB:5.2f} GiB{both / GIB:11.2f} GiB{took_s:11.0f} s", flush=True)
    return 0


def temporary_bytes(case: Case, devices: Any, backward: bool) -> int:
    mesh = mesh_lib.make_mesh(case.axes, devices=devices)

    def abstract(heads: int) -> jax.ShapeDtypeStruct:
        place = mesh_lib.sharding(mesh, "rows", "seq", "heads")
        return jax.ShapeDtypeStruct((case.rows, case.seq, heads, HEAD_DIM_7B), jnp.bfloat16, sharding=place)

    ids = jax.ShapeDtypeStruct((case.rows, case.seq), jnp.int32, sharding=mesh_lib.sharding(mesh, "rows", "seq"))
    q, k = abstract(HEADS_7B), abstract(KV_HEADS_7B)

    def attend(q, k, v, slots):
        return attention.attention(q, k, v, slots, causal=True, backend=case.backend, mesh=mesh, group=case.group)

    def both(q, k, v, slots, pull):
        return jax.vjp(lambda *qkv: attend(*qkv, slots), q, k, v)[1](pull)

    slots = attention.Slots(ids, ids)
    lowered = jax.jit(both).lower(q, k, k, slots, q) if backward else jax.jit(attend).lower(q, k, k, slots)
    return lowered.compile().memory_analysis().temp_size_in_bytes


if __name__ == "__main__":
    sys.exit(main())

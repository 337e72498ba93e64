"""A plan as text and as JSON."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from openo3_jax.config import GSPOConfig
from openo3_jax.plan.compiler import Answer, Request
from openo3_jax.plan.devices import GIB
from openo3_jax.plan.estimate import Estimate


def to_json(request: Request, answer: Answer, estimate: Estimate) -> dict[str, Any]:
    """All figures: bytes per device, seconds per step."""
    found = [
        one._asdict() | {"peak": one.peak, "collectives": [c._asdict() for c in one.collectives]}
        for one in answer.programs
    ]
    return {
        "devices": str(request.devices),
        "mesh": dict(answer.axes),
        "rows": answer.load.rows,
        "row_slots": answer.load.row.seq,
        "row_patches": answer.load.row.patches,
        "prompt_tokens": answer.load.prompt_tokens,
        "remat": request.config.remat,
        "bytes_by_kind": by_kind(answer, estimate),
        **estimate._asdict(),
        "rates": dataclasses.asdict(estimate.rates),
        "floors": [floor._asdict() for floor in estimate.floors],
        "programs": found,
    }


def by_kind(answer: Answer, estimate: Estimate) -> dict[str, int]:
    """Bytes of a device; of the hungriest program what lives only while it runs."""
    hungriest = max(answer.programs, key=lambda one: one.peak)
    return {
        "trained weights": answer.trained_bytes,
        "optimizer": answer.optimizer_bytes,
        "reference": answer.reference_bytes,
        "frozen weights": answer.frozen_bytes,
        "caches": estimate.cache_bytes,
        "activations, gradients, gathered weights": hungriest.temporary,
        "cuDNN workspace": estimate.workspace_bytes,
    }


def render(request: Request, answer: Answer, estimate: Estimate) -> str:
    load = answer.load
    axes = ", ".join(f"{name} {size}" for name, size in answer.axes.items() if size > 1) or "one device"
    lines = [
        f"{request.devices}, mesh {axes}; {load.rows} rows of {load.row.seq} slots and {load.row.patches} patches, "
        f"remat {request.config.remat}",
        "",
        f"{'GiB per device':<18}{'state':>10}{'batch, caches':>15}{'outputs':>10}{'temporary':>11}{'peak':>10}"
        f"{'compiled in':>13}",
    ]
    state = sum(getattr(answer, name) for name in Answer._fields if name.endswith("_bytes"))
    for one in answer.programs:
        if one.refused:
            lines.append(f"{one.name:<18}the compiler refuses it: {one.refused}")
            continue
        rest = one.arguments + one.resident - state
        sizes = (state, rest, one.outputs, one.temporary, one.peak)
        widths = (10, 15, 10, 11, 10)
        columns = "".join(f"{size / GIB:>{width}.2f}" for size, width in zip(sizes, widths, strict=True))
        lines.append(f"{one.name:<18}{columns}{one.compiled_s:>11.0f} s")
    parts = by_kind(answer, estimate).items()
    lines += ["by kind: " + "; ".join(f"{name} {size / GIB:.2f}" for name, size in parts if size)]
    verdict = "fits" if estimate.fits else "DOES NOT FIT"
    headroom = request.devices.kind.headroom_bytes / GIB
    lines += [
        f"{verdict}: peak {estimate.peak_bytes / GIB:.1f} of {estimate.available_bytes / GIB:.1f} GiB, "
        f"{headroom:.1f} more are left to libraries and fragmentation; host memory {estimate.host_bytes / GIB:.0f} GiB",
        "",
        f"{'seconds at least':<18}{'arithmetic':>12}{'memory':>10}{'links':>10}{'PFLOP':>10}   "
        "sent by each device, GiB in a step (calls)",
    ]
    for floor, one in zip(estimate.floors, answer.programs, strict=True):
        sent = ", ".join(
            f"{c.kind} {floor.runs * c.sent_bytes / GIB:.2f} ({floor.runs * c.calls})" for c in one.collectives
        )
        lines.append(
            f"{floor.name:<18}{floor.compute_s:>12.3f}{floor.memory_s:>10.3f}{floor.links_s:>10.3f}"
            f"{floor.flops / 1e15:>10.2f}   {sent or 'none'}"
        )
    rates = estimate.rates
    lines.append(
        f"a step: at least {estimate.floor_s:.2f} s, expected {estimate.expected_s:.2f} s if "
        f"{rates.compute_efficiency:.0%} of the arithmetic and {rates.bandwidth_efficiency:.0%} of the bandwidths are "
        f"reached; the model's {estimate.model_flops / 1e15:.2f} PFLOP are an MFU of {estimate.mfu:.0%}"
    )
    cost = "" if rates.price is None else f", {estimate.run_cost:.0f} at {rates.price:g} for a device and hour"
    lines.append(f"the run of {request.config.steps} steps, in the recipes an epoch: {estimate.run_hours:.1f} h{cost}")
    if load.padding > 1:
        lines.append(
            f"{1 / load.padding:.0%} of the rows hold samples, the rest is padding for this many devices: a batch_size "
            f"{load.padding:g} times as large takes as long"
        )
    if isinstance(request.config, GSPOConfig):
        lines.append("every completion is taken to have all of its tokens: what ends earlier takes less")
    return "\n".join(lines)


def render_ranking(rows: Sequence[tuple[str, Estimate, float]]) -> str:
    """`rows`: what was tried, its estimate, expected seconds per sample."""
    lines = [f"{'':<52}{'peak GiB':>10}{'s per step':>12}{'ms per sample':>15}"]
    for name, estimate, per_sample_s in rows:
        verdict = "" if estimate.fits else "   does not fit"
        figures = f"{estimate.peak_bytes / GIB:>10.1f}{estimate.expected_s:>12.2f}{1e3 * per_sample_s:>15.1f}"
        lines.append(f"{name:<52}{figures}{verdict}")
    return "\n".join(lines)

"""`openo3 plan`: a recipe, devices and what may be asked of them -> text, and JSON."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from openo3_jax.config import QWEN2_5_VL, GSPOConfig, ModelConfig, SFTConfig
from openo3_jax.data import processor_files
from openo3_jax.errors import InputError
from openo3_jax.plan import devices as devices_lib
from openo3_jax.plan import report, search
from openo3_jax.plan.compiler import Answer, Compiler, Request
from openo3_jax.plan.config import Rates, Sizes
from openo3_jax.plan.estimate import Estimate, make_estimate


def run(
    config: SFTConfig | GSPOConfig,
    *,
    devices: str,
    model: str,
    axes: Mapping[str, int] | None,
    sizes: Sizes,
    rates: Rates,
    wants_search: bool,
    json_out: Path | None,
    say: Callable[[str], None],
) -> tuple[str, bool]:
    """The text, and whether it fits.

    Raises: InputError for an unknown device or model, a compiler that is not installed, a mesh that does not divide.
    """
    request = Request(config, load_model(model), devices_lib.parse(devices), axes, sizes)
    with Compiler(request.devices) as compiler:

        def judge(wish: Request) -> tuple[Answer, Estimate]:
            answer = compiler(wish)
            return answer, estimate_of(wish, answer, rates)

        if wants_search:
            text, found, estimate = _search(request, judge, say)
        else:
            text, found, estimate = _plan(request, *judge(request))
    if json_out is not None:
        json_out.write_text(json.dumps(found, indent=2) + "\n")
    return text, estimate.fits


def estimate_of(request: Request, answer: Answer, rates: Rates) -> Estimate:
    saved = answer.trained_bytes + answer.optimizer_bytes
    return make_estimate(
        request.config,
        request.model,
        request.sizes,
        answer.load,
        request.devices,
        answer.programs,
        saved,
        rates,
    )


def load_model(name: str) -> ModelConfig:
    """A published size, or a directory with a config.json. Raises: InputError for anything else."""
    if name in QWEN2_5_VL:
        return QWEN2_5_VL[name]
    if not (Path(name) / "config.json").is_file():
        raise InputError(f"--model {name}: expected {', '.join(QWEN2_5_VL)}, or a directory with a config.json")
    return processor_files.load_model_config(Path(name))


def _plan(request: Request, answer: Answer, estimate: Estimate) -> tuple[str, dict[str, Any], Estimate]:
    return report.render(request, answer, estimate), report.to_json(request, answer, estimate), estimate


def _search(request: Request, judge: search.Judge, say: Callable[[str], None]) -> tuple[str, dict[str, Any], Estimate]:
    tried = search.search(request, judge, say)
    best = tried[0]
    text, found, estimate = _plan(best.request, best.answer, best.estimate)
    rows = [(one.name, one.estimate, one.per_sample_s) for one in tried]
    found["tried"] = [
        {"name": name, "per_sample_s": per_sample_s, "fits": one.fits, "peak_bytes": one.peak_bytes}
        for name, one, per_sample_s in rows
    ]
    text = f"{report.render_ranking(rows)}\n\n{text}"
    if best.estimate.fits:
        found["largest"] = search.limits(best, judge, say)
        largest = ", ".join(f"{number} {name}" for name, number in found["largest"].items())
        text += f"\nthe most that fits, each alone: {largest}"
    return text, found, estimate

"""What the plans claim, asserted on the programs that the real compilers make. Nothing runs on those chips.

    python benchmarks/plan.py [--only NAME]

Each compiler that is installed is used (pip install "openo3-jax[plan-gpu]", "[plan-tpu]"); one minute to ten each.
Exits with 3 where a claim does not hold.
"""

import argparse
import sys
import time
from typing import NamedTuple

from openo3_jax import recipes
from openo3_jax.config import GSPOConfig, SFTConfig
from openo3_jax.errors import InputError
from openo3_jax.plan import command, compiler, devices, report
from openo3_jax.plan.config import Rates, Sizes

GIB = 2**30
OUTSIDE = 0.35  # of the weights in bfloat16 may be whole at once: the embedding and the head, of policy and reference


class Case(NamedTuple):
    recipe: str
    devices: str
    prototype_gib: float | None = None  # temporary memory of a throw-away model without the vision tower


CASES = {
    "sft, H100": Case("sft_7b", "h100:8", 8.02),
    "gspo, H100": Case("gspo_7b", "h100:8"),
    "gspo with adapters, one H100": Case("gspo_7b_lora", "h100:1"),
    "sft, v5p": Case("sft_7b", "v5p:2x2x2", 10.03),
    "gspo, v5p": Case("gspo_7b", "v5p:2x2x2"),
    "sft, v6e": Case("sft_7b", "v6e:16x16", 6.48),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=CASES, action="append", help="these cases alone")
    names = parser.parse_args().only or list(CASES)
    return 0 if all([check(name, CASES[name]) for name in names]) else 3


def check(name: str, case: Case) -> bool:
    """Compile one case and hold it against the claims; a compiler that is not installed is said and passed over."""
    config = (recipes.SFT | recipes.GSPO)[case.recipe]
    request = compiler.Request(config, command.load_model("7b"), devices.parse(case.devices), None, Sizes())
    started_s = time.monotonic()
    try:
        with compiler.Compiler(request.devices) as compile_for:
            answer = compile_for(request)
    except InputError as error:
        print(f"\n## {name}: {error}", flush=True)
        return True
    estimate = command.estimate_of(request, answer, Rates())
    print(f"\n## {name}, {time.monotonic() - started_s:.0f} s\n\n{report.render(request, answer, estimate)}\n")
    claims = claims_of(config, request, answer, estimate.fits)
    if case.prototype_gib is not None:
        used = answer.programs[-1].temporary / GIB
        claims[f"temporary {used:.2f} GiB, within 1.3 times {case.prototype_gib}"] = used <= 1.3 * case.prototype_gib
    for claim, holds in claims.items():
        print(f"{'holds' if holds else 'DOES NOT HOLD'}: {claim}", flush=True)
    return all(claims.values())


def claims_of(
    config: SFTConfig | GSPOConfig, request: compiler.Request, answer: compiler.Answer, fits: bool
) -> dict[str, bool]:
    found = {one.name: one for one in answer.programs}
    update = found["update"]
    on_device = answer.trained_bytes // 2 if config.lora is None else answer.frozen_bytes  # in bfloat16
    share = update.gathered_outside_loops / (on_device * answer.axes["fsdp"] * answer.axes["tensor"])
    slots = answer.load.row.seq
    claims = {
        "fits": fits,
        f"whole outside the loops: {100 * share:.0f} % of the weights, at most {100 * OUTSIDE:.0f} %": share <= OUTSIDE,
        f"logits of {update.most_logits} slots at a time, rows of {slots}": 0 < update.most_logits < slots,
    }
    if "decode" in found:
        copied = found["decode"].copied_in_loops
        claims[f"a decode step copies {copied} bytes of caches"] = copied == 0
    return claims


if __name__ == "__main__":
    sys.exit(main())

"""What one accelerator makes of Qwen2.5-VL with random weights made on it: no download, a few minutes, a table last.

    python benchmarks/gpu.py [--model 3b|7b] [--torch] [--json FILE]
    python benchmarks/gpu.py --tiny --torch          # the same on a CPU within a minute, nothing is judged

First the card's own rates: a bfloat16 matrix product and a copy. Then, bfloat16 over float32 weights: a step of SFT as
a share of the first, a step of decoding (batch 4, 32 and 128 in groups of 4, behind a prefix of 4,096) as a share of
the second, and an iteration of GSPO by phase (benchmarks/gpu_parts.py). Each part takes as many of the model's decoder
layers as fit the card and says how many. `--torch`: the same parts by torch and transformers on the same card, in a
process of their own (benchmarks/gpu_torch.py). Exits with 3 where a goal is missed.
"""

import argparse
import dataclasses
import importlib.util
import json
import pathlib
import sys
import tempfile
from collections.abc import Mapping
from typing import Any

import results
import sides

LEAST_MFU = 0.55  # of the measured rate of a matrix product
LEAST_COPY = 0.75  # of the measured bandwidth of a copy


def main() -> int:
    parser = results.make_parser(__doc__)
    parser.add_argument("--model", default="3b", choices=["3b", "7b", "32b", "72b"])
    parser.add_argument("--tiny", action="store_true", help="the same as --quick: a tiny model, nothing is judged")
    parser.add_argument("--torch", action="store_true", help="torch and transformers on the same card too")
    args = parser.parse_args()
    args.quick |= args.tiny
    flags = ["--model", args.model, *(["--tiny"] if args.quick else [])]
    with tempfile.TemporaryDirectory() as directory:
        work = pathlib.Path(directory)
        ours = run_parts("gpu_parts.py", work, flags, XLA_PYTHON_CLIENT_MEM_FRACTION="0.92")
        theirs = measure_torch(work, flags, ours) if args.torch else {}
    return results.finish(make_rows(args, ours, theirs), args)


def measure_torch(work: pathlib.Path, flags: list[str], ours: Mapping[str, Any]) -> dict[str, Any]:
    """What torch makes of the same parts with as many layers; empty where torch is missing, which is said."""
    if importlib.util.find_spec("torch") is None:
        print("torch is missing here: pip install torch, with the CUDA that the card's driver has")
        return {}
    (work / "layers.json").write_text(json.dumps(ours["layers"]))
    return run_parts("gpu_torch.py", work, flags, JAX_PLATFORMS="cpu")  # jax would take the card's memory


def run_parts(script: str, work: pathlib.Path, flags: list[str], **environment: str) -> dict[str, Any]:
    """What a script beside this one says of its parts, once it has done them all."""
    with sides.Side(str(pathlib.Path(__file__).with_name(script)), "all", work, flags, **environment) as side:
        return side.ready


def make_rows(args: argparse.Namespace, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[results.Row]:
    """Against the card's own rates, then against torch."""
    judged = {"judged": not args.quick and ours["platform"] != "cpu"}
    layers = ours["layers"]
    rows = [
        results.compare(f"{name} on {ours['device']}", "-", ours=ours[key] / scale, theirs=None, unit=unit)
        for name, key, scale, unit in (
            ("matrix product, bfloat16", "flops_per_s", 1e12, "TFLOP/s"),
            ("copy, read and written", "bytes_per_s", 1e9, "GB/s"),
        )
    ]
    for key, found in ours["parts"].items():
        part = key.partition(" ")[0]
        name = f"{key}, {args.model}, {layers[part]} layers"
        if "error" in found:
            print(f"{name}: {found['error']}")
        elif part == "sft":
            rate = found["flops"] / found["all_s"]
            bound = {"theirs": ours["flops_per_s"] / 1e12, "unit": "TFLOP/s", "least": LEAST_MFU, **judged}
            note = f"{found['all_s']:.3f} s a step"
            rows.append(
                results.compare(
                    name, "the matrix product", ours=rate / 1e12, compile_s=found["compile_s"], note=note, **bound
                )
            )
        elif part == "decode":
            rate = found["bytes"] / found["all_s"]
            bound = {"theirs": ours["bytes_per_s"] / 1e9, "unit": "GB/s", "least": LEAST_COPY, **judged}
            note = f"{found['tokens'] / found['all_s']:,.0f} tokens/s"
            rows.append(
                results.compare(name, "the copy", ours=rate / 1e9, compile_s=found["compile_s"], note=note, **bound)
            )
        else:
            times = ", ".join(f"{phase} {seconds:.3f}" for phase, seconds in found["phases"].items())
            row = results.compare(name, "-", ours=found["all_s"], theirs=None, unit="s", compile_s=found["compile_s"])
            rows.append(dataclasses.replace(row, note=times))
    for key, found in theirs.get("parts", {}).items():
        mine = ours["parts"].get(key, {})
        if "error" in found or "error" in mine:
            print(f"torch, {key}: {found.get('error', 'nothing to compare with')}")
            continue
        work = f"{key}, {args.model}, {layers[key.partition(' ')[0]]} layers"
        rows.append(results.compare(work, "torch", ours=mine["all_s"], theirs=found["all_s"], unit="s"))
    return rows


if __name__ == "__main__":
    sys.exit(main())

"""Every benchmark in turn, each in a process of its own, and their table.

    python benchmarks/run.py [--quick] [--only NAME] [--out benchmarks/RESULTS.md]

What `make bench` runs. Without `--quick` the table is written, with the machine, the versions, and date and command of
each row. With it, tiny sizes show that all of them work, and nothing is written but to an `--out` that was given.
Beside the table lies the same as JSON, from which `--only` keeps the rows of the others, if machine and versions are
those of now.
Exits with 3 where a row does not hold, 1 where a benchmark ended otherwise.
"""

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from concurrent import futures
from typing import Any

import results

HERE = pathlib.Path(__file__).resolve().parent
RESULTS = HERE / "RESULTS.md"
SCRIPTS = (
    "startup",
    "rewards",
    "data",
    "attention",
    "forward",
    "training",
    "generation",
    "gspo_released",
    "gspo",
    "loading",
)
QUICK_AT_A_TIME = 2  # mostly compilation, on one core each; nothing is judged
QUICK_SETTINGS = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # so that there is less of it
PACKAGES = ("jax", "jaxlib", "flax", "optax", "torch", "transformers", "numpy")

# Published by others, on other hardware: where the field is, not what these figures are to be divided by.
PUBLISHED = (
    (
        "Qwen2.5-VL-7B, GRPO on Geo3k, 8 x H100, 512 prompts x 5",
        "120 to 145 s a step, 16 to 23 % MFU",
        "EasyR1, assets/baselines.md",
    ),
    ("Llama 3.1 8B, 256 x TPU v6e, 8,192 tokens", "45.5 % MFU", "MaxText, docs/reference/models/tiering.md"),
    ("Llama 3.1 8B, 8 x H100, 8,192 tokens", "33 to 39 % MFU", "torchtitan, benchmarks/llama3_h100_202412"),
    ("Qwen2.5-VL-7B, sampling, 140 requests", "2,628 tokens/s", "tpu-inference, pull request 1663"),
    ("Qwen3-VL-4B, sampling in JAX, A100", "12.7 tokens/s (transformers: 16.8)", "vlm-gym, README"),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that all of them work")
    parser.add_argument("--only", choices=SCRIPTS, action="append", help="these alone; rows of others are kept")
    parser.add_argument("--out", type=pathlib.Path, help="where the table goes (RESULTS.md beside this file)")
    args = parser.parse_args()
    out = args.out or (None if args.quick else RESULTS)
    here = {"machine": machine(), "versions": {name: importlib.metadata.version(name) for name in PACKAGES}}
    kept = kept_runs(out, here) if args.only and out is not None else {}
    rows: list[results.Row] = []
    failed = []
    names = args.only or SCRIPTS
    todo = [[f"benchmarks/{name}.py", *(["--quick"] if args.quick else [])] for name in names]
    with futures.ThreadPoolExecutor(QUICK_AT_A_TIME if args.quick else 1) as pool:
        for name, command, (found, code) in zip(names, todo, pool.map(run, todo), strict=True):
            rows += found
            failed += [name] if code not in (0, 3) or (code == 3 and not found) else []
            today = f"{datetime.date.today():%d %b %Y}"
            kept[name] = {"date": today, "command": "python " + " ".join(command), "rows": found}
            if out is not None:  # after each, so that an interrupted run leaves what it has
                write(out, here | {"runs": {name: kept[name] for name in SCRIPTS if name in kept}})
    print("\n" + results.table(rows))
    for name in failed:
        print(f"{name}: did not end as it should")
    return 1 if failed else results.exit_code(rows)


def kept_runs(out: pathlib.Path, here: Mapping[str, Any]) -> dict[str, Any]:
    """What an earlier call has left beside the table, if it ran on this machine with these versions."""
    file = out.with_suffix(".json")
    before = json.loads(file.read_text()) if file.exists() else {"runs": {}}
    runs = before["runs"] if {name: before.get(name) for name in here} == here else {}
    return {name: one | {"rows": [results.Row(**row) for row in one["rows"]]} for name, one in runs.items()}


def write(out: pathlib.Path, found: Mapping[str, Any]) -> None:
    out.with_suffix(".json").write_text(json.dumps(found, indent=1, default=dataclasses.asdict) + "\n")
    out.write_text(page(found))


def run(command: list[str]) -> tuple[list[results.Row], int]:
    """The rows of one benchmark, none if it failed before it had any, and its exit code."""
    started_s = time.monotonic()
    settings = QUICK_SETTINGS if "--quick" in command else {}
    with tempfile.TemporaryDirectory() as directory:
        file = pathlib.Path(directory) / "rows.json"
        done = subprocess.run(
            [sys.executable, *command, "--json", str(file)],
            env=os.environ | settings,
            cwd=HERE.parent,
            check=False,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        took_s = time.monotonic() - started_s
        said = f"\n## {' '.join(command)}\n{done.stdout}{took_s:.0f} s, exit code {done.returncode}"
        print(said, flush=True)  # at once, so that two of them do not mix
        return (results.load(file) if file.exists() else []), done.returncode


def page(found: Mapping[str, Any]) -> str:
    rows = [row for one in found["runs"].values() for row in one["rows"]]
    origins = [[one["date"], one["command"]] for one in found["runs"].values() for _ in one["rows"]]
    published = ["| what | published | source |", "|---|---|---|", *(f"| {' | '.join(line)} |" for line in PUBLISHED)]
    return "\n".join(
        [
            "# Results of `make bench`",
            "",
            found["machine"],
            "",
            ", ".join(f"{name} {version}" for name, version in found["versions"].items()) + ".",
            "",
            "Times of one row were taken in one run, both sides in turn; a shared machine makes single times long, so "
            "the ratios are what counts. What a row does is in the first lines of its script.",
            "",
            results.table(rows, ("date", "command"), origins),
            "",
            "## Published by others, not measured here",
            "",
            *published,
            "",
        ]
    )


def machine() -> str:
    """Processor, cores that this process may use, memory, interpreter."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    model, memory_gib = platform.processor() or platform.machine(), None
    if sys.platform == "linux":
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
        memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    memory = "" if memory_gib is None else f", {memory_gib:.0f} GiB"
    return f"{model}, {cores} cores{memory}, Python {platform.python_version()}, {sys.platform}."


if __name__ == "__main__":
    sys.exit(main())

"""benchmarks/gpu.py runs on a CPU at tiny size, so that whoever has a GPU needs one command."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import compile_flags

ROOT = Path(__file__).parents[1]


@pytest.mark.timeout(1200)  # two minutes of CPU, all of it compilation; the cache of the suite keeps the programs
def test_every_part_is_measured(tmp_path):
    """The card's two rates, SFT, decoding, and GSPO with its phases; nothing is judged on a CPU."""
    environment = (
        os.environ
        | compile_flags.settings(devices=1)
        | {
            "PYTHONPATH": str(ROOT),
            "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".jax_cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
        }
    )
    command = [sys.executable, "benchmarks/gpu.py", "--tiny", "--json", str(tmp_path / "rows.json")]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["work"].partition(",")[0].partition(" on ")[0] for row in rows] == [
        "matrix product",
        "copy",
        "sft step",
        "decode step",
        "gspo iteration",
    ]
    assert all(row["ours"] > 0 and row["holds"] is None for row in rows)
    phases = [part.split()[0] for part in rows[-1]["note"].split(", ")]
    assert phases == ["cast", "prefill", "layout", "decode", "old", "update"]

"""Runs killed with SIGKILL at seeded random moments, resumed each time: the same numbers to the last bit.

KILLS=20 makes it twenty times for each stage (`make soak`).
"""

import json
import os
import random
import signal
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_runs

from openo3_jax.train import checkpoint

pytestmark = pytest.mark.timeout(1200)
KILLS = int(os.environ.get("KILLS", "2"))
FREE = ("time/", "memory/")  # groups of metrics that may differ between two runs


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny_runs.prepare(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def whole(root, server):
    """The uninterrupted runs, both at once."""
    pids = {stage: server.start(stage, root, root / f"{stage}_whole") for stage in tiny_runs.CONFIGS}
    for stage, pid in pids.items():
        assert server.wait(pid) == 0, (root / f"{stage}_whole.err").read_text()
    return root


def lines(file: Path) -> list[dict]:
    return [
        {name: value for name, value in json.loads(line).items() if not name.startswith(FREE)}
        for line in file.read_text().splitlines()
    ]


def weights(run: Path) -> dict[str, np.ndarray]:
    """All arrays of the last checkpoint, optimizer included."""
    import orbax.checkpoint as ocp

    step = checkpoint.finished(run / "checkpoints")[-1]
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])  # for arrays of processes that are no more
    item = ocp.args.StandardRestore(fallback_sharding=here)
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
        read = reader.restore(run / "checkpoints" / str(step), ocp.args.Composite(params=item, optimizer=item))
    return {f"{item}{path}": np.asarray(value) for item in read for path, value in read[item].items()}


def batches(out: Path) -> dict[int, set[str]]:
    """Step -> hashes of all batches that were made for it."""
    found: dict[int, set[str]] = {}
    for line in Path(f"{out}.batches").read_text().splitlines():
        step, digest = line.split()
        found.setdefault(int(step), set()).add(digest)
    return found


def assert_same(out: Path, expected: Path) -> None:
    assert lines(out / "metrics.jsonl") == lines(expected / "metrics.jsonl")
    if (expected / "samples.jsonl").exists():
        assert (out / "samples.jsonl").read_bytes() == (expected / "samples.jsonl").read_bytes()
    ours, theirs = weights(out), weights(expected)
    assert ours.keys() == theirs.keys() and len(ours) > 20
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value, err_msg=name)
    assert batches(out) == batches(expected)


def num_steps(out: Path) -> int:
    file = out / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def is_alive(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def wait_for_steps(pid: int, out: Path, steps: int) -> None:
    """Until the run has made `steps` more steps than it had."""
    before = num_steps(out)
    while is_alive(pid) and num_steps(out) < before + steps:
        before = min(before, num_steps(out))  # it may cut its lines back to the checkpoint
        time.sleep(0.002)


def kill_after_progress(pid: int, out: Path, *, steps: int, delay_s: float, in_write: bool) -> None:
    """SIGKILL `delay_s` after the run has made `steps` more steps, or while it writes a checkpoint then."""
    wait_for_steps(pid, out, steps)
    until = time.monotonic() + (10.0 if in_write else delay_s)
    while is_alive(pid) and time.monotonic() < until:
        if in_write and any((out / "checkpoints").glob("*.orbax-checkpoint-tmp")):
            break
        time.sleep(0.0005)
    os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("stage", tiny_runs.CONFIGS)
def test_killed_runs_end_like_uninterrupted_ones(stage, whole, server):
    out, draw = whole / f"{stage}_killed", random.Random(f"kill {stage}")
    killed = number = 0
    while killed < KILLS:
        if num_steps(out) >= tiny_runs.CONFIGS[stage].steps - 1:  # many kills: begin another run
            assert server.run(stage, whole, out, "--resume") == 0
            assert_same(out, whole / f"{stage}_whole")
            out = whole / f"{stage}_killed_{number}"
        pid = server.start(stage, whole, out, "--resume")
        kill_after_progress(pid, out, steps=1, delay_s=draw.uniform(0.0, 0.3), in_write=killed % 2 == 1)
        code = server.wait(pid)
        assert code in (0, -signal.SIGKILL), Path(f"{out}.err").read_text()
        killed += code != 0  # else it ended before it was killed
        number += 1
    assert server.run(stage, whole, out, "--resume") == 0, Path(f"{out}.err").read_text()
    assert_same(out, whole / f"{stage}_whole")


def test_the_saved_config_gives_the_same_numbers_and_a_signal_saves(whole, server):
    """A new run from config.json of the first, stopped by SIGTERM and resumed."""
    out, saved = whole / "again", whole / "again_root"
    saved.mkdir()
    for name in ("model", "data"):
        (saved / name).symlink_to(whole / name)
    (saved / "sft.json").write_bytes((whole / "sft_whole" / "config.json").read_bytes())
    pid = server.start("sft", saved, out)
    wait_for_steps(pid, out, 3)
    os.kill(pid, signal.SIGTERM)
    assert server.wait(pid) == 75
    errors = Path(f"{out}.err").read_text()
    assert "openo3: SIGTERM: " in errors and "steps are saved in" in errors and "Traceback" not in errors
    steps = num_steps(out)
    assert 3 <= steps < 12 and checkpoint.finished(out / "checkpoints")[-1] == steps
    assert server.run("sft", saved, out, "--resume", "--optimizer.learning-rate", "0.5") == 2
    assert "config.optimizer.learning_rate is 0.001 in the checkpoint and 0.5 now" in Path(f"{out}.err").read_text()
    assert server.run("sft", saved, out, "--resume") == 0
    assert_same(out, whole / "sft_whole")
    configs = (json.loads((run / "config.json").read_text())["config"] for run in (out, whole / "sft_whole"))
    assert next(configs) == next(configs)

"""Runs over several real processes: the numbers of one process, and what happens when one of them is gone."""

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import test_kill
import tiny_runs

from openo3_jax.data import annotations
from openo3_jax.train import checkpoint

pytestmark = pytest.mark.timeout(900)
KILLS = int(os.environ.get("KILLS", "1"))
STEPS = {"sft": 4, "gspo": 3}
FLAGS = {
    "sft": ("--batch-size", "6", "--optimizer.name", "adamw", "--max-bad-fraction", "0.4"),
    "gspo": ("--batch-size", "6", "--minibatches", "2", "--max-bad-fraction", "0.4", "--kl-coef", "0.1"),
}
MESHES = {2: "fsdp=2", 4: "data=2,fsdp=2"}  # by the number of devices: each of a process of its own, or all of one
BOUND_S = 60  # within which a survivor must have ended; a few seconds on a quiet machine


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Six records of each stage, of which one of each cannot be decoded."""
    root = tiny_runs.prepare(tmp_path_factory.mktemp("hosts"), layers=1)
    for stage in ("sft", "rl"):
        records = annotations.load_stage(root / "data", stage)
        broken = next(record for record in records if record.get("video_path"))
        shutil.copy(next((root / "data").glob(f"videos/**/{broken['video_path']}")), root / f"{stage}.mp4")
        next((root / "data").glob(f"videos/**/{broken['video_path']}")).write_bytes(cut(root / f"{stage}.mp4"))
    return root


def cut(file: Path) -> bytes:
    """A clip whose header is whole, so that it is planned, and whose pictures are noise."""
    content = bytearray(file.read_bytes())
    start = content.index(b"mdat") + 4
    end = content.index(b"moov") - 4 if content.find(b"moov") > start else len(content)
    content[start:end] = random.Random(0).randbytes(end - start)
    return bytes(content)


def start(server, number, stage, root, out, *more, devices=None, last_root=None):
    """A run over so many processes with one device each, or over one with all `devices`."""
    flags = ("--mesh", MESHES[devices or number], *FLAGS[stage], "--steps", str(STEPS[stage]), *more)
    if number == 1:
        return [server.start(stage, root, out, *flags, devices=devices, name="-0")]
    return server.start_together(number, stage, root, out, *flags, last_root=last_root)


def said(out: Path, process: int) -> str:
    return Path(f"{out}-{process}.err").read_text()


def whole_run(server, number, stage, root, devices=None) -> Path:
    """The directory of an uninterrupted run, made when first asked for."""
    out = root / f"{stage}_{number}_{devices}"
    if not out.exists():
        codes = [server.wait(pid) for pid in start(server, number, stage, root, out, devices=devices)]
        assert codes == [0] * number, [said(out, process) for process in range(number)]
    return out


@pytest.mark.parametrize("stage", STEPS)
@pytest.mark.parametrize("number", [2, pytest.param(4, marks=pytest.mark.soak)])
def test_several_processes_give_the_numbers_of_one(stage, number, server, root):
    one, several = whole_run(server, 1, stage, root, devices=number), whole_run(server, number, stage, root)
    ours, theirs = (test_kill.lines(run / "metrics.jsonl") for run in (several, one))
    assert len(ours) == STEPS[stage]
    for line, expected in zip(ours, theirs, strict=True):
        assert line == pytest.approx(expected, rel=1e-4, abs=1e-5)
    name = "data/empty_places" if stage == "sft" else "data/bad_records"
    assert ours[-1][name] == 1  # one process found it, all of them know
    bad = {json.loads(line)["index"] for line in (several / "bad_samples.jsonl").read_text().splitlines()}
    assert len(bad) == 1
    arrays, expected = test_kill.weights(several), test_kill.weights(one)
    assert arrays.keys() == expected.keys()
    for path, value in expected.items():
        np.testing.assert_allclose(arrays[path], value, rtol=1e-3, atol=2e-5, err_msg=path)


def test_the_first_process_writes_and_speaks(server, root):
    """Every completion once, whoever sampled and scored it; the others are silent."""
    number = 2
    one, several = whole_run(server, 1, "gspo", root, devices=number), whole_run(server, number, "gspo", root)
    ours, theirs = ([json.loads(line) for line in (run / "samples.jsonl").open()] for run in (several, one))
    assert len(ours) == STEPS["gspo"] * 5 * 2
    for line, expected in zip(ours, theirs, strict=True):
        assert line.pop("total") == pytest.approx(expected.pop("total"), abs=1e-6)
        assert line.pop("advantage") == pytest.approx(expected.pop("advantage"), abs=1e-4)
        assert line == expected
    log = (several / "log.txt").read_text().splitlines()
    assert sum(f"{STEPS['gspo']} steps, reward/total" in line for line in log) == 1
    assert "reward/total" in said(several, 0)
    for process in range(1, number):
        assert not [line for line in said(several, process).splitlines() if line and "[Gloo]" not in line]


def end_of(server, pid, out, process) -> str:
    """The one line that a survivor says. It ends with exit code 1, within a bounded time."""
    before_s = time.monotonic()
    assert server.wait(pid) == 1, said(out, process)
    assert time.monotonic() - before_s < BOUND_S
    text = said(out, process)
    lost = [line for line in text.splitlines() if "another process of the run is gone" in line]
    assert "Traceback" not in text and "coordination_service" not in text and lost, text
    return lost[-1]


@pytest.mark.parametrize("stage", ["sft", pytest.param("gspo", marks=pytest.mark.soak)])
def test_a_run_goes_on_after_one_of_its_processes_was_killed(stage, server, root):
    """Killed with SIGKILL at seeded moments, the first and the second in turn: bit for bit the uninterrupted run."""
    out, draw = root / f"{stage}_killed", random.Random(f"hosts {stage}")
    for kill in range(KILLS):
        pids = start(server, 2, stage, root, out, "--resume")
        victim = (kill + (stage == "gspo")) % 2
        test_kill.kill_after_progress(
            pids[victim], out, steps=1, delay_s=draw.uniform(0.0, 0.3), in_write=draw.random() < 0.5
        )
        code = server.wait(pids[victim])
        if code == 0:  # it was done before it could be killed
            assert server.wait(pids[1 - victim]) == 0
            continue
        assert code == -signal.SIGKILL, said(out, victim)
        assert f"process {1 - victim} of 2: " in end_of(server, pids[1 - victim], out, 1 - victim)
    if stage == "sft":  # the same, on one process with as many devices
        alone = root / "sft_alone"
        shutil.copytree(out, alone)
        assert [server.wait(p) for p in start(server, 1, stage, root, alone, "--resume", devices=2)] == [0]
        one = whole_run(server, 1, stage, root, devices=2)
        ours, theirs = (test_kill.lines(run / "metrics.jsonl") for run in (alone, one))
        assert ours[-1] == pytest.approx(theirs[-1], rel=1e-4, abs=1e-5)
    codes = [server.wait(pid) for pid in start(server, 2, stage, root, out, "--resume")]
    assert codes == [0, 0], (said(out, 0), said(out, 1))
    whole = whole_run(server, 2, stage, root)
    assert test_kill.lines(out / "metrics.jsonl") == test_kill.lines(whole / "metrics.jsonl")
    if stage == "gspo":
        assert (out / "samples.jsonl").read_bytes() == (whole / "samples.jsonl").read_bytes()
    ours, theirs = test_kill.weights(out), test_kill.weights(whole)
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value, err_msg=name)
    for process in range(2):
        assert test_kill.batches(Path(f"{out}-{process}")) == test_kill.batches(Path(f"{whole}-{process}"))


@pytest.mark.parametrize("silent", [0, pytest.param(1, marks=pytest.mark.soak)])
def test_a_silent_process_counts_as_gone(silent, server, root):
    """As when its machine has lost its power: no connection is closed, nothing is heard."""
    out = root / f"silent_{silent}"
    pids = start(server, 2, "sft", root, out, "--run.heartbeat-timeout-seconds", "5", "--steps", "1000")
    test_kill.wait_for_steps(pids[silent], out, 1)
    os.kill(pids[silent], signal.SIGSTOP)
    assert f"process {1 - silent} of 2: " in end_of(server, pids[1 - silent], out, 1 - silent)
    os.kill(pids[silent], signal.SIGKILL)
    assert server.wait(pids[silent]) == -signal.SIGKILL


def test_a_signal_to_one_process_saves_and_ends_all(server, root):
    out = root / "told"
    pids = start(server, 2, "sft", root, out, "--steps", "1000")
    test_kill.wait_for_steps(pids[1], out, 1)
    os.kill(pids[1], signal.SIGTERM)
    assert [server.wait(pid) for pid in pids] == [75, 75], (said(out, 0), said(out, 1))
    steps = test_kill.num_steps(out)
    assert f"openo3: SIGTERM: {steps} of 1000 steps are saved" in said(out, 0)
    assert checkpoint.finished(out / "checkpoints")[-1] == steps


def test_a_mistake_that_one_process_sees_ends_all_with_its_words(server, root, tmp_path):
    """Too many records that cannot be used: the one that cannot be decoded is read by one of the two."""
    codes = [server.wait(pid) for pid in start(server, 2, "sft", root, tmp_path / "run", "--max-bad-fraction", "0.0")]
    assert codes == [2, 2]
    for process in range(2):
        assert "more than max_bad_fraction=0" in said(tmp_path / "run", process)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("stage", STEPS)
def test_processes_that_plan_other_batches_end_with_one_line(stage, server, root, tmp_path):
    """The second one reads longer questions: its devices would wait for arrays of another shape."""
    other = tmp_path / "other"
    for part in ("data", "model"):
        shutil.copytree(root / part, other / part)
    shutil.copy(root / f"{stage}.json", other)
    for file in (other / "data").rglob("*.json"):
        records = json.loads(file.read_text())
        file.write_text(json.dumps([record | {"question": record["question"] + " Why?" * 100} for record in records]))
    codes = [server.wait(pid) for pid in start(server, 2, stage, root, tmp_path / "run", last_root=other)]
    assert codes == [2, 2]
    for process in range(2):
        assert "step 1: plan of the " in said(tmp_path / "run", process)

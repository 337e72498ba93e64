"""Where numbers go, what a run takes of its machine, and what a run says when it is stopped."""

import dataclasses
import math
import os
import signal
import subprocess
import sys
import threading
import types

import jax
import numpy as np
import pytest
import rich.console
from tensorboardX.proto import event_pb2

import small
from openo3_jax import mesh as mesh_lib
from openo3_jax.config import OptimizerConfig, RunConfig, SFTConfig
from openo3_jax.errors import InputError, Stopped
from openo3_jax.train import board, checkpoint, journal, loop, metrics, profiling, runlog
from openo3_jax.train import state as state_lib

VALUES = {"sft/loss": 1.5, "sft/grad_norm": math.nan, "reward/format/visual_QA": 0.25, "time/total_s": 2.0}


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    one = mesh_lib.make_mesh({}, devices=jax.devices()[:1])
    return small.make_policy(tmp_path_factory.mktemp("model"), one)


class FakeStage:
    """Steps whose numbers are a pure function of the step; the weights count them."""

    name = "sft"
    headline = "sft/loss"

    def __init__(self, before=lambda step: None):
        self._before = before
        self._step = jax.jit(lambda s: dataclasses.replace(s, step=s.step + 1), donate_argnums=0)

    def __call__(self, state, step):
        self._before(step)
        return self._step(state), {"sft/loss": 10.0 / (step + 1), "sft/grad_norm": 1.0}

    def memory(self, step):
        return {"at": step}


def config(steps, **run):
    return SFTConfig(steps=steps, optimizer=OptimizerConfig(), run=RunConfig(**{"tensorboard": False} | run))


def train(out, policy, settings, *, stage=None, start=0, **options):
    out.mkdir(exist_ok=True)
    this = loop.Run(out, settings, {}, runlog.RunLog(out), start)
    return loop.train(stage or FakeStage(), state_lib.make_state(policy, settings), policy, this, **options)


# ---- where numbers go ----


def events(directory):
    """All events of the files in a directory: a length, its hash, the message, its hash."""
    found = []
    for file in sorted(directory.iterdir()):
        content = file.read_bytes()
        while content:
            length = int.from_bytes(content[:8], "little")
            found.append(event_pb2.Event.FromString(content[12 : 12 + length]))
            content = content[16 + length :]
    return found


def test_event_files_hold_the_metrics_and_mark_a_resume(tmp_path):
    from openo3_jax.train import tensorboard

    for start in (0, 2):
        writer = tensorboard.EventWriter(tmp_path, start=start)
        writer.write(start + 1, {"sft/loss": 1.5 + start, "reward/format/visual_QA": 0.25})
        writer.close()
    first, second = (
        [(e.step, v.tag, v.simple_value) for e in events(tmp_path) for v in e.summary.value if e.step == step]
        for step in (1, 3)
    )
    assert first == [(1, "sft/loss", 1.5), (1, "reward/format/visual_QA", 0.25)]
    assert second[0] == (3, "sft/loss", 3.5)
    starts = [e.step for e in events(tmp_path) if e.HasField("session_log")]
    assert sorted(starts) == [1, 3], "TensorBoard hides earlier events from these steps on"


def test_weights_and_biases_gets_every_step_if_it_is_there(tmp_path, monkeypatch):
    seen = []
    fake = types.SimpleNamespace(
        init=lambda **options: types.SimpleNamespace(
            log=lambda values, step: seen.append((step, values)), finish=lambda: seen.append("finished")
        )
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    fake.__spec__ = types.SimpleNamespace(name="wandb")
    log = runlog.RunLog(tmp_path)
    with journal.Journal(tmp_path, "sft", "sft/loss", config(3, wandb="project"), log, start=0) as book:
        book.write(1, {"sft/loss": 2.0})
    assert seen == [(1, {"sft/loss": 2.0}), "finished"]


def test_weights_and_biases_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setattr(journal.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"run\.wandb=project: the package wandb is not installed"):
        journal.Journal(tmp_path, "sft", "sft/loss", config(3, wandb="project"), runlog.RunLog(tmp_path), start=0)


def test_values_that_are_no_numbers_are_null(tmp_path):
    with metrics.JsonlWriter(tmp_path / "metrics.jsonl") as writer:
        writer.write(1, VALUES)
    assert metrics.read_lines(tmp_path / "metrics.jsonl") == [{"step": 1, **VALUES, "sft/grad_norm": None}]


def test_a_disk_that_takes_no_more_lines():
    with (
        metrics.JsonlWriter(runlog.Path("/dev/full")) as writer,
        pytest.raises(InputError, match="/dev/full: cannot be written: No space left on device"),
    ):
        writer.write(1, VALUES)


# ---- the terminal ----


def test_the_table_on_a_terminal_and_the_line_elsewhere():
    screen = rich.console.Console(force_terminal=True, width=100, file=open(os.devnull, "w"))  # noqa: SIM115
    shown = board.Board(screen, "sft", "sft/loss", start=10, total=20)
    with shown, screen.capture() as captured:
        screen.print(shown._render(15, VALUES))
    text = captured.get()
    for part in ("sft: 15/20 sft/loss 1.5", "s/step", "left", "loss 1.5", "grad_norm nan", "format/visual_QA 0.25"):
        assert part in text, part


def test_time_left_by_hand(monkeypatch):
    """Five steps since the start took 10 s: the 1800 that are left take an hour."""
    now = iter([100.0, 110.0])
    monkeypatch.setattr(board.time, "monotonic", lambda: next(now))
    with board.Board(rich.console.Console(stderr=True), "sft", "sft/loss", start=10, total=1815) as shown:
        assert shown.line(15, VALUES) == "sft: 15/1815 sft/loss 1.5, 2.00 s/step, 1:00:00 left"


def test_progress_has_a_rate_and_the_time_left(monkeypatch, capsys):
    """20 of 50 files in 4 s."""
    now = iter([100.0, 104.0])
    monkeypatch.setattr(metrics.time, "monotonic", lambda: next(now))
    with metrics.Progress("check", 50) as bar:
        bar.update(20, "1 failed")
    assert capsys.readouterr().err == "check: 20/50, 1 failed, 5/s, 6 s left\n"


def test_the_log_has_no_terminal_codes(tmp_path, policy):
    log = runlog.RunLog(tmp_path)
    log.console = rich.console.Console(force_terminal=True, file=open(os.devnull, "w"))  # noqa: SIM115
    loop.train(FakeStage(), state_lib.make_state(policy, config(3)), policy, loop.Run(tmp_path, config(3), {}, log))
    text = (tmp_path / runlog.LOG).read_text()
    assert "\x1b" not in text
    assert "sft: 2/3 sft/loss 5," in text and "sft: 3 steps, sft/loss 3.333, saved in" in text


# ---- the loop ----


def test_checkpoints_fall_on_their_steps_and_the_best_stays(tmp_path, policy):
    def evaluate(policy, done):
        return {"eval/accuracy": {2: 0.5, 4: 0.9, 6: 0.7, 8: 0.8}[done]} if done % 2 == 0 else {}

    settings = config(9, save_every=3, best="eval/accuracy", keep_last=1)
    train(tmp_path, policy, settings, evaluate=evaluate)
    assert checkpoint.finished(tmp_path / "checkpoints") == [4, 9]
    assert checkpoint.read_record(tmp_path / "checkpoints", 4).score == 0.9


def test_patience_ends_the_run_and_a_resume_makes_no_more_steps(tmp_path, policy):
    settings = config(20, best="sft/loss", best_is="highest", patience=3)  # the loss falls: the first is the best
    train(tmp_path, policy, settings)
    assert [line["step"] for line in metrics.read_lines(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    train(tmp_path, policy, settings, start=4)
    assert len(metrics.read_lines(tmp_path / "metrics.jsonl")) == 4


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_the_step_and_stops(number, tmp_path, policy):
    stage = FakeStage(lambda step: os.kill(os.getpid(), number) if step == 2 else None)
    handler = signal.getsignal(number)
    with pytest.raises(Stopped, match=f"{number.name}: 3 of 9 steps are saved in .*--resume"):
        train(tmp_path, policy, config(9), stage=stage)
    assert checkpoint.finished(tmp_path / "checkpoints") == [3]
    assert checkpoint.read_record(tmp_path / "checkpoints", 3).memory == {"at": 3}
    assert signal.getsignal(number) is handler


SECOND_SIGNAL = """
import os, signal, time
from openo3_jax.train import signals
with signals.StopSignals(lambda line: print(line, flush=True)):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.5)
    signal.pthread_sigmask(signal.SIG_BLOCK, [])
    os.kill(os.getpid(), signal.SIGTERM)
    while True:
        time.sleep(10)
"""


def test_a_second_signal_leaves_at_once():
    done = subprocess.run([sys.executable, "-c", SECOND_SIGNAL], capture_output=True, text=True, timeout=60)
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    assert done.stdout == "SIGTERM: saving after this step; a second signal leaves at once\n"


def test_a_last_checkpoint_that_cannot_be_written_is_an_error(tmp_path, policy):
    (tmp_path / "checkpoints").symlink_to("/sys/kernel/checkpoints")
    with pytest.raises(InputError, match=r"checkpoint 2 cannot be written: .*; there is no earlier one"):
        train(tmp_path, policy, config(2))


def test_a_thousand_steps_leave_nothing_behind(tmp_path, policy):
    """Threads, open files, memory and programs after 1,000 steps are those after 100."""
    seen = {}

    def look(step):
        if step in (100, 999):
            seen[step] = (threading.active_count(), len(os.listdir("/proc/self/fd")))

    stage = FakeStage(look)
    train(tmp_path, policy, config(1000, save_every=50, tensorboard=True), stage=stage)
    lines = metrics.read_lines(tmp_path / "metrics.jsonl")
    assert seen[999] <= tuple(count + 2 for count in seen[100])  # a checkpoint may be on its way in one of them
    assert lines[999]["time/programs"] == lines[100]["time/programs"]
    assert lines[999]["memory/host_gib"] - lines[100]["memory/host_gib"] < 0.03
    assert checkpoint.finished(tmp_path / "checkpoints") == [950, 1000]


# ---- profiling ----


def test_a_trace_of_the_wished_steps(tmp_path, policy):
    this = loop.Run(tmp_path, config(4), {}, runlog.RunLog(tmp_path), 0, profiling.parse_steps("2:3"))
    loop.train(FakeStage(), state_lib.make_state(policy, config(4)), policy, this)
    names = {path.suffix for path in (tmp_path / "profile").rglob("*") if path.is_file()}
    assert {".pb", ".gz"} <= names, names


@pytest.mark.parametrize("text", ["", "3", "3:", "0:2", "4:3", "a:b", "-1:2"])
def test_steps_that_are_none(text):
    with pytest.raises(InputError, match="expected the first and the last step to trace, such as 10:15"):
        profiling.parse_steps(text)


def test_rates_by_hand(monkeypatch):
    assert profiling.rates(10**12, 100, 2.0) == {"time/model_tflops_per_s": 0.5, "time/tokens_per_s": 50.0}
    monkeypatch.setattr(
        profiling.jax, "devices", lambda: [types.SimpleNamespace(device_kind="NVIDIA H100 80GB HBM3")] * 2
    )
    assert profiling.rates(989 * 10**12, 1, 1.0)["time/mfu"] == pytest.approx(0.5)


def test_operations_of_a_step(policy):
    """Three forwards for an update; for stage two sampling, update and what is scored besides: 4 + 2."""
    one = profiling.sft_flops(policy.config, [(40, 10, [])])
    assert one > 0 and profiling.sft_flops(policy.config, [(40, 10, [])] * 2) == 2 * one
    groups = [(40, [10, 12], [])]
    base = profiling.gspo_flops(policy.config, groups, scored=0)
    assert profiling.gspo_flops(policy.config, groups, scored=2) * 4 == base * 6
    assert np.isfinite(base)

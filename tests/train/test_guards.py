"""Bad numbers stop or skip and can be run again; spikes, stuck threads and the best value are seen; numbers by hand."""

import dataclasses
import json
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_runs

from openo3_jax import cli
from openo3_jax.config import OptimizerConfig, RunConfig
from openo3_jax.errors import InputError
from openo3_jax.models import vision
from openo3_jax.rewards.own import make_reward
from openo3_jax.train import checkpoint, gspo, guards, replay, resume, sft, watchdog
from openo3_jax.train import state as state_lib
from openo3_jax.train.best import Best


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny_runs.prepare(tmp_path_factory.mktemp("guards"))


MARK = np.random.default_rng(0).integers(0, 256, 1176, np.uint8)


@pytest.fixture
def poison(monkeypatch):
    """One patch in the batch of one step is no number once it is normalised, then and whenever it is run again."""
    normalise = vision.normalise

    def overflow(patches, config):
        return jnp.where((patches == MARK).all(-1, keepdims=True), jnp.nan, normalise(patches, config))

    monkeypatch.setattr(vision, "normalise", overflow)

    def poison(step: int) -> None:
        inner = tiny_runs.pipeline.SFTBatches.__call__

        def call(self, wanted: int):
            batch = inner(self, wanted)
            if wanted != step:
                return batch
            patches = batch.vision.patches.copy()
            patches[0, 0] = MARK
            return dataclasses.replace(batch, vision=dataclasses.replace(batch.vision, patches=patches))

        monkeypatch.setattr(tiny_runs.pipeline.SFTBatches, "__call__", call)

    return poison


def run_sft(root, out, one_device, *, resume=False, **run):
    config = dataclasses.replace(tiny_runs.SFT, steps=4, run=dataclasses.replace(tiny_runs.RUN, **run))
    return sft.run_sft(model=root / "model", data=root / "data", out=out, config=config, mesh=one_device, resume=resume)


def read(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_loss_that_is_not_finite_stops_is_dumped_and_runs_again(root, tmp_path, one_device, poison, capsys):
    poison(2)
    out = tmp_path / "run"
    with pytest.raises(InputError, match=r"sft: step 3 has loss nan, .* openo3 replay .*step-3-0 runs it again"):
        run_sft(root, out, one_device)
    assert [line["step"] for line in read(out)] == [1, 2]
    report = replay.replay(out / replay.DUMPS / "step-3-0", mesh=one_device)
    assert "again: loss nan" in report
    assert "inputs: all finite" in report and "weights: all finite" in report
    assert "gradients: not finite in" in report
    # The same run may go on without that batch: the weights were never touched by it.
    policy = run_sft(root, out, one_device, resume=True, nonfinite="skip")
    lines = read(out)
    assert [line["guard/skipped"] for line in lines] == [0, 0, 1, 0]
    assert lines[2]["sft/loss"] is None and np.isfinite(lines[3]["sft/loss"])
    assert all(np.isfinite(leaf).all() for leaf in map(np.asarray, jax.tree.leaves(policy.params)))
    capsys.readouterr()
    assert cli.main(["replay", str(out / replay.DUMPS)]) == 2
    assert "holds no dump.json" in capsys.readouterr().err


def test_a_skipped_update_changes_nothing(root, tmp_path, one_device, poison):
    poison(2)
    config = dataclasses.replace(tiny_runs.SFT, steps=4)
    policy = run_sft(root, tmp_path, one_device, nonfinite="skip", keep_last=9)
    abstract = state_lib.resume_state(policy, config)
    two, three, four = (checkpoint.restore(tmp_path / "checkpoints", step, abstract) for step in (2, 3, 4))
    assert [int(state.step) for state in (two, three, four)] == [2, 2, 3]
    leaves = [jax.tree.leaves((state.params, state.opt_state)) for state in (two, three, four)]
    assert all((a == b).all() for a, b in zip(leaves[0], leaves[1], strict=True))
    assert not all((a == b).all() for a, b in zip(leaves[1], leaves[2], strict=True))


@pytest.mark.filterwarnings("error:A large amount of constants")
def test_gspo_dumps_its_minibatch(root, tmp_path, one_device, small_constants):
    """After the first minibatch the weights are beyond all numbers; the second one cannot be computed.

    What runs it again is given the reference: closed over it would be a part of the program.
    """
    config = dataclasses.replace(tiny_runs.GSPO, optimizer=OptimizerConfig(learning_rate=1e37))
    places = {"model": root / "model", "data": root / "data", "out": tmp_path / "run"}
    with pytest.raises(InputError, match=r"gspo: step 1 has .* openo3 replay .*step-1-0"):
        gspo.run_gspo(**places, config=config, mesh=one_device, reward=make_reward(tiny_runs.reward))
    report = replay.replay(tmp_path / "run" / replay.DUMPS / "step-1-0", mesh=one_device)
    assert report.startswith("gspo, step 1") and "gradients: not finite in" in report


def test_replay_wants_a_dump(tmp_path):
    with pytest.raises(InputError, match=r"holds no dump\.json; expected a directory such as"):
        replay.replay(tmp_path)
    (tmp_path / "dumps" / "step-1-0").mkdir(parents=True)
    (tmp_path / "dumps" / "step-1-0" / replay.ABOUT).write_text("{}")
    with pytest.raises(InputError, match="is no run; a dump needs the model files of its run"):
        replay.replay(tmp_path / "dumps" / "step-1-0")
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_5_vl"}')
    with pytest.raises(InputError, match="of a run, not that of a model"):
        replay.replay(tmp_path / "dumps" / "step-1-0")


def test_dumps_after_the_step_go(tmp_path):
    for name in ("step-3-0", "step-12-0", "step-12-1"):
        (tmp_path / replay.DUMPS / name).mkdir(parents=True)
    replay.remove_after(tmp_path, 11)
    assert [at.name for at in (tmp_path / replay.DUMPS).iterdir()] == ["step-3-0"]


# ---- spikes ----


@pytest.mark.parametrize(("value", "mark"), [(2.75, 0.0), (2.85, 1.0), (-9.0, 0.0), (np.nan, 0.0)])
def test_spikes_by_hand(value, mark):
    """Median 2.0, median deviation 0.1: beyond 2.8 is a spike."""
    spikes = guards.Spikes("sft", [{"sft/loss": loss, "sft/grad_norm": 1.0} for loss in [1.9, 2.1] * 5])
    assert spikes({"sft/loss": value, "sft/grad_norm": 1.01}) == {
        "guard/loss_spike": mark,
        "guard/grad_norm_spike": 0.0,
    }


def test_the_first_steps_are_no_spikes():
    spikes = guards.Spikes("sft")
    assert not any(spikes({"sft/loss": 10.0**step})["guard/loss_spike"] for step in range(guards.FEWEST))
    assert spikes({"sft/loss": 1e30})["guard/loss_spike"]


def test_spikes_are_the_same_after_a_resume():
    draw = np.random.default_rng(0)
    lines = [{"sft/loss": float(value), "sft/grad_norm": None} for value in draw.lognormal(size=200)]
    whole = guards.Spikes("sft")
    expected = [whole(line) for line in lines]
    assert any(mark["guard/loss_spike"] for mark in expected)
    resumed = guards.Spikes("sft", lines[:120])
    assert [resumed(line) for line in lines[120:]] == expected[120:]


# ---- the best value ----


def test_best_by_hand():
    settings = RunConfig(best="eval/loss", best_is="lowest", patience=2)
    values = [{"eval/loss": 3.0}, {}, {"eval/loss": 2.0}, {"eval/loss": 2.0}, {"eval/loss": None}, {"eval/loss": 2.5}]
    best = Best(settings)
    seen = [(best(value), best.is_new, best.is_over) for value in values]
    assert seen == [
        (-3.0, True, False),
        (None, False, False),
        (-2.0, True, False),
        (-2.0, False, False),
        (None, False, False),
        (-2.5, False, True),
    ]
    assert Best(settings, values).is_over and not Best(settings, values[:4]).is_over


def test_patience_needs_a_metric():
    with pytest.raises(InputError, match=r"name it by run\.best"):
        RunConfig(patience=1)


# ---- the watchdog ----


def test_a_stuck_thread_is_shown_once():
    said = []

    def stuck_in_here(over):
        over.wait()

    over = threading.Event()
    loader = threading.Thread(target=stuck_in_here, args=(over,), name="loader")
    loader.start()
    with watchdog.Watchdog(0.2, said.append) as dog:
        for _ in range(10):
            dog.beat("making step 7")
            time.sleep(0.03)
        assert not said
        time.sleep(0.8)
    over.set()
    loader.join()
    assert len(said) == 1
    assert said[0].startswith("no progress for 0 s while making step 7; threads:\nthread ")
    assert "thread loader:" in said[0] and "in stuck_in_here" in said[0] and "thread MainThread:" in said[0]
    assert "thread watchdog" not in said[0]


def test_a_first_difference_names_the_field():
    assert resume.first_difference({"a": {"b": 1}}, {"a": {"b": 2}}, "config") == (
        "config.a.b is 1 in the checkpoint and 2 now"
    )
    assert resume.first_difference({"a": [1]}, {"a": [1]}, "config") is None

"""Runs of stage two on rendered clips: what they write, and what stops them."""

import dataclasses
import json

import numpy as np
import pytest

from openo3_jax import cli, recipes, tiny
from openo3_jax.config import OptimizerConfig, SamplingConfig, VideoConfig
from openo3_jax.data import samples as samples_lib
from openo3_jax.data import synthetic
from openo3_jax.errors import InputError
from openo3_jax.policy import load_pretrained
from openo3_jax.rewards.own import make_reward
from openo3_jax.train import gspo, run

CONFIG = dataclasses.replace(
    recipes.gspo_tiny(),
    steps=3,
    batch_size=6,  # all records in every step
    minibatches=2,
    sampling=SamplingConfig(num_samples=2, max_new_tokens=16),
    old_logp="recompute",
    importance_cap=2.0,
    optimizer=OptimizerConfig(learning_rate=1e-3),
    video=VideoConfig(max_frames=4, min_pixels=4 * 28 * 28, max_pixels=4 * 28 * 28),
)

STEPS = 6


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("gspo")
    synthetic.write_dataset(root / "data", num_train=6, seed=0)
    tiny.init_tiny(root / "model", hidden_size=64, layers=2)
    return root


@pytest.fixture(scope="module")
def trained(root, one_device):
    """Six steps over six records, one of each task; the picture of the visual one vanishes after the first.

    Media are read ahead, at most of the three steps that follow; the last ones miss it.
    """
    picture = next((root / "data" / "videos" / "gqa").iterdir())
    content = picture.read_bytes()

    def vanish(done, values):
        if done == 1:
            picture.unlink()
        return False

    config = dataclasses.replace(CONFIG, steps=STEPS, max_bad_fraction=0.2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samples_lib, "CACHE_BYTES", 0)  # else what was read once is never missed
        policy = gspo.run_gspo(
            model=root / "model", data=root / "data", out=root / "run", config=config, mesh=one_device, stop=vanish
        )
    picture.write_bytes(content)
    lines = {name: (root / "run" / name).read_text().splitlines() for name in ("metrics.jsonl", gspo.SAMPLES)}
    return policy, *([json.loads(line) for line in part] for part in lines.values())


def test_metrics_of_a_run(trained):
    _, metrics, _ = trained
    assert [line["step"] for line in metrics] == list(range(1, STEPS + 1))
    expected = {
        "loss",
        "kl",
        "entropy",
        "clip_fraction",
        "ratio",
        "grad_norm",
        "length",
        "cut",
        "all_wrong",
        "all_right",
    }
    for line in metrics:
        assert {f"gspo/{name}" for name in expected} <= set(line)
        assert {"time/data_s", "time/rollout_s", "time/reward_s", "time/update_s"} <= set(line)
        assert line["gspo/logp_gap_max"] < 1e-4
        assert None not in line.values()
    assert any(name.startswith("reward/format/") for name in metrics[0])


def test_samples_can_be_scored_again(trained, root, capsys):
    """`openo3 score` on what the run wrote gives the rewards that the run saw."""
    _, metrics, samples = trained
    assert {sum(line["step"] == step for line in samples) for step in range(1, STEPS + 1)} == {12, 10}
    for step in range(1, STEPS + 1):
        totals = [line["total"] for line in samples if line["step"] == step]
        assert metrics[step - 1]["reward/total"] == pytest.approx(np.mean(totals), abs=1e-6)
    assert cli.main(["score", str(root / "run" / gspo.SAMPLES), "--json", str(root / "scores.json")]) == 0
    again = json.loads((root / "scores.json").read_text())["rows"]
    np.testing.assert_allclose([row["total"] for row in again], [line["total"] for line in samples], atol=1e-6)
    capsys.readouterr()


def test_a_record_whose_picture_vanished_is_skipped_and_named(trained, root):
    _, metrics, samples = trained
    bad = [json.loads(line) for line in (root / "run" / gspo.BAD_SAMPLES).read_text().splitlines()]
    first = bad[0]["step"]
    assert 2 <= first <= 5
    assert [line["data/bad_records"] for line in metrics] == [float(step >= first) for step in range(1, STEPS + 1)]
    assert [(line["step"], line["index"]) for line in bad] == [(step, 1) for step in range(first, STEPS + 1)]
    assert "gqa" in bad[0]["error"]
    for step in range(1, STEPS + 1):
        seen = {line["record"] for line in samples if line["step"] == step}
        assert seen == ({0, 2, 3, 4, 5} if step >= first else {0, 1, 2, 3, 4, 5})


def test_the_run_can_be_read_back(trained, root, one_device):
    policy, _, _ = trained
    again = run.load(root / "run", mesh=one_device)
    np.testing.assert_array_equal(
        again.params["text"]["embed_tokens"]["weight"][...], policy.params["text"]["embed_tokens"]["weight"][...]
    )
    start = load_pretrained(root / "model", mesh=one_device)
    moved = np.abs(
        np.asarray(again.params["text"]["norm"]["weight"][...]) - start.params["text"]["norm"]["weight"][...]
    )
    assert moved.max() > 0


def test_groups_that_are_all_cut_are_counted_and_left_out(root, one_device, tmp_path):
    """Random weights never stop within two tokens: with cut="drop" nothing is learned, and the log says so."""
    sampling = SamplingConfig(num_samples=2, max_new_tokens=2)
    config = dataclasses.replace(CONFIG, steps=1, cut="drop", sampling=sampling)
    policy = gspo.run_gspo(
        model=root / "model", data=root / "data", out=tmp_path / "run", config=config, mesh=one_device
    )
    values = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert values["gspo/cut"] == 1.0 and values["gspo/kept"] == 0.0 and values["gspo/skipped_updates"] == 2.0
    start = load_pretrained(root / "model", mesh=one_device)
    np.testing.assert_array_equal(
        policy.params["text"]["norm"]["weight"][...], start.params["text"]["norm"]["weight"][...]
    )


def refuse(root, tmp_path, message, *, config=CONFIG, **options):
    with pytest.raises(InputError, match=message):
        gspo.run_gspo(
            **{"model": root / "model", "data": root / "data", "out": tmp_path / "run"} | options, config=config
        )


def test_no_records(root, tmp_path):
    (tmp_path / "json_data").mkdir()
    (tmp_path / "json_data" / "STGR-RL.json").write_text("[]")
    refuse(root, tmp_path, "STGR-RL.json holds no records", data=tmp_path)
    assert not (tmp_path / "run").exists()


def test_too_many_bad_records(root, tmp_path, one_device):
    picture = next((root / "data" / "videos" / "gqa").iterdir())
    content = picture.read_bytes()
    picture.unlink()
    try:
        refuse(root, tmp_path, "1 records cannot be used, more than max_bad_fraction=0.0", mesh=one_device)
    finally:
        picture.write_bytes(content)


def test_unknown_rules_are_found_before_anything_is_read(root, tmp_path):
    config = dataclasses.replace(CONFIG, rules="paper,gates=1")
    refuse(root, tmp_path, "change 'gates=1': no field 'gates'", config=config, model=tmp_path / "none")
    assert not (tmp_path / "run").exists()


def test_a_reward_that_is_no_number_stops_the_run(root, tmp_path, one_device):
    reward = make_reward(lambda records, completions: [float("nan")] * len(records))
    refuse(root, tmp_path, "reward: nan for record", mesh=one_device, reward=reward)


def test_the_command_line_says_it_in_one_line(root, tmp_path, capsys):
    arguments = ["gspo", "gspo_tiny", "--model", str(root / "model"), "--data", str(root / "data")]
    assert cli.main([*arguments, "--out", str(tmp_path), "--sampling.num-samples", "1"]) == 2
    assert capsys.readouterr().err.count("\n") == 1

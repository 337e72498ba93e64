"""Arms of stage two: what is said of their curves, what is refused, and how an interrupted comparison goes on."""

import dataclasses
import json
import os
import signal

import numpy as np
import pytest

from openo3_jax import cli, recipes, tiny
from openo3_jax.config import SamplingConfig
from openo3_jax.data import synthetic
from openo3_jax.demo import story
from openo3_jax.errors import InputError, Stopped
from openo3_jax.experiments import ablation, sweep
from openo3_jax.rewards import rules
from openo3_jax.rewards.score import Rewards

pytestmark = pytest.mark.timeout(900)  # programs of several runs are compiled in one test

STEPS = 2
ARMS = {name: ablation.ARMS[name] for name in ("adaptive, gated (paper)", "no gate")}


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """What the experiments read of a demo, from random weights."""
    root = tmp_path_factory.mktemp("start")
    tiny.init_tiny(root / "sft_model", hidden_size=64, layers=2)
    for name, seed in (("data", 0), ("held_out", 1)):
        synthetic.write_dataset(root / name, num_train=6, seed=seed, config=story.WORLD)
    return root


@pytest.fixture
def quick(monkeypatch):
    recipe = dataclasses.replace(
        recipes.demo_gspo(), batch_size=2, sampling=SamplingConfig(num_samples=2, max_new_tokens=8)
    )
    monkeypatch.setattr(recipes, "demo_gspo", lambda *, steps: dataclasses.replace(recipe, steps=steps))


def compare(start, out, arms=ARMS, **changes):
    how = {"steps": STEPS, "seeds": 1, "prompts": 6, "measure_every": 1}
    return ablation.compare(arms, start=start, out=out, **how | changes)


# ---- going on ----


def test_an_interrupted_comparison_goes_on_and_measures_nothing_twice(start, quick, tmp_path, monkeypatch):
    sample, asked = ablation.sampled.sample_rewards, []

    def sample_rewards(*args, stop_at=None, **kwargs):
        asked.append(args)
        if len(asked) == stop_at:
            os.kill(os.getpid(), signal.SIGINT)
        found = sample(*args, **kwargs)
        found.rewards.terms["thk_spatial"] += len(asked)  # random weights earn nothing: tell the measurements apart
        return found

    out = tmp_path / "out"
    with monkeypatch.context() as patch:  # the start, both points of the first run, one of the second
        patch.setattr(ablation.sampled, "sample_rewards", lambda *a, **k: sample_rewards(*a, stop_at=4, **k))
        with pytest.raises(Stopped, match=r"no-gate-seed0: stopped, .*the same command goes on"):
            compare(start, out)
    kept = {file: file.read_bytes() for file in out.glob("*.json")}
    assert sorted(file.name for file in kept) == ["adaptive-gated-paper-seed0.json", "settings.json", "start.json"]
    monkeypatch.setattr(ablation.sampled, "sample_rewards", sample_rewards)
    found = compare(start, out)
    assert len(asked) == 5
    assert [found[arm][0].steps for arm in ARMS] == [[0, 1, 2]] * 2
    assert [found[arm][0].values[:, 1].round().tolist() for arm in ARMS] == [[1, 2, 3], [1, 4, 5]]
    assert kept == {file: file.read_bytes() for file in kept}
    again = compare(start, out)
    assert len(asked) == 5  # nothing is measured twice
    for arm in ARMS:
        np.testing.assert_array_equal(again[arm][0].values, found[arm][0].values)
    settings = json.loads((out / "no-gate-seed0" / "config.json").read_text())
    assert settings["config"]["rules"] == "paper,gate_s=inf"
    assert json.loads((out / "no-gate-seed0.json").read_text())["rules"] == ["gate_s=inf"]


def test_each_arm_is_trained_by_its_own_rules(start, quick, tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(ablation.sampled, "sample_rewards", lambda *_, **__: rewards())
    policy = ablation.policy_lib.load_pretrained(start / "sft_model")

    def run_gspo(*, out, evaluate, config, **_):
        given.append(rules.get_rules(config.rules))
        lines = [{"step": step, **evaluate(policy, step)} for step in range(1, config.steps + 1)]
        out.mkdir()
        (out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    monkeypatch.setattr(ablation.gspo, "run_gspo", run_gspo)
    found = compare(start, tmp_path / "out", seeds=2, steps=5, measure_every=2)
    assert given == [arm for arm in ARMS.values() for _ in range(2)]
    assert [curve.steps for curves in found.values() for curve in curves] == [[0, 2, 4, 5]] * 4


def rewards():
    values = {term: np.ones(1, np.float32) for term in ablation.TERMS}
    applies = {term: np.ones(1, bool) for term in ablation.TERMS}
    texts, one = [[""]], np.ones((1, 1), np.float32)
    return ablation.sampled.SampledRewards(one, one[0], texts, Rewards(values, applies, one[0]))


# ---- what is refused ----


@pytest.mark.parametrize("verb", ["ablation", "sweep"])
@pytest.mark.parametrize(("flag", "value"), [("--seeds", 0), ("--prompts", 0), ("--prompts", -3), ("--steps", 0)])
def test_numbers_below_one_are_refused_before_anything_is_loaded(verb, flag, value, tmp_path, capsys):
    words = ["--start", tmp_path / "nothing", "--out", tmp_path / "out", flag, value]
    assert cli.main(["experiment", verb, *map(str, words)]) == 2
    assert capsys.readouterr().err == f"openo3: {flag} {value}: expected at least 1\n"
    assert not (tmp_path / "out").exists()


def test_a_start_that_is_no_demo_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"sft_model: no such directory; expected --start to be what `openo3 demo`"):
        compare(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "named"), [({"steps": 3}, "steps=2"), ({"seeds": 2}, "seeds=1"), ({"prompts": 5}, "prompts=6")]
)
def test_an_out_of_other_settings_is_refused(changes, named, start, quick, tmp_path, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(ablation.policy_lib, "load_pretrained", stop)
    with pytest.raises(KeyboardInterrupt):
        compare(start, tmp_path / "out")
    with pytest.raises(InputError, match=f"out: was begun with {named}, now it is "):
        compare(start, tmp_path / "out", **changes)
    with pytest.raises(InputError, match=r"was begun with arm no gate=\['gate_s=inf'\], now it is None"):
        compare(start, tmp_path / "out", arms={"adaptive, gated (paper)": rules.PAPER})


def test_another_start_or_a_foreign_directory_is_refused(start, quick, tmp_path, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(ablation.policy_lib, "load_pretrained", stop)
    with pytest.raises(KeyboardInterrupt):
        compare(start, tmp_path / "out")
    other = tmp_path / "other"
    other.symlink_to(start)
    with pytest.raises(KeyboardInterrupt):  # the same one by another name
        compare(other, tmp_path / "out")
    tiny.init_tiny(tmp_path / "demo" / "sft_model", hidden_size=64, layers=1)
    for name in ("data", "held_out"):
        (tmp_path / "demo" / name).symlink_to(start / name)
    with pytest.raises(InputError, match="was begun with start="):
        compare(tmp_path / "demo", tmp_path / "out")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="holds something else"):
        compare(start, tmp_path / "notes")
    assert [file.name for file in (tmp_path / "notes").iterdir()] == ["thesis.txt"]


# ---- what is said ----


def curves(*ends):
    """One for each end, (temporal, spatial), all from 0.1 and 0.2."""
    return [ablation.Curve([0, 4], np.array([[0.1, 0.2], end])) for end in ends]


@pytest.mark.parametrize(
    ("paper", "verdict"),
    [
        (
            (0.61, 0.59),
            r"+0.200 against the best other, no gate; the paper's choice is ahead by more than seeds scatter",
        ),
        (
            (0.31, 0.29),
            r"-0.100 against the best other, no gate; the paper's choice is behind by more than seeds scatter",
        ),
        ((0.60, 0.24), r"+0.020 against the best other, no gate; the difference is within the scatter of seeds"),
    ],
)
def test_the_verdict_is_that_of_the_curves(paper, verdict):
    """Two seeds each: the other arms end at 0.3 and, the better one, at 0.4; of the second term all are alike."""
    found = {
        "paper": curves(*((value, 0.5) for value in paper)),
        "sigma 1 s": curves((0.29, 0.5), (0.31, 0.5)),
        "no gate": curves((0.41, 0.5), (0.39, 0.5)),
    }
    start, first, *_, temporal, spatial = ablation._sentences(found).splitlines()
    assert start == "start: thk_temporal_point 0.100, thk_spatial 0.200"
    assert first.startswith(f"paper: thk_temporal_point {np.mean(paper):.3f}, thk_spatial 0.500 (deviation ")
    assert temporal.startswith(f"thk_temporal_point: paper {verdict}")
    assert spatial.endswith("within the scatter of seeds (0.000)")


def test_one_seed_claims_nothing():
    found = {"paper": curves((0.9, 0.9)), "no gate": curves((0.1, 0.1))}
    lines = ablation._sentences(found).splitlines()[-2:]
    assert all(line.endswith("no gate; one seed does not tell how far seeds scatter") for line in lines)


# ---- rules and names ----


@pytest.mark.parametrize("arm", ablation.ARMS)
def test_what_is_written_of_an_arm_gives_its_rules(arm):
    assert rules.change_rules(rules.PAPER, ablation.rule_changes(ablation.ARMS[arm])) == ablation.ARMS[arm]


def test_the_sweep_runs_each_rule_set_once(tmp_path, monkeypatch):
    asked = {}

    def compare(arms, *, steps, measure_every, **_):
        asked.update(arms=arms, measured=(steps, measure_every))
        return {arm: curves((0.2, 0.1 * number)) for number, arm in enumerate(arms)}

    monkeypatch.setattr(ablation, "compare", compare)
    outcome = sweep.sweep(start=tmp_path, out=tmp_path, steps=20)
    arms = asked["arms"]
    assert len(arms) == len(set(arms.values())) == 13  # ten pairs of widths and four gates, the paper's in both
    assert len({ablation._run_name(arm, 0) for arm in arms}) == 13
    assert asked["measured"] == (20, 20)
    kept = json.loads((tmp_path / "sweep.json").read_text())
    for arm, found in kept["arms"].items():
        assert rules.change_rules(rules.PAPER, found["rules"]) == arms[arm]
    assert kept["arms"]["sigma 4 to 1 s, gate 3 s"]["rules"] == []
    assert kept["start"] == pytest.approx(0.15)
    assert outcome.text.startswith("start: 0.150\n") and "best: sigma 4 to 1 s, gate inf s" in outcome.text
    assert (tmp_path / "sweep.png").is_file()


def test_the_ablation_keeps_its_table_of_arms(tmp_path, monkeypatch):
    found = {arm: curves((0.2, 0.3), (0.3, 0.4)) for arm in ablation.ARMS}
    monkeypatch.setattr(ablation, "compare", lambda *_, **__: found)
    assert ablation.ablation(start=tmp_path, out=tmp_path).holds
    kept = json.loads((tmp_path / "ablation.json").read_text())["arms"]
    assert kept["sigma 1 s"]["rules"] == ["sigma_start_s=1.0"]  # the paper's ends at 1 s
    assert kept["no gate"]["curves"][1] == {"steps": [0, 4], "values": [[0.1, 0.2], [0.3, 0.4]]}
    assert (tmp_path / "ablation.png").is_file()

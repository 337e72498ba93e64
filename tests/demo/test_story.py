"""The demo's stages: each is made once, goes on after an interruption, and its claims are those of the numbers."""

import dataclasses
import errno
import shutil
import tempfile

import av
import numpy as np
import pytest

from openo3_jax import cli, tiny
from openo3_jax.config import RunConfig, SamplingConfig
from openo3_jax.demo import base, held_out, story
from openo3_jax.errors import InputError, Stopped
from openo3_jax.evals import metrics, records, store
from openo3_jax.train import checkpoint

pytestmark = pytest.mark.timeout(900)  # both stages are compiled in the first one's set-up


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A plan of seconds, from random weights."""
    directory = tmp_path_factory.mktemp("base") / "model"
    tiny.write_random(directory, base.make_config, seed=0)
    plan = story.PLANS["quick"]
    gspo = dataclasses.replace(
        plan.gspo,
        steps=2,
        batch_size=2,
        sampling=SamplingConfig(num_samples=2, max_new_tokens=8),
        run=RunConfig(save_every=1),
    )
    sft = dataclasses.replace(plan.sft, steps=2, batch_size=2, run=RunConfig(save_every=1))
    return directory, story.Plan(sft, gspo, clips={"sft": 6, "rl": 6}, held_out=6, samples=2)


@pytest.fixture
def set_up(small, monkeypatch):
    directory, plan = small
    monkeypatch.setattr(story, "BASE", directory)
    monkeypatch.setitem(story.PLANS, "quick", plan)


@pytest.fixture(scope="module")
def made(small, tmp_path_factory):
    directory, plan = small
    out = tmp_path_factory.mktemp("demo") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(story, "BASE", directory)
        patch.setitem(story.PLANS, "quick", plan)
        outcome = story.run_demo(out, size="quick")
    return out, outcome


def test_everything_is_there(made):
    out, outcome = made
    assert outcome.holds  # quick claims nothing
    for name in ("data", "held_out", "sft_model/model.safetensors", "model/model.safetensors", "report.html"):
        assert (out / name).exists(), name
    assert sorted(file.name for file in (out / "scores").iterdir()) == ["base.json", "gspo.json", "sft.json"]
    assert "best constant" in outcome.text and "FAILS" in outcome.text  # nothing was learned
    assert not [file for file in out.iterdir() if file.name.startswith(".")]


def test_called_again_it_makes_nothing_twice(made, set_up):
    out, outcome = made
    files = {file: file.stat().st_mtime_ns for file in out.rglob("*") if file.is_file() and file.name != "report.html"}
    assert story.run_demo(out, size="quick").text == outcome.text
    assert files == {file: file.stat().st_mtime_ns for file in files}


def test_another_size_or_a_foreign_directory_is_refused(made, set_up, tmp_path):
    with pytest.raises(InputError, match="was begun with size='quick', now it is 'demo'"):
        story.run_demo(made[0], size="demo")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="holds something else"):
        story.run_demo(tmp_path, size="quick")
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def test_an_interrupted_rendering_leaves_nothing(set_up, tmp_path, monkeypatch):
    def stop(root, **_):
        root.mkdir()
        (root / "half").write_text("")
        raise KeyboardInterrupt

    monkeypatch.setattr(story.synthetic, "write_dataset", stop)
    with pytest.raises(KeyboardInterrupt):
        story.run_demo(tmp_path / "run", size="quick")
    assert [file.name for file in (tmp_path / "run").iterdir()] == [store.SETTINGS]


def test_what_another_version_made_is_not_gone_on_with(made, set_up, monkeypatch):
    monkeypatch.setattr(story, "WORLD", dataclasses.replace(story.WORLD, fps=10))
    with pytest.raises(InputError, match=r"was begun with world\.fps=5, now it is 10"):
        story.run_demo(made[0], size="quick")


def test_killed_while_rendering_it_starts_anew_and_leaves_nothing(set_up, tmp_path, monkeypatch):
    out = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(story.shutil, "move", _interrupt)
        patch.setattr(story.tempfile, "TemporaryDirectory", _Kept)  # a killed process clears nothing away
        story.run_demo(out, size="quick")
    assert [file.name for file in out.iterdir() if file.name.startswith(".data-")]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(story.sft, "run_sft", _interrupt)
        story.run_demo(out, size="quick")
    assert sorted(file.name for file in out.iterdir()) == ["data", "held_out", store.SETTINGS]


def _interrupt(*_, **__):
    raise KeyboardInterrupt


class _Kept(tempfile.TemporaryDirectory):
    def cleanup(self):
        self._finalizer.detach()


def test_interrupted_within_both_stages_it_goes_on_to_the_same_end(made, set_up, tmp_path, monkeypatch):
    save, out = checkpoint.Checkpoints.save, tmp_path / "run"

    def save_and_stop(self, state, record):
        save(self, state, record)
        if record.step == 1:
            self.wait()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Checkpoints, "save", save_and_stop)
        for stage in ("sft", "gspo"):
            with pytest.raises(KeyboardInterrupt):
                story.run_demo(out, size="quick")
            assert (out / stage).is_dir() and not (out / "model").exists()
    assert (out / "sft_model").exists()
    assert story.run_demo(out, size="quick").text == made[1].text.replace(str(made[0]), str(out))


def test_interrupted_while_measuring_it_asks_only_those_that_are_left(made, set_up, tmp_path, monkeypatch):
    out = tmp_path / "run"
    shutil.copytree(made[0], out)
    (out / "scores" / "gspo.json").unlink()
    (out / "scores" / "sft.json").unlink()
    asked, judge = [], held_out.records.judge

    def judge_once(*args):
        asked.append(args)
        if len(asked) == 4:  # three of the first: two samples and the greedy answers
            raise KeyboardInterrupt
        return judge(*args)

    monkeypatch.setattr(held_out.records, "judge", judge_once)
    with pytest.raises(KeyboardInterrupt):
        story.run_demo(out, size="quick")
    assert story.run_demo(out, size="quick").text == made[1].text.replace(str(made[0]), str(out))
    assert len(asked) == 7


def test_a_signal_names_the_way_on(made, set_up, tmp_path, monkeypatch, capsys):
    def stopped(**_):
        raise Stopped("SIGTERM: go on with --resume")

    monkeypatch.setattr(story.sft, "run_sft", stopped)
    out = tmp_path / "run"
    assert cli.main(["demo", "--quick", "--out", str(out)]) == 75
    error = capsys.readouterr().err
    assert "the same command goes on" in error and "--resume" not in error


def test_a_full_disk_is_one_line_and_the_same_command_goes_on(set_up, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    for module, function in ((store, "replace_json"), (story.synthetic, "_save"), (story.sft, "run_sft")):
        with monkeypatch.context() as patch:
            patch.setattr(module, function, full)
            assert cli.main(["demo", "--quick", "--out", str(out)]) == 2
        assert "No space left on device; make room and start again" in capsys.readouterr().err
    assert sorted(file.name for file in out.iterdir()) == ["data", "held_out", store.SETTINGS]


@pytest.mark.parametrize(("size", "code"), [([], 3), (["--quick"], 0)])
def test_claims_that_fail_are_the_exit_code(made, set_up, size, code, tmp_path, monkeypatch):
    """The demo itself, from random weights: nothing was learned."""
    plan = story.PLANS["quick"]
    out = tmp_path / "run"
    shutil.copytree(made[0], out)
    monkeypatch.setitem(story.PLANS, "demo", plan)
    if not size:
        settings = store.read_json(out / store.SETTINGS)
        store.replace_json(out / store.SETTINGS, settings | {"size": "demo"})
    assert cli.main(["demo", *size, "--out", str(out)]) == code


def test_where_nothing_can_be_written_or_encoded(tmp_path, monkeypatch, capsys):
    assert cli.main(["demo", "--quick", "--out", "/sys/kernel/demo"]) == 2
    assert "/sys/kernel/demo" in capsys.readouterr().err
    assert cli.main(["demo", "--quick", "--full"]) == 2
    assert "choose one" in capsys.readouterr().err
    monkeypatch.setattr(av, "codecs_available", av.codecs_available - {"libx264"})
    assert cli.main(["demo", "--quick", "--out", str(tmp_path / "run")]) == 2
    assert "libx264" in capsys.readouterr().err
    assert [file.name for file in (tmp_path / "run").iterdir()] == [store.SETTINGS]


QUESTIONS = held_out.Questions(
    [{"task": "temporal QA", "question": "When?", "answer": f"[{i}.0, {i + 1}.0]", "num_objects": 1} for i in range(4)]
    + [
        {
            "task": "visual QA",
            "question": "Where?",
            "answer": f"<obj>a</obj><box>{box}</box>",
            "image_size": [40, 40],
            "image_size_refine": [40, 40],
            "num_objects": 2,
        }
        for box in ("[0,0,10,10]", "[30,30,40,40]")
    ],
    [],
)


def held(reward: float, tiou: float, viou: float) -> held_out.Held:
    columns = np.full((6, 4), np.nan)
    columns[:, 0], columns[:, 1], columns[:4, 2], columns[4:, 3] = 1.0, 0.5, tiou, viou
    rewards = np.full((6, 1), reward) + np.arange(6)[:, None] / 100
    return held_out.Held(rewards, drawn=columns, greedy=np.zeros(6), columns=columns, texts=[""] * 6)


@pytest.mark.parametrize(
    ("rewards", "tiou", "viou", "failing"),
    [
        ((0.1, 0.5, 0.8), 0.9, 1.0, ()),
        ((0.1, 0.8, 0.5), 0.9, 1.0, ("GSPO over SFT",)),
        ((0.5, 0.5, 0.8), 0.9, 1.0, ("SFT over base",)),
        ((0.1, 0.5, 0.8), 0.37, 1.0, ("temporal IoU",)),
        ((0.1, 0.5, 0.8), 0.38, 1.0, ()),
        ((0.1, 0.5, 0.8), 0.9, 0.99, ("visual IoU",)),
        ((0.1, 0.8, 0.8), 0.2, 0.0, ("GSPO over SFT", "visual IoU", "temporal IoU")),
    ],
)
def test_the_verdict_is_that_of_the_numbers(rewards, tiou, viou, failing):
    """The best span of these four earns 1/4: 1.5 times that is 0.375. The best box is one of the two and earns 1/2."""
    found = {name: held(reward, tiou, viou) for name, reward in zip(story.ROWS, rewards, strict=True)}
    text, holds = story._verdict(found, QUESTIONS, "demo")
    lines = [line for line in text.splitlines() if line.startswith("FAILS")]
    assert holds is (not failing) and len(text.splitlines()) == 4
    assert len(lines) == len(failing) and all(name in line for name, line in zip(failing, lines, strict=True))


def test_stage_one_is_not_blamed_for_a_task_it_was_not_taught():
    mcq = {"task": "temporal QA (MCQ)", "question": "When?\nA. x", "answer": "A\n[0.0, 9.0]", "num_objects": 1}
    asked = held_out.Questions([*QUESTIONS.records, mcq], [])
    found = {
        name: one._replace(
            reward=np.vstack([one.reward, [[0.0]]]),
            greedy=np.zeros(7),
            columns=np.vstack([one.columns, [0, 0, 0, np.nan]]),
        )
        for name, one in ((name, held(0.1 * i, 0.9, 1.0)) for i, name in enumerate(story.ROWS))
    }
    assert "temporal IoU of SFT in its own tasks 0.900" in story._verdict(found, asked, "demo")[0]
    assert found["sft"].values()["tiou"] == pytest.approx(0.9 * 4 / 5)  # the table has all


@pytest.mark.parametrize(("last", "word"), [(0.7, "holds"), (0.5, "FAILS"), (0.4, "FAILS")])
def test_the_long_demo_also_orders_mlgm(last, word):
    """Of the samples: greedy answers are the same here."""
    drawn = {name: held(0.5, tiou, 0.5).drawn for name, tiou in zip(story.ROWS, (0.1, 0.5, last), strict=True)}
    found = {name: held(0.5, 0.5, 0.5)._replace(drawn=columns) for name, columns in drawn.items()}
    lines = story._verdict(found, QUESTIONS, "full")[0].splitlines()
    assert [line.partition(":")[0] for line in lines if "mLGM rises" in line] == [word]
    assert "mLGM" not in story._verdict(found, QUESTIONS, "demo")[0]


def test_the_table_is_made_by_the_evaluations_own_measures(monkeypatch):
    """The demo has none of its own: another answer of `evals` is another number in the table."""
    for name, value in (("mam", 41.0), ("mlgm", 42.0)):
        monkeypatch.setattr(metrics, name, lambda _, value=value: value)
    values = held(0.5, 0.5, 0.5).values()
    assert (values["mam"], values["mlgm"]) == (41.0, 42.0)
    monkeypatch.setattr(metrics, "tiou", lambda *_: 0.123)
    monkeypatch.setattr(metrics, "is_well_formed", lambda _: 0.321)
    judged = records.judge(QUESTIONS.records[:1], ["<think></think><answer>[0.0, 1.0]</answer>"])
    assert judged[0].tolist()[0::2] == [0.321, 0.123]

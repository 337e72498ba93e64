"""`openo3 report RUN`: finished, unfinished and broken runs, of both stages; what is missing is said."""

import json
import math
import re
import shutil

import pytest

from openo3_jax import cli, tags, tasks
from openo3_jax.errors import InputError
from openo3_jax.report import run_files, run_report
from report import moving_square
from report.browser import Browser

RECORD = {
    "task": tasks.TEMPORAL_SPATIAL,
    "source": "STR_square",
    "question": "What moves?",
    "answer": "a blue square",
    "video_path": "clip.mp4",
    "key_frames": [{"idx": 0, "time": 3.0, "path": "a.jpg"}],
    "key_items": {"0": {moving_square.NAME: [moving_square.box_frac(30)]}},
    "image_size": [140, 112],
}
TEXT = tags.render_think_answer(tags.render_claim(moving_square.NAME, moving_square.box_px(30), 3.0), "a blue square")


def sample(step, completion=TEXT, total=3.0, **more):
    line = {"completion": completion, "step": step, "step_percent": step / 20, "group": f"{step}-0"}
    return RECORD | line | {"total": total, "advantage": 0.5, "finished": True} | more


def write_run(folder, stage="gspo", *, steps=20, done=20, samples=(), saved=True):
    folder.mkdir()
    config = {"steps": steps, "rules": "paper", "video": {"fps": 2.0, "max_frames": 16}}
    (folder / "config.json").write_text(json.dumps({"model": "base<b>", "stage": stage, "config": config}))
    lines = []
    for step in range(1, done + 1):
        values = {"gspo/loss": 0.0, "reward/total": step / 10, "gspo/length": 90.0, "gspo/kl": 0.001 * step}
        values |= {"gspo/clip_fraction": 0.1, "reward/thk_spatial/temporal-spatial_free-form_QA": step / 20}
        values |= {"reward/format/temporal-spatial_free-form_QA": 1.0, "time/total_s": 1.0}
        if stage == "sft":
            values = {"sft/loss": 2.0 / step, "sft/grad_norm": 1.0}
        lines.append(json.dumps({"step": step, **values}) + "\n")
    (folder / "metrics.jsonl").write_text("".join(lines))
    if samples:
        (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in samples))
    if saved:
        (folder / "checkpoints" / "20").mkdir(parents=True)
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("root")
    place = root / "videos" / "stgr" / "temporal_grounding" / "videos"
    place.mkdir(parents=True)
    moving_square.write(place / "clip.mp4")
    return root


def words(page):
    return " ".join(re.sub(r"<(script|style).*?</\1>|<[^>]*>", " ", page, flags=re.DOTALL).split())


def test_the_page_of_a_finished_run_in_the_browser(tmp_path, root, capsys):
    """Every part is there, nothing is loaded, a click on a claim of a sample seeks and draws."""
    run = write_run(tmp_path / "run", samples=[sample(step) for step in range(1, 21)])
    assert cli.main(["report", str(run), "--root", str(root)]) == 0
    assert capsys.readouterr().out == f"0 of 11 rules found something; page: {run / 'report.html'}\n"
    with Browser() as browser:
        browser.open(run / "report.html", width=390, height=800, dark=True)
        text = browser.run("return document.body.innerText")
        titles = browser.run("return [...document.querySelectorAll('figure h3')].map((e) => e.innerText)")
        assert titles == [
            "loss", "reward", "thk_spatial", "format", "length in tokens", "KL to the reference", "clip fraction",
            "seconds per step",
        ]  # fmt: skip
        assert "20 of 20 steps, a checkpoint is saved" in text and "base<b>" in text and "video.max_frames" in text
        assert "None of the 11 rules below found anything" in text
        assert browser.run("return document.querySelectorAll('.sample').length") == 12
        assert browser.run("return document.documentElement.scrollWidth") == 390
        browser.wait("return document.querySelector('video').readyState >= 1")
        browser.click('#sample-0 .part button[data-mark="0"]')
        browser.wait(
            "const v = document.querySelector('video'); return !v.seeking && Math.abs(v.currentTime - 3) < 0.01"
        )
        assert browser.run("return document.querySelectorAll('#sample-0 .box').length") == 2
        assert browser.errors() == []


def test_an_unfinished_run_with_torn_lines(tmp_path):
    run = write_run(tmp_path / "run", done=7, samples=[sample(1), sample(7)], saved=False)
    for name in ("metrics.jsonl", "samples.jsonl"):
        with (run / name).open("a") as stream:
            stream.write('{"step": 8, "reward/tot')
    page = words(run_report.make_report(run).page)
    assert "unfinished or stopped early: 7 of 20 steps are recorded, nothing is saved yet" in page
    assert "metrics.jsonl: line 8 could not be read and was left out" in page
    assert "samples.jsonl: line 3 could not be read" in page
    assert "fewer than 10 steps" in page and "--root ROOT shows the clip" in page


def test_a_checkpoint_on_the_way_does_not_make_a_run_finished(tmp_path):
    run = write_run(tmp_path / "run", done=7, saved=True)
    page = words(run_report.make_report(run).page)
    assert "unfinished or stopped early: 7 of 20 steps are recorded, a checkpoint is saved" in page


def test_a_step_written_twice_counts_once(tmp_path):
    """A run that was resumed from an older checkpoint wrote some steps again: the later line is the one that counts."""
    run = write_run(tmp_path / "run", done=3)
    with (run / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 3, "reward/total": 9.0, "gspo/kl": null}\n')
    found = run_files.load(run)
    assert found.metrics["reward/total"] == ([1, 2, 3], [0.1, 0.2, 9.0]) and found.num_steps == 3
    assert math.isnan(found.metrics["gspo/kl"].values[-1])


def test_a_supervised_run(tmp_path, capsys):
    run = write_run(tmp_path / "run", stage="sft")
    out = tmp_path / "page.html"
    assert cli.main(["report", str(run), "--out", str(out)]) == 0
    assert "0 of 2 rules found something" in capsys.readouterr().out
    page = words(out.read_text())
    assert "Stage: one, supervised" in page and "supervised training samples no answers" in page
    assert 'aria-label="loss"' in out.read_text() and 'aria-label="gradient norm"' in out.read_text()


def test_a_run_without_a_step(tmp_path):
    run = write_run(tmp_path / "run", done=0, saved=False)
    for name in ("metrics.jsonl", None):
        page = words(run_report.make_report(run).page)
        assert "no step has been recorded yet" in page and "there is nothing to draw" in page
        assert "there is no answer in samples.jsonl" in page
        if name:
            (run / name).unlink()


BAD_SAMPLES = {  # a line of samples.jsonl -> what the page says
    "a record that cannot be scored": ({"key_frames": None}, "left out, record 0: key_frames is NoneType"),
    "no claims": ({"completion": "nothing"}, "No claim with object, box and time"),
    "nothing at all": ({"completion": ""}, "The model said nothing"),
    "a clip that is gone": ({"video_path": "gone.mp4"}, "no such file"),
    "a path out of the root": ({"video_path": "../../x.mp4"}, "expected a path relative to the data root"),
    "a clip that is none": ({"video_path": "broken.mp4"}, "broken.mp4"),
    "a script": ({"completion": "<think><script>alert(1)</script></think>"}, "&lt;script&gt;alert(1)"),
}


@pytest.mark.parametrize("name", BAD_SAMPLES)
def test_samples_that_cannot_be_shown_are_said(tmp_path, root, name):
    more, said = BAD_SAMPLES[name]
    (root / "videos" / "stgr" / "temporal_grounding" / "videos" / "broken.mp4").write_text("no clip")
    run = write_run(tmp_path / "run", samples=[sample(1, **more)])
    page = run_report.make_report(run, root=root).page
    assert said in words(page)
    assert "<script>alert" not in page


def test_the_chosen_samples(tmp_path):
    """Of 600 answers: eight from the end, best and worst of each task by turns, and the best four of the beginning."""
    other = {"task": tasks.GENERAL_MCQ, "answer": "A"}
    lines = [sample(i, total=i % 7, **(other if i % 2 else {})) for i in range(600)]
    run = run_files.load(write_run(tmp_path / "run", samples=lines))
    assert [line["step"] for line in (run.early[0], run.early[-1], run.late[0], run.late[-1])] == [0, 255, 344, 599]
    chosen = run_report.choose(run)
    assert [where for where, _ in chosen] == ["end"] * 8 + ["beginning"] * 4
    assert [line["total"] for _, line in chosen] == [6, 6, 0, 0, 6, 6, 0, 0, 6, 6, 6, 6]
    assert [line["task"] for _, line in chosen[:4]] == [tasks.GENERAL_MCQ, tasks.TEMPORAL_SPATIAL] * 2


def test_few_samples_are_shown_once(tmp_path):
    for number in (1, 2, 5, 13):
        run = run_files.load(write_run(tmp_path / f"run{number}", samples=[sample(i) for i in range(number)]))
        steps = [line["step"] for _, line in run_report.choose(run)]
        assert len(steps) == len(set(steps)) == min(number, 12)


def test_what_looks_wrong_is_named(tmp_path, capsys):
    whole = tags.render_think_answer(tags.render_claim("x", (0, 0, 140, 112), 3.0), "a")
    run = write_run(tmp_path / "run", samples=[sample(step, whole) for step in range(1, 21)])
    assert cli.main(["report", str(run)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("reward hacking: whole-frame boxes: 100% of the last answers' 10 boxes cover nearly all")
    assert "1 of 11 rules found something" in out
    assert "rules='hardened' or min_iou ends it" in words((run / "report.html").read_text()).replace("&#39;", "'")


def write_evaluation(folder, values, benchmark="videomme"):
    folder.mkdir()
    (folder / "settings.json").write_text(json.dumps({"benchmark": benchmark}))
    rows = [{"item": str(i), "scores": {"accuracy": v}, "groups": {}} for i, v in enumerate(values)]
    (folder / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_before_and_after(tmp_path):
    """20 items, 5 right before and 15 after: 25.0, 75.0, +50.0."""
    run = write_run(tmp_path / "run")
    before = write_evaluation(tmp_path / "a", [1.0] * 5 + [0.0] * 15)
    after = write_evaluation(tmp_path / "b", [1.0] * 15 + [0.0] * 5)
    page = words(run_report.make_report(run, before=before, after=after).page)
    assert "accuracy 25.0 75.0 +50.0" in page
    other = write_evaluation(tmp_path / "c", [1.0], benchmark="worldsense")
    for pair, said in (
        ((before, None), "one of --before and --after"),
        ((before, other), "expected one benchmark"),
        ((before, tmp_path / "none"), "cannot be read"),
    ):
        with pytest.raises(InputError, match=said):
            run_report.make_report(run, before=pair[0], after=pair[1])


MISTAKES = {
    "nothing": "no config.json; expected the directory of a training run",
    "empty": "no config.json; expected the directory of a training run",
    "text": "is not JSON",
    "list": "stage=None; expected 'sft' or 'gspo'",
    "stage": "stage='dpo'; expected 'sft' or 'gspo'",
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line(tmp_path, capsys, name):
    run = tmp_path / "run"
    content = {"text": "{", "list": "[]", "stage": '{"stage": "dpo"}'}
    if name != "nothing":
        run.mkdir()
    if name in content:
        (run / "config.json").write_text(content[name])
    assert cli.main(["report", str(run)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and MISTAKES[name] in err and str(run) in err and err.count("\n") == 1
    assert not (run / "report.html").exists()


def test_a_root_that_is_not_there(tmp_path, capsys):
    run = write_run(tmp_path / "run")
    assert cli.main(["report", str(run), "--root", str(tmp_path / "gone")]) == 2
    assert "no such directory; expected the data root" in capsys.readouterr().err
    shutil.rmtree(run)


@pytest.mark.parametrize(("number", "early", "late"), [(1, 0, 1), (257, 128, 129), (300, 150, 150), (600, 256, 256)])
def test_the_last_answers_are_never_a_handful_of_many(tmp_path, number, early, late):
    run = run_files.load(write_run(tmp_path / "run", samples=[sample(i) for i in range(number)]))
    steps = [[line["step"] for line in part] for part in (run.early, run.late)]
    assert steps == [[*range(early)], [*range(number - late, number)]]

"""The command line: one line for a mistake, exit codes, nothing half written, nothing of the libraries on stderr."""

import importlib.util
import json
import shutil
import subprocess
import sys

import pytest

from openo3_jax import cli, tiny
from openo3_jax.data import synthetic


def run(*arguments):
    """The verb in a process of its own: exit code, stdout, stderr."""
    start = "import sys; from openo3_jax.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", start, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def assert_one_line(result, *parts):
    code, stdout, stderr = result
    assert code == 2, stderr
    assert stdout == ""
    assert stderr.startswith("openo3: ") and stderr.count("\n") == 1 and stderr.endswith("\n"), stderr
    for part in parts:
        assert part in stderr, stderr


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A directory in the layout of the hub, as `init-tiny` writes it."""
    out = tmp_path_factory.mktemp("tiny") / "model"
    tiny.init_tiny(out, hidden_size=64, layers=2)
    return out


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    synthetic.write_dataset(root, num_train=1, seed=0)
    return root


# ---- mistakes, each in a process of its own ----


def test_a_text_file_is_no_video(model, tmp_path):
    clip = tmp_path / "notes.mp4"
    clip.write_text("not a video")
    assert_one_line(run("ask", model, clip, "Where?"), str(clip), "expected")


def test_a_model_directory_without_weights(model, data, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(model, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    out = tmp_path / "run"
    result = run("sft", "sft_tiny", "--model", bare, "--data", data, "--out", out)
    assert_one_line(result, str(bare), "no weights; expected model.safetensors")
    assert not out.exists()


def test_an_unknown_task(model, data, tmp_path):
    records = json.loads((data / "json_data" / "STGR-SFT.json").read_text())
    records[0]["task"] = "spatial QA"
    (tmp_path / "json_data").mkdir()
    (tmp_path / "json_data" / "STGR-SFT.json").write_text(json.dumps(records))
    out = tmp_path / "run"
    result = run("sft", "sft_tiny", "--model", model, "--data", tmp_path, "--out", out)
    assert_one_line(result, "STGR-SFT.json:0", "task='spatial QA' is unknown", "visual QA")
    assert not out.exists()


# ---- the same in this process ----


def call(capsys, *arguments):
    code = cli.main(list(map(str, arguments)))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_another_architecture(capsys, model, data, tmp_path):
    config = json.loads((model / "config.json").read_text()) | {"model_type": "qwen2_vl"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    clip = next(data.rglob("*.mp4"))
    assert_one_line(call(capsys, "ask", tmp_path, clip, "Where?"), "model_type is 'qwen2_vl'; expected 'qwen2_5_vl'")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["ask", "{model}", "missing.mp4", "Where?"], "missing.mp4: no such video file"),
        (["ask", "{tmp}", "{clip}", "Where?"], "no config.json; expected a Qwen2.5-VL directory"),
        (["ask", "{tmp}/nothing", "{clip}", "Where?"], "{tmp}/nothing"),
        (["init-tiny", "{model}"], "exists and is not an empty directory"),
        (["sft", "sft_tiny", "--model", "{model}", "--data", "{tmp}", "--out", "{tmp}/run"], "STGR-SFT.json"),
        (["sft", "sft_tiny", "--model", "{model}", "--data", "{data}", "--out", "{model}"], "{model}: exists"),
        (["sft", "sft_tiny", "--model", "m", "--data", "d", "--out", "o", "--steps", "0"], "steps=0"),
        (["sft", "sft_tiny", "--model", "m", "--data", "d", "--out", "o", "--mesh", "fsdp"], "such as fsdp=4,tensor=2"),
        (["sft", "sft_tiny", "--model", "m", "--data", "d", "--out", "o", "--mesh", "fsdp=2,fsdp=4"], "different axes"),
        (["sft", "sft_8b"], "unknown verb 'sft_8b'; expected openo3 sft with one of sft_tiny"),
        (["trian"], "unknown verb 'trian'; expected openo3 with one of demo"),
        (["export", "{tmp}", "{tmp}/out"], "no config.json; expected the directory of a training run"),
        (["export", "{model}", "{tmp}/out"], "config.json: has no stage and config; expected the config.json of a run"),
        (
            ["export", "{model}", "{tmp}/out", "--adapter"],
            "config.json: has no stage and config; expected the config.json",
        ),
        (
            ["sft", "sft_tiny", "--model", "{model}", "--data", "{data}", "--out", "{model}", "--resume"],
            "{model}/config.json: has no stage and config; expected the config.json of a run, not that of a model",
        ),
        (["demo", "--quick", "--full"], "--quick and --full: choose one of them"),
        (["demo", "--out", "{data}"], "{data}: exists and holds something else"),
        (["score", "{tmp}/none.jsonl"], "none.jsonl: cannot be read"),
        (["score", "{tmp}/none.jsonl", "--json", "{tmp}/out.json"], "none.jsonl: cannot be read"),
    ],
)
def test_mistakes(capsys, model, data, tmp_path, arguments, part):
    places = {"model": model, "data": data, "tmp": tmp_path, "clip": next(data.rglob("*.mp4"))}
    result = call(capsys, *(argument.format(**places) for argument in arguments))
    assert_one_line(result, part.format(**places))
    assert not list(tmp_path.iterdir())


def test_a_package_that_is_missing_is_named_before_anything_is_written(capsys, model, data, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *of: None if name == "wandb" else find(name, *of))
    run = ["--model", model, "--data", data, "--out", tmp_path / "run", "--run.wandb", "p"]
    for stage in (["sft", "sft_tiny"], ["gspo", "gspo_tiny"]):
        assert_one_line(call(capsys, *stage, *run), "run.wandb=p: the package wandb is not installed")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("stage", ["sft", "gspo"])
def test_a_best_metric_that_nothing_measures(capsys, model, data, tmp_path, stage):
    """The command line has no evaluator."""
    run = ["--model", model, "--data", data, "--out", tmp_path / "run", "--run.best", "eval/accuracy"]
    assert_one_line(call(capsys, stage, f"{stage}_tiny", *run), "run.best=eval/accuracy", "such as reward/total")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "flag"),
    [
        (["sft", "sft_tiny", "--model", "m", "--data", "d"], "--out"),
        (["sft", "sft_tiny", "--model", "m", "--data", "d", "--out", "o", "--batch-size", "many"], "--batch-size"),
        (["sft", "sft_tiny", "--model", "m", "--data", "d", "--out", "o", "--loss-on", "all"], "--loss-on"),
        (["sft", "sft_tiny", "--model", "m", "--data", "d", "--out", "o", "--optimizer.lr", "1"], "--optimizer.lr"),
        (["ask", "m", "v"], "QUESTION"),
        (["ask", "m", "v", "q", "--video.max-framse", "3"], "--video.max-frames"),
        (["sft", "sft_tiny", "--model", "m", "--data", "d", "--out", "o", "--optimizer.clip-norm", "0"], "clip_norm"),
    ],
)
def test_usage_errors_name_the_flag(capsys, arguments, flag):
    assert_one_line(call(capsys, *arguments), flag, f"openo3 {arguments[0]}", "--help tells more")


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["sft"], ["experiment", "--help"], ["ask", "--help"]])
def test_help_goes_to_stdout(capsys, arguments):
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    captured = capsys.readouterr()
    assert ended.value.code == 0
    assert "usage: openo3" in captured.out and captured.err == ""


def test_a_recipe_gives_the_defaults_of_its_flags(capsys):
    """The published number of steps and learning rate stand in the help of sft_7b."""
    with pytest.raises(SystemExit):
        cli.main(["sft", "sft_7b", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--steps INT optimizer updates (default: 3896)" in text
    assert "--optimizer.learning-rate FLOAT at its peak (default: 1e-06)" in text


@pytest.mark.parametrize(
    ("raised", "code", "line"),
    [
        (KeyboardInterrupt(), 130, "openo3: interrupted\n"),
        (
            FileNotFoundError(2, "No such file or directory", "clip.mp4"),
            2,
            "openo3: clip.mp4: No such file or directory\n",
        ),
        (PermissionError(13, "Permission denied", "/root/x"), 2, "openo3: /root/x: Permission denied\n"),
    ],
)
def test_what_ends_a_verb(capsys, monkeypatch, raised, code, line):
    def verb() -> None:
        """Fail."""
        raise raised

    monkeypatch.setattr(cli, "VERBS", {"fail": verb})
    assert call(capsys, "fail") == (code, "", line)


def test_our_own_bugs_keep_their_traceback(monkeypatch):
    def verb() -> None:
        """Fail."""
        raise OSError("no file has this")

    monkeypatch.setattr(cli, "VERBS", {"fail": verb})
    with pytest.raises(OSError, match="no file has this"):
        cli.main(["fail"])


def test_a_claim_that_does_not_hold_is_3(capsys, monkeypatch):
    from openo3_jax.experiments import Outcome, overfit

    for holds, code in ((True, 0), (False, 3)):
        monkeypatch.setattr(overfit, "overfit", lambda holds=holds, **_: Outcome("loss 1.0", holds))
        assert call(capsys, "experiment", "overfit", "--out", "o") == (code, "loss 1.0\n", "")


# ---- verbs that work ----


def test_ask_answers_and_says_nothing_else(model, data):
    clip = next(data.rglob("*.mp4"))
    small_frames = ["--video.max-frames", 4, "--video.min-pixels", 12_544, "--video.max-pixels", 12_544]
    code, stdout, stderr = run("ask", model, clip, "Where is the circle?", "--max-new-tokens", 5, *small_frames)
    assert (code, stderr) == (0, "")
    assert stdout.endswith("\n")


def test_score_prints_terms_with_sizes_from_the_media(capsys, data, tmp_path):
    """A temporal-spatial record without sizes: they come from its clip under the root."""
    record = json.loads((data / "json_data" / "STGR-RL.json").read_text())[0]
    assert "image_size" not in record
    completion = f"<think>None.</think><answer>{record['answer']}</answer>"
    lines = tmp_path / "lines.jsonl"
    lines.write_text(json.dumps(record | {"completion": completion}) + "\n")
    assert_one_line(call(capsys, "score", lines), "image_size is missing")
    code, stdout, _ = call(capsys, "score", lines, "--root", data, "--json", tmp_path / "out.json", "--explain")
    assert code == 0 and "ans_acc" in stdout
    row = json.loads((tmp_path / "out.json").read_text())["rows"][0]
    assert row["terms"]["ans_acc"] == pytest.approx(1.0, abs=1e-6)

"""`openo3 eval` with a tiny model: the whole way from files to the table, and mistakes in one line."""

import json

import pytest

from openo3_jax import cli, policy, tiny
from openo3_jax.config import RunConfig, SFTConfig
from openo3_jax.evals import policies, scores, store, synthetic_vstar
from openo3_jax.evals.config import EvalConfig
from openo3_jax.train import loop, metrics, run, runlog, state

SMALL = [
    *("--max-frames", "4", "--min-pixels", "3136", "--max-pixels", "3136"),
    *("--max-new-tokens", "4", "--batch-size", "8"),
]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    root = tmp_path_factory.mktemp("eval")
    tiny.init_tiny(root / "model", hidden_size=64, layers=1)
    synthetic_vstar.write_vstar(root / "vstar", num_items=1, seed=0, num_frames=20)
    return root


def call(capsys, *arguments):
    code = cli.main([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


def test_vstar_from_files_to_the_table_and_again(capsys, places, tmp_path, one_device, monkeypatch):
    # one device instead of all eight: the programs compile in a third of the time
    load = policy.load_pretrained
    monkeypatch.setattr(policy, "load_pretrained", lambda *a, mesh, **options: load(*a, mesh=one_device, **options))
    out = tmp_path / "out"
    words = ["eval", "vstar", "--model", places / "model", "--data", places / "vstar", "--out", out, *SMALL]
    code, table, told = call(capsys, *words)
    assert code == 0
    assert "vstar: 5/5, 0 failed" in told and "judge: 1/1" in told
    assert "mam" in table and "33.7" in table and "judge of the open answers: ROUGE" in table
    lines = [json.loads(line) for line in (out / store.PREDICTIONS).read_text().splitlines()]
    assert len(lines) == 5 and not any("error" in line for line in lines)
    assert lines[0]["shown_hw"] == [28, 56] and lines[0]["source_hw"] == [112, 140]
    assert json.loads((out / scores.RESULTS).read_text())["items"] == 1
    assert table.strip() == (out / scores.TABLE).read_text().strip()
    # again: nothing is asked, the table is the same
    before = (out / store.PREDICTIONS).read_bytes()
    assert call(capsys, *words)[1] == table
    assert (out / store.PREDICTIONS).read_bytes() == before
    code, compared, _ = call(capsys, "eval", "--compare", out, out)
    assert code == 0 and "+0.0" in compared
    # the same code in a training loop, after every second step
    trained, settings = load(places / "model", mesh=one_device), SFTConfig(steps=3, run=RunConfig(tensorboard=False))
    config = EvalConfig(max_frames=4, min_pixels=3136, max_pixels=3136, max_new_tokens=4)
    evaluator = policies.make_evaluator("vstar", places / "vstar", tmp_path / "during", config, every=2)
    (tmp_path / "run").mkdir()
    this = loop.Run(tmp_path / "run", settings, {}, runlog.RunLog(tmp_path / "run"))
    loop.train(Still(), state.make_state(trained, settings), trained, this, evaluate=evaluator)
    lines = metrics.read_lines(tmp_path / "run" / run.METRICS)
    found = [{name: value for name, value in line.items() if name.startswith("eval/")} for line in lines]
    written = json.loads((out / scores.RESULTS).read_text())["values"]
    assert found == [{}, {f"eval/vstar/{name}": value["value"] for name, value in written.items()}, {}]
    assert (tmp_path / "during" / "vstar_000002" / scores.TABLE).is_file()


class Still:
    """A stage that changes nothing."""

    name, headline = "sft", "sft/loss"

    def __call__(self, state, step):
        return state, {"sft/loss": 1.0}

    def memory(self, step):
        return {}


VSTAR = ["eval", "vstar", "--model", "{r}", "--out", "{r}/o"]  # a model that cannot be read: these come before it
MISTAKES = {
    "no benchmark": (["eval"], "no benchmark"),
    "unknown": (["eval", "vstra", "--model", "{r}", "--data", "{r}", "--out", "{r}/o"], "unknown benchmark 'vstra'"),
    "no out": (["eval", "vstar", "--model", "{r}", "--data", "{r}"], "--out missing"),
    "no data": (["eval", "vstar", "--model", "{r}", "--data", "{r}/x", "--out", "{r}/o"], "no such data"),
    "judge": (
        ["eval", "vstar", "--model", "{r}", "--data", "{r}", "--out", "{r}/o", "--judge", "gpt"],
        "expected exact, rouge",
    ),
    "votes": ([*VSTAR, "--data", "{r}", "--num-samples", "2", "--temperature", "1"], "no options to vote on"),
    "frames": ([*VSTAR, "--data", "{r}", "--max-frames", "1"], "need 2 <= min_frames"),
    "pixels": ([*VSTAR, "--data", "{r}", "--max-pixels", "100"], "use at least 784"),
    "no tokens": ([*VSTAR, "--data", "{r}", "--max-new-tokens", "0"], "max_new_tokens=0 must be at least 1"),
    "data": (
        ["eval", "vstar", "--model", "{r}/model", "--data", "{r}/model", "--out", "{r}/o"],
        "expected a list of objects",
    ),
    "a directory of one's own": (
        ["eval", "jsonl", "--model", "{r}/model", "--data", "{r}/vstar", "--out", "{r}/o"],
        "vstar: is no annotation file; expected one that ends in .json, .jsonl",
    ),
    "compare": (["eval", "--compare", "{r}", "{r}"], "cannot be read"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line(capsys, places, name):
    words, part = MISTAKES[name]
    code, stdout, stderr = call(capsys, *(word.format(r=places) for word in words))
    assert (code, stdout) == (2, "")
    assert stderr.startswith("openo3: ") and stderr.count("\n") == 1 and part in stderr, stderr
    assert not (places / "o").exists()

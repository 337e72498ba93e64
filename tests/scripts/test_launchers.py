"""The launchers of scripts/: what they hand to their clusters, read by our command line; two processes of Slurm."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from openo3_jax import cli, hosts, tiny
from openo3_jax.data import synthetic
from openo3_jax.train import gspo, sft

SCRIPTS = Path(__file__).parents[2] / "scripts"
PLACES = ["--model", "/shared/a model", "--data", "/shared/data", "--out", "/shared/run"]
WORDS = ["sft", "sft_7b", *PLACES, "--batch-size", "16"]
SETTINGS = {
    "jobset.sh": {
        "NAME": "sft",
        "IMAGE": "registry/openo3",
        "ACCELERATOR": "tpu-v5p-slice",
        "TOPOLOGY": "2x2x4",
        "HOSTS": "4",
        "CLAIM": "shared",
    },
    "xpk.sh": {"CLUSTER": "c", "NAME": "sft", "IMAGE": "registry/openo3", "TYPE": "v5p-32"},
    "tpu_vm.sh": {"TPU": "my-tpu", "ZONE": "us-east5-a"},
    "slurm.sh": {"SLURM_JOB_ID": "77"},
}
# What a launcher calls leaves its arguments and its stdin behind.
RECORDER = """#!{python}
import json, sys
print(json.dumps([sys.argv, "" if sys.stdin.isatty() else sys.stdin.read()]), file=open({file!r}, "a"))
"""
# Two local processes with what Slurm tells each of a step's tasks.
SRUN = """#!/usr/bin/env bash
for id in 0 1; do
  SLURM_STEP_NODELIST=localhost SLURM_NTASKS=2 SLURM_NNODES=2 SLURM_PROCID=$id SLURM_LOCALID=0 "$@" 2>"$ERRORS-$id" &
  pids[id]=$!
done
worst=0
for id in 0 1; do wait "${pids[id]}"; code=$?; [ "$code" -gt "$worst" ] && worst=$code; done
exit "$worst"
"""


def program(file: Path, text: str) -> None:
    file.write_text(text)
    file.chmod(0o755)


def launch(script: str, words: list[str], tmp_path: Path, **more: str) -> subprocess.CompletedProcess:
    path = os.pathsep.join([str(tmp_path), os.environ["PATH"]])
    env = os.environ | SETTINGS[script] | {"PATH": path} | more
    command = ["bash", str(SCRIPTS / script), *words]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=240, stdin=subprocess.DEVNULL)


def handed_over(script: str, tmp_path: Path, words=WORDS) -> tuple[list[str], str]:
    """Arguments and stdin of the cluster's own program."""
    for name in ("kubectl", "xpk", "gcloud", "srun", "scontrol"):
        program(tmp_path / name, RECORDER.format(python=sys.executable, file=str(tmp_path / "called")))
    done = launch(script, words, tmp_path)
    assert done.returncode == 0, done.stderr
    arguments, stdin = json.loads((tmp_path / "called").read_text().splitlines()[0])
    return arguments, stdin


def openo3_words(script: str, tmp_path: Path) -> list[str]:
    arguments, stdin = handed_over(script, tmp_path)
    if script == "slurm.sh":
        return arguments[1:]
    if script == "jobset.sh":
        spec = yaml.safe_load(stdin)["spec"]["replicatedJobs"][0]["template"]["spec"]
        assert (spec["parallelism"], spec["completions"], spec["backoffLimit"]) == (4, 4, 0)
        return spec["template"]["spec"]["containers"][0]["command"]
    return shlex.split(arguments[arguments.index("--command") + 1])


@pytest.fixture
def seen(monkeypatch):
    """What the command line would start, instead of starting it."""
    calls = []
    monkeypatch.setattr(hosts, "start", lambda processes, **more: calls.append({"processes": processes, **more}))
    monkeypatch.setattr(sft, "run_sft", lambda **given: calls.append(given))
    monkeypatch.setattr(gspo, "run_gspo", lambda **given: calls.append(given))
    return calls


@pytest.mark.parametrize("script", SETTINGS)
def test_many_machines_run_the_recipe_of_one(script, seen, tmp_path):
    """The words of a launcher are those of one machine, and two flags: the settings of the run are equal."""
    words = openo3_words(script, tmp_path)
    assert words == ["openo3", *WORDS, "--resume", "--distributed"]
    assert cli.main(words[1:]) == 0
    started, many = seen
    assert started["processes"].distributed and started["heartbeat_timeout_seconds"] == 20
    assert cli.main(WORDS) == 0
    one = seen[-1]
    assert len(seen) == 3  # no processes are looked for on one machine
    assert many == one | {"resume": True}


@pytest.mark.parametrize("script", SETTINGS)
def test_scripts_are_bash(script):
    subprocess.run(["bash", "-n", str(SCRIPTS / script)], check=True)


@pytest.mark.parametrize(
    ("code", "restarts", "requeued"),
    [(0, 0, False), (75, 0, True), (75, 99, True), (137, 3, True), (1, 3, True), (1, 10, False), (2, 0, False)],
)
def test_slurm_puts_back_what_can_go_on(code, restarts, requeued, tmp_path):
    program(tmp_path / "srun", f"#!/bin/sh\nexit {code}\n")
    program(tmp_path / "scontrol", RECORDER.format(python=sys.executable, file=str(tmp_path / "called")))
    done = launch("slurm.sh", WORDS, tmp_path, SLURM_RESTART_COUNT=str(restarts))
    assert done.returncode == code
    assert (tmp_path / "called").exists() is requeued
    if requeued:
        assert json.loads((tmp_path / "called").read_text())[0][1:] == ["requeue", "77"]


def test_slurm_runs_two_processes(tmp_path):
    """Both are one run, told by Slurm's variables who is who; the mistake in the words is told by both."""
    program(tmp_path / "srun", SRUN)
    program(tmp_path / "openo3", f'#!/bin/sh\nexec "{sys.executable}" -c "{OPENO3}" "$@"\n')
    tiny.init_tiny(tmp_path / "model", hidden_size=64, layers=1)
    synthetic.write_dataset(tmp_path / "data", num_train=6, seed=0)
    words = ["sft", "sft_tiny", "--model", str(tmp_path / "model"), "--data", str(tmp_path / "data")]
    words += ["--out", str(tmp_path / "run"), "--mesh", "data=3"]
    job = str(1000 + os.getpid() % 1000)  # the port of the coordinator is made of it
    more = {"ERRORS": str(tmp_path / "errors"), "SLURM_JOB_ID": job, "XLA_FLAGS": "", "PYTHONPATH": str(SCRIPTS.parent)}
    done = launch("slurm.sh", words, tmp_path, **more)
    said = [(tmp_path / f"errors-{process}").read_text() for process in range(2)]
    assert done.returncode == 2, said
    for text in said:
        assert text.strip().splitlines()[-1] == "openo3: mesh: sizes {'data': 3} make 3 places for 2 devices"


OPENO3 = "import sys; from openo3_jax import cli; sys.exit(cli.main())"

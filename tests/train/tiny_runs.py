"""Runs of both stages on rendered clips with a tiny model, in this process or in one of their own that can be killed.

A root holds data/, model/, sft.json and gspo.json as `prepare` writes them.
"""

import atexit
import ctypes
import dataclasses
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

import jax
import numpy as np

import compile_flags
from openo3_jax import cli, recipes, tiny
from openo3_jax.config import OptimizerConfig, RunConfig, SamplingConfig, VideoConfig
from openo3_jax.data import pipeline, rl_prompts, synthetic

VIDEO = VideoConfig(max_frames=4, min_pixels=4 * 28 * 28, max_pixels=4 * 28 * 28)
RUN = RunConfig(save_every=1, keep_last=2, tensorboard=False)
SFT = dataclasses.replace(
    recipes.sft_tiny(),
    steps=12,
    batch_size=2,
    workers=1,
    optimizer=OptimizerConfig(name="muon", learning_rate=1e-3, schedule="cosine", warmup_steps=2),
    video=VIDEO,
    run=RUN,
)
GSPO = dataclasses.replace(
    recipes.gspo_tiny(),
    steps=8,
    batch_size=2,
    minibatches=2,
    workers=1,
    sampling=SamplingConfig(num_samples=2, max_new_tokens=16),
    optimizer=OptimizerConfig(learning_rate=1e-3, schedule="cosine"),
    video=VIDEO,
    run=RUN,
)
CONFIGS = {"sft": SFT, "gspo": GSPO}
STUCK_S = 300


def prepare(root: Path, *, layers: int = 2) -> Path:
    """Six records of each stage and a model with random weights."""
    synthetic.write_dataset(root / "data", num_train=6, seed=0)
    tiny.init_tiny(root / "model", hidden_size=64, layers=layers)
    for stage, config in CONFIGS.items():
        (root / f"{stage}.json").write_text(json.dumps({"stage": stage, "config": dataclasses.asdict(config)}))
    return root


def reward(records, completions) -> list[float]:
    """Something to learn that random weights already differ in: many different characters."""
    return [len(set(text)) / 16 for text in completions]


class Server:
    """Starts runs in processes of their own. They are forked from one that has imported everything and used nothing."""

    def __init__(self):
        env = os.environ | {
            "JAX_COMPILATION_CACHE_DIR": str(Path(__file__).parents[2] / ".jax_cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "PYTHONPATH": os.pathsep.join(sys.path),
            "USE_TORCH": "0",
        }
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._process = subprocess.Popen([sys.executable, __file__], env=env, text=True, **pipes)
        self._running: set[int] = set()

    def start(self, stage: str, root: Path, out: Path, *more: str, devices: int = 1, name: str = "") -> int:
        """The id of the new process; its stderr is appended to `out`NAME.err."""
        pid = self._ask("start", devices, name, stage, str(root), str(out), *more)
        self._running.add(pid)
        return pid

    def start_together(
        self,
        number: int,
        stage: str,
        root: Path,
        out: Path,
        *more: str,
        devices: int = 1,
        last_root: Path | None = None,
    ) -> list[int]:
        """So many processes of one run; stderr of process i is in `out`-i.err. `last_root`: what the last one reads."""
        with socket.socket() as free:
            free.bind(("localhost", 0))
            place = f"localhost:{free.getsockname()[1]}"
        flags = [f"--coordinator={place}", f"--num-processes={number}"]
        roots = [root] * (number - 1) + [last_root or root]
        return [
            self.start(stage, own, out, *more, *flags, f"--process-id={i}", devices=devices, name=f"-{i}")
            for i, own in enumerate(roots)
        ]

    def wait(self, pid: int) -> int:
        """Exit code; minus the signal that ended it. A run that takes longer than `STUCK_S` is killed."""
        code = self._ask("wait", pid)
        self._running.discard(pid)
        return code

    def run(self, stage: str, root: Path, out: Path, *more: str) -> int:
        return self.wait(self.start(stage, root, out, *more))

    def _ask(self, *words: str | int) -> int:
        self._process.stdin.write(json.dumps(words) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        """What a failed test has left behind ends too."""
        for pid in self._running:
            os.kill(pid, signal.SIGKILL)
        self._process.stdin.close()
        self._process.wait()


def serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        wish, *words = json.loads(line)
        if wish == "wait":
            answer = end_of(words[0])
        elif (answer := os.fork()) == 0:
            run_forked(*words)
        answers.write(f"{answer}\n")
        answers.flush()


def end_of(pid: int) -> int:
    until = time.monotonic() + STUCK_S
    while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
        if time.monotonic() > until:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    return os.waitstatus_to_exitcode(ended[1])


def run_forked(devices: int, name: str, stage: str, root: str, out: str, *more: str) -> None:
    """Never returns, unless as a process of its own does: what the interpreter does at its end is done too."""
    code = 1
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it ends with the process that forked it
    os.environ |= compile_flags.settings(devices)
    try:
        errors = os.open(f"{out}{name}.err", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(errors, 2)
        os.dup2(errors, 1)
        os.close(0)
        log_batches(Path(f"{out}{name}.batches"))
        places = [f"--{name}={root}/{name}" for name in ("model", "data")]
        own = ["--reward", "tiny_runs:reward"] if stage == "gspo" else []
        code = cli.main([stage, f"{root}/{stage}.json", *places, *own, "--out", out, *more])
        atexit._run_exitfuncs()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def log_batches(file: Path) -> None:
    """Every batch that a step asks for leaves a line: the step, and a hash of all its arrays."""

    def wrap(cls: type) -> None:
        inner = cls.__call__

        def call(self, step: int):
            made = inner(self, step)
            prompts = [one.sample.tokens for one in made.good if one.sample] if hasattr(made, "good") else None
            leaves = jax.tree.leaves(made if prompts is None else prompts)
            digest = hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in leaves)).hexdigest()
            with file.open("a") as stream:
                stream.write(f"{step} {digest}\n")
            return made

        cls.__call__ = call

    wrap(pipeline.SFTBatches)
    wrap(rl_prompts.Prompts)


if __name__ == "__main__":
    import orbax.checkpoint
    import transformers.models.qwen2.tokenization_qwen2
    import tyro

    from openo3_jax.train import gspo, sft

    assert all((orbax.checkpoint, transformers.AutoTokenizer, tyro, gspo, sft))
    serve()

"""Stage one: records with evidence -> a policy that answers as they do."""

import time
from collections.abc import Mapping
from pathlib import Path

from jax.sharding import Mesh
from rich import console

from openo3_jax import mesh as mesh_lib
from openo3_jax import policy as policy_lib
from openo3_jax.config import SFTConfig
from openo3_jax.data import annotations, pipeline, prompts
from openo3_jax.train import ahead, loop, run, steps
from openo3_jax.train import state as state_lib
from openo3_jax.train.state import TrainState
from openo3_jax.types import Batch

BAD_SAMPLES = "bad_samples.jsonl"


def run_sft(
    *,
    model: Path,
    data: Path,
    out: Path,
    config: SFTConfig,
    mesh: Mapping[str, int] | Mesh | None = None,
    prompts_file: Path | None = None,
    evaluate: loop.Evaluator | None = None,
    stop: loop.StopRule | None = None,
) -> policy_lib.Policy:
    """Train `model` on `data/json_data/STGR-SFT.json`, write the run into `out`, return the trained policy.

    `out` holds config.json (resolved), metrics.jsonl, bad_samples.jsonl (records that cannot be used), model/ (the
    files beside the weights) and, at the end, checkpoints/. `evaluate` may add metrics after a step, `stop` may end the
    run early.
    Raises: InputError for an `out` that is not empty, bad records or media, and a loss that is not finite.
    """
    run.check_new(out)
    records = annotations.load_stage(data, "sft")
    wording = prompts.load_prompts(prompts_file)
    policy = policy_lib.load_pretrained(model, mesh=mesh, video=config.video)
    state = state_lib.make_state(policy, config)
    policy = policy.without_weights()  # the state has its own copy; the loaded one may go
    ways = policy.round_rows(1)
    with pipeline.Samples(records, data, "sft", policy.processor, config, wording) as samples:
        batches = pipeline.SFTBatches(samples, policy.processor, config, rows_multiple=ways)
        batches(0)  # media that cannot be read are named before anything is written
        run.create(out, policy, "sft", config)
        samples.bad.write_to(out / BAD_SAMPLES)
        shapes = ", ".join(f"{shape.rows} x {shape.seq} ({shape.patches})" for shape in batches.shapes)
        say = console.Console(stderr=True).print
        say(f"sft: rows x tokens (patches) of the batches: {shapes}", highlight=False, soft_wrap=True)
        with ahead.Ahead(lambda step: mesh_lib.shard_rows(batches(step), policy.mesh), config.steps) as on_devices:
            stage = _SFT(batches, on_devices, config)
            return loop.train(stage, state, policy, out=out, steps=config.steps, evaluate=evaluate, stop=stop)


class _SFT:
    name = "sft"
    headline = "sft/loss"

    def __init__(self, batches: pipeline.SFTBatches, on_devices: ahead.Ahead[Batch], config: SFTConfig):
        self._batches = batches
        self._on_devices = on_devices
        self._step = steps.make_sft_step(config)

    def __call__(self, state: TrainState, step: int) -> tuple[TrainState, dict[str, float]]:
        started_s = time.monotonic()
        batch = self._on_devices(step)
        ready_s = time.monotonic()
        state, measured = self._step(state, batch)
        values = {f"sft/{name}": float(value) for name, value in measured.items()}
        values |= {f"data/{name}": value for name, value in self._batches.measures(step).items()}
        return state, values | {"time/data_s": ready_s - started_s, "time/step_s": time.monotonic() - ready_s}

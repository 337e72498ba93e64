"""The order of events of a run, and nothing else: load, step, write, save."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
from jax.sharding import Mesh
from rich import console

from openo3_jax import mesh as mesh_lib
from openo3_jax import policy as policy_lib
from openo3_jax.config import SFTConfig
from openo3_jax.data import annotations, pipeline, prompts
from openo3_jax.errors import InputError
from openo3_jax.train import checkpoint, metrics, run, steps
from openo3_jax.train import state as state_lib

StopRule = Callable[[int, Mapping[str, float]], bool]  # (steps done, metrics) -> True ends the run


def run_sft(
    *,
    model: Path,
    data: Path,
    out: Path,
    config: SFTConfig,
    mesh: Mapping[str, int] | Mesh | None = None,
    prompts_file: Path | None = None,
    stop: StopRule | None = None,
) -> policy_lib.Policy:
    """Stage one: train `model` on `data/json_data/STGR-SFT.json`, write the run into `out`, return the trained policy.

    `out` holds config.json (resolved), metrics.jsonl, model/ (the files beside the weights) and, at the end,
    checkpoints/. `stop` may end the run early. Raises InputError for an `out` that is not empty, bad records or media,
    and a loss that is not finite.
    """
    run.check_new(out)
    records = annotations.load_stage(data, "sft")
    wording = prompts.load_prompts(prompts_file)
    policy = policy_lib.load_pretrained(model, mesh=mesh, video=config.video)
    state = state_lib.make_state(policy, config)
    shapes = jax.eval_shape(lambda params: params, policy.params)
    policy = dataclasses.replace(policy, params=shapes)  # the state has its own copy; the loaded one may go
    ways = mesh_lib.mesh_size(policy.mesh, mesh_lib.LOGICAL_AXES["rows"])
    step = steps.make_sft_step(config)
    with contextlib.ExitStack() as stack:
        samples = stack.enter_context(pipeline.Samples(records, data, "sft", policy.processor, config, wording))
        batches = pipeline.SFTBatches(samples, policy.processor, config, rows_multiple=ways)
        batches(0)  # media that cannot be read are named before anything is written
        run.create(out, policy, config)
        writer = stack.enter_context(metrics.JsonlWriter(out / run.METRICS))
        progress = stack.enter_context(metrics.Progress("sft", config.steps))
        for done in range(1, config.steps + 1):
            started_s = time.monotonic()
            batch = mesh_lib.shard_rows(batches(done - 1), policy.mesh)
            ready_s = time.monotonic()
            state, measured = step(state, batch)
            values = {f"sft/{name}": float(value) for name, value in measured.items()}
            values |= {"time/data_s": ready_s - started_s, "time/step_s": time.monotonic() - ready_s}
            writer.write(done, values)
            loss = values["sft/loss"]
            progress.update(done, f"loss {loss:.3f}")
            if not math.isfinite(loss):
                raise InputError(f"sft: the loss is {loss} at step {done}; lower optimizer.learning_rate")
            if stop is not None and stop(done, values):
                break
    checkpoint.save(out / run.CHECKPOINTS, state)
    console.Console(stderr=True).print(f"sft: {done} steps, loss {loss:.3f}, saved in {out}", soft_wrap=True)
    return dataclasses.replace(policy, params=state.params)

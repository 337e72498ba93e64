"""Stage one: records with evidence -> a policy that answers as they do."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from openo3_jax import hosts
from openo3_jax import mesh as mesh_lib
from openo3_jax import policy as policy_lib
from openo3_jax.config import SFTConfig
from openo3_jax.data import annotations, loader, pipeline, plan, prompts
from openo3_jax.data import samples as samples_lib
from openo3_jax.train import ahead, guards, journal, loop, profiling, run, runlog, steps
from openo3_jax.train import resume as resume_lib
from openo3_jax.train import state as state_lib
from openo3_jax.train.state import TrainState
from openo3_jax.types import Batch


def run_sft(
    *,
    model: Path,
    data: Path,
    out: Path,
    config: SFTConfig,
    mesh: Mapping[str, int] | Mesh | None = None,
    prompts_file: Path | None = None,
    resume: bool = False,
    profile: profiling.Steps | None = None,
    evaluate: loop.Evaluator | None = None,
    stop: loop.StopRule | None = None,
) -> policy_lib.Policy:
    """Train `model` on `data/json_data/STGR-SFT.json`, write the run into `out`, return the trained policy.

    `out` holds config.json (resolved), metrics.jsonl, log.txt, bad_samples.jsonl (records that could not be used since
    the run was last started), model/ (the files beside the weights) and checkpoints/.
    `resume`: go on with the run in `out` at its newest checkpoint, bit for bit as if it had never been stopped; a new
    run where there is none. `profile`: steps to trace into `out`/profile. `evaluate` may add metrics after
    a step, `stop` may end the run early.
    Raises: InputError for an `out` that is not empty, no or bad records, bad media, a loss that is not finite, a run
    with other settings, data or model to resume; Stopped after a signal, with the state saved.
    """
    loop.check_best(config.run, evaluate)
    journal.check(config.run)
    log = runlog.RunLog(out)

    def read() -> tuple[list[annotations.Record], prompts.Prompts, policy_lib.Policy]:
        run.check_resumable(out) if resume else run.check_new(out)
        records, wording = annotations.load_stage(data, "sft"), prompts.load_prompts(prompts_file)
        samples_lib.check(records, data, "sft", config)
        return (
            records,
            wording,
            policy_lib.load_pretrained(model, dtype=state_lib.load_dtype(config), mesh=mesh, video=config.video),
        )

    (records, wording, policy), _ = hosts.together(read)
    about = resume_lib.describe("sft", config, plan.data_hash(records), policy.params)
    found = resume_lib.find(out, about, log.say) if resume else None
    state = state_lib.make_state(policy, config) if found is None else state_lib.resume_state(policy, config)
    policy = policy.without_weights()  # the state has its own copy; the loaded one may go
    ways = policy.round_rows(1)
    with pipeline.Samples(records, data, "sft", policy.processor, config, wording) as samples:
        share = mesh_lib.row_share(policy.mesh)
        batches = pipeline.SFTBatches(samples, policy.processor, config, rows_multiple=ways, share=share)
        start = 0 if found is None else batches.step_of(resume_lib.position(found))
        if start < config.steps:
            hosts.together(lambda: batches(start))  # media that cannot be read are named before anything is written
        run.create(out, policy, "sft", config, model=model)
        state = resume_lib.go_on(out, found, state)
        if hosts.is_first():
            samples.bad.write_to(out / run.BAD_SAMPLES)
        if start < config.steps:
            shapes = ", ".join(f"{shape.rows} x {shape.seq} ({shape.patches})" for shape in batches.shapes)
            log.say(f"sft: rows x tokens (patches) of the batches: {shapes}")
        this = loop.Run(out, config, about, log, start, profile)
        with ahead.Ahead(lambda step: mesh_lib.shard_rows(batches(step), policy.mesh), config.steps) as on_devices:
            stage = _SFT(batches, on_devices, policy, config, guards.Guard("sft", config, out, log))
            return loop.train(stage, state, policy, this, evaluate=evaluate, stop=stop)


class _SFT:
    name = "sft"
    headline = "sft/loss"

    def __init__(
        self,
        batches: pipeline.SFTBatches,
        on_devices: ahead.Ahead[Batch],
        policy: policy_lib.Policy,  # without weights
        config: SFTConfig,
        guard: guards.Guard,
    ):
        self._batches = batches
        self._on_devices = on_devices
        self._policy = policy
        self._guard = guard
        self._lora = config.lora
        self._step = steps.make_sft_step(config)

    def memory(self, step: int) -> dict[str, Any]:
        return {"position": self._batches.state(step)._asdict()}

    def _batch(self, step: int) -> Batch:
        """The batch of a step; which of its records could not be used is then known to every process."""

        def tell(_: Batch) -> dict[str, Any]:
            return {"planned": self._batches.planned(step), "bad": [*self._batches.bad(step).items()]}

        batch, told = hosts.together(lambda: self._on_devices(step), tell)
        hosts.agree([part["planned"] for part in told], f"step {step + 1}: plan of the batch", loader.DIFFERENT_PLANS)
        others = {index: reason for part in told for index, reason in part["bad"]}
        if others:
            hosts.together(lambda: self._batches.note_bad(others))
        return batch

    def __call__(self, state: TrainState, step: int) -> tuple[TrainState, dict[str, float]]:
        started_s = time.monotonic()
        with jax.profiler.TraceAnnotation("data"):
            batch = self._batch(step)
        ready_s = time.monotonic()
        with jax.profiler.TraceAnnotation("update"):
            state, measured = self._step(state, batch)
            values = {name: float(value) for name, value in measured.items()}
        done_s = time.monotonic()
        is_made = self._guard(state, batch, step, values)
        sizes = self._batches.sizes(step)
        work = profiling.sft_flops(self._policy.config, sizes, lora=self._lora)
        rates = profiling.rates(work, sum(size.tokens for size in sizes), done_s - started_s)
        times = {"time/data_s": ready_s - started_s, "time/step_s": done_s - ready_s}
        named = {f"sft/{name}": value for name, value in values.items()}
        named |= {f"data/{name}": value for name, value in self._batches.measures(step).items()}
        return state, named | {"guard/skipped": float(not is_made)} | times | rates

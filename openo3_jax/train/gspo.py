"""Stage two: prompts -> groups of answers -> rewards -> a policy that answers better."""

import contextlib
import dataclasses
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from openo3_jax import hosts
from openo3_jax import mesh as mesh_lib
from openo3_jax import policy as policy_lib
from openo3_jax.config import GSPOConfig
from openo3_jax.data import annotations, loader, plan, prompts, rl_prompts
from openo3_jax.data import samples as samples_lib
from openo3_jax.errors import InputError
from openo3_jax.rewards import own
from openo3_jax.train import guards, journal, loop, profiling, rollout, run, runlog, steps
from openo3_jax.train import resume as resume_lib
from openo3_jax.train import state as state_lib
from openo3_jax.train.state import TrainState
from openo3_jax.types import Rollouts

SAMPLES, BAD_SAMPLES = run.SAMPLES, run.BAD_SAMPLES


def run_gspo(
    *,
    model: Path,
    data: Path,
    out: Path,
    config: GSPOConfig,
    mesh: Mapping[str, int] | Mesh | None = None,
    prompts_file: Path | None = None,
    reference: Path | None = None,
    reward: own.Reward | None = None,
    resume: bool = False,
    profile: profiling.Steps | None = None,
    evaluate: loop.Evaluator | None = None,
    stop: loop.StopRule | None = None,
) -> policy_lib.Policy:
    """Train `model` on the questions of `data/json_data/STGR-RL.json`, write the run into `out`, return the policy.

    `reference`: the model not to leave too far behind, None for `model` itself. `reward`: one of the caller's own,
    None for this package's under `config.rules`. `out`, `resume` and `profile` are as those of `run_sft`; `out` has
    samples.jsonl. The model and the reference of a run to resume are read again, and must be what they were.
    Raises: InputError for an `out` that is not empty, no or bad records, too many unreadable media, a reference of
    another shape, a reward or a loss that is not finite, a run with other settings, data or model to resume; Stopped
    after a signal, with the state saved.
    """
    reward = rollout.rubric_reward(config.rules) if reward is None else reward
    loop.check_best(config.run, evaluate)
    journal.check(config.run)
    log = runlog.RunLog(out)

    def read() -> tuple[list[annotations.Record], prompts.Prompts, policy_lib.Policy, policy_lib.Policy | None]:
        run.check_resumable(out) if resume else run.check_new(out)
        records, wording = annotations.load_stage(data, "rl"), prompts.load_prompts(prompts_file)
        samples_lib.check(records, data, "rl", config)
        policy = policy_lib.load_pretrained(model, dtype=state_lib.load_dtype(config), mesh=mesh, video=config.video)
        anchor = None if reference is None else policy_lib.load_pretrained(reference, mesh=policy.mesh)
        return records, wording, policy, anchor

    (records, wording, policy, anchor), _ = hosts.together(read)
    compared = state_lib.anchor_of(policy, config, anchor)
    about = resume_lib.describe("gspo", config, plan.data_hash(records), policy.params, compared)
    found = resume_lib.find(out, about, log.say) if resume else None
    make = state_lib.make_state if found is None else state_lib.resume_state
    state = make(policy, config, reference=anchor)
    policy, anchor, compared = policy.without_weights(), None, None  # the state has its own copies
    share = mesh_lib.row_share(policy.mesh)
    with rl_prompts.Prompts(records, data, policy.processor, config, wording, share=share) as source:
        start = 0 if found is None else source.step_of(resume_lib.position(found))
        if start < config.steps:
            hosts.together(lambda: source(start))  # reads the media of the first step before anything is written
        run.create(out, policy, "gspo", config, model=model, reference=reference)
        state = resume_lib.go_on(out, found, state)
        max_bad = int(config.max_bad_fraction * len(records))
        guard = guards.Guard("gspo", config, out, log)
        stage = _GSPO(policy, source, config, reward, out, max_bad, guard)
        if found is not None:
            stage.remember(found.memory)
        this = loop.Run(out, config, about, log, start, profile)
        return loop.train(stage, state, policy, this, evaluate=evaluate, stop=stop)


class _GSPO:
    name = "gspo"
    headline = "reward/total"

    def __init__(
        self,
        policy: policy_lib.Policy,  # without weights
        source: rl_prompts.Prompts,
        config: GSPOConfig,
        reward: own.Reward,
        out: Path,
        max_bad: int,  # records
        guard: guards.Guard,
    ):
        self._guard = guard
        self._policy = policy
        self._source = source
        self._config = config
        self._reward = reward
        self._out = out
        self._max_bad = max_bad
        self._bad: dict[int, str] = {}
        self._prompt_bucket, self._group_bucket = rollout.GrowingBucket(), rollout.GrowingBucket()
        self._score = steps.make_score_step(config)
        self._step = steps.make_gspo_step(config)

    def memory(self, step: int) -> dict[str, Any]:
        """With the shapes: sums over other padding may differ in their last bits."""
        buckets = [bucket.to_json() for bucket in (self._prompt_bucket, self._group_bucket)]
        return {"position": self._source.state(step)._asdict(), "buckets": buckets, "bad": [*self._bad.items()]}

    def remember(self, memory: Mapping[str, Any]) -> None:
        self._prompt_bucket, self._group_bucket = map(rollout.GrowingBucket.from_json, memory["buckets"])
        self._bad = {index: error for index, error in memory["bad"]}

    def __call__(self, state: TrainState, step: int) -> tuple[TrainState, dict[str, float]]:
        clock = _Clock()
        with clock.phase("data"):
            places = self._prompts(step)
        values = {"data/bad_records": float(len(self._bad))}
        if not any(places):
            return state, values
        with clock.phase("rollout"):
            out = self._sample(state, places, step)
        progress = (step + 1) / self._config.steps
        with clock.phase("reward"):
            sampled = rollout.Groups(places, out, *rollout.judge(places, out, self._config, self._reward, progress))
            if hosts.is_first():
                self._write_samples(sampled, step, progress)
        with clock.phase("update"):
            state, measured = self._update(state, sampled, step)
        done = [(prompt, group) for prompt, group in zip(places, out.tokens, strict=True) if prompt is not None]
        good, lengths = [prompt for prompt, _ in done], [[len(tokens) for tokens in group] for _, group in done]
        new = sum(map(sum, lengths))
        trained = new + sum(prompt.size.tokens for prompt in good)
        rates = {
            "time/rollout_tokens_per_s": new / clock.seconds["rollout"],
            "time/update_tokens_per_s": trained / clock.seconds["update"],
        }
        rates |= profiling.rates(self._work(good, lengths), trained, sum(clock.seconds.values()))
        times = {f"time/{phase}_s": seconds for phase, seconds in clock.seconds.items()}
        return state, values | measured | rollout.summarize(sampled) | times | rates

    def _work(self, good: list[rl_prompts.Prompt], lengths: list[list[int]]) -> int:
        """Operations of the model in a step in which every group is trained on."""
        groups = [(one.size.tokens, group, one.size.grids) for one, group in zip(good, lengths, strict=True)]
        scored = (self._config.kl_coef > 0) + (self._config.old_logp == "recompute")
        return profiling.gspo_flops(self._policy.config, groups, scored=scored, lora=self._config.lora)

    def _prompts(self, step: int) -> list[rl_prompts.Prompt | None]:
        """The prompts of a step in their places, None for those that a process could not use; each has its record."""

        def tell(made: rl_prompts.StepPrompts) -> dict[str, Any]:
            own = {place: prompt.record for place, prompt in enumerate(made.places) if prompt and prompt.is_own}
            return {"planned": self._source.planned(step), "bad": made.bad, "records": [*own.items()]}

        made, told = hosts.together(lambda: self._source(step), tell)
        hosts.agree([part["planned"] for part in told], f"step {step + 1}: plan of the prompts", loader.DIFFERENT_PLANS)
        bad = {index: rl_prompts.BadPrompt(index, error) for part in told for index, error in part["bad"]}
        self._source.note_bad([*bad.values()])
        self._note_bad(step, [*bad.values()])
        records = {place: record for part in told for place, record in part["records"]}
        return [
            None if prompt is None or prompt.index in bad else prompt._replace(record=records[place])
            for place, prompt in enumerate(made.places)
        ]

    def _sample(self, state: TrainState, places: list[rl_prompts.Prompt | None], step: int) -> policy_lib.Generations:
        config = self._config
        policy = state_lib.trained_policy(self._policy, state, config.compute_dtype)
        samples = [None if prompt is None else prompt.sample for prompt in places]
        need = policy.bucket([prompt.room for prompt in places if prompt is not None])
        need = dataclasses.replace(need, rows=policy.round_rows(config.batch_size))
        seeds = rollout.prompt_seeds(config.seed, step, len(places))
        return policy.continue_samples(samples, config.sampling, seeds, bucket=self._prompt_bucket(need))

    def _update(self, state: TrainState, sampled: rollout.Groups, step: int) -> tuple[TrainState, dict[str, float]]:
        """One update for each minibatch in which something is kept; the others are counted."""
        size = self._config.batch_size // self._config.minibatches
        slices = [slice(start, start + size) for start in range(0, len(sampled.prompts), size)]
        kept = [rows for rows in slices if sampled.advantages.keep[rows].any()]
        batches = [
            rollout.make_rollouts(self._policy, sampled, rows, self._config, self._group_bucket) for rows in kept
        ]
        if self._config.old_logp == "recompute":  # before the first update: all of it is one old policy's
            batches = [dataclasses.replace(b, old_logp=self._score(state, b.batch)) for b in batches]
        found: list[dict[str, float]] = []
        for batch in batches:
            state, measured = self._step(state, batch)
            one = {name: float(value) for name, value in measured.items()}
            if self._guard(state, batch, step, one):
                found.append(one)
        values = {f"gspo/{name}": float(np.mean([one[name] for one in found])) for name in (found[0] if found else ())}
        for name in ("logp_gap_mean", "logp_gap_max"):  # later the policy has moved
            values |= {f"gspo/{name}": found[0][name]} if found else {}
        values |= _padding(sampled, kept, batches)
        values["guard/skipped"] = float(len(batches) - len(found))
        return state, values | {"gspo/skipped_updates": float(len(slices) - len(kept))}

    def _note_bad(self, step: int, bad: list[rl_prompts.BadPrompt]) -> None:
        """Write down records that could not be used; raise InputError when they are too many."""
        if hosts.is_first():
            with (self._out / BAD_SAMPLES).open("a", encoding="utf-8") as stream:
                for one in bad:
                    stream.write(json.dumps({"step": step + 1, "index": one.index, "error": one.error}) + "\n")
        self._bad |= {one.index: one.error for one in bad}
        if len(self._bad) > self._max_bad:
            index, error = next(iter(self._bad.items()))
            raise InputError(
                f"gspo: {len(self._bad)} records cannot be used, more than max_bad_fraction="
                f"{self._config.max_bad_fraction} allows; the first is record {index}: {error}; all of them: "
                f"{self._out / BAD_SAMPLES}"
            )

    def _write_samples(self, sampled: rollout.Groups, step: int, progress: float) -> None:
        group = self._config.sampling.num_samples
        with (self._out / SAMPLES).open("a", encoding="utf-8") as stream:
            for place in range(len(sampled.prompts) * group):
                prompt, number = sampled.prompts[place // group], place % group
                if prompt is None:
                    continue
                line = {
                    **prompt.record,
                    "completion": sampled.generations.texts[place // group][number],
                    "group": f"{step + 1}-{place // group}",
                    "step_percent": progress,
                    "step": step + 1,
                    "record": prompt.index,
                    "finished": sampled.generations.finished[place // group][number],
                    "total": float(sampled.rewards.total[place]),
                    "advantage": float(sampled.advantages.advantage[place // group, number]),
                }
                stream.write(json.dumps(line) + "\n")


def _padding(sampled: rollout.Groups, kept: Sequence[slice], batches: Sequence[Rollouts]) -> dict[str, float]:
    """Shares of the slots of the updates' rows that hold nothing, nothing where there was no update."""
    if not batches:
        return {}
    padding = plan.Padding(
        token_slots=sum(one.batch.tokens.size for one in batches),
        patch_slots=sum(one.batch.vision.patch_hw.size // 2 for one in batches),
    )
    for rows in kept:
        for prompt, group in zip(sampled.prompts[rows], sampled.generations.tokens[rows], strict=True):
            if prompt is not None:
                own = sum(len(tokens) - 1 for tokens in group)
                padding = padding._replace(
                    tokens=padding.tokens + prompt.size.tokens + own, patches=padding.patches + prompt.size.patches
                )
    return {"data/token_waste": padding.token_waste, "data/patch_waste": padding.patch_waste}


class _Clock:
    """Seconds of each phase of a step; in a trace the phases have their names."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        started_s = time.monotonic()
        with jax.profiler.TraceAnnotation(name):
            yield
        self.seconds[name] = time.monotonic() - started_s

"""Stage two after an unfinished stage one: does the reward of sampled answers rise?"""

import dataclasses
from pathlib import Path

from openo3_jax import recipes, tiny
from openo3_jax.data import annotations, prompts, tokens, transforms
from openo3_jax.evals import metrics, sampled
from openo3_jax.experiments import Outcome
from openo3_jax.policy import Policy
from openo3_jax.train import gspo, run, sft

START_SHARE = 0.45  # of the highest reward, where the first stage stops
MEASURE_EVERY = 5  # steps of the first stage
MEASURED_SAMPLES = 16  # per question


def sharpen(*, data: Path, out: Path, steps: int = 50, seed: int = 0) -> Outcome:
    """Stage two after an unfinished stage one, on the same few questions: does the sampled reward rise?

    A tiny model is taught the SFT records of `data` until its answers to the RL records earn about half of what can be
    earned, then trained by GSPO on those. Writes `out/model`, `out/sft`, `out/start`, `out/gspo` and `out/export`. The
    claim: the 95 % interval of the gain per question (paired bootstrap, fixed seeds) lies above 0.
    """
    run.check_new(out)
    out.mkdir(parents=True, exist_ok=True)
    taught, recipe = recipes.sft_tiny(), recipes.gspo_tiny()
    records = annotations.load_stage(data, "rl")
    tiny.init_tiny(out / "model", seed=seed)
    prepared = transforms.prepare_all(records, data, "rl", config=recipe.video, wording=prompts.load_prompts())
    questions = [one.reward_record for one in prepared]
    processor = tokens.load_processor(out / "model")
    samples = [processor.encode(one.messages) for one in prepared]

    def measure(policy: Policy) -> sampled.SampledRewards:
        sampling = dataclasses.replace(recipe.sampling, num_samples=MEASURED_SAMPLES)
        return sampled.sample_rewards(policy, samples, questions, sampling, seed=seed)

    def share(policy: Policy, done: int) -> dict[str, float]:
        return {} if done % MEASURE_EVERY else {"eval/reward_share": measure(policy).share}

    batch_size = len(annotations.load_stage(data, "sft"))
    config = dataclasses.replace(taught, steps=240, batch_size=batch_size, seed=seed)
    policy = sft.run_sft(
        model=out / "model",
        data=data,
        out=out / "sft",
        config=config,
        evaluate=share,
        stop=lambda _, values: values.get("eval/reward_share", 0.0) >= START_SHARE,
    )
    policy.save_pretrained(out / "start")
    before = measure(policy)
    config = dataclasses.replace(recipe, steps=steps, batch_size=len(records), seed=seed)
    policy = gspo.run_gspo(model=out / "start", data=data, out=out / "gspo", config=config)
    policy.save_pretrained(out / "export")
    after = measure(policy)
    per_question = (found.total.mean(1, keepdims=True) for found in (before, after))
    gain = metrics.paired_bootstrap(*per_question, lambda means: means[..., 0], seed=seed)
    text = (
        f"start: {before.total.mean():.3f} of {before.highest.mean():.3f} ({before.share:.0%}; expected 40 to 70 %)\n"
        f"after {steps} steps of GSPO: {after.total.mean():.3f} ({after.share:.0%})\n"
        f"gain per question {gain.value:.3f}, 95 % interval {gain.low:.3f} to {gain.high:.3f} (claim: above 0)\n"
        f"samples: {out / 'gspo' / gspo.SAMPLES}, model: {out / 'export'}"
    )
    return Outcome(text, gain.low > 0 and 0.4 <= before.share <= 0.7)

"""Can the model learn a handful of records by heart? Then the whole chain works."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from openo3_jax import policy as policy_lib
from openo3_jax import recipes, tiny
from openo3_jax.config import SamplingConfig, SFTConfig
from openo3_jax.data import annotations, prompts, synthetic, transforms
from openo3_jax.experiments import Outcome
from openo3_jax.policy import Policy
from openo3_jax.train import run, sft

OVERFIT_LOSS = 0.05  # the claim: nats per target token
STOP_LOSS = 0.0005  # training goes on to here, so that greedy decoding repeats every token


def overfit(*, data: Path | None, out: Path, steps: int = 400, seed: int = 0) -> Outcome:
    """A tiny model from random weights learns the SFT records of `data` by heart (None: ten rendered clips).

    Writes `out/model` (the start), `out/run`, `out/export` (a Hugging Face directory), `out/overfit.png` (the curve)
    and `out/answers.jsonl` (each target beside the greedy answer). The claim: loss below 0.05 nats per token, and every
    target repeated to the letter. Source: arXiv:2510.20579, the overfitting check that precedes training.
    """
    run.check_new(out)
    out.mkdir(parents=True, exist_ok=True)
    recipe = recipes.sft_tiny()
    if data is None:
        data = out / "data"
        synthetic.write_dataset(data, num_train=10, seed=seed)
    records = annotations.load_stage(data, "sft")
    config = dataclasses.replace(recipe, steps=steps, batch_size=len(records), seed=seed)
    tiny.init_tiny(out / "model", seed=seed)
    losses: list[float] = []

    def has_learned(_: int, values) -> bool:
        losses.append(values["sft/loss"])
        return losses[-1] < STOP_LOSS

    policy = sft.run_sft(model=out / "model", data=data, out=out / "run", config=config, stop=has_learned)
    policy.save_pretrained(out / "export")
    _plot(losses, out / "overfit.png")
    pairs = answers(policy, records, data, config)
    lines = (json.dumps({"target": target, "answer": answer}) + "\n" for target, answer in pairs)
    (out / "answers.jsonl").write_text("".join(lines))
    num_same = sum(target == answer for target, answer in pairs)
    text = (
        f"loss {losses[-1]:.4f} nats per token after {len(losses)} steps on {len(records)} records "
        f"(claim: < {OVERFIT_LOSS})\n"
        f"{num_same} of {len(records)} targets repeated to the letter, greedily\n"
        f"curve: {out / 'overfit.png'}, answers: {out / 'answers.jsonl'}, model: {out / 'export'}"
    )
    return Outcome(text, losses[-1] < OVERFIT_LOSS and num_same == len(records))


def answers(
    policy: Policy, records: Sequence[annotations.Record], root: Path, config: SFTConfig
) -> list[tuple[str, str]]:
    """For each SFT record the text it was trained on, and the policy's greedy answer to its prompt."""
    wording = prompts.load_prompts()
    prepared = transforms.prepare_all(records, root, "sft", config=config.video, wording=wording)
    samples = [policy.processor.encode(one.messages[:-1]) for one in prepared]
    targets = [one.messages[-1]["content"][0]["text"] for one in prepared]
    longest = max(len(policy.processor.tokenizer(target)["input_ids"]) for target in targets)
    greedy = SamplingConfig(temperature=0.0, max_new_tokens=longest + policy_lib.CAPACITY_STEP)
    out = policy.continue_samples(samples, greedy, [0] * len(samples))
    return [(target, texts[0]) for target, texts in zip(targets, out.texts, strict=True)]


def _plot(losses: Sequence[float], file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.semilogy(range(1, len(losses) + 1), losses)
    axes.axhline(OVERFIT_LOSS, color="grey", linestyle="--", label=f"claim: {OVERFIT_LOSS}")
    axes.set(xlabel="step", ylabel="loss, nats per target token", title="A handful of records, learned by heart")
    axes.legend()
    figure.savefig(file, dpi=120)

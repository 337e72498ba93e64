"""The first stage on this machine: render clips, make a tiny model, train it, ask it about clips it never saw."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rich import box, console, table

from openo3_jax import experiments, recipes, tags, tiny
from openo3_jax.data import annotations, synthetic
from openo3_jax.train import run, sft

TRAIN_SEED, HELD_OUT_SEED = 0, 1
STOP_LOSS = 0.05  # nats per target token


class Answer(NamedTuple):
    """One held-out question: the text that would be right, and what the model said."""

    task: str
    question: str
    target: str
    said: str

    @property
    def is_well_formed(self) -> bool:
        """Reasoning and answer stand in their tags, each pair closed."""
        has_both = tags.think_text(self.said) is not None and tags.answer_text(self.said) is not None
        return has_both and tags.counts_match(self.said, "think", "answer", "obj", "box", "t")

    @property
    def is_right(self) -> bool:
        return tags.answer_text(self.said) == tags.answer_text(self.target)


def run_demo(out: Path, *, quick: bool = False) -> tuple[str, bool]:
    """Write everything under `out`; returns what to print, and whether every held-out answer has the taught form.

    `quick`: a few steps, to see that all parts work; nothing is claimed then.
    """
    say = console.Console(stderr=True).print
    run.check_new(out)
    config = recipes.demo_quick() if quick else recipes.demo()
    say("1/4 rendering clips")
    synthetic.write_dataset(out / "data", num_train=40 if quick else 160, seed=TRAIN_SEED)
    synthetic.write_dataset(out / "held_out", num_train=5 if quick else 20, seed=HELD_OUT_SEED)
    say("2/4 a tiny random model")
    tiny.init_tiny(out / "model")
    say("3/4 supervised fine-tuning")
    policy = sft.run_sft(
        model=out / "model",
        data=out / "data",
        out=out / "run",
        config=config,
        stop=lambda _, values: values["sft/loss"] < STOP_LOSS,
    )
    policy.save_pretrained(out / "export")
    say("4/4 asking about clips it never saw")
    records = annotations.load_stage(out / "held_out", "sft")
    pairs = experiments.answers(policy, records, out / "held_out", config)
    found = [Answer(r["task"], r["question"], *pair) for r, pair in zip(records, pairs, strict=True)]
    clip = out / "held_out" / "videos" / "stgr" / "temporal_grounding" / "videos" / "0.mp4"
    ask = f'openo3 ask {out / "export"} {clip} "{records[0]["question"]}" --video.max-frames {config.video.max_frames}'
    ask += f" --video.min-pixels {config.video.min_pixels} --video.max-pixels {config.video.max_pixels}"
    return f"{_render(found)}\nask it yourself:\n  {ask}", quick or all(answer.is_well_formed for answer in found)


def _render(found: Sequence[Answer]) -> str:
    """The held-out questions as a table, one answer in full, and the counts."""
    rows = table.Table("task", "question", "truth", "answer", "form", box=box.SIMPLE)
    for answer in found:
        question = answer.question.partition("\n")[0]
        truth, said = tags.answer_text(answer.target) or "", tags.answer_text(answer.said) or ""
        rows.add_row(answer.task, question, truth, said, "ok" if answer.is_well_formed else "broken")
    page = console.Console(width=150, color_system=None, markup=False)
    with page.capture() as text:
        page.print(rows)
    well_formed, right = sum(a.is_well_formed for a in found), sum(a.is_right for a in found)
    return (
        f"{text.get()}\nthe first one in full\n  truth: {found[0].target}\n  model: {found[0].said}\n\n"
        f"{well_formed} of {len(found)} answers have the form that was taught, {right} are true to the letter.\n"
        "This run teaches how to answer with evidence; to see what it answers about takes far more clips."
    )

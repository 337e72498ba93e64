"""Render, teach (stage one), sharpen (stage two), measure, export. One seed, one result; it can be interrupted."""

import dataclasses
import functools
import hashlib
import itertools
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from rich import box, console, table

from openo3_jax import config_json, recipes, tasks
from openo3_jax import policy as policy_lib
from openo3_jax.config import GSPOConfig, SFTConfig, VideoConfig
from openo3_jax.data import media, synthetic, world
from openo3_jax.demo import held_out, stills
from openo3_jax.errors import Stopped
from openo3_jax.evals import store
from openo3_jax.policy import Policy
from openo3_jax.report import pages, run_report
from openo3_jax.train import gspo, metrics, sft

Size = Literal["quick", "demo", "full"]
BASE = Path(__file__).with_name("tiny_base")
PROMPTS = Path(__file__).with_name("prompts.json")
TRAIN_SEED, HELD_OUT_SEED = 0, 1
WORLD = world.WorldConfig(
    objects=(1, 3),
    sizes=(0.25, 0.4),
    num_frames=30,
    fps=5,
    beat_s=1.0,
    stays=(1, 4),
    height=stills.HEIGHT,
    width=stills.WIDTH,
)
VIOU_TIMES, TIOU_TIMES = 2.0, 1.5  # what stage one must reach, in the best constant answer
ROWS = ("base", "sft", "gspo")


class Plan(NamedTuple):
    """How much of everything."""

    sft: SFTConfig
    gspo: GSPOConfig
    clips: Mapping[tasks.Stage, int]  # to train on
    held_out: int
    samples: int  # answers drawn for each held-out question


PLANS: dict[Size, Plan] = {
    "quick": Plan(
        recipes.demo(steps=4), recipes.demo_gspo(steps=2), clips={"sft": 96, "rl": 48}, held_out=24, samples=2
    ),
    "demo": Plan(recipes.demo(), recipes.demo_gspo(), clips={"sft": 1920, "rl": 864}, held_out=396, samples=4),
    "full": Plan(
        recipes.demo(steps=900), recipes.demo_gspo(steps=250), clips={"sft": 6000, "rl": 3000}, held_out=600, samples=8
    ),
}


class Outcome(NamedTuple):
    """What the command prints, and whether every claim held."""

    text: str
    holds: bool


def run_demo(out: Path, *, size: Size = "demo") -> Outcome:
    """Everything under `out`: data, held_out, sft, gspo, model (the export), scores, report.html.

    Called again with the same `out` it goes on where it was interrupted. "quick" shows that all parts work and claims
    nothing. Raises: InputError for an `out` that holds something else, or a demo of another size.
    """
    say = console.Console(stderr=True).print
    plan = PLANS[size]
    store.open_run(out, _settings(size, plan))
    say("1/5 rendering clips")
    for name, clips, seed in (("data", plan.clips, TRAIN_SEED), ("held_out", {"rl": plan.held_out}, HELD_OUT_SEED)):
        _once(out / name, functools.partial(_render, clips=clips, seed=seed))
    say("2/5 stage one: how to answer with evidence")
    taught = _trained(out, "sft", lambda **where: sft.run_sft(model=BASE, config=plan.sft, **where))
    say("3/5 stage two: rewards for evidence that is right")
    sharpened = _trained(out, "gspo", lambda **where: gspo.run_gspo(model=taught, config=plan.gspo, **where))
    say("4/5 asking all three about clips they never saw")
    models = dict(zip(ROWS, (BASE, taught, sharpened), strict=True))
    sampling = dataclasses.replace(plan.gspo.sampling, num_samples=plan.samples)
    asked, found = None, {}
    for name, directory in models.items():
        policy = policy_lib.load_pretrained(directory, video=plan.gspo.video)
        asked = asked or held_out.load(out / "held_out", policy, plan.gspo.video, PROMPTS)
        found[name] = held_out.measure(policy, asked, sampling, plan.gspo.rules, out / "scores" / f"{name}.json")
    say("5/5 the page")
    report = out / "report.html"
    pages.write(report, run_report.make_report(out / "gspo", root=out / "data").page)
    text, holds = _verdict(found, asked, size)
    ends = f"model: {sharpened}, page: {report}\n{_how_to_ask(out / 'held_out', asked, sharpened, plan.gspo.video)}"
    return Outcome(f"{_table(found, asked)}\n{text}\n{ends}", holds or size == "quick")


# ---- stages that can be interrupted ----


def _settings(size: Size, plan: Plan) -> dict[str, Any]:
    """All that the result follows from: what one version has made another does not go on with."""
    base = hashlib.sha256((BASE / "model.safetensors").read_bytes()).hexdigest()
    how_much = {"clips": dict(plan.clips), "held_out": plan.held_out, "samples": plan.samples}
    parts = {"world": WORLD, "sft": plan.sft, "gspo": plan.gspo}
    fields = {f"{part}.{name}": value for part, of in parts.items() for name, value in config_json.to_json(of).items()}
    return {"size": size, "seed": TRAIN_SEED, "base": base} | how_much | fields


def _render(root: Path, clips: Mapping[tasks.Stage, int], seed: int) -> None:
    for stage, number in clips.items():
        with metrics.Progress(f"clips for {stage}", number) as bar:
            advance = functools.partial(bar.update, note="")
            synthetic.write_dataset(root, num_train=number, seed=seed, config=WORLD, stages=[stage], advance=advance)


def _once(directory: Path, make: Callable[[Path], None]) -> None:
    """Make the directory, whole or not at all; one that is there is kept."""
    if directory.exists():
        return
    for cut_off in directory.parent.glob(f".{directory.name}-*"):
        shutil.rmtree(cut_off)
    with tempfile.TemporaryDirectory(prefix=f".{directory.name}-", dir=directory.parent) as staging:
        make(Path(staging) / "made")
        shutil.move(Path(staging) / "made", directory)


def _trained(out: Path, stage: str, train: Callable[..., Policy]) -> Path:
    """The Hugging Face directory after a stage, trained unless it is there; a run cut short goes on."""
    directory = out / {"sft": "sft_model", "gspo": "model"}[stage]
    if not directory.exists():
        try:
            policy = train(data=out / "data", out=out / stage, prompts_file=PROMPTS, resume=True)
        except Stopped:
            raise Stopped(f"{out / stage}: stopped, and what was learned is saved; the same command goes on") from None
        policy.save_pretrained(directory, dtype="float32")
    return directory


# ---- what is said in the end ----


def _verdict(found: dict[str, held_out.Held], asked: held_out.Questions, size: Size) -> tuple[str, bool]:
    taught = _taught(asked)
    constant, learned = held_out.constants(asked, taught), found["sft"].values(taught)
    gains = {
        "SFT over base": held_out.gain(found["base"], found["sft"]),
        "GSPO over SFT": held_out.gain(found["sft"], found["gspo"]),
    }
    claims = [
        (f"{name}: sampled reward {gain.value:+.3f}, 95 % interval {gain.low:+.3f} to {gain.high:+.3f}", gain.low > 0)
        for name, gain in gains.items()
    ]
    for name, column, times in (("visual", "viou", VIOU_TIMES), ("temporal", "tiou", TIOU_TIMES)):
        ratio = learned[column] / constant[column]
        text = f"{name} IoU of SFT in its own tasks {learned[column]:.3f}, {ratio:.2f} times the best constant's"
        claims.append((f"{text} (claim: {times:g})", ratio >= times))
    if size == "full":
        mlgm = [found[name].drawn_mlgm for name in ROWS]
        rises = all(lower < higher for lower, higher in itertools.pairwise(mlgm))
        text = f"sampled mLGM rises from stage to stage: {', '.join(f'{one:.3f}' for one in mlgm)}"
        claims.append((text, rises))
    lines = [f"{'holds' if holds else 'FAILS'}: {text}" for text, holds in claims]
    return "\n".join(lines), all(holds for _, holds in claims)


def _table(found: dict[str, held_out.Held], asked: held_out.Questions) -> str:
    """All questions, those of stage one's tasks, then those about clips with one, two and three objects."""
    names = ("reward", "greedy", "format", "acc", "tiou", "viou", "mam", "mlgm")
    rows = table.Table("", "questions", "n", *names, box=box.SIMPLE)
    everything = np.ones(len(asked.records), bool)
    whole = {"all": everything, "of stage one's tasks": _taught(asked)}
    groups = whole | {f"objects: {number}": chosen for number, chosen in held_out.by_objects(asked).items()}
    for kind, chosen in groups.items():
        number = str(int(chosen.sum()))
        for name, held in found.items():
            values = held.values(chosen)
            rows.add_row(name, kind, number, *(f"{values[column]:.3f}" for column in names))
        if kind in whole:
            constant = {name: f"{value:.3f}" for name, value in held_out.constants(asked, chosen).items()}
            rows.add_row("best constant", kind, number, *(constant.get(column, "") for column in names))
    page = console.Console(width=120, color_system=None, markup=False)
    with page.capture() as text:
        page.print(rows)
    notes = (
        "reward: mean of samples at temperature 1 from the likeliest 95 %; greedy: that of greedy answers, as the rest"
    )
    return f"{text.get()}\n{notes}; mam, mlgm: of one chain"


def _taught(asked: held_out.Questions) -> np.ndarray:
    """Which questions are of the tasks of stage one."""
    return np.array([record["task"] in tasks.STAGE_TASKS["sft"] for record in asked.records])


def _how_to_ask(root: Path, asked: held_out.Questions, model: Path, video: VideoConfig) -> str:
    record = next(record for record in asked.records if record["task"] == tasks.TEMPORAL_SPATIAL)
    clip = media.find_media(root, record, "rl")
    sizes = f"--video.max-frames {video.max_frames} --video.min-pixels {video.min_pixels}"
    words = f'openo3 ask {model} {clip} "{record["question"]}" --prompts {PROMPTS}'
    return f"ask it yourself:\n  {words} {sizes} --video.max-pixels {video.max_pixels}"

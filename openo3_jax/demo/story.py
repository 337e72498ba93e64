"""Render, teach (stage one), sharpen (stage two), measure, export. One seed, one result; it can be interrupted."""

import dataclasses
import itertools
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from rich import box, console, table

from openo3_jax import policy as policy_lib
from openo3_jax import recipes, tasks
from openo3_jax.config import GSPOConfig, SFTConfig
from openo3_jax.data import synthetic, world
from openo3_jax.demo import held_out, stills
from openo3_jax.errors import InputError
from openo3_jax.evals import store
from openo3_jax.policy import Policy
from openo3_jax.report import pages, run_report
from openo3_jax.train import gspo, sft

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
SETTINGS = "demo.json"


class Plan(NamedTuple):
    """How much of everything."""

    sft: SFTConfig
    gspo: GSPOConfig
    clips: int
    held_out: int
    samples: int  # answers drawn for each held-out question


PLANS: dict[Size, Plan] = {
    "quick": Plan(recipes.demo_sft(steps=4), recipes.demo_gspo(steps=2), clips=96, held_out=24, samples=2),
    "demo": Plan(recipes.demo_sft(), recipes.demo_gspo(), clips=1920, held_out=264, samples=4),
    "full": Plan(recipes.demo_sft(steps=900), recipes.demo_gspo(steps=250), clips=6000, held_out=600, samples=8),
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
    _claim_directory(out, size)
    say("1/5 rendering clips")
    for name, number, seed in (("data", plan.clips, TRAIN_SEED), ("held_out", plan.held_out, HELD_OUT_SEED)):
        _once(out / name, lambda at, n=number, s=seed: synthetic.write_dataset(at, num_train=n, seed=s, config=WORLD))
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
    ends = f"model: {sharpened}, page: {report}\n{_how_to_ask(out, sharpened, plan.gspo)}"
    return Outcome(f"{_table(found, asked)}\n{text}\n{ends}", holds or size == "quick")


# ---- stages that can be interrupted ----


def _claim_directory(out: Path, size: Size) -> None:
    settings = {"size": size, "seed": TRAIN_SEED}
    file = out / SETTINGS
    if file.is_file():
        if store.read_json(file) != settings:
            raise InputError(f"{out}: holds a demo of another size ({store.read_json(file)}); choose another --out")
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: exists and is not an empty directory; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    store.replace_text(file, json.dumps(settings) + "\n")


def _once(directory: Path, make: Callable[[Path], None]) -> None:
    """Make the directory, whole or not at all; one that is there is kept."""
    if directory.exists():
        return
    with tempfile.TemporaryDirectory(prefix=f".{directory.name}-", dir=directory.parent) as staging:
        make(Path(staging) / "made")
        shutil.move(Path(staging) / "made", directory)


def _trained(out: Path, stage: str, train: Callable[..., Policy]) -> Path:
    """The Hugging Face directory after a stage, trained unless it is there; a run cut short goes on."""
    directory = out / {"sft": "sft_model", "gspo": "model"}[stage]
    if not directory.exists():
        policy = train(data=out / "data", out=out / stage, prompts_file=PROMPTS, resume=True)
        policy.save_pretrained(directory, dtype="float32")
    return directory


# ---- what is said in the end ----


def _verdict(found: dict[str, held_out.Held], asked: held_out.Questions, size: Size) -> tuple[str, bool]:
    taught = np.array([record["task"] in tasks.STAGE_TASKS["sft"] for record in asked.records])
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
        mlgm = [found[name].values()["mlgm"] for name in ROWS]
        rises = all(lower < higher for lower, higher in itertools.pairwise(mlgm))
        claims.append((f"mLGM rises from stage to stage: {', '.join(f'{one:.3f}' for one in mlgm)}", rises))
    lines = [f"{'holds' if holds else 'FAILS'}: {text}" for text, holds in claims]
    return "\n".join(lines), all(holds for _, holds in claims)


def _table(found: dict[str, held_out.Held], asked: held_out.Questions) -> str:
    """All questions, then those about clips with one, two and three objects."""
    names = ("reward", "format", "acc", "tiou", "viou", "mam", "mlgm")
    rows = table.Table("", "objects", "n", *names, box=box.SIMPLE)
    groups = {"all": slice(None), **held_out.by_objects(asked)}
    for objects, chosen in groups.items():
        number = len(asked.records) if objects == "all" else int(chosen.sum())
        for name, held in found.items():
            values = held.values(chosen)
            rows.add_row(name, str(objects), str(number), *(f"{values[column]:.3f}" for column in names))
    constant = held_out.constants(asked, slice(None))
    blank = dict.fromkeys(names, "")
    rows.add_row("best constant", "all", "", *(blank | {k: f"{v:.3f}" for k, v in constant.items()}).values())
    page = console.Console(width=120, color_system=None, markup=False)
    with page.capture() as text:
        page.print(rows)
    note = "reward: mean of samples at temperature 1; the rest: greedy answers; mam, mlgm: of one chain"
    return f"{text.get()}\n{note}"


def _how_to_ask(out: Path, model: Path, config: GSPOConfig) -> str:
    clip = next((out / "held_out" / "videos").rglob("*.mp4"))
    video = config.video
    sizes = f"--video.max-frames {video.max_frames} --video.min-pixels {video.min_pixels}"
    return f'ask it yourself:\n  openo3 ask {model} {clip} "..." {sizes} --video.max-pixels {video.max_pixels}'

"""`openo3 VERB ...`: parse, call, print. Results go to stdout, everything else to stderr; heavy imports wait.

Exit codes: 0 done, 2 the user's mistake, 3 a stated claim did not hold, 75 stopped by a signal with the state saved,
130 interrupted.
"""

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import AvoidSubcommands, Positional, UseAppendAction, arg

from openo3_jax import recipes
from openo3_jax.config import GSPOConfig, HostsConfig, SFTConfig, VideoConfig
from openo3_jax.errors import InputError, Stopped
from openo3_jax.evals.config import EvalConfig
from openo3_jax.plan.config import Rates, Sizes

Flat = arg(name="")  # fields of a nested dataclass as flags of their own
Verbs = Mapping[str, Any]  # a word -> a function, or the words that may follow it


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code. Usage errors leave through SystemExit(2), as `--help` does with 0."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    _prepare_libraries()
    try:
        function, prog, rest = _find(words)
        return tyro.cli(function, prog=prog, args=rest, config=(AvoidSubcommands,)) or 0
    except InputError as error:
        return _fail(str(error))
    except Stopped as stopped:
        return _fail(str(stopped), code=75)
    except BrokenPipeError:  # the reader of stdout left; nothing is flushed into the void at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        if error.filename is None:
            raise
        return _fail(f"{error.filename}: {error.strerror}")
    except KeyboardInterrupt:
        return _fail("interrupted", code=130)
    return 1


def _find(words: list[str]) -> tuple[Callable[..., int | None], str, list[str]]:
    """The function that the first words name, the program's name with them, and the words that are left."""
    verbs: Any = VERBS
    prog = "openo3"
    while isinstance(verbs, Mapping):
        word = words[0] if words else "--help"
        if word in ("-h", "--help"):
            print(_help(prog, verbs))
            raise SystemExit(0)
        if word.endswith(".json") and verbs in (VERBS["sft"], VERBS["gspo"]):
            return _rerun(prog.split()[-1], word), f"{prog} {word}", words[1:]
        if word not in verbs:
            raise InputError(f"unknown verb {word!r}; expected {prog} with one of {', '.join(verbs)}")
        verbs, prog, words = verbs[word], f"{prog} {word}", words[1:]
    return verbs, prog, words


def _rerun(stage: str, file: str) -> Callable[[], int | None]:
    """The verb of a stage with the settings that a run has saved."""
    from openo3_jax.train import run

    config = run.load_config(Path(file), stage)
    return _sft(config) if stage == "sft" else _gspo(config)


def _help(prog: str, verbs: Verbs) -> str:
    def summary(verb: Any) -> str:
        return " | ".join(verb) if isinstance(verb, Mapping) else verb.__doc__.partition("\n")[0]

    lines = [f"  {word:<11} {summary(verb)}" for word, verb in verbs.items()]
    return "\n".join([f"usage: {prog} {{{','.join(verbs)}}} ...", "", *lines, "", f"{prog} VERB --help tells more."])


def _fail(message: str, code: int = 2) -> int:
    print(f"openo3: {' '.join(message.split())}", file=sys.stderr)
    return code


def _prepare_libraries() -> None:
    """Set before they are imported: compiled programs are kept between runs, and warnings are not for the user."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "openo3_jax" / "compiled"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    warnings.filterwarnings("ignore")
    for name in ("jax", "orbax"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for name in ("absl", "asyncio"):  # a checkpoint that cannot be written is told by us, in one line
        logging.getLogger(name).setLevel(logging.CRITICAL)


# ---- verbs: their arguments become positionals and flags ----


def demo(*, out: Path = Path("demo_run"), quick: bool = False, full: bool = False) -> int:
    """Render clips, teach a tiny model to answer with evidence, sharpen it, measure it: the whole story here.

    Interrupted, it goes on where it was when called again.

    Args:
        out: the directory for everything that is made.
        quick: a few steps, to see that all parts work; nothing is claimed then.
        full: more clips and more steps, an hour.
    """
    if quick and full:
        raise InputError("--quick and --full: choose one of them")
    # Two devices of one thread each train small models faster than one device of two threads.
    os.environ.setdefault("XLA_FLAGS", f"--xla_force_host_platform_device_count={min(2, os.cpu_count() or 1)}")
    from openo3_jax.demo import story

    return _claim(*story.run_demo(out, size="quick" if quick else "full" if full else "demo"))


def _claim(text: str, holds: bool) -> int:
    print(text)
    return 0 if holds else 3


def init_tiny(
    out: Positional[Annotated[Path, arg(metavar="OUT")]], *, seed: int = 0, hidden_size: int = 128, layers: int = 4
) -> None:
    """Write a small random Qwen2.5-VL directory: tokenizer, processor and weights.

    Args:
        out: a new directory.
        seed: of the weights.
        hidden_size: of the decoder, a multiple of 64.
        layers: of the decoder.
    """
    from openo3_jax import api

    api.init_tiny(out, seed=seed, hidden_size=hidden_size, layers=layers)


def ask(
    model: Positional[Annotated[Path, arg(metavar="MODEL")]],
    video: Positional[Annotated[Path, arg(metavar="VIDEO")]],
    question: Positional[Annotated[str, arg(metavar="QUESTION")]],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    seed: int = 0,
    native: bool = False,
    prompts: Path | None = None,
    html: Path | None = None,
    overlay: Path | None = None,
    frames: Annotated[VideoConfig, arg(name="video")] = VideoConfig(),  # noqa: B008 (frozen)
) -> None:
    """Answer a question about a video with evidence: what, where and when.

    Args:
        model: a Qwen2.5-VL directory in Hugging Face layout.
        video: the clip.
        question: asked as in training, with the wording of temporal-spatial QA.
        max_new_tokens: limit of the answer.
        temperature: 0 takes the likeliest token each time.
        seed: of the sampling.
        native: temporal patches of two frames, without lines of text that tell the time.
        prompts: other wordings, a JSON file.
        html: where to write a page on which the clip plays beside its evidence, one file.
        overlay: where to write the clip with boxes and captions, .mp4 or .gif.
        frames: how the clip becomes frames.
    """
    from openo3_jax import api, tasks
    from openo3_jax.data import prompts as prompts_lib
    from openo3_jax.report import overlay as overlay_lib
    from openo3_jax.report import pages

    if not video.is_file():  # said before the weights are read, which may take minutes
        raise InputError(f"{video}: no such video file")
    if html is not None:
        pages.check_name(html)
    if overlay is not None:
        overlay_lib.check_name(overlay)
    wording = prompts_lib.load_prompts(prompts).of("sft", tasks.TEMPORAL_SPATIAL)
    policy = api.load_pretrained(model, video=frames, video_mode="native" if native else "frames")
    said = [{"type": "video", "video": video}, {"type": "text", "text": wording.ask(question)}]
    system = [{"role": "system", "content": wording.system}] if wording.system else []
    out = policy.generate(
        [[*system, {"role": "user", "content": said}]],
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
    )
    answer = out.texts[0][0]
    print(answer, flush=True)
    if html is not None:
        pages.write(html, pages.answer_page(video, question, answer, frames, [("model", str(model))]))
    if overlay is not None:
        overlay_lib.write(overlay, video, question, answer, pages.shown_hw(video, frames))


def _sft(recipe: SFTConfig) -> Callable[..., None]:
    def sft(
        *,
        model: Path,
        data: Path,
        out: Path,
        resume: bool = False,
        profile: str | None = None,
        mesh: str | None = None,
        prompts: Path | None = None,
        processes: Annotated[HostsConfig, Flat] = HostsConfig(),  # noqa: B008 (frozen)
        config: Annotated[SFTConfig, Flat] = recipe,
    ) -> None:
        """Stage one: train on the records of STGR-SFT.json.

        Args:
            model: the Qwen2.5-VL directory to start from.
            data: the data root in the released layout.
            out: a new directory for the run.
            resume: go on with the run in OUT where it was stopped; without a checkpoint there it starts anew.
            profile: steps to trace into OUT/profile for XProf or Perfetto, such as 10:15.
            mesh: sizes of its axes, such as fsdp=4,tensor=2; without it all devices are on fsdp.
            prompts: other wordings, a JSON file.
            processes: of a run over several hosts; each of them is started with the same command.
        """
        _start(processes, config)
        from openo3_jax.train import profiling
        from openo3_jax.train import sft as stage

        places = {"model": model, "data": data, "out": out, "prompts_file": prompts}
        traced = None if profile is None else profiling.parse_steps(profile)
        with _several(processes):
            stage.run_sft(**places, config=config, mesh=_mesh(mesh), resume=resume, profile=traced)

    return sft


def _start(processes: HostsConfig, config: SFTConfig | GSPOConfig) -> None:
    """Join the other processes of the run, before anything else imports or asks jax."""
    if processes.is_distributed:
        from openo3_jax import hosts

        hosts.start(processes, heartbeat_timeout_seconds=config.run.heartbeat_timeout_seconds)


def _several(processes: HostsConfig) -> contextlib.AbstractContextManager[None]:
    """What is done with other processes ends with them."""
    if not processes.is_distributed:
        return contextlib.nullcontext()
    from openo3_jax import hosts

    return hosts.until_lost()


def _gspo(recipe: GSPOConfig) -> Callable[..., None]:
    def gspo(
        *,
        model: Path,
        data: Path,
        out: Path,
        resume: bool = False,
        profile: str | None = None,
        mesh: str | None = None,
        prompts: Path | None = None,
        reference: Path | None = None,
        reward: str | None = None,
        processes: Annotated[HostsConfig, Flat] = HostsConfig(),  # noqa: B008 (frozen)
        config: Annotated[GSPOConfig, Flat] = recipe,
    ) -> None:
        """Stage two: sample groups of answers to the records of STGR-RL.json, reward them, learn from the difference.

        Args:
            model: the Qwen2.5-VL directory to start from, such as the export of a run of stage one.
            data: the data root in the released layout.
            out: a new directory for the run.
            resume: go on with the run in OUT where it was stopped; without a checkpoint there it starts anew.
            profile: steps to trace into OUT/profile for XProf or Perfetto, such as 10:15.
            mesh: sizes of its axes, such as fsdp=4,tensor=2; without it all devices are on fsdp.
            prompts: other wordings, a JSON file.
            reference: the model not to leave too far behind, if it is not the one to start from.
            reward: a reward of one's own, module:function, called with records and completions.
            processes: of a run over several hosts; each of them is started with the same command.
        """
        _start(processes, config)
        from openo3_jax.rewards import redteam
        from openo3_jax.train import gspo as stage
        from openo3_jax.train import profiling, rollout

        own = None if reward is None else rollout.own_reward(redteam.load_reward(reward))
        with _several(processes):
            stage.run_gspo(
                model=model,
                data=data,
                out=out,
                config=config,
                mesh=_mesh(mesh),
                resume=resume,
                profile=None if profile is None else profiling.parse_steps(profile),
                prompts_file=prompts,
                reference=reference,
                reward=own,
            )

    return gspo


def _plan(recipe: SFTConfig | GSPOConfig) -> Callable[..., int]:
    def plan(
        *,
        devices: str,
        model: str = "7b",
        mesh: str | None = None,
        sizes: Annotated[Sizes, Flat] = Sizes(),  # noqa: B008 (frozen)
        rates: Annotated[Rates, Flat] = Rates(),  # noqa: B008 (frozen)
        search: bool = False,
        json: Path | None = None,
        config: Annotated[type(recipe), Flat] = recipe,
    ) -> int:
        """Compile the recipe for devices that need not be here: memory, communication, time. Exit code 3: too large.

        Args:
            devices: KIND:SHAPE, such as h100:8 or v5p:4x4x4.
            model: 3b, 7b, 32b, 72b, or a directory with a config.json.
            mesh: sizes of its axes, such as fsdp=4,tensor=2; without it all devices are on fsdp.
            search: try meshes, remat policies and batches; rank what fits; find the most that a device holds.
            json: where to write all figures.
        """
        from openo3_jax.plan import command

        text, fits = command.run(
            config,
            devices=devices,
            model=model,
            axes=_mesh(mesh),
            sizes=sizes,
            rates=rates,
            wants_search=search,
            json_out=json,
            say=lambda tried: print(f"plan: {tried}", file=sys.stderr),
        )
        return _claim(text, fits)

    return plan


def _mesh(text: str | None) -> dict[str, int] | None:
    """`fsdp=4,tensor=2` -> {"fsdp": 4, "tensor": 2}."""
    if text is None:
        return None
    pairs = [part.partition("=") for part in text.split(",")]
    axes = {axis.strip(): int(size) for axis, _, size in pairs if size.strip().isdecimal()}
    if len(axes) != len(pairs):
        raise InputError(f"--mesh {text}: expected different axes with their sizes, such as fsdp=4,tensor=2")
    return axes


def export(
    run: Positional[Annotated[Path, arg(metavar="RUN")]],
    out: Positional[Annotated[Path, arg(metavar="OUT")]],
    *,
    dtype: Literal["float32", "bfloat16"] | None = None,
    adapter: bool = False,
) -> None:
    """Write the trained weights of a run as a Hugging Face directory; adapters are added to the weights.

    Args:
        run: the directory of a training run.
        out: a new directory.
        dtype: of every tensor; without it each keeps that of the model the run started from.
        adapter: write the adapters alone, for peft; the result is also a MODEL of every other verb.
    """
    from openo3_jax.train import run as run_lib

    if adapter and dtype is not None:
        raise InputError(f"export: --dtype {dtype} with --adapter; adapters are written in float32, so leave it out")
    if adapter:
        run_lib.save_adapter(run, out)
    else:
        run_lib.load(run).save_pretrained(out, dtype)


def replay(dump: Positional[Annotated[Path, arg(metavar="DUMP")]], *, mesh: str | None = None) -> None:
    """Run a batch again whose loss or gradient was not finite, and say which numbers are not.

    Args:
        dump: a directory that a run has written, such as RUN/dumps/step-12-0.
        mesh: sizes of its axes, such as fsdp=4,tensor=2; without it all devices are on fsdp.
    """
    from openo3_jax.train import replay as replay_lib

    print(replay_lib.replay(dump, mesh=_mesh(mesh)))


def score(
    file: Positional[Annotated[Path, arg(metavar="FILE")]],
    *,
    rules: str = "paper",
    explain: bool = False,
    what_if: UseAppendAction[tuple[str, ...]] = (),
    json: Path | None = None,
    html: Path | None = None,
    root: Path | None = None,
) -> None:
    """Score completions term by term.

    Args:
        file: JSONL; a line is a record with `completion`, and perhaps `group` and `step_percent`.
        rules: a rule set: paper, released or hardened.
        explain: say why, for every line.
        what_if: FIELD=VALUE, a rule to change for a second scoring; may be repeated.
        json: where to write everything.
        html: where to write a page of the first answers with their evidence, one file; clips are shown with --root.
        root: the data root, for clips and pictures and for records without picture sizes.
    """
    from openo3_jax import api
    from openo3_jax.rewards import commands

    options = {"rules": rules, "explain": explain, "what_if": what_if, "json_out": _text(json)}
    with contextlib.ExitStack() as stack:
        sizes = None if root is None else stack.enter_context(api.MediaSizes(root))
        print(commands.score_file(str(file), **options, sizes=sizes), flush=True)
        if html is not None:
            from openo3_jax.report import pages

            pages.write(html, pages.score_page(str(file), rules=rules, root=root, sizes=sizes))


def report(
    run: Positional[Annotated[Path, arg(metavar="RUN")]],
    *,
    out: Path | None = None,
    root: Path | None = None,
    before: Path | None = None,
    after: Path | None = None,
) -> None:
    """Write the page of a run: curves, what looks wrong, answers with evidence, settings.

    Args:
        run: the directory of a training run, finished or not.
        out: the page, one file; RUN/report.html without it.
        root: the data root of the run, for the clips of its answers.
        before: the directory of an evaluation of the model that the run started from.
        after: the same of what became of it.
    """
    from openo3_jax.report import pages, run_report

    file = run / "report.html" if out is None else out
    pages.check_name(file)
    made = run_report.make_report(run, root=root, before=before, after=after)
    pages.write(file, made.page)
    seen = [finding for finding in made.findings if finding.verdict == "seen"]
    for finding in seen:
        print(f"{finding.name}: {finding.numbers}")
    print(f"{len(seen)} of {len(made.findings)} rules found something; page: {file}")


def redteam(
    *, rules: UseAppendAction[tuple[str, ...]] = (), reward: str | None = None, json: Path | None = None
) -> None:
    """Score adversarial answers beside honest ones.

    Args:
        rules: a rule set; may be repeated, all of them without it.
        reward: a reward of one's own, module:function, called with records and completions.
        json: where to write the findings.
    """
    from openo3_jax.rewards import commands

    chosen = {"rules": rules} if rules else {}
    print(commands.redteam(**chosen, reward=reward, json_out=_text(json)))


def data_check(
    root: Positional[Annotated[Path, arg(metavar="ROOT")]],
    *,
    fix: Path | None = None,
    json: Path | None = None,
    jobs: int = 0,
) -> int:
    """Check every record and every media file of a data root; exit code 2 if a problem was found.

    Args:
        root: the data root in the released layout; or a prepared set, whose files are compared with its manifest.
        fix: a new directory for a copy without the problems; its changes.jsonl says what was changed or left out.
        json: where to write all problems and notes, one JSON line each.
        jobs: files looked at side by side; 0 is one per core, at most 32.
    """
    from openo3_jax.data import check, store, workers

    if store.is_prepared(root):
        problems = store.verify(root)
        print("\n".join([*problems, f"prepared set: {len(problems)} files differ from {store.MANIFEST}"]))
        return 2 if problems else 0
    if json is not None and (json.is_dir() or not json.absolute().parent.is_dir()):
        raise InputError(f"--json {json}: cannot be written; expected the name of a file in a directory that exists")
    with _progress("check") as advance:
        report = check.check_root(root, jobs=workers.count(jobs), advance=advance, fix=fix)
    if json is not None:
        check.write_jsonl(report, json)
    print(check.render(report))
    return 2 if report.problems else 0


def data_prepare(
    root: Positional[Annotated[Path, arg(metavar="ROOT")]],
    out: Positional[Annotated[Path, arg(metavar="OUT")]],
    *,
    frames: Literal["jpeg", "raw"] = "jpeg",
    jobs: int = 0,
    max_bad_fraction: float = 0.01,
    video: VideoConfig = VideoConfig(),  # noqa: B008 (frozen)
) -> None:
    """Store records with their frames, chosen and resized, as ArrayRecord: training then reads no video.

    Args:
        root: the data root in the released layout.
        out: a new directory, or one whose preparation was interrupted: it goes on.
        frames: as JPEG, or as they are, about eight times as large.
        jobs: clips decoded side by side; 0 is one per core, at most 32.
        max_bad_fraction: share of a stage's records that may be unusable; OUT/bad_samples.jsonl names them.
        video: how clips become frames; training must use the same.
    """
    from openo3_jax.data import prepare, workers

    with _progress("prepare") as advance:
        settings = {
            "frames": frames,
            "config": video,
            "jobs": workers.count(jobs),
            "max_bad_fraction": max_bad_fraction,
        }
        manifest = prepare.prepare_root(root, out, **settings, advance=advance)
    for stage, made in manifest["stages"].items():
        size_mib = sum(file["bytes"] for file in made["files"]) / 2**20
        print(f"{stage}: {made['records']} records, {made['left_out']} left out, {size_mib:.1f} MiB in {out}")


def data_stats(
    root: Positional[Annotated[Path, arg(metavar="ROOT")]], *, html: Path | None = None, jobs: int = 0
) -> None:
    """How answers are distributed, and what guessing without looking scores.

    Args:
        root: a data root, or a prepared set.
        html: where to write tables and plots, one file.
        jobs: clips measured side by side; 0 is one per core, at most 32.
    """
    from openo3_jax.data import stats, workers

    if html is not None:
        from openo3_jax.report import data_page, pages

        pages.check_name(html)
    with _progress("stats") as advance:
        statistics = stats.compute_root(root, jobs=workers.count(jobs), advance=advance)
    if html is not None:
        pages.write(html, data_page.render(statistics, f"Statistics of {root}"))
    print(stats.render(statistics))


def data_convert(
    file: Positional[Annotated[Path, arg(metavar="FILE")]],
    out: Positional[Annotated[Path, arg(metavar="OUT")]],
    *,
    media: Path | None = None,
    name: str = "own",
) -> None:
    """Make STGR records of both stages from questions with spans and boxes; docs/data.md describes the lines.

    Args:
        file: JSONL, one question per line.
        out: a new data root.
        media: where videos and pictures lie; the directory of FILE without it.
        name: of the set, part of its sources.
    """
    from openo3_jax.data import convert

    print(convert.convert_file(file, out, media_root=media or file.parent, name=name))


@contextlib.contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A function that is told how much is done, of how much, and shows it on stderr."""
    from openo3_jax.train import metrics

    with contextlib.ExitStack() as stack:
        bars: list[metrics.Progress] = []

        def advance(done: int, total: int) -> None:
            if not bars:
                bars.append(stack.enter_context(metrics.Progress(what, total)))
            bars[0].update(done, "")

        yield advance


def eval_(
    benchmark: Positional[Annotated[str | None, arg(metavar="BENCHMARK")]] = None,
    *,
    model: Path | None = None,
    data: Path | None = None,
    out: Path | None = None,
    compare: tuple[Path, Path] | None = None,
    judge: str = "rouge",
    judge_model: str | None = None,
    judge_key: str | None = None,
    prompts: Path | None = None,
    mesh: str | None = None,
    config: Annotated[EvalConfig, Flat] = EvalConfig(),  # noqa: B008 (frozen)
) -> None:
    """Ask a model the questions of a benchmark: predictions, then the table beside the published numbers.

    Args:
        benchmark: vstar, videomme, worldsense, videommmu, tvgbench, longvideo_reason, or jsonl for a set of one's own.
        model: a Qwen2.5-VL directory in Hugging Face layout.
        data: the benchmark's directory as it is published; for jsonl the file.
        out: a new directory, or one of a run that was stopped: it goes on where it was.
        compare: two finished runs, A B; prints B - A with paired intervals, and nothing is asked.
        judge: of open answers: exact, rouge, the URL of an OpenAI-compatible server (http://host:port/v1), or the
            directory of a local Qwen2.5 or Qwen2.5-VL.
        judge_model: the name of the server's model.
        judge_key: the environment variable that holds the server's key.
        prompts: other wordings, a JSON file.
        mesh: sizes of its axes, such as fsdp=4,tensor=2; without it all devices are on fsdp.
    """
    if compare is not None:
        from openo3_jax.evals import evaluate

        print(evaluate.compare(*compare))
        return
    if benchmark is None:
        raise InputError("eval: no benchmark; expected openo3 eval BENCHMARK ..., or openo3 eval --compare A B")
    from openo3_jax.evals import commands

    options = {"judge_spec": judge, "judge_model": judge_model, "judge_key": judge_key, "prompts": prompts}
    places = {"model": model, "data": data, "out": out}
    print(commands.run(benchmark, **places, **options, mesh=_mesh(mesh), config=config))


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def rewards(*, out: Path = Path("rewards_page")) -> int:
    """Mock predictions against values worked by hand, difficulty curves and the red team, on one page.

    Args:
        out: a directory for index.html and its figures.
    """
    from openo3_jax.report import rewards_page

    return _claim(*rewards_page.experiment_rewards(str(out)))


def overfit(*, out: Path, data: Path | None = None, steps: int = 400, seed: int = 0) -> int:
    """Learn a handful of records by heart, from random weights.

    Args:
        out: a new directory for the run, the curve, the answers and the exported model.
        data: a data root; without it clips are rendered.
        steps: at most so many.
        seed: of weights, clips and order.
    """
    from openo3_jax.experiments import overfit

    return _claim(*overfit.overfit(data=data, out=out, steps=steps, seed=seed))


def sharpen(*, data: Path, out: Path, steps: int = 50, seed: int = 0) -> int:
    """Stage two after an unfinished stage one, on a handful of questions: does the sampled reward rise?

    Args:
        data: a data root with a few records of both stages.
        out: a new directory for both runs and the exported model.
        steps: of stage two.
        seed: of weights, order and sampling.
    """
    from openo3_jax.experiments import sharpen

    return _claim(*sharpen.sharpen(data=data, out=out, steps=steps, seed=seed))


def ablation(*, start: Path, out: Path, steps: int = 40, seeds: int = 3, prompts: int = 96) -> int:
    """Adaptive proximity and the gate against fixed widths and none: stage two, several seeds, one figure.

    Args:
        start: the directory that `openo3 demo` has made: its model after stage one, its clips.
        out: a new directory for all runs, the figure and its numbers.
        steps: of each run.
        seeds: runs of each kind.
        prompts: held-out questions that the curves are measured on.
    """
    from openo3_jax.experiments import ablation

    return _claim(*ablation.ablation(start=start, out=out, steps=steps, seeds=seeds, prompts=prompts))


def sweep(*, start: Path, out: Path, steps: int = 20, seeds: int = 1, prompts: int = 48) -> int:
    """The width of the proximity and of the gate, as a heat map.

    Args:
        start: the directory that `openo3 demo` has made: its model after stage one, its clips.
        out: a new directory for all runs, the figure and its numbers.
        steps: of each run.
        seeds: runs of each kind.
        prompts: held-out questions that the runs are compared on.
    """
    from openo3_jax.experiments import sweep

    return _claim(*sweep.sweep(start=start, out=out, steps=steps, seeds=seeds, prompts=prompts))


VERBS: Verbs = {
    "demo": demo,
    "init-tiny": init_tiny,
    "ask": ask,
    "sft": {name: _sft(recipe) for name, recipe in recipes.SFT.items()},
    "gspo": {name: _gspo(recipe) for name, recipe in recipes.GSPO.items()},
    "plan": {name: _plan(recipe) for name, recipe in (recipes.SFT | recipes.GSPO).items()},
    "eval": eval_,
    "export": export,
    "replay": replay,
    "score": score,
    "redteam": redteam,
    "report": report,
    "data": {"check": data_check, "prepare": data_prepare, "stats": data_stats, "convert": data_convert},
    "experiment": {
        "overfit": overfit,
        "sharpen": sharpen,
        "rewards": rewards,
        "ablation": ablation,
        "sweep": sweep,
    },
}

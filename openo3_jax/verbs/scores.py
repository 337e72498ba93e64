"""Verbs that judge: completions by the rewards, a model by a benchmark, a run by its page."""

import contextlib
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, UseAppendAction, arg

from openo3_jax.errors import InputError
from openo3_jax.evals.config import EvalConfig
from openo3_jax.verbs import shared
from openo3_jax.verbs.shared import Flat


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
        rules: a rule set: paper, released or hardened, with changes if any: paper,gate_s=1.
        explain: say why, for every line.
        what_if: FIELD=VALUE, a rule to change for a second scoring; may be repeated.
        json: where to write everything.
        html: where to write a page of the first answers with their evidence, one file; clips are shown with --root.
        root: the data root, for clips and pictures and for records without picture sizes.
    """
    from openo3_jax import api
    from openo3_jax.rewards import commands

    shared.check_place("--json", json)
    options = {"rules": rules, "explain": explain, "what_if": what_if, "json_out": None if json is None else str(json)}
    with contextlib.ExitStack() as stack:
        sizes = None if root is None else stack.enter_context(api.MediaSizes(root))
        print(commands.score_file(str(file), **options, sizes=sizes), flush=True)
        if html is not None:
            from openo3_jax.report import pages

            pages.write(html, pages.score_page(str(file), rules=rules, root=root, sizes=sizes))


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

    shared.check_place("--json", json)
    chosen = {"rules": rules} if rules else {}
    print(commands.redteam(**chosen, reward=reward, json_out=None if json is None else str(json)))


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


def evaluate(
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
        mesh: sizes of its axes, such as fsdp=4,tensor=2; without it fsdp in a host or slice, data over them.
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
    print(commands.run(benchmark, **places, **options, mesh=shared.mesh_axes(mesh), config=config))

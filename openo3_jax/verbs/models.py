"""Verbs about a model: make a random one, ask it, export what a run has taught it."""

from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from openo3_jax.config import VideoConfig
from openo3_jax.errors import InputError


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


def export(
    run: Positional[Annotated[Path, arg(metavar="RUN")]],
    out: Positional[Annotated[Path, arg(metavar="OUT")]],
    *,
    step: int | None = None,
    dtype: Literal["float32", "bfloat16"] | None = None,
    adapter: bool = False,
) -> None:
    """Write the trained weights of a run as a Hugging Face directory; adapters are added to the weights.

    Args:
        run: the directory of a training run.
        out: a new directory.
        step: of which checkpoint; without it the newest.
        dtype: of every tensor; without it each keeps that of the model the run started from.
        adapter: write the adapters alone, for peft; the result is also a MODEL of every other verb.
    """
    from openo3_jax.train import run as run_lib

    if adapter and dtype is not None:
        raise InputError(f"export: --dtype {dtype} with --adapter; adapters are written in float32, so leave it out")
    if adapter:
        run_lib.save_adapter(run, out, step=step)
    else:
        run_lib.load(run, step=step).save_pretrained(out, dtype)

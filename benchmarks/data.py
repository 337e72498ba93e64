"""Frames and samples per second on one core, from mp4 and from prepared sets, against the plain reference route.

    python benchmarks/data.py [--quick] [--json FILE]

The reference: decord's get_batch, PIL's resize, transformers' image processor and tokenizer, one thread, the same 16
frames. Seconds are those of the core. Exits with 3 where reading and resizing from mp4 takes over 1.2 times as long as
decord's decoding alone, or a prepared set is less than ten times as fast as the reference. `--quick`: short clips, few
repeats, to see that it works.
"""

import functools
import json
import os
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAYON_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("DECORD_EOF_RETRY_MAX", "20480")

import av
import decord
import jax
import numpy as np
import results
from PIL import Image
from transformers import AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from openo3_jax import recipes, tasks, tiny, types
from openo3_jax.config import QWEN2_5_VL, VideoConfig
from openo3_jax.data import annotations, decode, pipeline, prepare, prompts, sampling, store, tokens, transforms
from openo3_jax.models import vision

SIZES = {"360p": (360, 640), "1080p": (1080, 1920)}
CONFIG = VideoConfig()
STEP_MFU, PEAK_FLOPS = 0.40, 989e12  # the share of an H100's bfloat16 peak that stage one is planned to reach


def render(path: pathlib.Path, height: int, width: int, seconds: int, fps: int = 30) -> None:
    """A textured picture that wanders under a still one, with noise: bits and motion as in filmed clips."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (height // 20, width // 20, 3), np.uint8)
    ground = np.asarray(Image.fromarray(coarse).resize((2 * width, 2 * height), Image.Resampling.BICUBIC))
    noise = rng.integers(0, 8, (height, width, 3), np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"preset": "veryfast", "crf": "23", "g": "250"})
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for i in range(seconds * fps):
            x, y = int(width / 2 * (1 + np.sin(i / 40))), int(height / 2 * (1 + np.cos(i / 55)))
            frame = ground[y : y + height, x : x + width] // 2 + np.roll(noise, i, axis=1)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), "rgb24")))
        container.mux(stream.encode(None))


def seconds_of(function: Callable[[], object]) -> float:
    """Seconds of the core, of all threads: what else runs on the machine is not counted."""
    start = time.process_time()
    function()
    return time.process_time() - start


def in_turn(functions: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of the core for each, taken in turn, so that a busy moment of the machine meets all."""
    for function in functions.values():
        function()
    rounds = [{name: seconds_of(function) for name, function in functions.items()} for _ in range(repeats)]
    return {name: statistics.median(one[name] for one in rounds) for name in functions}


# ---- the reference ----


def decord_frames(path: str) -> np.ndarray:
    """Open the file and decode the frames, at full size."""
    reader = decord.VideoReader(path, num_threads=1)
    chosen = sampling.choose_frames(len(reader), reader.get_avg_fps(), CONFIG)
    return reader.get_batch(chosen.tolist()).asnumpy()


def reference_sample(path: str, question: str, tokenizer, processor) -> object:
    """decord, PIL's resize, transformers' processor and tokenizer."""
    frames = decord_frames(path)
    height, width = sampling.frame_size(*frames.shape[1:3], len(frames), CONFIG)
    pictures = [Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC) for frame in frames]
    inputs = processor(images=pictures, do_resize=False, return_tensors="np")
    counts = inputs["image_grid_thw"].prod(-1) // 4
    lines = (f"Frame {i + 1} at {i:.1f}s: " + "<|image_pad|>" * n + "\n" for i, n in enumerate(counts.tolist()))
    return inputs, tokenizer("".join(lines) + question)


# ---- ours ----


def record_of(path: pathlib.Path) -> annotations.Record:
    return {
        "id": path.stem,
        "task": tasks.GENERAL_FREE_FORM,
        "source": "videor1",
        "video_path": path.name,
        "question": "What wanders over the picture?",
        "answer": "A texture",
        "reasoning_process": "At <t>1.0</t>s the texture stands elsewhere than at <t>2.0</t>s.",
    }


def our_sample(record, media, processor, wording) -> types.Sample:
    """Tokens and patches as bytes; the device normalises them."""
    prepared = transforms.assemble(record, media, "sft", config=CONFIG, wording=wording)
    return processor.encode(prepared.messages)


def measure_size(
    name: str, path: pathlib.Path, root: pathlib.Path, model: pathlib.Path, repeats: int
) -> dict[str, float]:
    """Median seconds of each route for one clip."""
    record = record_of(path)
    processor, wording = tokens.load_processor(model), prompts.load_prompts()
    hf_tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    hf_processor = Qwen2VLImageProcessorPil()
    read = functools.partial(decode.decode_clip, str(path), CONFIG, name=str(path))
    files = transforms.Files(root, "sft", CONFIG, lambda *_: read())
    routes = {
        "decord, decoding alone": lambda: decord_frames(str(path)),
        "ours, decoded and resized": read,
        "reference, to a sample": lambda: reference_sample(str(path), record["question"], hf_tokenizer, hf_processor),
        "ours, mp4 to a sample": lambda: our_sample(record, files, processor, wording),
    }
    to_sample = functools.partial(our_sample, processor=processor, wording=wording)
    normalise = jax.jit(vision.normalise, static_argnums=1)
    for frames in ("raw", "jpeg"):
        stored = store.Stored(root / f"prepared-{name}-{frames}", "sft", CONFIG)
        routes[f"ours, prepared ({frames}) to a sample"] = lambda stored=stored: to_sample(record, stored.media(record))
        routes[f"  the same, normalised on this core too ({frames})"] = lambda stored=stored: normalise(
            to_sample(record, stored.media(record)).patches, processor.config.vision
        ).block_until_ready()
    return in_turn(routes, repeats)


def prepare_one(root: pathlib.Path, name: str, path: pathlib.Path) -> None:
    """A prepared set of one clip in each form, under `root`."""
    single = root / f"root-{name}"
    (single / "videos" / "videor1").mkdir(parents=True)
    os.link(path, single / "videos" / "videor1" / path.name)
    write_records(single, [record_of(path)])
    for frames in ("raw", "jpeg"):
        out = root / f"prepared-{name}-{frames}"
        prepare.prepare_root(single, out, frames=frames, config=CONFIG, jobs=1, max_bad_fraction=0.0)


def write_records(root: pathlib.Path, records: list[annotations.Record]) -> None:
    (root / "json_data").mkdir(exist_ok=True)
    pathlib.Path(annotations.stage_file(root, "sft")).write_text(json.dumps(records))


def first_batch_s(root: pathlib.Path, model: pathlib.Path) -> tuple[float, float]:
    """Seconds to the first batch of 8, and on average to each of the next three, with a worker per core."""
    processor, records = tokens.load_processor(model), annotations.load_stage(root, "sft")
    config = recipes.sft_7b()
    start = time.perf_counter()
    with pipeline.Samples(records, root, "sft", processor, config, prompts.load_prompts()) as samples:
        batches = pipeline.SFTBatches(samples, processor, config, rows_multiple=8)
        batches(0)
        first = time.perf_counter() - start
        for step in range(1, 4):
            batches(step)
    return first, (time.perf_counter() - start - first) / 3


def planned_step_s(batch_size: int = 8, devices: int = 8) -> float:
    """Seconds of an update of stage one on 8 H100: 6 FLOPs per weight and token, a third more for rematerialising."""
    model = QWEN2_5_VL["7b"]
    text, tower = model.text, model.vision
    kv = text.num_key_value_heads * text.head_dim
    layer = 2 * text.hidden_size**2 + 2 * text.hidden_size * kv + 3 * text.hidden_size * text.intermediate_size
    block = 4 * tower.hidden_size**2 + 3 * tower.hidden_size * tower.intermediate_size
    per_clip_tokens, per_clip_patches = 2450, 16 * 480
    flops = per_clip_tokens * text.num_hidden_layers * layer + per_clip_patches * tower.depth * block
    return batch_size * 6 * flops * 4 / 3 / (devices * PEAK_FLOPS * STEP_MFU)


def main() -> int:
    args = results.make_parser(__doc__).parse_args()
    quick = args.quick
    seconds, repeats, num_clips = (8, 3, 8) if quick else (20, 7, 128)
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    rows, per_sample = [], {}
    with tempfile.TemporaryDirectory() as place:
        root = pathlib.Path(place)
        tiny.init_tiny(root / "model", seed=0)
        (root / "videos" / "videor1").mkdir(parents=True)
        if cores:
            os.sched_setaffinity(0, {min(cores)})
        for name, (height, width) in SIZES.items():
            path = root / "videos" / "videor1" / f"{name}.mp4"
            render(path, height, width, seconds)
            prepare_one(root, name, path)
            taken = measure_size(name, path, root, root / "model", repeats)
            reference = taken["reference, to a sample"]
            print(f"{name}, {seconds} s of H.264, 16 frames, one core")
            for route, median_s in taken.items():
                rates = f"{16 / median_s:8.1f} frames/s {1 / median_s:7.2f} samples/s"
                print(f"  {route:46s}{1e3 * median_s:8.1f} ms {rates}  {reference / median_s:6.1f} x the reference")
            rows += compare(name, taken, judged=not quick)
            per_sample[name] = taken
        if cores:
            os.sched_setaffinity(0, cores)
        source = root / "videos" / "videor1" / "360p.mp4"
        names = [f"{number}.mp4" for number in range(num_clips)]
        for name in names:
            os.link(source, source.with_name(name))
        write_records(root, [record_of(source.with_name(name)) for name in names])
        first, later = first_batch_s(root, root / "model")
        where = f"{num_clips} clips of 360p planned ahead, {len(cores or [0])} cores"
        print(f"{where}: first batch of 8 after {first:.1f} s, then {later:.2f} s each")
    step_s = planned_step_s()
    print(f"8 x H100, stage one in batches of 8 at {STEP_MFU:.0%} of the peak: {step_s:.2f} s a step")
    for name, taken in per_sample.items():
        for route in ("ours, mp4 to a sample", "ours, prepared (raw) to a sample", "ours, prepared (jpeg) to a sample"):
            print(f"  {name}, {route}: {8 * taken[route] / step_s:.1f} cores keep it busy")
    return results.finish(rows, args)


def compare(name: str, taken: dict[str, float], *, judged: bool) -> list[results.Row]:
    """From the file, against decoding alone; from a prepared set, in samples, against the reference."""
    read, prepared = taken["ours, decoded and resized"], taken["ours, prepared (raw) to a sample"]
    decord_s, reference_s = taken["decord, decoding alone"], taken["reference, to a sample"]
    return [
        results.compare(
            f"mp4 of {name}, decoded and resized",
            "decord, decoding alone",
            ours=1e3 * read,
            theirs=1e3 * decord_s,
            unit="ms of a core",
            most=1.2,
            judged=judged,
        ),
        results.compare(
            f"prepared set of {name}, to a sample",
            "decord, PIL, transformers",
            ours=1 / prepared,
            theirs=1 / reference_s,
            unit="samples/s of a core",
            least=10,
            judged=judged,
        ),
    ]


if __name__ == "__main__":
    sys.exit(main())

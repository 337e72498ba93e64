"""The parts of gpu.py by torch and transformers, which starts it with `--torch`: sdpa, autocast, checkpointing.

GSPO is the released formulation (hf_gspo.py), one prompt after the other; decoding is `generate` behind random ids.
"""

import argparse
import json
import pathlib
import tempfile
import time
from collections.abc import Callable
from typing import Any

import gpu_parts
import gspo
import hf_gspo
import hf_model
import random_model
import sides
import torch
import transformers

from openo3_jax.data import tokens


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    sides.add_arguments(parser, ["all"])
    parser.add_argument("--model")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    return sides.serve(lambda: (measure(args), dict))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    if not torch.cuda.is_available() and not args.tiny:
        return {"parts": {"torch": {"error": "it was built without CUDA, or finds no card"}}}
    load = gpu_parts.TINY if args.tiny else gpu_parts.FULL
    layers = json.loads((args.work / "layers.json").read_text())
    parts: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as directory:
        runs = {"sft": sft_work(load), "decode": decode_work(load), "gspo": gspo_work(load)}
        for part, of_part in runs.items():
            place = pathlib.Path(directory) / part
            place.mkdir()
            settings, processor = write_settings(place, args, layers[part])
            for key, run in of_part.items():
                try:
                    parts[key] = {"all_s": run(settings, processor)}
                except torch.OutOfMemoryError as error:
                    parts[key] = {"error": str(error).partition(".")[0]}
                print(key, parts[key], flush=True)
    return {"parts": parts}


def write_settings(place: pathlib.Path, args: argparse.Namespace, layers: int) -> tuple[Any, tokens.Processor]:
    """The model of gpu_parts.py, as transformers describes it, and its tokenizer."""
    model, ids = gpu_parts.cut_model("tiny" if args.tiny else args.model, place, 1, None)
    settings = model.to_hf()
    settings.get("text_config", settings)["num_hidden_layers"] = layers
    settings |= {"num_hidden_layers": layers, "eos_token_id": ids.eos_token_id, "bos_token_id": None}
    (place / "config.json").write_text(json.dumps(settings))
    return transformers.AutoConfig.from_pretrained(place), tokens.load_processor(place)


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def make_model(settings: Any, dtype: torch.dtype) -> torch.nn.Module:
    """Random weights, made where they are used; no token ends an answer."""
    with torch.device(device()):
        model = transformers.Qwen2_5_VLForConditionalGeneration._from_config(
            settings, attn_implementation="sdpa", dtype=dtype
        )
    model.generation_config = transformers.GenerationConfig(pad_token_id=0)
    return model


def clock_s() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def fastest(call: Callable[[], Any], rounds: int = 2) -> float:
    found = []
    for _ in range(1 + rounds):
        started_s = clock_s()
        call()
        found.append(clock_s() - started_s)
    return min(found[1:])


def placed(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.to(device()) for name, value in inputs.items()}


def bfloat16() -> torch.autocast:
    return torch.autocast(device(), torch.bfloat16)


def sft_work(load: gpu_parts.Load) -> dict[str, Callable]:
    def run(settings: Any, processor: tokens.Processor) -> float:
        model = make_model(settings, torch.float32).train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=torch.cuda.is_available())
        size = random_model.QUICK._replace(frames=load.frames, frame_hw=load.frame_hw, prompt=load.row)
        samples = [random_model.make_prompt(processor, size, row, "because " * 64) for row in range(load.rows)]
        batch = placed(hf_model.inputs(samples, processor))
        labels = torch.full_like(batch["input_ids"], -100)
        for row, sample in enumerate(samples):
            told = torch.tensor(sample.loss_mask, device=labels.device)
            own = slice(labels.shape[1] - len(sample.tokens), None)
            labels[row, own] = torch.where(told, batch["input_ids"][row, own], -100)

        def step() -> None:
            with bfloat16():
                loss = model(**batch, labels=labels, use_cache=False).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()

        return fastest(step)

    return {"sft step": run}


def decode_work(load: gpu_parts.Load) -> dict[str, Callable]:
    def run(settings: Any, processor: tokens.Processor, batch: int) -> float:
        model = make_model(settings, torch.bfloat16).eval()
        ids = torch.full((batch, load.prefix), 65, device=device())

        def generate(new: int) -> float:
            with torch.no_grad():
                return fastest(
                    lambda: model.generate(
                        input_ids=ids,
                        attention_mask=torch.ones_like(ids),
                        do_sample=True,
                        top_k=0,
                        max_new_tokens=new,
                    ),
                    rounds=1,
                )

        return (generate(load.steps) - generate(1)) / (load.steps - 1)

    def of(batch: int) -> Callable:
        return lambda *args: run(*args, batch)

    return {f"decode step, {batch} behind {load.prefix}": of(batch) for batch in load.batches}


def gspo_work(load: gpu_parts.Load) -> dict[str, Callable]:
    def run(settings: Any, processor: tokens.Processor) -> float:
        size = random_model.QUICK._replace(
            frames=load.frames,
            frame_hw=load.frame_hw,
            prompt=load.prompt,
            group=load.group,
            new_tokens=load.new_tokens,
        )
        prompt = placed(hf_model.inputs([random_model.make_prompt(processor, size)], processor))
        model = make_model(settings, torch.float32)
        released = hf_gspo.Iteration(model, prompt, gspo.make_config(size), bfloat16())
        return load.prompts * fastest(lambda: released.update(released.sample()), rounds=1)

    return {"gspo iteration": run}


if __name__ == "__main__":
    raise SystemExit(main())

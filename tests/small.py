"""Small models, samples and batches for tests that need no tokenizer, and a look into what a program holds."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from openo3_jax import mesh as mesh_lib
from openo3_jax import tiny, types
from openo3_jax.config import ModelConfig, TextConfig, VideoConfig, VisionConfig
from openo3_jax.data import packing, positions, tiny_tokenizer, tokens
from openo3_jax.models import qwen2_5_vl
from openo3_jax.policy import Policy

TEXT_IDS = 90  # ids below are text, those above stand for pictures
IMAGE, VIDEO, VISION_START = 93, 94, 92


def model_config(*, tied: bool = False, vocab_size: int = 96, **text) -> ModelConfig:
    """Two layers of each tower; sizes that 4 devices on fsdp and 2 on tensor divide."""
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "mrope_section": (2, 1, 1),
        "rope_theta": 1e4,
    } | text
    vision = VisionConfig(
        depth=2,
        hidden_size=16,
        intermediate_size=24,
        num_heads=2,
        out_hidden_size=sizes["hidden_size"],
        fullatt_block_indexes=(1,),
    )
    return ModelConfig(
        text=TextConfig(vocab_size=vocab_size, tie_word_embeddings=tied, **sizes),
        vision=vision,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
    )


def make_params(config: ModelConfig, mesh: Mesh, seed: int = 0) -> tuple[nnx.GraphDef, nnx.State]:
    """Random weights, the same on every mesh, large enough that each of them, norms and biases too, matters."""
    graphdef, abstract = qwen2_5_vl.abstract_params(config, mesh)
    draw = np.random.default_rng(seed)

    def fill(path, leaf, place):
        name = jax.tree_util.keystr(path)
        scale = leaf.shape[-2] ** -0.5 if "kernel" in name else 0.2
        values = draw.normal(size=leaf.shape) * scale + ("norm" in name or "ln_q" in name)
        return jax.device_put(values.astype(np.float32), place)

    return graphdef, jax.tree_util.tree_map_with_path(fill, abstract, mesh_lib.state_shardings(abstract, mesh))


def sample(
    config: ModelConfig, *, prompt: int, answer: int, pictures: Sequence[tuple[int, int]] = (), seed: int = 0
) -> types.Sample:
    """Random text and pictures (height and width in patches), then an answer of `answer` tokens."""
    draw = np.random.default_rng([seed, prompt, answer])
    grids = tuple(types.VisionGrid(1, *picture) for picture in pictures)
    pieces = [draw.integers(1, TEXT_IDS, prompt)]
    for grid in grids:
        pieces += [[VISION_START], [IMAGE] * (grid.num_patches // 4), draw.integers(1, TEXT_IDS, 1)]
    pieces.append(draw.integers(1, TEXT_IDS, answer))
    tokens = np.concatenate(pieces).astype(np.int32)
    num_patches = sum(grid.num_patches for grid in grids)
    return types.Sample(
        tokens=tokens,
        positions=positions.mrope_positions(tokens, grids, [None] * len(grids), config),
        loss_mask=np.arange(len(tokens)) >= len(tokens) - answer,
        is_visual=tokens == IMAGE,
        patches=draw.integers(0, 256, (num_patches, config.vision.patch_dim), np.uint8),
        grids=grids,
    )


def make_policy(directory: Path, mesh: Mesh) -> Policy:
    """A tiny model with random weights and a real tokenizer, whose files are written into `directory`."""
    ids = tiny_tokenizer.write_tokenizer(directory)
    config = tiny.tiny_config(ids, hidden_size=64, layers=2)
    (directory / "config.json").write_text(json.dumps(config.to_hf()))
    graphdef, params = make_params(config, mesh)
    return Policy(
        graphdef=graphdef,
        params=params,
        mesh=mesh,
        processor=tokens.load_processor(directory),
        directory=directory,
        dtypes={},
        video=VideoConfig(),
        video_mode="frames",
    )


def make_batch(rows: Sequence[Sequence[types.Sample]], config: ModelConfig, *, num_rows: int | None = None):
    bucket = packing.bucket_for(rows, config.vision, num_rows=num_rows, image_token_id=config.image_token_id)
    return packing.make_batch(rows, bucket, config)


def equations_in(jaxpr) -> Iterator:
    """Every operation of a program, in its loops, branches and calls too."""
    inner = jaxpr.jaxpr if hasattr(jaxpr, "jaxpr") else jaxpr
    for equation in inner.eqns:
        yield equation
        for value in jax.tree.leaves(equation.params, is_leaf=is_jaxpr):
            if is_jaxpr(value):
                yield from equations_in(value)


def shapes_in(jaxpr) -> Iterator[tuple[int, ...]]:
    """Shape of every array that a program makes."""
    for equation in equations_in(jaxpr):
        yield from (variable.aval.shape for variable in equation.outvars if hasattr(variable.aval, "shape"))


def is_jaxpr(value) -> bool:
    return hasattr(value, "eqns") or hasattr(value, "jaxpr")

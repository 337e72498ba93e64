"""The model that the demo starts from: tiny, and taught on stills to name and to box shapes.

The paper starts from a model that sees; so does the demo. `scripts/train_tiny_base.py` makes this one again.
"""

import dataclasses
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float

from openo3_jax import geometry
from openo3_jax.config import ModelConfig, OptimizerConfig, SamplingConfig, SFTConfig, TextConfig, VisionConfig
from openo3_jax.data import tiny_tokenizer, world
from openo3_jax.demo import stills
from openo3_jax.policy import Policy
from openo3_jax.types import Batch

MEASURED_STILLS = 96  # for each number of objects


def make_config(ids: tiny_tokenizer.TokenIds) -> ModelConfig:
    """1.7 million weights. Rotations turn fast: with a theta of 1e6 a head of 32 could not tell columns apart."""
    return ModelConfig(
        text=TextConfig(
            vocab_size=ids.vocab_size,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=5,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=False,
            mrope_section=(4, 6, 6),
            rope_theta=100.0,
        ),
        vision=VisionConfig(
            depth=3,
            hidden_size=96,
            intermediate_size=192,
            num_heads=3,
            out_hidden_size=128,
            fullatt_block_indexes=(0, 1, 2),
        ),
        image_token_id=ids.image_token_id,
        video_token_id=ids.video_token_id,
        vision_start_token_id=ids.vision_start_token_id,
    )


def recipe(steps: int, rows: int, learning_rate: float) -> SFTConfig:
    """Of its training, with `rows` of 256 tokens in an update."""
    muon = OptimizerConfig(name="muon", learning_rate=learning_rate, schedule="cosine", warmup_steps=40, clip_norm=1.0)
    return SFTConfig(steps=steps, batch_size=rows, compute_dtype="float32", remat="none", optimizer=muon)


def renew_strangers(policy: Policy, shown: Iterable[Batch], seed: int) -> Policy:
    """Tokens that none of `shown` has get rows drawn like those of the others, in the embedding and in the head.

    Training has pushed them all the same way, off every answer; a later stage would have to move each row by itself
    to tell them apart, and would take the words beside them along. Likewise for tokens that are new to a vocabulary:
    mean and spread of the rows there are (J. Hewitt, Initializing New Word Embeddings, 2021).
    """
    seen, said = np.zeros((2, policy.config.text.vocab_size), bool)
    for batch in shown:
        seen[batch.tokens] = True
        said[batch.targets[batch.target_slots >= 0]] = True
    draw = np.random.default_rng(seed)

    def renew(weight: nnx.Variable, known: np.ndarray) -> nnx.Variable:
        rows = np.array(weight[...], np.float32)
        mean, spread = rows[known].mean(0), rows[known].std(0)
        rows[~known] = mean + spread * draw.standard_normal((int((~known).sum()), rows.shape[1]))
        return weight.replace(jnp.asarray(rows, weight[...].dtype))

    params = jax.tree.map(lambda x: x, policy.params)
    params["text"]["embed_tokens"]["weight"] = renew(params["text"]["embed_tokens"]["weight"], seen)
    params["lm_head"]["weight"] = renew(params["lm_head"]["weight"], said)
    return dataclasses.replace(policy, params=params)


class Sight(NamedTuple):
    """What a model sees on stills it was not taught: of the boxes it gives the mean IoU, of names the share right."""

    box_iou: float
    names: float


def measure(policy: Policy, num_objects: int, *, words: int = 0, pictures: int = 1, seed: int = 2**31) -> Sight:
    """Greedy answers about one object of each of `MEASURED_STILLS` scenes that hold so many.

    `words`: the most that stand before the question and after it. `pictures`: of a scene; above 1 they have labels, and
    a question says which it means.
    """
    draws = np.random.default_rng([seed, num_objects])
    seeds = draws.integers(2**32, size=MEASURED_STILLS).tolist()
    scenes = [_scene(draws, one, num_objects, pictures) for one in seeds]
    greedy = SamplingConfig(temperature=0.0, max_new_tokens=32)

    def answers(questions: Sequence[str]) -> list[str]:
        asked = [stills.surround(draws, question, words) for question in questions]
        said = [stills.conversation(scene.shown, scene.before, one) for scene, one in zip(scenes, asked, strict=True)]
        samples = [policy.processor.encode(one) for one in said]
        return [texts[0] for texts in policy.continue_samples(samples, greedy, [0] * len(samples)).texts]

    boxes = answers([f"Where{scene.on} is the {scene.name}?" for scene in scenes])
    names = answers([f"What color is the {scene.name.split()[1]}?" for scene in scenes])
    ious = [geometry.box_iou(_box(text), scene.box) for text, scene in zip(boxes, scenes, strict=True)]
    right = [text == scene.color for text, scene in zip(names, scenes, strict=True)]
    return Sight(float(np.mean(ious)), float(np.mean(right)))


class _Scene(NamedTuple):
    """Pictures, what stands before each, and the object that is asked about with its place on one of them."""

    shown: list[world.Still]
    before: list[str]
    on: str  # " on" and the label of the one meant; empty for a single picture
    name: str
    color: str  # as `ask_one` and `ask_several` answer
    box: Float[np.ndarray, " 4"]  # px


def _scene(draws: np.random.Generator, seed: int, num_objects: int, pictures: int) -> _Scene:
    objects = (num_objects, num_objects)
    if pictures == 1:
        still = stills.make_still(seed, objects)
        name, box = still.objects[0]
        return _Scene([still], [""], "", name, name.split()[0], box)
    shown, labels = stills.make_stills(seed, objects, pictures), stills.draw_labels(draws, pictures)
    there = [i for i, still in enumerate(shown) if still.objects]
    i = there[draws.integers(len(there))]
    name, box = shown[i].objects[draws.integers(len(shown[i].objects))]
    return _Scene(shown, stills.label_all(labels), f" on {labels[i]}", name, f"a {name}", box)


def _box(text: str) -> np.ndarray:
    corners = re.fullmatch(r"\[(\d{1,3}),(\d{1,3}),(\d{1,3}),(\d{1,3})\]", text)
    return np.array(corners.groups() if corners else [np.nan] * 4, float)

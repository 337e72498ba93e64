"""Rendered stills and questions about them: what the demo's base learns to see by; no tags, no order in time."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from openo3_jax import types
from openo3_jax.data import groups, packing, prompts, tokens, world

HEIGHT, WIDTH = 84, 112  # px, of every still and of the demo's clips: 12 visual tokens
REPEATED = (3, 12)  # words of a line to repeat, fewest and most

# Ordinary words, and numbers as they are written: what is said around pictures, and repeated.
_SPOKEN = (
    "I see it on the background. From to it appears at and is gone moves nowhere left right up down first last later "
    "Give name, box and time. Give the span, then letter. Answer short. Which object is shown? When is it visible? "
    "Which way does the square move? What color is the circle? Where is the triangle? Who is here? A. B. C. D. A B C D "
    "red green blue yellow white black background: Frame video in total seconds picture 0.0 0.5 0.8 1.0 1.2 1.6 2.0 "
    "2.3 2.5 2.7 3.0 3.1 3.5 3.7 4.0 s s: s, 1 2 3 4 5 6 [ ] , . : ? To the left To the right Nowhere"
)
WORDS = tuple(_SPOKEN.split())


class Lesson(NamedTuple):
    """What a row shows and how much is said around it."""

    objects: tuple[int, int]  # fewest and most in the scene of a picture
    pictures: int = 1  # of a row, all of one scene; above 1 they have labels, numbers that the questions refer to
    words: int = 0  # most that stand before a single picture, before the question and after it; then lines are repeated

    @property
    def row_tokens(self) -> int:
        if self.pictures > 1:
            return 128 + 64 * self.pictures
        return 160 if self.words == 0 else 256


class Asked(NamedTuple):
    """A question about stills and its answer."""

    question: str
    answer: str


def make_still(seed: int, objects: tuple[int, int]) -> world.Still:
    """With between `objects[0]` and `objects[1]` of them in the scene, boxes in px; equal arguments, equal pixels."""
    return _in_px(world.make_still(seed, _config(objects)))


def make_stills(seed: int, objects: tuple[int, int], number: int) -> list[world.Still]:
    """Of one scene, in random order."""
    return [_in_px(still) for still in world.make_stills(seed, _config(objects), number)]


def _config(objects: tuple[int, int]) -> world.WorldConfig:
    return world.WorldConfig(objects=objects, height=HEIGHT, width=WIDTH)


def _in_px(still: world.Still) -> world.Still:
    return still._replace(objects=[(n, np.rint(box * [WIDTH, HEIGHT, WIDTH, HEIGHT])) for n, box in still.objects])


def ask_one(still: world.Still) -> list[Asked]:
    """Everything that is asked about a single picture: places, names and colors of single objects, and the whole."""
    found = []
    for name, box in still.objects:
        color, shape = name.split()
        found += [
            Asked(f"Where is the {name}?", _place(box)),
            Asked(f"Where is the {shape}?", f"{name} {_place(box)}"),
            Asked(f"What is at {_place(box)}?", name),
            Asked(f"What color is the {shape}?", color),
        ]
    return [*found, Asked("What is here?", _whole(still))]


def ask_several(shown: Sequence[world.Still], labels: Sequence[str]) -> list[Asked]:
    """What is asked about labelled pictures of one scene: which show something, and where it is on them."""
    names = list(dict.fromkeys(name for still in shown for name, _ in still.objects))
    found = [Asked("Which objects are shown?", ", ".join(names))]
    for still, label in zip(shown, labels, strict=True):
        found.append(Asked(f"What is on {label}?", _whole(still) or "nothing"))
    ground = shown[0].ground
    for name in names:
        color, shape = name.split()
        boxes = {
            label: _place(dict(still.objects)[name])
            for still, label in zip(shown, labels, strict=True)
            if name in dict(still.objects)
        }
        in_order = list(boxes.items())
        (first, box), (last, other) = in_order[0], in_order[-1]
        found += [
            Asked(f"Which show the {name}?", ", ".join(boxes)),
            Asked(f"Which show the {shape}?", f"{name}: {', '.join(boxes)}"),
            Asked(f"Where are all of the {name}?", ", ".join(f"{label} {box}" for label, box in in_order)),
            Asked(f"Where is the {name}?", f"I see {name} {box} on {first}, then {name} {other} on {last}"),
            Asked(f"Where is the {shape}?", f'"{name}" {box} on {first}, then "{name}" {other} on {last}'),
            *(Asked(f"Where on {label} is the {name}?", one) for label, one in in_order),
            Asked(f"Say all of the {name}.", f'On the {ground} background I see "{name}" {box}.'),
            Asked(f"Which are the first and the last with the {shape}?", f"{first} and {last}"),
            Asked(f"What color is the {shape}?", f"a {color} {shape}"),
        ]
    return found


def make_batch(processor: tokens.Processor, seed: int | Sequence[int], rows: int, lesson: Lesson) -> types.Batch:
    """Stills in each row with as many of their questions as there is room for, in random order; answers are targets."""
    draw = np.random.default_rng(seed)
    shared, tails, begins = [], [], []
    for one in draw.integers(2**32, size=(rows, 1))[:, 0].tolist():
        if lesson.pictures == 1:
            shown = [make_still(one, lesson.objects)]
            before, every = [_line(draw, 0, lesson.words)], ask_one(shown[0])
        else:
            shown = make_stills(one, lesson.objects, lesson.pictures)
            labels = draw_labels(draw, lesson.pictures)
            before = label_all(labels)
            every = ask_several(shown, labels)
        if lesson.words:
            every += [Asked(f"Repeat: {line}", line) for line in (_line(draw, *REPEATED), _pieces(draw, processor))]
        every = [every[i] for i in draw.permutation(len(every))]
        every = [one._replace(question=surround(draw, one.question, lesson.words)) for one in every]
        prompt, own, starts = _encode(processor, shown, before, every, lesson.row_tokens)
        shared.append(prompt)
        tails.append(own)
        begins.append(starts)
    bucket = groups.group_bucket(shared, tails, processor.config.vision, num_rows=rows)
    bucket = dataclasses.replace(bucket, seq=lesson.row_tokens, targets=packing.round_up(lesson.row_tokens, 64))
    batch, completion = groups.make_group_batch(shared, tails, bucket, processor.config, pad_id=processor.pad_id)
    for row, starts in enumerate(begins):
        is_question = np.concatenate(
            [np.arange(len(tail)) < start for tail, start in zip(tails[row], starts, strict=True)]
        )
        batch.target_slots[row, : len(is_question)][is_question] = -1
    assert (completion >= 0).any(axis=1).all()
    return batch


def conversation(shown: Sequence[world.Still], before: Sequence[str], question: str) -> list[tokens.Message]:
    """The pictures, each after its words, and then the question."""
    content: list[dict[str, Any]] = []
    for still, words in zip(shown, before, strict=True):
        content += [{"type": "text", "text": words}] if words else []
        content.append({"type": "picture", "picture": types.Picture(still.pixels[None])})
    return [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]


def surround(draw: np.random.Generator, question: str, most: int) -> str:
    """The question with up to `most` words before it and after it; nothing is drawn for 0."""
    ahead, after = _line(draw, 0, most), _line(draw, 0, most)
    return f"{ahead}\n{question} {after}".strip() if ahead or after else question


def draw_labels(draw: np.random.Generator, number: int) -> list[str]:
    """Numbers such as 0.0, 1.6 and 5.9, no two with the same first digit."""
    return [f"{first}.{draw.integers(10)}" for first in draw.permutation(10)[:number]]


def label_all(labels: Sequence[str]) -> list[str]:
    """What stands before each of several pictures, as before the frames of a clip."""
    first, *others = (prompts.render_frame(number, float(label)) for number, label in enumerate(labels, 1))
    return [first, *(f"\n{one}" for one in others)]


def _whole(still: world.Still) -> str:
    """All its objects from the left."""
    from_left = sorted(still.objects, key=lambda item: item[1][0])
    return ", ".join(f"{name} {_place(box)}" for name, box in from_left)


def _line(draw: np.random.Generator, fewest: int, most: int) -> str:
    return " ".join(draw.choice(WORDS, draw.integers(fewest, most + 1))) if most else ""


def _pieces(draw: np.random.Generator, processor: tokens.Processor) -> str:
    """Any pieces of the vocabulary but single bytes and those of tags."""
    every = (processor.tokenizer.decode([i]) for i in range(256, processor.tokenizer.vocab_size))
    usable = [piece for piece in every if not set(piece) & set("<>")]
    return "".join(draw.choice(usable, draw.integers(REPEATED[0], REPEATED[1] + 1))).strip()


def _encode(
    processor: tokens.Processor, shown: Sequence[world.Still], before: Sequence[str], asked: list[Asked], room: int
) -> tuple[types.Sample, list[Int[np.ndarray, " _tokens"]], list[int]]:
    """The conversation up to its last picture, and for each question the rest of it; where its answer begins."""
    tails, starts, used = [], [], 0
    for one in asked:
        answer = {"role": "assistant", "content": one.answer}
        whole = processor.encode([*conversation(shown, before, one.question), answer])
        prefix = int(np.flatnonzero(whole.is_visual)[-1]) + 2  # the picture and the token that closes it
        spoken = np.flatnonzero(whole.loss_mask)
        tail = whole.tokens[prefix : spoken[-1] + 1]
        if prefix + used + len(tail) - 1 > room:
            continue
        tails.append(tail)
        starts.append(int(spoken[0]) - prefix)
        used += len(tail) - 1
    prompt = dataclasses.replace(
        whole,
        tokens=whole.tokens[:prefix],
        positions=whole.positions[:, :prefix],
        loss_mask=whole.loss_mask[:prefix],
        is_visual=whole.is_visual[:prefix],
    )
    return prompt, tails, starts


def _place(box: Float[np.ndarray, " 4"]) -> str:
    return f"[{','.join(str(int(edge)) for edge in box)}]"

"""Stills and their questions: true, never with evidence, and only the answers are learned."""

import re

import numpy as np
import pytest

from openo3_jax import policy, tiny
from openo3_jax.data import world
from openo3_jax.demo import base, stills

LESSON = stills.Lesson((1, 3))


@pytest.fixture(scope="module")
def model(tmp_path_factory, one_device):
    out = tmp_path_factory.mktemp("base") / "model"
    tiny.write_random(out, base.make_config, seed=0)
    return policy.load_pretrained(out, mesh=one_device)


def test_boxes_hold_the_color_that_is_named():
    for seed in range(20):
        still = stills.make_still(seed, (1, 1))
        ((name, box),) = still.objects
        x1, y1, x2, y2 = box.astype(int)
        color = np.array(world.COLORS[name.split()[0]])
        is_it = np.abs(still.pixels.astype(int) - color).max(-1) <= 2
        rows, columns = np.nonzero(is_it[y1:y2, x1:x2])
        assert len(rows) > 0.4 * (y2 - y1) * (x2 - x1)  # a triangle fills half of its box
        assert (np.ptp(rows) + 1, np.ptp(columns) + 1) == pytest.approx((y2 - y1, x2 - x1), abs=2)


def test_every_object_is_asked_for_and_nothing_of_evidence_is_said():
    still = stills.make_still(3, (3, 3))
    asked = stills.ask_one(still)
    assert len(asked) == 4 * len(still.objects) + 1
    (name, box), place = still.objects[0], re.compile(r"\[\d+,\d+,\d+,\d+\]")
    where = next(one for one in asked if one.question == f"Where is the {name}?")
    assert where.answer == f"[{','.join(str(int(edge)) for edge in box)}]"
    what = next(one for one in asked if one.question == f"What is at {where.answer}?")
    assert what.answer == name
    assert all(other in asked[-1].answer for other, _ in still.objects)
    assert len(place.findall(asked[-1].answer)) == len(still.objects)
    assert not re.search(r"<|think|\bs\b", " ".join(part for one in asked for part in one))


def test_only_answers_are_targets(model):
    batch = stills.make_batch(model.processor, 5, 4, LESSON)
    assert batch.tokens.shape == (4, LESSON.row_tokens)
    decode = model.processor.tokenizer.decode
    for row in range(4):
        learned = batch.targets[row][batch.target_slots[row] >= 0]
        answers = decode(learned.tolist()).split("<|im_end|>")
        assert answers.pop() == ""
        possible = {one.answer for one in stills.ask_one(_still_of(batch_seed=5, row=row))}
        assert answers and set(answers) <= possible
    again = stills.make_batch(model.processor, 5, 4, LESSON)
    np.testing.assert_array_equal(again.tokens, batch.tokens)


def test_labelled_pictures_are_of_one_scene_and_asked_about_by_their_labels():
    shown, labels = stills.make_stills(4, (3, 3), 6), ["0.4", "3.1", "5.9", "1.6", "2.2", "4.8"]
    assert len({still.ground for still in shown}) == 1 and len({still.pixels.tobytes() for still in shown}) > 2
    asked = {(one.question, one.answer) for one in stills.ask_several(shown, labels)}
    for name in {name for still in shown for name, _ in still.objects}:
        there = [label for still, label in zip(shown, labels, strict=True) if name in dict(still.objects)]
        assert (f"Which show the {name}?", ", ".join(there)) in asked
        for still, label in zip(shown, labels, strict=True):
            answers = {answer for question, answer in asked if question == f"Where on {label} is the {name}?"}
            box = dict(still.objects).get(name)
            assert answers == (set() if box is None else {f"[{','.join(str(int(edge)) for edge in box)}]"})
    assert ("Which objects are shown?", "") not in asked
    for still, label in zip(shown, labels, strict=True):
        (listed,) = (answer for question, answer in asked if question == f"What is on {label}?")
        assert all(name in listed for name, _ in still.objects) and (listed == "nothing") == (not still.objects)
    again = stills.make_stills(4, (3, 3), 6)
    assert all((a.pixels == b.pixels).all() for a, b in zip(shown, again, strict=True))


def test_words_around_several_pictures(model):
    """Every picture has its label, lines are repeated to the letter, and evidence is never said."""
    lesson = stills.Lesson((2, 3), pictures=4, words=8)
    batch = stills.make_batch(model.processor, 1, 6, lesson)
    assert batch.tokens.shape == (6, lesson.row_tokens)
    decode = model.processor.tokenizer.decode
    seeds = np.random.default_rng(1).integers(2**32, size=6).tolist()
    for row in range(6):
        shown = stills.make_stills(seeds[row], (2, 3), 4)
        text = decode(batch.tokens[row].tolist())
        labels = re.findall(r"Frame \d at (\d\.\d)s: <\|vision_start\|>", text)
        assert len(set(labels)) == 4 and not re.search(r"<(think|answer|obj|box|t)>", text)
        asked = stills.ask_several(shown, labels)
        learned = decode(batch.targets[row][batch.target_slots[row] >= 0].tolist()).split("<|im_end|>")[:-1]
        possible = {one.answer for one in asked}
        repeated = [answer for answer in learned if answer not in possible]
        assert learned and all(f"Repeat: {answer}" in text for answer in repeated)


def _still_of(batch_seed: int, row: int) -> world.Still:
    seeds = np.random.default_rng(batch_seed).integers(2**32, size=4).tolist()
    return stills.make_still(seeds[row], (1, 3))


def test_what_a_model_sees_is_measured(model, monkeypatch):
    monkeypatch.setattr(base, "MEASURED_STILLS", 4)
    sight = base.measure(model, 2)
    assert (sight.box_iou, sight.names) == (0.0, 0.0)  # random weights say nothing that can be read

    def perfect(samples, *_):
        """Answers from the stills themselves."""
        draws = np.random.default_rng([2**31, 2]).integers(2**32, size=4).tolist()
        shown = [stills.make_still(one, (2, 2)).objects[0] for one in draws]
        asks_place = "Where" in model.processor.tokenizer.decode(samples[0].tokens)
        texts = [[f"[{','.join(str(int(e)) for e in box)}]" if asks_place else name.split()[0]] for name, box in shown]
        return policy.Generations(texts, [], [], [])

    monkeypatch.setattr(policy.Policy, "continue_samples", lambda _, samples, *rest: perfect(samples, *rest))
    assert base.measure(model, 2) == (1.0, 1.0)

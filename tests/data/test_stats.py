import html.parser

import numpy as np
import pytest

from openo3_jax import cli
from openo3_jax.data import annotations, stats, synthetic

MCQ, TEMPORAL, VISUAL, STR = "General video QA MCQ", "temporal QA", "visual QA", "temporal-spatial free-form QA"


def record(task, answer, number=0, **fields):
    media = {"image_path": f"{number}.png"} if task == VISUAL else {"video_path": f"{number}.mp4"}
    return {"task": task, "source": "x", "question": "Who is it?", "answer": answer} | media | fields


def test_values_worked_by_hand():
    records = [
        record(TEMPORAL, "[2, 6]"),
        record(MCQ, "B"),
        record(VISUAL, "<obj>Cat</obj><box>[0,0,30,10]</box>", image_size=[60, 20]),
        record(
            STR, "a cat and a dog", key_frames=[{"idx": 0, "time": 5.0, "path": "k"}],
            key_items={"0": {"cat": [[0.5, 0.0, 1.0, 0.5]], "dog": [[0, 0, 1, 1], [0, 0, 0.5, 0.5]]}},
        ),
    ]  # fmt: skip
    found = stats.compute("rl", records, [8.0, None, None, 20.0])
    assert found.num_without_clip == 1
    np.testing.assert_allclose(found.span_centre, [0.5])  # (0.25 + 0.75) / 2
    np.testing.assert_allclose(found.span_length, [0.5])
    np.testing.assert_allclose(found.key_time, [0.25])
    np.testing.assert_allclose(found.box_x, [0.25, 0.75, 0.5, 0.25])
    np.testing.assert_allclose(found.box_y, [0.25, 0.25, 0.5, 0.25])
    np.testing.assert_allclose(found.box_area, [0.25, 0.25, 1.0, 0.25])
    assert found.boxes.tolist() == [1, 3] and found.key_frames.tolist() == [1] and found.clip_s.tolist() == [8, 20]
    assert dict(found.names) == {"cat": 2, "dog": 1} and dict(found.letters) == {"B": 1}
    assert found.answer_words.tolist() == [2, 1, 1, 5]


def guess(records, spans=None, boxes=None, *, task, name):
    made = stats.make_guesses(records, spans or [None] * len(records), boxes or [[]] * len(records))
    return next(one for one in made if one.task == task and name in one.guess)


def test_a_set_with_one_right_letter_is_solved_without_looking():
    options = "Which?\nA. red\nB. blue\nC. white"
    records = [record(MCQ, "B", number, question=options) for number in range(40)]
    found = guess(records, task=MCQ, name="always B")
    assert found.score == 1.0 and 10 < found.num_records < 30


def test_an_option_that_is_usually_right_is_found_under_any_letter():
    orders = (("red", "blue"), ("blue", "red"))
    records = []
    for number in range(40):
        options = orders[number // 2 % 2]
        question = f"Which?\nA. {options[0]}\nB. {options[1]}"
        records.append(record(MCQ, "AB"[options.index("blue")], number, question=question))
    assert guess(records, task=MCQ, name="the option").score == 1.0
    assert guess(records, task=MCQ, name="always").score < 0.8


def test_the_best_constant_span_and_box_are_found():
    records = [record(TEMPORAL, "x", number) for number in range(40)] + [record(VISUAL, "x", n) for n in range(40)]
    spans = [(0.5, 0.75)] * 40 + [None] * 40
    boxes = [[]] * 40 + [[(0.0, 0.5, 0.5, 1.0)]] * 40
    assert guess(records, spans, boxes, task=TEMPORAL, name="50% to 75%").score == pytest.approx(1.0)
    assert guess(records, spans, boxes, task=TEMPORAL, name="whole clip").score == pytest.approx(0.25)
    assert guess(records, spans, boxes, task=VISUAL, name="0%, 50%, 50%, 100%").score == pytest.approx(1.0)
    # The middle quarter shares 1/16 with it; together they cover 1/4 + 1/4 - 1/16 = 7/16.
    assert guess(records, spans, boxes, task=VISUAL, name="middle").score == pytest.approx(1 / 7)


def test_no_clip_is_in_both_halves():
    records = [record(MCQ, "A", number // 5) for number in range(50)]
    halves = [stats._is_learnt(one) for one in records]
    assert all(len(set(halves[i : i + 5])) == 1 for i in range(0, 50, 5)) and len(set(halves)) == 2


class Reader(html.parser.HTMLParser):
    """Collects what a page would fetch."""

    def __init__(self):
        super().__init__()
        self.fetched = []

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if name in ("src", "href", "xlink:href") and value and not value.startswith(("#", "data:")):
                self.fetched.append((tag, value))


def test_the_verb_writes_one_page(tmp_path, capsys):
    synthetic.write_dataset(tmp_path / "root", num_train=24, seed=2)
    page = tmp_path / "page.html"
    assert cli.main(["data", "stats", str(tmp_path / "root"), "--html", str(page), "--jobs", "2"]) == 0
    out, text = capsys.readouterr().out, page.read_text()
    assert "rl: 24 records" in out and "tIoU" in out and "right options:" in out
    reader = Reader()
    reader.feed(text)
    assert reader.fetched == [] and text.count("<svg") >= 12
    records = annotations.load_stage(tmp_path / "root", "rl")
    lengths = stats.clip_lengths(tmp_path / "root", {"rl": records}, jobs=1)["rl"]
    assert [length is None for length in lengths] == [r["task"] == VISUAL for r in records]
    assert {length for length in lengths if length} == {4.0}


def test_both_stages_advance_one_bar(tmp_path):
    synthetic.write_dataset(tmp_path, num_train=6, seed=2)
    counted = []
    found = stats.compute_root(tmp_path, jobs=2, advance=lambda done, total: counted.append((done, total)))
    assert [one.stage for one in found] == ["sft", "rl"] and all(one.num_without_clip == 0 for one in found)
    assert counted == [(i + 1, len(counted)) for i in range(len(counted))] and counted


def test_names_cannot_break_the_page(tmp_path):
    from openo3_jax.report import data_page

    nasty = record(STR, "x", key_frames=[], key_items={"0": {"<script>alert(1)</script>": [[0, 0, 1, 1]]}})
    page = data_page.render([stats.compute("rl", [nasty], [None])], "<b>")
    assert "<script>alert" not in page and "&lt;script&gt;" in page

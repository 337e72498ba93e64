"""The runner: nothing repeated, nothing lost, whatever is killed, unreadable or too large."""

import dataclasses
import json
import re

import fake_answerer
import jax
import pytest
from PIL import Image

import small
from openo3_jax import mesh
from openo3_jax.config import SamplingConfig
from openo3_jax.data import synthetic
from openo3_jax.errors import InputError
from openo3_jax.evals import items, predict, store


def make_calls(count=10):
    return items.calls_of(
        [items.Item(str(i), {"a": items.ask(f"{i} a"), "b": items.ask(f"{i} b")}, None, {}) for i in range(count // 2)]
    )


def run(out, answerer, calls, **options):
    store.open_run(out, {"benchmark": "fake"})
    with store.Predictions(out / store.PREDICTIONS) as predictions:
        predict.predict(answerer, calls, predictions, batch_size=3, **options)
        return predictions.known


def echo(**options):
    return fake_answerer.FakeAnswerer(fake_answerer.text_of, **options)


def test_every_call_has_its_answer(tmp_path):
    calls = make_calls()
    known = run(tmp_path / "out", echo(), calls)
    assert {key: one.text for key, one in known.items()} == {(str(i), n): f"{i} {n}" for i in range(5) for n in "ab"}
    lines = [json.loads(line) for line in (tmp_path / "out" / store.PREDICTIONS).read_text().splitlines()]
    assert len(lines) == 10
    first = lines[0]
    assert (first["item"], first["call"], first["texts"], first["commit"]) == (
        "0",
        "a",
        ["0 a"],
        store.project_commit(),
    )
    assert first["seed"] == items.seed_of(0, ("0", "a")) and len(first["prompt_hash"]) == 16


@pytest.mark.parametrize("died_after", [0, 3, 6, 9])
def test_a_killed_run_goes_on_where_it_was(tmp_path, died_after, capsys):
    calls, out = make_calls(), tmp_path / "out"
    first, second = echo(die_after=died_after), echo()
    with pytest.raises(KeyboardInterrupt):
        run(out, first, calls)
    capsys.readouterr()
    known = run(out, second, calls)
    assert len(known) == 10
    left = 10 - died_after
    assert f"eval: {left}/{left}, 0 failed" in capsys.readouterr().err  # rate and time left are those of what is left
    assert sorted(first.asked + second.asked) == sorted(fake_answerer.text_of(call.conversation) for call in calls)
    whole = echo()
    run(tmp_path / "whole", whole, calls)
    assert first.seeds + second.seeds == whole.seeds
    # a third run has nothing to ask
    third = echo()
    run(out, third, calls)
    assert third.asked == []


@pytest.mark.parametrize("cut", [1, 5, 60])
def test_a_line_that_was_cut_off_is_asked_again(tmp_path, cut):
    out = tmp_path / "out"
    run(out, echo(), make_calls())
    file = out / store.PREDICTIONS
    raw = file.read_bytes()
    file.write_bytes(raw[:-cut])
    again = echo()
    assert len(run(out, again, make_calls())) == 10
    assert again.asked == ["4 b"]
    assert file.read_bytes() == raw


def test_reading_changes_no_file(tmp_path):
    """A last line without its newline may be one that somebody wrote by hand."""
    file = tmp_path / "scores.jsonl"
    file.write_text('{"item": "a"}\n{"item": "b"}')
    assert store.read_lines(file) == [{"item": "a"}, {"item": "b"}]
    assert file.read_text().endswith("}")


def test_a_call_that_cannot_be_asked_is_recorded_and_passed(tmp_path):
    answerer = echo(unreadable=["1 a", "4 b"], too_large=["2 b"])
    known = run(tmp_path / "out", answerer, make_calls())
    assert len(known) == 10
    assert known["1", "a"].error == "1 a: no such video file" and known["1", "a"].text == ""
    assert "out of memory" in known["2", "b"].error
    assert known["2", "a"].text == "2 a"  # in the batch that did not fit
    assert {key for key, one in known.items() if one.error} == {("1", "a"), ("4", "b"), ("2", "b")}
    again = echo()
    run(tmp_path / "out", again, make_calls())
    assert again.asked == []  # a recorded failure is an outcome


def test_batches_stay_full_where_calls_cannot_be_asked(tmp_path):
    answerer = echo(unreadable=["0 a", "1 a"])
    run(tmp_path / "out", answerer, make_calls())
    assert answerer.batches == [3, 3, 2]


def test_another_prompt_or_other_settings_do_not_mix(tmp_path):
    out = tmp_path / "out"
    run(out, echo(), make_calls())
    other = items.calls_of([items.Item("0", {"a": items.ask("another")}, None, {})])
    with pytest.raises(InputError, match="was asked with prompt"):
        run(out, echo(), other)
    changed = echo()
    changed.settings = {"fake": 2}
    with pytest.raises(InputError, match="was asked with prompt"):
        run(out, changed, make_calls())
    with pytest.raises(InputError, match="begun with benchmark='fake', now it is 'other'"):
        store.open_run(out, {"benchmark": "other"})


def test_a_directory_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("x")
    with pytest.raises(InputError, match="holds something else"):
        store.open_run(tmp_path, {})


OTHERS = {"{": "is not JSON", "[1]": "is no prediction", '{"item": "1"}': "is no prediction"}


@pytest.mark.parametrize("line", OTHERS)
def test_lines_of_others_are_named(tmp_path, line):
    file = tmp_path / store.PREDICTIONS
    file.write_text(line + "\n")
    with pytest.raises(InputError, match=OTHERS[line]), store.Predictions(file):
        pass


def test_ids_must_differ():
    item = items.Item("1", {}, None, {})
    with pytest.raises(InputError, match="'1' comes twice"):
        items.calls_of([item, item])


def test_hashes_tell_pictures_and_file_names_apart(tmp_path):
    def of(color, name):
        picture = Image.new("RGB", (2, 2), color)
        return items.hash_of(items.ask("q", video=tmp_path / name, images=[picture]))

    assert of("red", "a.mp4") == of("red", "a.mp4")
    assert len({of("red", "a.mp4"), of("blue", "a.mp4"), of("red", "b.mp4")}) == 3
    assert items.hash_of(items.ask("q", video=tmp_path / "a.mp4")) == items.hash_of(
        items.ask("q", video=tmp_path / "elsewhere" / "a.mp4")
    )


# ---- with a model ----


def test_a_policy_answers_as_it_does_without_the_runner(tmp_path):
    """Over two devices, whose rows a batch of three, and one of one, do not fill."""
    policy = small.make_policy(tmp_path, mesh.make_mesh({"fsdp": 2}, devices=jax.devices()[:2]))
    config = SamplingConfig(num_samples=2, max_new_tokens=4, temperature=1.0)
    calls = items.calls_of([items.Item(str(i), {"": items.ask(f"What is {i}?")}, None, {}) for i in range(4)])
    with predict.PolicyAnswerer(policy, config, rows=3) as answerer:
        store.open_run(tmp_path / "out", {})
        with store.Predictions(tmp_path / "out" / store.PREDICTIONS) as predictions:
            predict.predict(answerer, calls, predictions, batch_size=3)
    for pair in ([calls[0], calls[3]], [calls[2], calls[1]]):  # other neighbours than in the run
        found = [predictions.known[call.key] for call in pair]
        expected = policy.generate(
            [call.conversation for call in pair],
            num_samples=2,
            max_new_tokens=4,
            seed=[one.seed for one in found],
        )
        for one, texts, logps in zip(found, expected.texts, expected.logp, strict=True):
            assert one.texts == tuple(texts)
            assert one.logp == pytest.approx([logp.sum() for logp in logps], abs=1e-4)


def test_other_weights_are_another_run(tmp_path, one_device):
    """They may have the same name, and none at all in Python."""
    policy = small.make_policy(tmp_path, one_device)
    other = dataclasses.replace(policy, params=jax.tree.map(lambda x: x + 1, policy.params))
    config = SamplingConfig()
    settings = [predict.PolicyAnswerer(one, config, rows=1).settings for one in (policy, policy, other)]
    assert settings[0] == settings[1]
    store.open_run(tmp_path / "out", settings[0])
    with pytest.raises(InputError, match="begun with weights="):
        store.open_run(tmp_path / "out", settings[2])


def test_a_policy_sees_the_part_of_a_clip(tmp_path, one_device):
    """8 frames at 10 a second: four of them, or those of its second half, counted from there."""
    synthetic.render_clip(tmp_path / "v.mp4", seed=0, num_frames=8)
    whole = items.ask("q", video=tmp_path / "v.mp4")
    part = [{**whole[0], "content": [{**whole[0]["content"][0], "part_s": [0.4, 0.8]}, *whole[0]["content"][1:]]}]
    policy = small.make_policy(tmp_path, one_device)
    with predict.PolicyAnswerer(policy, SamplingConfig(), rows=1) as answerer:
        texts = [policy.processor.decode(answerer.prompt(asked).sample.tokens) for asked in (whole, part, whole)]
    found = [re.findall(r"Frame \d at ([\d.]+)s", text) for text in texts]
    assert found == [["0.0", "0.2", "0.5", "0.7"], ["0.0", "0.1", "0.3", "0.4"], ["0.0", "0.2", "0.5", "0.7"]]

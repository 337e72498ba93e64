"""Wordings: slots filled without touching what is filled in, files checked entry by entry."""

import json

import pytest

from openo3_jax.errors import InputError
from openo3_jax.evals import wording


def test_every_wording_asks_for_what_its_parser_reads():
    own = wording.load_wording().templates
    assert own.keys() == wording.SLOTS.keys()
    for name in ("vstar_when_1", "vstar_when_2", "grounding"):
        assert "From <t>start</t>s to <t>end</t>s" in own[name].system
    for name, template in own.items():
        if name != "relevance":
            assert "<answer>" in template.system + template.text, name


def test_slots_of_values_stay_as_they_are():
    asked = wording.Template("", "{question} of {options}").ask(question="{options}?", options="{question}")
    assert asked[0]["content"][0]["text"] == "{options}? of {question}"


def test_a_file_replaces_only_what_it_has(tmp_path):
    file = tmp_path / "own.json"
    file.write_text(json.dumps({"open": {"system": "S", "text": "Tell: {question}"}}))
    words = wording.load_wording(file)
    assert words["open"].ask(question="Why?") == [
        {"role": "system", "content": "S"},
        {"role": "user", "content": [{"type": "text", "text": "Tell: Why?"}]},
    ]
    assert words["choice"] == wording.load_wording()["choice"]


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ([], "holds a list"),
        ({"opne": {}}, "unknown wording 'opne'"),
        ({"open": {"text": "{question}"}}, "open: expected the texts system and text"),
        ({"open": {"system": None, "text": "{question}"}}, "open: expected the texts"),
        ({"open": {"system": "", "text": "Why?"}}, "open: has the slots []"),
        ({"open": {"system": "", "text": "{question} {count}"}}, "['count', 'question']"),
    ],
)
def test_mistakes_are_named(tmp_path, content, part):
    file = tmp_path / "own.json"
    file.write_text(json.dumps(content))
    with pytest.raises(InputError) as raised:
        wording.load_wording(file)
    assert part in str(raised.value)

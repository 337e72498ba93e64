"""The rewards' page: every mock holds, a wrong value shows, model text is escaped, figures repeat bit by bit."""

import pathlib

import pytest

from openo3_jax.errors import InputError
from openo3_jax.report import rewards_page
from openo3_jax.rewards import mocks, redteam

DOCS = pathlib.Path(__file__).parents[2] / "docs" / "figures"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    return folder, *rewards_page.experiment_rewards(str(folder))


def test_every_mock_holds(page):
    folder, text, held = page
    assert held, text
    assert "42 of 42 mock predictions" in text
    html = (folder / "index.html").read_text()
    assert "42 of 42 hold" in html
    assert "&lt;obj&gt;cat" in html and "<obj>" not in html
    assert all(exploit.name in html for exploit in redteam.exploits())


def test_figures_repeat_and_are_those_of_the_documentation(page, tmp_path):
    folder, *_ = page
    again = rewards_page.write_figures(tmp_path)
    assert sorted(again) == sorted(path.name for path in folder.glob("*.svg"))
    assert sorted(again) == sorted(path.name for path in DOCS.glob("reward_*.svg"))
    for name, text in again.items():
        assert (folder / name).read_text() == text


def test_a_mock_that_does_not_hold_is_named(tmp_path, monkeypatch):
    wrong = mocks.mocks()[0]._replace(paper={"format": 0.5})
    monkeypatch.setattr(mocks, "mocks", lambda: [wrong])
    text, held = rewards_page.experiment_rewards(str(tmp_path))
    assert not held
    assert "1 of 2 mock predictions" in text
    assert "perfect evidence under paper: ans_acc 1.0000, expected 0.0000; " in text


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        rewards_page.experiment_rewards(str(tmp_path / "file"))

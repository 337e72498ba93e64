"""One step ahead, never two, and nothing left behind."""

import threading

import pytest

from openo3_jax.errors import InputError
from openo3_jax.train import ahead


class Maker:
    """Makes `10 * step` and says when; step 7 cannot be made."""

    def __init__(self):
        self.made = []
        self.events = [threading.Event() for _ in range(9)]

    def __call__(self, step):
        self.made.append(step)
        self.events[step].set()
        if step == 7:
            raise InputError("record 7: is broken")
        return 10 * step


def test_the_next_one_is_made_unasked_and_no_other():
    maker = Maker()
    with ahead.Ahead(maker, steps=3) as made:
        assert made(0) == 0
        assert maker.events[1].wait(10)  # the step runs; nobody asked
        assert not maker.events[2].wait(0.2)
        assert made(1) == 10 and made(2) == 20
        assert not maker.events[3].wait(0.2)
    assert maker.made == [0, 1, 2]  # each once, none after the last step


def test_a_step_that_was_not_next_is_made_too():
    maker = Maker()
    with ahead.Ahead(maker, steps=9) as made:
        assert [made(step) for step in (2, 2, 5)] == [20, 20, 50]
    assert maker.made[:2] == [2, 3] and maker.made.count(2) == 2


def test_an_error_belongs_to_its_step():
    maker = Maker()
    with ahead.Ahead(maker, steps=9) as made:
        assert made(6) == 60
        assert maker.events[7].wait(10)
        with pytest.raises(InputError, match="record 7"):
            made(7)
        assert made(8) == 80


def test_leaving_ends_the_thread():
    before = threading.active_count()
    with pytest.raises(ZeroDivisionError), ahead.Ahead(Maker(), steps=9) as made:
        made(1 // 0)
    with ahead.Ahead(Maker(), steps=9) as made:
        made(0)
        assert threading.active_count() == before + 1
    assert threading.active_count() == before

"""Other meshes, other remat policies, larger batches: which fit, and which is fastest; and how much a device holds."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import NamedTuple

from openo3_jax.config import GSPOConfig, ModelConfig
from openo3_jax.errors import InputError
from openo3_jax.mesh import MAX_FSDP
from openo3_jax.plan.compiler import Answer, Request
from openo3_jax.plan.estimate import Estimate

Judge = Callable[[Request], tuple[Answer, Estimate]]

TENSORS = (1, 2, 4)
REMATS = ("layers", "attention", "dots")
BATCHES = (2, 4, 8)  # times the recipe's
MOST = 2**20


class Tried(NamedTuple):
    name: str
    request: Request
    answer: Answer
    estimate: Estimate

    @property
    def per_sample_s(self) -> float:
        return self.estimate.expected_s / self.request.config.batch_size


def search(request: Request, judge: Judge, say: Callable[[str], None]) -> list[Tried]:
    """First the meshes, then with the best the remat policies, then larger batches; the best first, then what is too
    large. Meshes that the model or the rows cannot be divided by are left out.
    """
    tried: list[Tried] = []
    refusals: list[str] = []

    def attempt(wish: Request) -> Tried | None:
        try:
            answer, estimate = judge(wish)
        except InputError as error:
            refusals.append(str(error))
            return None
        axes = ", ".join(f"{name} {size}" for name, size in answer.axes.items() if size > 1) or "one device"
        name = f"{axes}; remat {wish.config.remat}; batch {wish.config.batch_size}"
        say(name)
        tried.append(Tried(name, wish._replace(axes=answer.axes), answer, estimate))
        return tried[-1]

    for axes in meshes(request.devices.number, request.model):
        attempt(request._replace(axes=axes))
    if not tried:
        raise InputError(f"plan: no mesh of {request.devices} can be compiled; the last refusal: {refusals[-1]}")
    best = ranked(tried)[0].request
    for remat in REMATS:
        if remat != best.config.remat:
            attempt(best._replace(config=dataclasses.replace(best.config, remat=remat)))
    best = ranked(tried)[0].request
    for times in BATCHES:
        config = dataclasses.replace(best.config, batch_size=times * request.config.batch_size)
        found = attempt(best._replace(config=config))
        if found is None or not found.estimate.fits:
            break
    return ranked(tried)


def ranked(tried: list[Tried]) -> list[Tried]:
    return sorted(tried, key=lambda one: (not one.estimate.fits, one.per_sample_s, one.estimate.peak_bytes))


def meshes(number: int, model: ModelConfig) -> Iterator[dict[str, int]]:
    """Sizes of the axes for so many devices: `tensor` as the key heads allow, `fsdp` as wide as it may be or half."""
    for tensor in TENSORS:
        if number % tensor or model.text.num_key_value_heads % tensor:
            continue
        rest = number // tensor
        widest = max(ways for ways in range(1, min(rest, MAX_FSDP) + 1) if rest % ways == 0)
        for fsdp in {widest, widest // 2}:
            if fsdp and rest % fsdp == 0:
                yield {"data": rest // fsdp, "fsdp": fsdp, "tensor": tensor}


def limits(best: Tried, judge: Judge, say: Callable[[str], None]) -> dict[str, int]:
    """The most frames, the longest prompt in tokens of text, and in stage two the largest group, each alone.

    `best` must fit as it is.
    """
    request = best.request
    sizes = request.sizes

    def room(wish: Request) -> int | None:
        try:
            return room_of(*judge(wish))
        except InputError:
            return None

    def with_frames(number: int) -> Request:
        return request._replace(sizes=dataclasses.replace(sizes, frames=number))

    def with_text(number: int) -> Request:
        return request._replace(sizes=dataclasses.replace(sizes, text_tokens=number))

    def with_group(number: int) -> Request:
        sampling = dataclasses.replace(request.config.sampling, num_samples=number)
        return request._replace(config=dataclasses.replace(request.config, sampling=sampling))

    frames = sizes.num_frames(request.config.video)
    wishes = {"frames": (with_frames, frames, 8), "tokens of text": (with_text, sizes.text_tokens, 1024)}
    if isinstance(request.config, GSPOConfig):
        wishes["samples of a prompt"] = (with_group, request.config.sampling.num_samples, 2)
    left = room_of(best.answer, best.estimate)
    found = {}
    for name, (make, known, step) in wishes.items():
        say(f"the most {name}")
        found[name] = largest(lambda number, make=make: room(make(number)), known, left, step)
    return found


def room_of(answer: Answer, estimate: Estimate) -> int | None:
    """Bytes of a device that are left, below zero where they do not suffice; None where a compiler only says no."""
    if any(program.refused for program in answer.programs):
        return None
    return estimate.available_bytes - estimate.peak_bytes


def largest(ask: Callable[[int], int | None], known: int, room: int | None, step: int) -> int:
    """The largest number, to `step`, that fits, where `known` and everything below one that fits does.

    `ask`: the room that a number leaves. It shrinks nearly in proportion, so each question is where a line through the
    last two answers meets zero; in the middle of what is open where that has not halved it, or there is no line.

    Example: room of 100 - number, known 16, step 8 -> 96, after three questions: 32, 96, 104.
    """
    good, bad = known, MOST
    points = [(known, room)]
    guess = known + step * max(1, known // step)
    while bad - good > step:
        width = bad - good
        points.append((guess, ask(guess)))
        good, bad = (guess, bad) if _fits(points[-1]) else (good, guess)
        meets = _zero(*points[-2:])
        if bad == MOST:
            aim = min(meets or 2 * good, 8 * good)
        else:
            aim = meets if meets and 2 * (bad - good) <= width else (good + bad) // 2
        most = (bad - 1 - good) // step  # whole steps that stay below what does not fit
        guess = good + step * min(max(1, (aim - good) // step), max(1, most))
    return good


def _fits(point: tuple[int, int | None]) -> bool:
    return point[1] is not None and point[1] >= 0


def _zero(one: tuple[int, int | None], other: tuple[int, int | None]) -> int | None:
    """Where the line through two points meets zero; None where it does not fall."""
    if one[1] is None or other[1] is None or (other[1] - one[1]) * (other[0] - one[0]) >= 0:
        return None
    return int(other[0] - other[1] * (other[0] - one[0]) / (other[1] - one[1]))

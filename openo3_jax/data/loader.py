"""Steps -> planned batches with their samples, read ahead by threads. A batch is a pure function of seed and step."""

import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from typing import Any, NamedTuple

import grain
import numpy as np
from jaxtyping import Float

from openo3_jax.config import VisionConfig
from openo3_jax.data import packing, plan
from openo3_jax.data.samples import Example, Samples
from openo3_jax.errors import InputError
from openo3_jax.types import RowShare

_KEPT_PLANS = 3  # windows: the last one, this one, the next one


class Rules(NamedTuple):
    """How batches are made of records; see `plan.plan_window`."""

    seed: int
    steps: int
    batch_size: int
    rows_multiple: int
    max_row_tokens: int


class BatchPlan(NamedTuple):
    """Indices of records, row by row, and the static shape of all rows together, which may have more rows."""

    rows: list[list[int]]
    shape: packing.Bucket

    def share(self, share: RowShare) -> list[list[int]]:
        """The rows of one process; some may be empty."""
        rows = [*self.rows, *[[]] * (self.shape.rows - len(self.rows))]
        return [rows[row] for row in share.rows(self.shape.rows)]


DIFFERENT_PLANS = "media that only some could look at, or other data? --resume goes on when all of them find the same"


class Ready(NamedTuple):
    """One step: its plan and this process's samples by index of the record, None for one that cannot be read."""

    plan: BatchPlan
    samples: dict[int, Example | None]


class _Element(NamedTuple):
    """A place of a batch. `index`: of the record, None for an empty place and for a row of another process."""

    step: int
    index: int | None = None
    example: Example | None = None
    error: InputError | None = None


class Plans:
    """Step -> what its batch is made of, a window of batches at a time; the next window is planned meanwhile."""

    def __init__(
        self,
        samples: Samples,
        rules: Rules,
        weights: Float[np.ndarray, " records"],
        vision: VisionConfig,
    ):
        self._samples = samples
        self._rules = rules
        self._weights = weights
        self._vision = vision
        self.epochs = plan.Epochs(round(weights.sum()), rules.batch_size)
        self._windows: dict[tuple[int, int], futures.Future[list[BatchPlan]]] = {}
        self._lock = threading.Lock()
        self._thread = futures.ThreadPoolExecutor(1, thread_name_prefix="plan")

    def batch(self, step: int) -> BatchPlan:
        """The plan of a step, from 0."""
        place = self.epochs.place(step)
        number, within = divmod(place.batch, plan.WINDOW_BATCHES)
        following = (number + 1) * plan.WINDOW_BATCHES
        with self._lock:
            window = self._submit(place.epoch, number)
            if self.epochs.step(plan.Place(place.epoch, following)) < self._rules.steps:
                is_last = following >= self.epochs.num_batches
                self._submit(place.epoch + is_last, 0 if is_last else number + 1)
            for key in sorted(self._windows)[:-_KEPT_PLANS]:
                del self._windows[key]
        return window.result()[within]

    @functools.cached_property
    def classes(self) -> list[plan.Class]:
        """Classes of like length: those of the first window of the first epoch, for the whole run."""
        lengths = [size.tokens for size in self._samples.sizes(self._indices(0, 0))]
        return plan.choose_classes(lengths, **self._row_rules, rng=np.random.default_rng(self._rules.seed))

    @property
    def _row_rules(self) -> dict[str, int]:
        rules = self._rules
        return {name: getattr(rules, name) for name in ("batch_size", "rows_multiple", "max_row_tokens")}

    @functools.cached_property
    def shapes(self) -> list[packing.Bucket]:
        """The static shapes, chosen from the first window for the whole run."""
        planned = self._compose(0, 0)
        return plan.choose_shapes(planned, [self._need(batch, fine=True) for batch in planned])

    def _submit(self, epoch: int, number: int) -> futures.Future[list[BatchPlan]]:
        key = epoch, number
        if key not in self._windows:
            self._windows[key] = self._thread.submit(self._plan, epoch, number)
        return self._windows[key]

    def _plan(self, epoch: int, number: int) -> list[BatchPlan]:
        return [BatchPlan(batch.rows, self._shape(batch)) for batch in self._compose(epoch, number)]

    def _shape(self, batch: plan.Planned) -> packing.Bucket:
        """One of `shapes`; for a batch that none of them holds one of its own, in coarse steps."""
        shape = plan.choose_shape(self._need(batch, fine=True), self.shapes)
        return shape if shape in self.shapes else self._need(batch, fine=False)

    def _need(self, batch: plan.Planned, *, fine: bool) -> packing.Bucket:
        return packing.bucket_for([self._samples.sizes(row) for row in batch.rows], self._vision, fine=fine)

    def _compose(self, epoch: int, number: int) -> list[plan.Planned]:
        indices = self._indices(epoch, number)
        lengths = [size.tokens for size in self._samples.sizes(indices)]
        rng = np.random.default_rng([self._rules.seed, epoch, number])
        return plan.plan_window(indices, lengths, self.classes, **self._row_rules, rng=rng)

    def _indices(self, epoch: int, number: int) -> list[int]:
        size = plan.WINDOW_BATCHES * self._rules.batch_size
        whole = self.epochs.num_draws - self.epochs.num_left_out
        order = plan.epoch_order(self._weights, self._rules.seed, epoch)[:whole]
        return order[number * size : (number + 1) * size].tolist()


class Loader:
    """Step -> `finish(Ready)`, made ahead of time for the steps that follow.

    Samples are read by a thread for each decoder, in the order in which they are wanted, and finished by another one.
    `choose`: the records of a batch that this process reads.
    """

    def __init__(
        self,
        samples: Samples,
        plans: Plans,
        rules: Rules,
        finish: Callable[[Ready], Any],
        choose: Callable[[BatchPlan], list[int]],
    ):
        self._samples = samples
        self._plans = plans
        self._rules = rules
        self._finish = finish
        self._choose = choose
        self._iterator: Iterator[Any] | None = None
        self._made: tuple[int, Any] | None = None  # the last step and what it gave

    def __call__(self, step: int) -> Any:
        if self._made is not None and self._made[0] == step:
            return self._made[1]
        if self._iterator is None or self._made is None or step != self._made[0] + 1:
            self._iterator = self._iterate(step)
        made = next(self._iterator)
        if isinstance(made, InputError):
            self._iterator = None
            raise made
        self._made = step, made
        return made

    def _iterate(self, start: int) -> Iterator[Any]:
        """An element is a place of a batch, of which every batch has `batch_size`; so grain's index is a step."""
        per_batch = self._rules.batch_size
        places = grain.MapDataset.range(start * per_batch, max(self._rules.steps, start + 1) * per_batch)
        num_threads = self._samples.num_workers
        ahead = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=max(num_threads, per_batch))
        samples = places.map(self._read).to_iter_dataset(ahead)
        batches = samples.batch(per_batch, batch_fn=self._gather)
        return iter(grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=1))

    def _read(self, place: int) -> _Element:
        step, number = divmod(place, self._rules.batch_size)
        try:
            mine = self._choose(self._plans.batch(step))
            if number >= len(mine):
                return _Element(step)
            return _Element(step, mine[number], self._samples.read(mine[number]))
        except InputError as error:
            return _Element(step, error=error)

    def _gather(self, elements: Sequence[_Element]) -> Any:
        """What `finish` makes of the elements of a batch; or an error, as a value: grain would add lines to it."""
        errors = [element.error for element in elements if element.error is not None]
        if errors:
            return errors[0]
        samples = {element.index: element.example for element in elements if element.index is not None}
        try:
            return self._finish(Ready(self._plans.batch(elements[0].step), samples))
        except InputError as error:
            return error


class IteratorState(NamedTuple):
    """Where a run stands in its data; `data` is the hash of the records and of what decides on their order."""

    seed: int
    epoch: int
    batch: int
    data: str


def state_at(step: int, plans: Plans, seed: int, data: str) -> IteratorState:
    """The state that continues with `step`."""
    return IteratorState(seed, *plans.epochs.place(step), data)


def step_of(state: IteratorState, plans: Plans, seed: int, data: str) -> int:
    """The step that a state continues with. Raises: InputError for the state of other data or another seed."""
    if state.data != data or state.seed != seed:
        raise InputError(
            f"data: the run was stopped with data {state.data} and seed {state.seed}, this is {data} and {seed}; "
            "resume with the same records, frames, prompts, batch_size, weights and seed"
        )
    return plans.epochs.step(plan.Place(state.epoch, state.batch))

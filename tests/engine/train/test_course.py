"""A stage's length is counted in epochs: however a run is continued, it sees each image of each epoch once and ends."""

from __future__ import annotations

import itertools
import random
from collections import Counter, defaultdict
from dataclasses import dataclass

import pytest

from engine.data.buckets import BucketSampler
from engine.data.coco import ResumableSampler
from engine.train.optim import LrSchedule
from engine.train.state import Course, Position

IMAGES, EPOCHS = 53, 3
SHAPES = [(40 + 7 * (k % 5), 40 + 11 * (k % 3)) for k in range(IMAGES)]
SIZES = ((32, 32), (48, 32), (32, 48))


@dataclass(frozen=True)
class Way:
    """One way to run: a stretch of `steps` of it (None: to the end)."""

    batch_size: int
    world_size: int
    accum_iter: int
    steps: int | None = None

    @property
    def images_per_step(self) -> int:
        return self.batch_size * self.world_size * self.accum_iter


def new_sampler(way: Way, rank: int, has_buckets: bool) -> ResumableSampler:
    if has_buckets:
        return BucketSampler(SHAPES, SIZES, rank, way.world_size, 1, way.batch_size)
    return ResumableSampler(IMAGES, rank, way.world_size, 1, way.batch_size)


def run(ways: list[Way], has_buckets: bool = False) -> tuple[Position, dict[int, list[int]], list[tuple[float, float]]]:
    """What the loop does, without a model: where it ends, the images of each epoch as seen, (epochs done, rate)."""
    position, seen, rates, state = Position(), defaultdict(list), [], {}
    schedule = LrSchedule(1.0, 0.0, 0.5, EPOCHS, "cosine")
    for way in ways:
        course = Course(IMAGES, way.images_per_step, EPOCHS)
        samplers = [new_sampler(way, rank, has_buckets) for rank in range(way.world_size)]
        for sampler in samplers:
            sampler.restore(state, position.epoch, position.images)
        position = course.entered(position)
        budget = itertools.count() if way.steps is None else range(way.steps)
        epoch, readers = None, []
        for _ in budget:
            if course.is_finished(position):
                break
            if position.epoch != epoch:
                epoch = position.epoch
                for sampler in samplers:
                    sampler.set_epoch(epoch, position.images)
                readers = [iter(sampler) for sampler in samplers]
            for reader in readers:
                items = list(itertools.islice(reader, way.batch_size * way.accum_iter))
                assert len(items) == way.batch_size * way.accum_iter
                assert not has_buckets or len({each.size for each in items[: way.batch_size]}) == 1
                seen[epoch] += [each.item for each in items] if has_buckets else items
            rates.append((course.epochs_after(position), schedule.at(course.epochs_after(position))))
            position = course.after_step(position)
        state = samplers[0].state()
    return position, seen, rates


def random_ways(seed: int) -> list[Way]:
    rng = random.Random(seed)
    stretches = [
        Way(rng.choice((1, 2, 3, 5)), rng.choice((1, 2, 3)), rng.choice((1, 2)), rng.randint(0, 25)) for _ in range(4)
    ]
    return [*stretches, Way(rng.choice((1, 2, 4)), rng.choice((1, 2)), rng.choice((1, 2)))]


@pytest.mark.parametrize("has_buckets", [False, True])
@pytest.mark.parametrize("seed", range(60))
def test_however_it_is_continued_each_image_of_each_epoch_is_seen_once(seed: int, has_buckets: bool) -> None:
    ways = random_ways(seed)
    end, seen, rates = run(ways, has_buckets)
    assert (end.epoch, end.images) == (EPOCHS, 0)
    largest = max(way.images_per_step for way in ways)
    for epoch in range(EPOCHS):
        counts = Counter(seen[epoch])
        assert set(counts.values()) == {1}
        assert IMAGES - len(counts) < largest  # what does not fill a step is left out
    steps_back = [earlier - later for (earlier, _), (later, _) in itertools.pairwise(rates)]
    assert max(steps_back) < largest / IMAGES  # an epoch without its last images is counted as a whole one
    assert rates[-1] == (EPOCHS, 0.0)  # the schedule ends where the epochs do


@pytest.mark.parametrize("has_buckets", [False, True])
def test_stopped_and_continued_as_it_was_it_is_the_run_that_never_stopped(has_buckets: bool) -> None:
    whole = run([Way(3, 2, 2)], has_buckets)
    for first in range(1, 12):
        assert run([Way(3, 2, 2, first), Way(3, 2, 2)], has_buckets) == whole


def test_max_steps_counts_steps_of_all_sizes() -> None:
    course = Course(IMAGES, 10, EPOCHS, max_steps=7)
    assert course.steps_left(Position(0, 4, 40)) == 3
    assert course.steps_left(Position(2, 3, 20)) == 3  # the epochs end first
    assert course.is_finished(Position(1, 9, 0))
    assert course.is_finished(Position(3, 2, 0))

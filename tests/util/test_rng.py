"""Keyed randomness: stable across machines, different for every key."""

import pytest
import torch

from util.rng import derive_seed, generator


def test_seeds_are_the_same_everywhere() -> None:
    assert derive_seed(0, "noise", 3) == 2407288163025327868
    assert generator(1).initial_seed() == derive_seed(1) == 410007335047683770


def test_every_part_its_place_and_its_type_matter() -> None:
    keys: list[tuple[int | str, ...]] = [(1, 2), (2, 1), (12,), ("12",), ("1", "2"), (1, "2"), (-1,)]
    keys += [("a", "bc"), ("ab", "c"), ("abc",)]
    seeds = {derive_seed(*key) for key in keys}
    assert len(seeds) == len(keys)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_whole_numbers_of_any_library_count_as_ints() -> None:
    assert derive_seed(int(torch.tensor(7))) == derive_seed(7)


@pytest.mark.parametrize("part", [0.5, None, b"x"])
def test_other_parts_are_refused(part: object) -> None:
    with pytest.raises(TypeError):
        derive_seed("noise", part)  # type: ignore[arg-type]
    with pytest.raises(ValueError):
        derive_seed()


def test_draws_repeat_and_leave_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    first, again, other = (torch.randn(4, generator=generator(0, "x", step)) for step in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)

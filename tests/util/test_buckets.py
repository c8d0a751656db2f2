"""Sizes of pictures: which there are, and which one suits an image."""

from __future__ import annotations

import pytest

from util.buckets import bucket_cell, bucket_sizes, nearest_size, ratio_distance, read_size, size_name


@pytest.mark.parametrize(("side", "count"), [(256, 25), (384, 37), (512, 49)])
def test_the_sizes_are_lumina_mgpts(side: int, count: int) -> None:
    sizes = bucket_sizes(side)
    assert len(sizes) == len(set(sizes)) == count
    most = (side // 32) ** 2
    for height, width in sizes:
        assert height % 32 == width % 32 == 0
        assert max(height, width) <= 4 * min(height, width)
        assert height * width // 1024 <= most < (height // 32 + 1) * (width // 32 + 1)
    assert {(width, height) for height, width in sizes} == set(sizes)
    assert (side, side) in sizes


def test_small_squares_have_smaller_cells() -> None:
    assert [bucket_cell(*each) for each in ((256, 16), (512, 16), (64, 8), (64, 4), (128, 8), (96, 48))] == [
        32, 32, 8, 8, 16, 48
    ]  # fmt: skip
    assert {(64, 64), (128, 32), (32, 128)} <= set(bucket_sizes(64, bucket_cell(64, 8)))
    with pytest.raises(ValueError, match="cells of 32 px do not fit into a square of 16 px"):
        bucket_sizes(16)


def test_the_nearest_size_is_the_one_by_the_ratio_of_ratios() -> None:
    sizes = [(64, 64), (96, 64), (64, 96)]
    assert [nearest_size(*shape, sizes) for shape in ((480, 640), (640, 480), (500, 510), (10, 90))] == [
        (64, 96), (96, 64), (64, 64), (64, 96)
    ]  # fmt: skip
    every = bucket_sizes(256)
    for height, width in ((333, 500), (426, 640), (640, 427), (1, 9)):
        ratios = {size: (height / size[0]) / (width / size[1]) for size in every}
        kept = max(min(ratio, 1 / ratio) for ratio in ratios.values())
        chosen = ratios[nearest_size(height, width, every)]
        assert min(chosen, 1 / chosen) == pytest.approx(kept)
    assert nearest_size(5, 5, [(32, 32), (64, 64)]) == (64, 64)  # as near: the larger one
    assert ratio_distance((2, 4), (3, 6)) == 0


def test_sizes_as_texts() -> None:
    assert read_size("96x64") == (96, 64)
    assert size_name((96, 64)) == "96x64"
    for text in ("96", "96x", "x64", "96x64x3", "-96x64", "96 x 64"):
        with pytest.raises(ValueError, match="HEIGHTxWIDTH"):
            read_size(text)
